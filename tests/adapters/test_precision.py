"""Base weights of lower precision: the adapter beside them stays float32 and is not lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from adapters import lora
from adapters.adapter import Adapter, AdapterSpec
from adapters.base_model import BaseModel, load_base
from adapters.lowrank import LowRank
from conf.schema import ModelSettings

SPEC = AdapterSpec(2, 4.0, ("q_proj", "down_proj"))
IDS = torch.tensor([[5, 9, 40, 41, 7, 3]])


def load(folder: Path, precision: str) -> BaseModel:
    return load_base(ModelSettings(source="path", path=str(folder), precision=precision))


@torch.no_grad()
def logits(base: BaseModel) -> torch.Tensor:
    return base.model(input_ids=IDS).logits.float()


def small_adapter(base: BaseModel, size: float) -> Adapter:
    start = lora.initial(base.model, SPEC, 1)
    g = torch.Generator().manual_seed(2)
    layers = {
        n: LowRank(torch.randn(u.B.shape, generator=g) * size, u.A) for n, u in start.layers.items()
    }
    return Adapter(SPEC, layers)


@pytest.mark.parametrize("precision", ["bfloat16", "nf4"])
def test_the_base_is_small_and_the_adapter_float32(wide_model: Path, precision: str) -> None:
    full, base = load(wide_model, "float32"), load(wide_model, precision)
    weight = base.model.get_submodule("model.layers.0.mlp.down_proj").weight
    assert weight.dtype is {"bfloat16": torch.bfloat16, "nf4": torch.uint8}[precision]
    assert torch.allclose(logits(base), logits(full), atol=0.3)
    assert not logits(base).equal(logits(full))
    assert len({full.fingerprint, base.fingerprint}) == 2
    assert base.fingerprint == load(wide_model, precision).fingerprint
    live = lora.attach(base.model, SPEC)
    assert {p.dtype for p in live.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "nf4"])
def test_an_adapter_too_small_for_the_base_weights_still_counts(
    wide_model: Path, precision: str
) -> None:
    """A hundredth of a bfloat16 step: added to the weights it would vanish."""
    base = load(wide_model, precision)
    before = logits(base)
    adapter = small_adapter(base, 3e-4 if precision == "float32" else 3e-3)
    with lora.applied(base.model, adapter):
        moved = logits(base)
    assert logits(base).equal(before)
    assert base.fingerprint == load(wide_model, precision).fingerprint
    assert float((moved - before).abs().max()) > 1e-5


def test_a_head_tied_to_the_embedding_moves_alone(tiny_model: Path) -> None:
    """As under PEFT, which keeps the LoRA beside the head; the embedding is nobody's target."""
    base = load(tiny_model, "float32")
    embedding, head = base.model.get_input_embeddings(), base.model.get_output_embeddings()
    assert head.weight is embedding.weight
    spec = AdapterSpec(2, 4.0, ("q_proj", "lm_head"))
    start = lora.initial(base.model, spec, 1)
    g = torch.Generator().manual_seed(2)
    layers = {n: LowRank(torch.randn(u.B.shape, generator=g), u.A) for n, u in start.layers.items()}
    assert "lm_head" in layers
    adapter = Adapter(spec, layers)
    before = logits(base)
    with lora.applied(base.model, adapter):
        folded = logits(base)
    assert head.weight is embedding.weight
    assert logits(base).equal(before)
    live = lora.attach(base.model, spec)
    lora.write(live, adapter)
    beside = logits(base)
    lora.detach(live)
    assert torch.allclose(folded, beside, atol=1e-5)
    assert not torch.allclose(folded, before, atol=1e-2)


def test_alignment_on_rounded_weights_is_refused(wide_model: Path) -> None:
    from conf.load import ConfigError, load
    from conf.schema import RunSettings

    options = ["model=path", f"model.path={wide_model}", "model.precision=nf4"]
    with pytest.raises(ConfigError, match="alignment=none"):
        load("simulate", options, RunSettings)
    assert load("simulate", [*options, "alignment=none"], RunSettings).model.precision == "nf4"
