"""The only way out: named factors of the right shape, and facts from a fixed list."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapters.adapter import Adapter
from adapters.lowrank import LowRank
from adapters.plan import TrainingPlan
from client.privacy.gate import outgoing_facts, outgoing_tensors
from client.refusal import Reason, Refusal
from conf.policy import SitePolicy

MakePlan = Callable[..., TrainingPlan]
MakePolicy = Callable[..., SitePolicy]
Start = tuple[Adapter, str]

PUBLIC: dict[str, Any] = {
    "site": "east", "noise_multiplier": 1.2, "steps": 4, "unit": "patient",
    "epsilon_spent": 3.4, "delta": 1e-5,
}  # fmt: skip
COUNTS: dict[str, Any] = {"patients": 41, "notes": 99}
KINDS = {name: type(value) for name, value in (PUBLIC | COUNTS).items()}
OWN = SitePolicy.model_validate(
    {
        "site": "east", "lineage": "invented", "ledger": "ledger.sqlite",
        "notes": {"source": "jsonl", "path": "notes.jsonl"}, "model": {"source": "smollm2"},
        "privacy": {"epsilon": 8.0, "delta": 1e-5},
    }
)  # fmt: skip


def moved(adapter: Adapter, A: float = 0.0, B: float = 1.0) -> Adapter:
    layers = {n: LowRank(layer.B + B, layer.A + A) for n, layer in adapter.layers.items()}
    return replace(adapter, layers=layers)


def refused(adapter: Adapter, received: Adapter, plan: TrainingPlan) -> str:
    with pytest.raises(Refusal) as refusal:
        outgoing_tensors(adapter, received, plan)
    assert refusal.value.reason is Reason.OUTBOUND_REFUSED
    return refusal.value.detail


@pytest.fixture
def received(starting_point: Start) -> Adapter:
    return starting_point[0]


def test_only_B_leaves_where_A_is_frozen(plan: MakePlan, received: Adapter) -> None:
    out = outgoing_tensors(moved(received), received, plan())
    assert set(out) == {n for n in received.tensors() if n.endswith("lora_B.weight")}
    assert all(t.equal(torch.ones_like(t)) for t in out.values())


def test_both_leave_where_both_are_trained(plan: MakePlan, received: Adapter) -> None:
    both = plan(adapter={"train": "both"}, upload="both")
    out = outgoing_tensors(moved(received, A=1.0), received, both)
    assert set(out) == set(received.tensors())


def test_what_leaves_is_float32(plan: MakePlan, received: Adapter) -> None:
    wide = {n: layer.to(torch.float64) for n, layer in moved(received).layers.items()}
    frozen = {n: replace(wide[n], A=received.layers[n].A) for n in wide}
    out = outgoing_tensors(replace(received, layers=frozen), received, plan())
    assert {t.dtype for t in out.values()} == {torch.float32}


def test_a_frozen_factor_that_moved_by_one_bit_stops_everything(
    plan: MakePlan, received: Adapter
) -> None:
    name, layer = next(iter(received.layers.items()))
    A = layer.A.clone()
    A[0, 0] = torch.nextafter(A[0, 0], torch.tensor(9.0))
    sly = replace(received, layers={**received.layers, name: replace(layer, A=A)})
    assert "moved" in refused(sly, received, plan())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_does_not_leave(plan: MakePlan, received: Adapter, value: float) -> None:
    name, layer = list(received.layers.items())[-1]
    B = layer.B.clone()
    B[-1, -1] = value
    bad = replace(received, layers={**received.layers, name: replace(layer, B=B)})
    assert "not finite" in refused(bad, received, plan())


def test_factors_nobody_asked_for_do_not_leave(plan: MakePlan, received: Adapter) -> None:
    name, layer = next(iter(received.layers.items()))
    extra = replace(received, layers={**received.layers, "lm_head": layer})
    assert "unexpected" in refused(extra, received, plan())
    taller = LowRank(torch.zeros(layer.shape[0] + 1, 2), layer.A)
    assert "unexpected" in refused(
        replace(received, layers={**received.layers, name: taller}), received, plan()
    )


def test_public_facts_leave_and_counts_do_not(policy: MakePolicy) -> None:
    assert outgoing_facts(PUBLIC | COUNTS, policy()) == PUBLIC
    assert outgoing_facts(PUBLIC | COUNTS, policy(share_counts="public")) == PUBLIC | COUNTS


@pytest.mark.parametrize(
    "fact",
    [
        {"loss": 1.5},
        {"patient_ids": "p1"},
        {"site": b"east"},
        {"steps": 4.0},
        {"steps": True},
        {"epsilon_spent": "3.4"},
        {"patients": "41"},
        {"unit": ["patient", "a note"]},
    ],
)
def test_an_unknown_fact_or_type_stops_everything(policy: MakePolicy, fact: dict[str, Any]) -> None:
    for own in (policy(), policy(share_counts="public")):
        with pytest.raises(Refusal) as refusal:
            outgoing_facts(PUBLIC | fact, own)
        assert refusal.value.reason is Reason.OUTBOUND_REFUSED


@given(
    facts=st.dictionaries(
        st.sampled_from(sorted(PUBLIC | COUNTS)) | st.text(max_size=9),
        st.integers() | st.floats() | st.text(),
    )
)
def test_what_leaves_is_on_the_list_and_of_its_type_whatever_is_handed_over(
    facts: dict[str, Any],
) -> None:
    sound = all(type(value) is KINDS.get(name) for name, value in facts.items())
    try:
        out = outgoing_facts(facts, OWN)
    except Refusal:
        assert not sound
    else:
        assert sound
        assert out == {name: value for name, value in facts.items() if name in PUBLIC}
