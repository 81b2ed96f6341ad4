"""Per-note gradients of every kind of model that is supported, against a loop of single notes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from adapters import lora
from adapters.adapter import AdapterSpec
from adapters.likelihood import note_losses, pad_right
from client.privacy import chunked_loss
from client.privacy.chunked_loss import memory_saving_losses
from client.privacy.engine import clipped_sum
from client.privacy.per_note import GradientError, per_note_gradients, trained_parameters

ROWS = [[4, 8, 15, 16, 23, 42, 5, 6, 9], [9, 2, 2, 41], [30, 31], [7]]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(("rows", "tokens"), [(16, 16), (5, 52), (3, 200), (24, 33)])
def test_every_chunk_of_logits_has_one_shape(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, rows: int, tokens: int
) -> None:
    """A smaller last chunk would go through another kernel: a note's bits would tell its place."""
    heights = []
    real = torch.nn.functional.linear

    def watched(h: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        if h.ndim == 2:
            heights.append(len(h))
        return real(h, *rest)

    losses = memory_saving_losses(adapted(llama(tiny_model)))
    monkeypatch.setattr(chunked_loss.F, "linear", watched)
    ids = torch.randint(5, 200, (rows, tokens), generator=torch.Generator().manual_seed(1))
    found = losses(ids, torch.full((rows,), tokens))
    assert len(set(heights)) == 1
    assert len(found) == rows
    found.sum().backward()
    alone = losses(ids[-1:], torch.tensor([tokens]))
    assert torch.allclose(found[-1:], alone, atol=1e-5)


def llama(folder: Path, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.eval().requires_grad_(False)


def adapted(model: PreTrainedModel, **options: object) -> PeftModel:
    """A LoRA away from its starting point, factors in float32; ``train_a`` frees factor A."""
    train_a = bool(options.pop("train_a", True))
    config = LoraConfig(**({"r": 3, "lora_alpha": 6, "target_modules": LINEAR} | options))
    peft_model = get_peft_model(model, config).eval()
    assert isinstance(peft_model, PeftModel)
    draw = torch.Generator().manual_seed(3)
    for name, p in peft_model.named_parameters():
        if "lora_" in name:
            p.data = torch.randn(p.shape, generator=draw) * 0.05
            p.requires_grad_(train_a or "lora_B" in name)
    return peft_model


def loop(model: PeftModel, rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """The definition: one note at a time, no padding."""
    found: dict[str, list[torch.Tensor]] = {name: [] for name in trained_parameters(model)}
    for row in rows:
        model.zero_grad(set_to_none=True)
        note_losses(model, *pad_right([row])).sum().backward()
        for name, p in trained_parameters(model).items():
            assert p.grad is not None
            found[name].append(p.grad.clone())
    model.zero_grad(set_to_none=True)
    return {name: torch.stack(g) for name, g in found.items()}


def worst(model: PeftModel, expected: dict[str, torch.Tensor]) -> float:
    """Largest difference of a fast gradient from ``expected``, relative to the largest of all."""
    with per_note_gradients(model) as gradients:
        found = gradients(*pad_right(ROWS))
    assert found.keys() == expected.keys()
    assert all(g.dtype == torch.float32 for g in found.values())
    scale = max(float(g.abs().max()) for g in expected.values())
    assert scale > 1e-3
    return max(float((found[n] - expected[n]).abs().max()) for n in found) / scale


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"train_a": False},
        {"use_rslora": True},
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": [*LINEAR, "lm_head"]},
        {"r": 1, "lora_alpha": 1},
    ],
)
def test_fast_gradients_equal_the_loop(tiny_model: Path, options: dict[str, object]) -> None:
    model = adapted(llama(tiny_model), **options)
    assert worst(model, loop(model, ROWS)) < 2e-6


def test_a_bfloat16_base_under_float32_factors(tiny_model: Path) -> None:
    model = adapted(llama(tiny_model, torch.bfloat16))
    assert worst(model, loop(model, ROWS)) < 0.02  # eight bits of mantissa
    single = adapted(llama(tiny_model))
    assert worst(single, loop(model, ROWS)) > 1e-4  # and the base did compute in bfloat16


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_activations_give_the_same_gradients(tiny_model: Path, reentrant: bool) -> None:
    expected = loop(adapted(llama(tiny_model)), ROWS)
    base = llama(tiny_model)
    base.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        base.enable_input_require_grads()
    model = adapted(base)
    passes = []
    layer = base.model.layers[0].self_attn
    layer.register_forward_hook(lambda *_: passes.append(1))
    assert worst(model, expected) < 2e-6
    # Two for the probe of the loss, one forward, one again on the way back.
    assert len(passes) == 4
    assert not any(m.training for m in model.modules())


