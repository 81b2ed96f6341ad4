"""The private gradient: against a loop of single notes, and the promises it makes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from adapters import lora
from adapters.adapter import AdapterSpec
from adapters.base_model import load_base
from adapters.likelihood import note_losses, pad_right, token_losses
from client.privacy import per_note
from client.privacy.engine import (
    clip_factor,
    clipped_sum,
    noised_mean,
    rehearse,
    unit_gradients,
)
from client.privacy.per_note import Engine, per_note_gradients, trained_parameters
from client.privacy.randomness import SecureRandomness
from conf.schema import ModelSettings

UNITS = [
    [[4, 8, 15, 16, 23, 42, 5, 6], [9, 2, 2, 41]],
    [[7, 7, 3]],
    [[11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22]],
    [[30, 31], [32, 33, 34], [35, 36, 37, 38, 39]],
]


def prepare(settings_: ModelSettings, spec: AdapterSpec, train: str) -> PeftModel:
    """A model whose LoRA is not at its starting point, so that every factor has a gradient."""
    model = lora.attach(load_base(settings_).model, spec, train)
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=g) * 0.05)
    return model


@pytest.fixture(scope="module", params=["B", "A", "both", "core"])
def model(request: pytest.FixtureRequest, tiny_model: Path) -> PeftModel:
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    source = ModelSettings(source="path", path=str(tiny_model))
    return prepare(source, AdapterSpec(3, 6.0, targets), request.param)


def loop_gradients(model: PeftModel, units: list[list[list[int]]]) -> dict[str, torch.Tensor]:
    """One note at a time, no padding, no hooks: the definition."""
    out: dict[str, list[torch.Tensor]] = {name: [] for name in trained_parameters(model)}
    for unit in units:
        model.zero_grad(set_to_none=True)
        for row in unit:
            (note_losses(model, *pad_right([row])).sum() / len(unit)).backward()
        for name, p in trained_parameters(model).items():
            out[name].append(p.grad.clone())
    model.zero_grad(set_to_none=True)
    return {name: torch.stack(g) for name, g in out.items()}


def vectors(
    model: PeftModel, units: list[list[list[int]]], engine: Engine = "fast", micro: int = 0
) -> torch.Tensor:
    """Unit gradients by the engine, (units, parameters), in the order of the units."""
    found = dict(unit_gradients(model, units, engine, micro))
    return torch.stack([found[i] for i in range(len(units))])


def flat(gradients: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([g.double().flatten(1) for g in gradients.values()], 1)


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[n].double() - other[n].double()).abs().max()) for n in one)


def size(gradient: dict[str, torch.Tensor]) -> float:
    return float(sum(g.double().square().sum() for g in gradient.values())) ** 0.5


@pytest.mark.parametrize("engine", ["fast", "opacus"])
@pytest.mark.parametrize("micro", [0, 16, 48, 4096])
def test_unit_gradients_equal_a_loop_of_single_notes(
    model: PeftModel, engine: Engine, micro: int
) -> None:
    expected = flat(loop_gradients(model, UNITS))
    found = vectors(model, UNITS, engine, micro)
    assert float((found - expected).abs().max()) < 1e-6
    widths = [p.numel() for p in trained_parameters(model).values()]
    assert all(float(part.abs().max()) > 0 for part in found.split(widths, 1))


@settings(deadline=None, max_examples=15)
@given(st.permutations(UNITS))
def test_sum_does_not_depend_on_order(model: PeftModel, units: list[list[list[int]]]) -> None:
    assert difference(clipped_sum(model, units, 0.5), clipped_sum(model, UNITS, 0.5)) < 1e-6


@settings(deadline=None, max_examples=20)
@given(
    st.lists(
        st.lists(st.lists(st.integers(2, 250), min_size=2, max_size=9), min_size=1, max_size=3),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from([1e-3, 0.05, 1.0]),
)
def test_one_unit_moves_the_sum_by_at_most_C(
    model: PeftModel, units: list[list[list[int]]], clip: float
) -> None:
    with_it, without = clipped_sum(model, units, clip), clipped_sum(model, units[1:], clip)
    moved = size({n: with_it[n] - without[n] for n in with_it})
    assert moved <= clip * (1 + 1e-5)
    own = size({n: g[0] for n, g in loop_gradients(model, units[:1]).items()})
    assert moved == pytest.approx(min(own, clip), rel=1e-3)  # the bound is reached, not just kept


def test_small_gradients_are_not_clipped(model: PeftModel) -> None:
    assert clip_factor(0.5, 0.5) == clip_factor(0.0, 0.5) == 1.0
    assert clip_factor(2.0, 0.5) == 0.25
    expected = vectors(model, UNITS).sum(0)
    total = clipped_sum(model, UNITS, 10.0)
    found = torch.cat([t.flatten() for t in total.values()])
    assert float((found - expected).abs().max()) < 1e-9


@pytest.mark.parametrize("clip", [1e-3, 0.01])
def test_a_clipped_unit_is_never_longer_than_C(model: PeftModel, clip: float) -> None:
    for unit in UNITS:
        assert clip * (1 - 1e-6) < size(clipped_sum(model, [unit], clip)) <= clip


def test_an_empty_batch_is_a_noise_only_step(model: PeftModel) -> None:
    total = clipped_sum(model, [], 1.0)
    assert all(not t.any() for t in total.values())
    released = noised_mean(total, 2.0, 10, SecureRandomness().normal)
    assert all(t.any() for t in released.values())


@pytest.mark.parametrize("engine", ["fast", "opacus"])
def test_the_model_is_as_before_afterwards(model: PeftModel, engine: Engine) -> None:
    ids, lengths = pad_right([[3, 4, 5]])
    before = note_losses(model, ids, lengths)
    with per_note_gradients(model, engine) as gradients:
        gradients(ids, lengths)
    assert not hasattr(model, "autograd_grad_sample_hooks")
    assert not any(m.training for m in model.modules())
    assert not any("forward" in vars(m) for m in model.modules())
    assert torch.equal(note_losses(model, ids, lengths), before)
    note_losses(model, ids, lengths).sum().backward()
    for p in trained_parameters(model).values():
        assert getattr(p, "grad_sample", None) is None
        assert p.grad is not None
    model.zero_grad(set_to_none=True)


def test_the_fast_engine_never_forms_the_summed_gradient(model: PeftModel) -> None:
    clipped_sum(model, UNITS, 1.0)
    assert all(p.grad is None for p in model.parameters())


MICRO = [0, 20, 64, 4096]


@pytest.mark.parametrize("micro", MICRO)
def test_batch_mates_change_nothing_bit_for_bit(model: PeftModel, micro: int) -> None:
    """What a unit adds is a function of that unit alone: no rounding for an adapter to amplify."""
    alone = [clipped_sum(model, [unit], 0.05, micro_tokens=micro) for unit in UNITS]
    together = clipped_sum(model, UNITS, 0.05, micro_tokens=micro)
    backwards = clipped_sum(model, UNITS[::-1], 0.05, micro_tokens=micro)
    for name in together:
        expected = sum((one[name] for one in alone), torch.zeros_like(together[name]))
        assert torch.equal(together[name], expected)
        assert torch.equal(backwards[name], expected)


def test_on_many_threads_too(many_threads: None) -> None:
    """Threads share out a whole micro-batch: in one of several rows, bits depend on the row."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=576, intermediate_size=1536, num_hidden_layers=1,
        num_attention_heads=9, num_key_value_heads=3,
    )  # fmt: skip
    wide = LlamaForCausalLM(config).eval().requires_grad_(False)
    model = lora.attach(wide, AdapterSpec(2, 2.0, ("down_proj",)), "B")
    first, second = (torch.randint(2, 300, (105,)).tolist() for _ in range(2))
    alone = clipped_sum(model, [[first]], 0.05, micro_tokens=256)
    other = clipped_sum(model, [[second]], 0.05, micro_tokens=256)
    for units in ([[first], [second]], [[second], [first]]):
        together = clipped_sum(model, units, 0.05, micro_tokens=256)
        assert all(together[name].equal(alone[name] + other[name]) for name in together)


