"""What a round keeps frozen must be what was received, and does not leave."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from adapters.adapter import Adapter
from adapters.lowrank import LowRank
from adapters.plan import TrainingPlan
from client.privacy.gate import Gate
from client.privacy.released import Charge, Fact, Mechanism, Released
from client.refusal import Reason, Refusal
from conf.policy import SitePolicy

MakePlan = Callable[..., TrainingPlan]
MakePolicy = Callable[..., SitePolicy]
Start = tuple[Adapter, str]
MakeGate = Callable[..., Gate]

GRADIENT = Mechanism("gradient", 7)
HONEST: dict[str, Released[Fact]] = {}


def moved(adapter: Adapter, A: float = 0.0, B: float = 1.0) -> Adapter:
    layers = {n: LowRank(layer.B + B, layer.A + A) for n, layer in adapter.layers.items()}
    return replace(adapter, layers=layers)


def refused(gate: Gate, trained: Adapter) -> str:
    with pytest.raises(Refusal) as refusal:
        gate.release(Released(trained, GRADIENT), HONEST)
    assert refusal.value.reason is Reason.OUTBOUND_REFUSED
    return refusal.value.detail


@pytest.fixture
def received(starting_point: Start) -> Adapter:
    return starting_point[0]


@pytest.fixture
def gate(plan: MakePlan, policy: MakePolicy, received: Adapter) -> MakeGate:
    """The gate of a private round; keywords change the plan."""

    def make(**others: Any) -> Gate:
        return Gate(plan(**others), policy(), received, Charge(7, 1.2, frozenset({"gradient"})))

    return make


@pytest.mark.parametrize("part", ["B", "A", "both"])
def test_of_a_half_that_is_frozen_nothing_leaves_and_nothing_may_have_moved(
    part: str, gate: MakeGate, received: Adapter
) -> None:
    half = gate(adapter={"train": part, "freeze_half": True}, upload=part)
    trained = half.plan.trained_layers(received.layers)
    frozen = sorted(received.layers.keys() - trained)
    assert len(frozen) == len(trained) == 2
    B, A = float(part != "A"), float(part != "B")
    there = moved(received, A, B)
    honest = received.updated(there.only(trained))
    out = half.release(Released(honest, GRADIENT), HONEST).tensors
    assert {name.rpartition(".lora_")[0] for name in out} == trained
    assert half.plan.joined(received, out).fingerprint() == honest.fingerprint()
    for layer in frozen:
        for factor in ("A", "B"):  # one number of one factor is enough
            was = received.layers[layer]
            changed = replace(was, **{factor: getattr(was, factor).clone()})
            getattr(changed, factor)[0, 0] += 1e-6
            assert not getattr(changed, factor).equal(getattr(was, factor))
            detail = refused(half, replace(honest, layers={**honest.layers, layer: changed}))
            assert detail == f"frozen factor {layer}.lora_{factor}.weight moved"


def test_only_A_leaves_where_B_is_frozen(gate: MakeGate, received: Adapter) -> None:
    only_A = gate(adapter={"train": "A"}, upload="A")
    layers = {n: replace(layer, A=layer.A + 1) for n, layer in received.layers.items()}
    out = only_A.release(Released(replace(received, layers=layers), GRADIENT), HONEST).tensors
    assert set(out) == {n for n in received.tensors() if n.endswith("lora_A.weight")}
    assert "moved" in refused(only_A, moved(received))


def test_only_the_core_leaves_where_its_frame_is_public(gate: MakeGate, received: Adapter) -> None:
    core = gate(adapter={"train": "core"}, upload="core")
    out = core.release(Released(moved(received), GRADIENT), HONEST).tensors
    assert {tuple(t.shape) for t in out.values()} == {(2, 2)}
    assert len(out) == len(received.layers)
    assert "moved" in refused(core, moved(received, A=1.0))


def test_a_frozen_factor_that_moved_by_one_bit_stops_everything(
    gate: MakeGate, received: Adapter
) -> None:
    name, layer = next(iter(received.layers.items()))
    A = layer.A.clone()
    A[0, 0] = torch.nextafter(A[0, 0], torch.tensor(9.0))
    sly = replace(received, layers={**received.layers, name: replace(layer, A=A)})
    assert "moved" in refused(gate(), sly)