def test_recomputed_layers_drop_nothing_out() -> None:
    """OPT's layers drop out by a rate of their own whenever they are in training mode."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=32,
        max_position_embeddings=64, word_embed_proj_dim=16, dropout=0.5,
    )  # fmt: skip
    base = OPTForCausalLM(config).eval().requires_grad_(False)
    base.gradient_checkpointing_enable({"use_reentrant": False})
    model = adapted(base, target_modules=["q_proj", "v_proj"])
    assert worst(model, loop(model, ROWS)) < 2e-6
    assert [layer.dropout for layer in base.model.decoder.layers] == [0.5, 0.5]


def test_gpt2_layers(tiny_model: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=60, n_positions=64, n_embd=16, n_layer=2, n_head=2)
    base = GPT2LMHeadModel(config).eval().requires_grad_(False)
    model = adapted(base, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    assert worst(model, loop(model, ROWS)) < 2e-6


@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"target_modules": ["embed_tokens"]}, {"bias": "all"}]
)
def test_what_has_no_per_note_gradient_is_refused(
    tiny_model: Path, options: dict[str, object]
) -> None:
    base = llama(tiny_model)
    model = adapted(base, **options)
    if "bias" in options:
        base.model.norm.weight.requires_grad_(True)
    with (
        pytest.raises(GradientError),
        per_note_gradients(model) as gradients,
    ):
        gradients(*pad_right(ROWS))


def test_a_factor_that_was_skipped_is_an_error_not_a_zero(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lora.attach(llama(tiny_model), AdapterSpec(2, 4.0, ("q_proj", "v_proj")), "B")
    layer = next(m for n, m in model.named_modules() if n.endswith("q_proj"))
    monkeypatch.setattr(layer, "forward", lambda x: layer.base_layer(x))
    with pytest.raises(GradientError, match="no per-note gradient for"):
        clipped_sum(model, [[ROWS[0]]], 1.0)


# --- the loss without its logits ----------------------------------------------------------------

Wrap = Callable[[PeftModel], None]


def test_the_chunked_loss_is_the_plain_one_and_used(tiny_model: Path) -> None:
    model = adapted(llama(tiny_model))
    batch = pad_right(ROWS)
    losses = memory_saving_losses(model)
    assert losses.__name__ == "chunked"
    torch.testing.assert_close(losses(*batch), note_losses(model, *batch), rtol=1e-6, atol=1e-6)
    assert float(losses(*batch)[3]) == 0.0  # a single token is nobody's successor


@pytest.mark.parametrize("chunk", [1, 3, 10_000])
def test_the_cut_over_the_vocabulary_changes_nothing(
    tiny_model: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(llama(tiny_model))
    expected = loop(model, ROWS)
    monkeypatch.setattr(chunked_loss, "_CHUNK", chunk)
    assert worst(model, expected) < 2e-6


def test_a_model_that_scales_its_logits_keeps_its_own_loss(tiny_model: Path) -> None:
    model = adapted(llama(tiny_model))
    base = model.get_base_model()

    def scaled(_: object, inputs: object, output: dict[str, torch.Tensor]) -> None:
        output["logits"] = output["logits"] * 0.5

    base.register_forward_hook(scaled)
    assert memory_saving_losses(model).__name__ == "plain"
    assert worst(model, loop(model, ROWS)) < 2e-6


def test_logits_never_exist_for_more_than_a_chunk(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(llama(tiny_model))
    losses = memory_saving_losses(model)
    monkeypatch.setattr(chunked_loss, "_CHUNK", 4)
    largest = 0
    vocabulary = model.get_base_model().config.vocab_size
    real = torch.nn.functional.linear

    def watched(x: torch.Tensor, weight: torch.Tensor, *others: object) -> torch.Tensor:
        nonlocal largest
        if weight.shape[0] == vocabulary:
            largest = max(largest, x.shape[:-1].numel())
        return real(x, weight, *others)

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    losses(*pad_right([list(range(2, 40)), [3, 4, 5]]))
    assert largest == 4
