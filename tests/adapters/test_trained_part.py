"""What a round trains is what travels, and joins what was sent without changing anything else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from transformers import AutoModelForCausalLM

from adapters import lora
from adapters.adapter import Adapter, AdapterSpec
from adapters.lowrank import LowRank
from adapters.trained_part import (
    TrainedPart,
    frame,
    frozen_suffix,
    joined,
    orthonormal_rows,
    part_of_round,
    to_travel,
)

SPEC = AdapterSpec(3, 6.0, ("q", "v"))
PARTS = get_args(TrainedPart)
SEED = 11


def random_adapter(seed: int) -> Adapter:
    g = torch.Generator().manual_seed(seed)
    shapes = {"l0.q": (8, 7), "l0.v": (5, 9)}
    return Adapter(
        SPEC,
        {
            n: LowRank(torch.randn(m, 3, generator=g), torch.randn(3, w, generator=g))
            for n, (m, w) in shapes.items()
        },
    )


def trained(sent: Adapter, part: TrainedPart) -> Adapter:
    """``sent`` after a round in which only ``part`` moved."""
    other, layers = random_adapter(2), {}
    for name, layer in sent.layers.items():
        B, A = other.layers[name].B, other.layers[name].A
        if part == "core":
            B = frame(name, layer.shape[0], 3, SEED) @ B[:3]
        layers[name] = LowRank(
            layer.B if part == "A" else B, layer.A if part in ("B", "core") else A
        )
    return Adapter(sent.spec, layers)


@pytest.mark.parametrize("part", PARTS)
def test_what_travels_joins_to_what_was_trained(part: TrainedPart) -> None:
    sent = random_adapter(1)
    there = trained(sent, part)
    back = joined(sent, to_travel(there, part, SEED), part, SEED)
    for name, layer in there.layers.items():
        assert back.layers[name].A.equal(layer.A)
        assert torch.allclose(back.layers[name].B, layer.B, atol=1e-6)
        assert part == "core" or back.layers[name].B.equal(layer.B)


def test_a_core_is_all_that_travels_of_a_core_adapter() -> None:
    travelled = to_travel(random_adapter(1), "core", SEED)
    assert {n: tuple(t.shape) for n, t in travelled.items()} == {
        "l0.q.lora_core.weight": (3, 3),
        "l0.v.lora_core.weight": (3, 3),
    }


def test_under_another_seed_a_core_means_another_adapter() -> None:
    sent = random_adapter(1)
    there = trained(sent, "core")
    back = joined(sent, to_travel(there, "core", SEED), "core", SEED + 1)
    assert not torch.allclose(back.layers["l0.q"].B, there.layers["l0.q"].B, atol=0.1)


@pytest.mark.parametrize("part", PARTS)
def test_what_does_not_fit_is_not_joined(part: TrainedPart) -> None:
    sent = random_adapter(1)
    travelled = to_travel(sent, part, SEED)
    name = next(iter(travelled))
    for wrong in (
        {n: t for n, t in travelled.items() if n != name},
        {**travelled, "more": torch.ones(1)},
        {**travelled, name: travelled[name][:-1]},
    ):
        with pytest.raises(ValueError, match="factors"):
            joined(sent, wrong, part, SEED)


def test_alternating_rounds_begin_with_B() -> None:
    assert [part_of_round("alternate", n) for n in (1, 2, 3, 4)] == ["B", "A", "B", "A"]
    assert all(part_of_round(p, n) == p for p in PARTS for n in (1, 2))
    assert [frozen_suffix(p) for p in ("B", "A", "both")] == [
        "lora_A.weight",
        "lora_B.weight",
        None,
    ]


def test_public_factors_are_orthonormal_and_follow_their_key() -> None:
    rows = orthonormal_rows(4, 30, "key")
    assert torch.allclose(rows @ rows.T, torch.eye(4), atol=1e-6)
    assert rows.equal(orthonormal_rows(4, 30, "key"))
    assert not torch.allclose(rows, orthonormal_rows(4, 30, "other"), atol=0.1)
    P = frame("layer", 30, 4, 1)
    assert torch.allclose(P.T @ P, torch.eye(4), atol=1e-6)


# --- on a live model ---------------------------------------------------------------------------


def live_model(folder: Path) -> tuple[torch.nn.Module, AdapterSpec, Adapter]:
    model = AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
    spec = AdapterSpec(3, 6.0, ("q_proj", "down_proj"))
    start = lora.initial(model, spec, SEED)
    g = torch.Generator().manual_seed(1)
    layers = {
        n: replace(layer, B=frame(n, layer.shape[0], 3, SEED) @ torch.randn(3, 3, generator=g))
        for n, layer in start.layers.items()
    }
    return model, spec, Adapter(spec, layers)


def test_choosing_another_part_changes_what_is_trained_and_not_the_adapter(
    tiny_model: Path,
) -> None:
    model, spec, adapter = live_model(tiny_model)
    live = lora.attach(model, spec)
    lora.write(live, adapter)
    ids = torch.tensor([[5, 9, 40, 41, 7, 3]])
    before = live(input_ids=ids).logits
    ends = {"B": ["lora_B.default.weight"], "A": ["lora_A.default.weight"],
            "both": ["lora_A.default.weight", "lora_B.default.weight"],
            "core": ["lora_B.default.core.weight"]}  # fmt: skip
    for part in ("core", "B", "A", "core", "both", "core", "core", "A"):
        lora.train_only(live, part, SEED)
        names = [n for n, p in live.named_parameters() if p.requires_grad]
        assert {n.split("proj.")[1] for n in names} == set(ends[part])
        assert len(names) == len(adapter.layers) * len(ends[part])
        assert torch.allclose(live(input_ids=ids).logits, before, atol=1e-4)
        for name, layer in lora.read(live, spec).layers.items():
            assert torch.allclose(layer.B, adapter.layers[name].B, atol=1e-5)
            assert layer.A.equal(adapter.layers[name].A)


def test_a_core_takes_of_a_received_B_what_lies_in_its_frame(tiny_model: Path) -> None:
    model, spec, adapter = live_model(tiny_model)
    live = lora.attach(model, spec, "core", SEED)
    g = torch.Generator().manual_seed(4)
    other = Adapter(
        spec,
        {
            n: replace(layer, B=torch.randn(layer.B.shape, generator=g))
            for n, layer in adapter.layers.items()
        },
    )
    lora.write(live, other)
    for name, layer in lora.read(live, spec).layers.items():
        P = frame(name, layer.shape[0], 3, SEED)
        assert torch.allclose(layer.B, P @ P.T @ other.layers[name].B, atol=1e-5)


@pytest.mark.parametrize("train", ["B", "A", "alternate", "both", "core"])
def test_every_start_is_zero_as_a_product_and_can_learn(tiny_model: Path, train: str) -> None:
    model, spec, _ = live_model(tiny_model)
    start = lora.initial(model, spec, SEED, train)
    zero, other = ("A", "B") if train == "A" else ("B", "A")
    for layer in start.layers.values():
        assert not getattr(layer, zero).any()
        factor = getattr(layer, other)
        rows = factor if other == "A" else factor.T
        assert torch.allclose(rows @ rows.T, torch.eye(3), atol=1e-6)
    live = lora.attach(model, spec, part_of_round(train, 1), SEED)
    lora.write(live, start)
    live(input_ids=torch.tensor([[5, 9, 40]])).logits.square().mean().backward()
    moved = [p.grad.abs().max() > 0 for p in live.parameters() if p.grad is not None]
    assert any(moved)
    assert all(moved) or train == "both"  # A cannot move while B is zero