@pytest.fixture
def many_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(12)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("held", [1, 3000, 10**9])
def test_how_many_gradients_are_held_changes_no_bit(
    model: PeftModel, monkeypatch: pytest.MonkeyPatch, held: int
) -> None:
    expected = clipped_sum(model, UNITS, 0.05, micro_tokens=96)
    monkeypatch.setattr("client.privacy.engine._HELD", held)
    found = clipped_sum(model, UNITS, 0.05, micro_tokens=96)
    assert all(found[name].equal(expected[name]) for name in expected)


def test_no_more_gradients_exist_at_a_time_than_the_adapters_size_allows(
    model: PeftModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that grew with the sample would tell of it where it runs out."""
    size = sum(p.numel() for p in trained_parameters(model).values())
    monkeypatch.setattr("client.privacy.engine._HELD", 2 * size)
    rows = []
    real = per_note_gradients

    @contextmanager
    def watched(*arguments: Any) -> Iterator[Callable[..., Any]]:
        with real(*arguments) as gradients:
            yield lambda ids, lengths: rows.append(len(ids)) or gradients(ids, lengths)

    monkeypatch.setattr("client.privacy.engine.per_note_gradients", watched)
    clipped_sum(model, UNITS * 5, 0.05, micro_tokens=10_000)
    assert set(rows) == {2}


def test_a_rehearsal_takes_as_much_memory_as_a_step(
    model: PeftModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = []

    def seen(_: object, units: Any, *__: Any) -> None:
        shapes.extend(len(note) for unit in units for note in unit)

    monkeypatch.setattr("client.privacy.engine.clipped_sum", seen)
    rehearse(model, 200, "fast", 64)
    assert sorted(shapes) == [1, 200]  # the longest bucket, and that of the most rows


def test_shapes_that_follow_the_batch_would_not_be_independent(
    model: PeftModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sabotage: pad to the longest note at hand, and a note's bits depend on its mates."""
    draw = np.random.default_rng(5)
    units = [[draw.integers(2, 250, n).tolist()] for n in (3, 40, 90, 200)]

    def bits(units: list[list[list[int]]]) -> torch.Tensor:
        return vectors(model, units, micro=4096)[0]

    assert torch.equal(bits(units), bits(units[:1]))
    monkeypatch.setattr("client.privacy.microbatch.bucket", lambda length: 200)
    longer = bits(units)
    monkeypatch.setattr("client.privacy.microbatch.bucket", lambda length: length)
    assert not torch.equal(longer, bits(units[:1]))
    torch.testing.assert_close(longer, bits(units[:1]), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("precision", ["bfloat16", "nf4"])
@pytest.mark.parametrize("engine", ["fast", "opacus"])
def test_unit_gradients_of_a_rounded_base_equal_the_loop(
    wide_model: Path, precision: str, engine: Engine
) -> None:
    """Float32 gradients of a model that computes in bfloat16, so equal to its three digits."""
    source = ModelSettings(source="path", path=str(wide_model), precision=precision)
    rounded = prepare(source, AdapterSpec(3, 6.0, ("q_proj", "o_proj", "down_proj")), "both")
    expected = flat(loop_gradients(rounded, UNITS))
    for micro in (0, 48):
        found = vectors(rounded, UNITS, engine, micro)
        assert float((found - expected).norm() / expected.norm()) < 0.03
    total = clipped_sum(rounded, UNITS, 0.01, engine, 48)
    assert {t.dtype for t in total.values()} == {torch.float64}
    assert size(total) <= 0.01 * len(UNITS)


def test_a_unit_that_overflows_adds_zero_and_tells_nobody(tiny_model: Path) -> None:
    """A coordinator may send an adapter under which one phrase overflows and others do not."""
    source = ModelSettings(source="path", path=str(tiny_model))
    model = prepare(source, AdapterSpec(2, 4.0, ("q_proj",)), "B")
    fine = clipped_sum(model, UNITS[1:], 1.0)
    token = UNITS[0][0][0]  # only the first unit holds it

    def overflow(_: object, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        return output.masked_fill((inputs[0] == token)[..., None], float("inf"))

    model.get_input_embeddings().register_forward_hook(overflow)
    assert difference(clipped_sum(model, UNITS, 1.0), fine) == 0.0
    assert all(torch.isfinite(t).all() for t in fine.values())


def test_noise_has_the_standard_deviation_asked_for() -> None:
    total = {"w": torch.zeros(400, 500, dtype=torch.float64)}
    noise = noised_mean(total, 3.0, 2, SecureRandomness().normal)["w"] * 2
    assert float(noise.std()) == pytest.approx(3.0, rel=0.01)
    assert abs(float(noise.mean())) < 5 * 3.0 / 200_000**0.5
    again = noised_mean(total, 3.0, 2, SecureRandomness().normal)["w"] * 2
    assert not torch.equal(noise, again)
    assert abs(float((noise * again).mean())) < 5 * 9.0 / 200_000**0.5


def test_the_denominator_is_the_constant_given_not_the_batch() -> None:
    total = {"w": torch.full((2, 3), 12.0, dtype=torch.float64)}
    assert torch.equal(noised_mean(total, 0.0, 24, None)["w"], torch.full((2, 3), 0.5).double())


def test_noise_without_a_source_and_a_source_without_noise_are_refused() -> None:
    total = {"w": torch.zeros(2, dtype=torch.float64)}
    with pytest.raises(ValueError, match="go together"):
        noised_mean(total, 1.0, 1, None)
    with pytest.raises(ValueError, match="go together"):
        noised_mean(total, 0.0, 1, lambda n: np.zeros(n))


NOTES = [
    ["The patient was seen in clinic today for follow-up of hypertension and type 2 diabetes."],
    [
        "Chest pain for two days, worse on exertion. Aspirin 81 mg daily was started.",
        "Discharged home in stable condition.",
    ],
    ["No acute distress. Lungs clear to auscultation on both sides. Review in four weeks."],
]


def test_embedded_model_equals_the_loop_and_moves_every_trained_tensor() -> None:
    base = load_base(ModelSettings(source="smollm2"))
    spec = AdapterSpec(8, 16.0, ("q_proj", "v_proj"))
    start = lora.initial(base.model, spec, seed=1)
    real_model = lora.attach(base.model, spec, "both")
    lora.write(real_model, start)
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():  # away from B = 0, where A has no gradient
        for name, p in real_model.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=g) * 0.005)
    units = [[base.tokenizer(note).input_ids for note in notes] for notes in NOTES]
    expected = flat(loop_gradients(real_model, units))
    for engine, micro in (("fast", 0), ("fast", 128), ("opacus", 0)):
        found = vectors(real_model, units, cast(Engine, engine), micro)
        assert float((found - expected).abs().max()) < 1e-5
    before = {n: p.detach().clone() for n, p in trained_parameters(real_model).items()}
    released = noised_mean(clipped_sum(real_model, units, 1.0), 0.0, 3, None)
    optimizer = torch.optim.SGD(trained_parameters(real_model).values(), lr=1.0)
    for name, p in trained_parameters(real_model).items():
        p.grad = released[name].float()
    optimizer.step()
    still = [n for n, p in trained_parameters(real_model).items() if torch.equal(p, before[n])]
    assert still == []


def test_batch_averaged_loss_would_break_the_promise(
    model: PeftModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sabotage: averaging over the tokens of the batch lets batch mates change a gradient."""

    def averaged(model: PeftModel, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        losses, mask = token_losses(model, ids, lengths)
        return losses.sum(1) / mask.sum() * len(ids)

    units = [[[9, 2, 2, 41]], [[7, 7, 3]], [[11, 12, 13, 14, 15]]]
    honest = vectors(model, units, "opacus", 64)[0]
    torch.testing.assert_close(vectors(model, units[:1], "opacus", 64)[0], honest)
    monkeypatch.setattr(per_note, "note_losses", averaged)
    accompanied = vectors(model, units, "opacus", 64)[0]
    alone = vectors(model, units[:1], "opacus", 64)[0]
    assert float((alone - accompanied).norm() / alone.norm()) > 0.05
