"""The only way out: named factors and facts, each from the origin that its name calls for."""

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
from client.privacy.gate import Gate, Outgoing
from client.privacy.released import Charge, Mechanism, Released, Source
from client.refusal import Reason, Refusal
from conf.policy import SitePolicy

MakePlan = Callable[..., TrainingPlan]
MakePolicy = Callable[..., SitePolicy]
Start = tuple[Adapter, str]
MakeGate = Callable[..., Gate]

CHARGE = Charge(7, 1.2, frozenset({"gradient", "patients", "notes", "loss", "score"}))
GRADIENT = Mechanism("gradient", 7)
NOISED_BY_POLICY = {"share": {"counts": "noised", "losses": "noised", "scores": "noised"}}
PUBLISHED = {"share": {"counts": "public", "losses": "public", "scores": "public"}}


def public(value: Any) -> Released[Any]:
    return Released(value, Source.POLICY_PUBLIC)


def noised(value: Any, name: str, seq: int = 7) -> Released[Any]:
    return Released(value, Mechanism(name, seq))


HONEST: dict[str, Released[Any]] = {
    "site": public("east"),
    "steps": Released(2, Source.PLAN),
    "unit": Released("patient", Source.PLAN),
    "noise_multiplier": Released(1.2, Source.LEDGER),
    "epsilon_spent": Released(3.4, Source.LEDGER),
    "delta": Released(1e-5, Source.LEDGER),
}
NUMBERS: dict[str, Released[Any]] = {
    "noised_patients": noised(41.0, "patients"),
    "noised_notes": noised(-3.0, "notes"),
    "noised_loss": noised(4.5, "loss"),
    "noised_score": noised(2.0**-10, "score"),
    "noised_loss_std": Released(0.3, Source.LEDGER),
}


def moved(adapter: Adapter, A: float = 0.0, B: float = 1.0) -> Adapter:
    layers = {n: LowRank(layer.B + B, layer.A + A) for n, layer in adapter.layers.items()}
    return replace(adapter, layers=layers)


def refused(
    gate: Gate, trained: Any, facts: Any = HONEST, origin: Source | Mechanism = GRADIENT
) -> str:
    with pytest.raises(Refusal) as refusal:
        gate.release(Released(trained, origin), facts)
    assert refusal.value.reason is Reason.OUTBOUND_REFUSED
    return refusal.value.detail


@pytest.fixture
def received(starting_point: Start) -> Adapter:
    return starting_point[0]


@pytest.fixture
def gate(plan: MakePlan, policy: MakePolicy, received: Adapter) -> MakeGate:
    """The gate of a private round; keywords change the plan, or the policy under ``own``."""

    def make(
        charge: Charge | None = CHARGE, own: dict[str, Any] | None = None, **others: Any
    ) -> Gate:
        return Gate(plan(**others), policy(**(own or {})), received, charge)

    return make


# --- factors -----------------------------------------------------------------------------------


def test_only_B_leaves_where_A_is_frozen(gate: MakeGate, received: Adapter) -> None:
    out = gate().release(Released(moved(received), GRADIENT), HONEST).tensors
    assert set(out) == {n for n in received.tensors() if n.endswith("lora_B.weight")}
    assert all(t.equal(torch.ones_like(t)) for t in out.values())
    assert {t.dtype for t in out.values()} == {torch.float32}


def test_both_leave_where_both_are_trained(gate: MakeGate, received: Adapter) -> None:
    both = gate(adapter={"train": "both"}, upload="both")
    out = both.release(Released(moved(received, A=1.0), GRADIENT), HONEST).tensors
    assert set(out) == set(received.tensors())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_does_not_leave(gate: MakeGate, received: Adapter, value: float) -> None:
    name, layer = list(received.layers.items())[-1]
    B = layer.B.clone()
    B[-1, -1] = value
    bad = replace(received, layers={**received.layers, name: replace(layer, B=B)})
    assert "not finite" in refused(gate(), bad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int32])
def test_a_factor_of_another_type_does_not_leave(
    gate: MakeGate, received: Adapter, dtype: torch.dtype
) -> None:
    """Float64 holds 29 bits more than were looked at when the noise was rounded."""
    layers = {n: replace(layer, B=layer.B.to(dtype)) for n, layer in received.layers.items()}
    assert str(dtype) in refused(gate(), replace(received, layers=layers))


def test_factors_nobody_asked_for_do_not_leave(gate: MakeGate, received: Adapter) -> None:
    name, layer = next(iter(received.layers.items()))
    extra = replace(received, layers={**received.layers, "lm_head": layer})
    assert "unexpected" in refused(gate(), extra)
    taller = LowRank(torch.zeros(layer.shape[0] + 1, 2), layer.A)
    wrong = replace(received, layers={**received.layers, name: taller})
    assert "shape" in refused(gate(), wrong)


@pytest.mark.parametrize(
    "origin",
    [*Source, Mechanism("gradient", 6), Mechanism("loss", 7), None, "gradient"],
)
def test_factors_that_moved_without_the_paid_mechanism_do_not_leave(
    gate: MakeGate, received: Adapter, origin: Any
) -> None:
    assert "provenance" in refused(gate(), moved(received), origin=origin)
    assert "provenance" in refused(gate(charge=None), moved(received), origin=origin)
    unpaid = replace(CHARGE, mechanisms=frozenset({"loss"}))
    assert "provenance" in refused(gate(charge=unpaid), moved(received), origin=origin)
    with pytest.raises(Refusal):
        gate().release(moved(received), HONEST)  # type: ignore[arg-type]  # no provenance at all


def test_without_privacy_factors_leave_only_where_the_policy_allows_it(
    gate: MakeGate, received: Adapter
) -> None:
    off = {"enabled": False}
    facts = {name: HONEST[name] for name in ("site", "steps")}
    lax = gate(charge=None, own={"privacy": {"required": False}}, privacy=off)
    assert lax.release(public(moved(received)), facts).facts == {"site": "east", "steps": 2}
    strict = gate(charge=None, privacy=off)
    assert "provenance" in refused(strict, moved(received), facts, Source.POLICY_PUBLIC)
    private = gate(charge=None, own={"privacy": {"required": False}})
    assert "provenance" in refused(private, moved(received), facts, Source.POLICY_PUBLIC)


# --- statistics --------------------------------------------------------------------------------

MEASURED = {"share": {"statistics": "noised"}}
STATISTICS = Mechanism("statistics", 7)
PAID = replace(CHARGE, mechanisms=CHARGE.mechanisms | {"statistics"})


def grams(received: Adapter) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([[2.0, 0.5], [0.5, -1.0]]) for name in received.layers}


def statistics_refused(
    gate: Gate, received: Adapter, statistics: Any, origin: Any = STATISTICS
) -> str:
    with pytest.raises(Refusal) as refusal:
        gate.release(Released(moved(received), GRADIENT), HONEST, Released(statistics, origin))
    assert refusal.value.reason is Reason.OUTBOUND_REFUSED
    return refusal.value.detail


def test_statistics_leave_where_they_are_asked_for_allowed_noised_and_paid(
    gate: MakeGate, received: Adapter
) -> None:
    asked = gate(charge=PAID, own=MEASURED, statistics="gram")
    sent = Released(grams(received), STATISTICS)
    out = asked.release(Released(moved(received), GRADIENT), HONEST, sent)
    assert all(out.statistics[n].equal(g) for n, g in grams(received).items())
    again = Outgoing.from_bytes(out.to_bytes())
    for one, two in ((again.tensors, out.tensors), (again.statistics, out.statistics)):
        assert one.keys() == two.keys()
        assert all(one[name].equal(two[name]) for name in one)
    assert again.facts == out.facts


def test_statistics_without_any_of_that_stop_everything(gate: MakeGate, received: Adapter) -> None:
    good = grams(received)
    asked = gate(charge=PAID, own=MEASURED, statistics="gram")
    assert "not shared" in statistics_refused(gate(charge=PAID, statistics="gram"), received, good)
    unpaid = gate(own=MEASURED, statistics="gram")
    assert "provenance" in statistics_refused(unpaid, received, good)
    for origin in (GRADIENT, Mechanism("statistics", 6), *Source):
        assert "provenance" in statistics_refused(asked, received, good, origin)
    for own in (MEASURED, {}):
        unasked = gate(charge=PAID, own=own)
        assert statistics_refused(unasked, received, good)
    with pytest.raises(Refusal, match="gate"):
        asked.release(Released(moved(received), GRADIENT), HONEST)  # asked for, and not there
    with pytest.raises(Refusal, match="gate"):
        asked.release(Released(moved(received), GRADIENT), HONEST, good)  # type: ignore[arg-type]


def test_statistics_do_not_leave_a_round_without_privacy(gate: MakeGate, received: Adapter) -> None:
    """Such a plan cannot be made; and were it, nothing pays for them."""
    lax = gate(charge=None, own=MEASURED | {"privacy": {"required": False}})
    off = lax.plan.privacy.model_copy(update={"enabled": False})
    plan = lax.plan.model_copy(update={"statistics": "gram", "privacy": off})
    open_gate = replace(lax, plan=plan)
    facts = {name: HONEST[name] for name in ("site", "steps")}
    for origin in (Source.POLICY_PUBLIC, STATISTICS):
        statistics = Released(grams(received), origin)
        with pytest.raises(Refusal) as refusal:
            open_gate.release(Released(moved(received), Source.POLICY_PUBLIC), facts, statistics)
        assert "statistics has no sufficient provenance" in refusal.value.detail


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda g: {**g, "more": torch.eye(2)}, "missing or unexpected"),
        (lambda g: dict(list(g.items())[1:]), "missing or unexpected"),
        (lambda g: g | {next(iter(g)): torch.eye(3)}, "another shape"),
        (lambda g: g | {next(iter(g)): torch.eye(2).double()}, "not float32"),
        (lambda g: g | {next(iter(g)): torch.eye(2) * float("nan")}, "NaN or infinity"),
        (lambda g: g | {next(iter(g)): torch.tensor([[1.0, 0.5], [0.4, 1.0]])}, "not symmetric"),
    ],
)
def test_misshapen_statistics_do_not_leave(
    gate: MakeGate, received: Adapter, change: Callable[[Any], Any], said: str
) -> None:
    asked = gate(charge=PAID, own=MEASURED, statistics="gram")
    assert said in statistics_refused(asked, received, change(grams(received)))
    fisher = gate(charge=PAID, own=MEASURED, statistics="fisher")  # asked for another kind
    assert "unexpected" in statistics_refused(fisher, received, grams(received))


# --- facts -------------------------------------------------------------------------------------


def test_facts_leave_as_the_policy_says(gate: MakeGate, received: Adapter) -> None:
    trained = Released(moved(received), GRADIENT)
    out = gate().release(trained, HONEST).facts
    assert out == {name: fact.value for name, fact in HONEST.items()}
    out = gate(own=NOISED_BY_POLICY).release(trained, HONEST | NUMBERS).facts
    assert out == {name: fact.value for name, fact in (HONEST | NUMBERS).items()}
    exact = {"patients": public(41), "notes": public(99), "loss": public(4.1)}
    out = gate(own=PUBLISHED).release(trained, HONEST | exact).facts
    assert (out["patients"], out["notes"], out["loss"]) == (41, 99, 4.1)


@pytest.mark.parametrize(
    "fact",
    [
        # what no rule knows
        {"gradient_norm": public(1.5)},
        {"patient_ids": public("p1")},
        {"Anna Meier": Released(1.0, Source.PLAN)},
        # raw values, with no provenance or one that does not fit
        {"noised_patients": 41.0},
        {"noised_patients": public(41.0)},
        {"noised_patients": Released(41.0, Source.LEDGER)},
        {"noised_patients": Released(41.0, Source.PLAN)},
        {"noised_patients": noised(41, "patients")},  # an int: nothing added noise to it
        {"noised_patients": noised(41.3, "patients")},  # not on the grid
        {"noised_loss": noised(4.512345678, "loss")},  # a float of a note's loss
        {"noised_loss": noised(4.5, "score")},
        {"noised_loss": noised(4.5, "loss", seq=6)},  # an older reservation
        {"noised_loss": noised(float("nan"), "loss")},
        {"noised_loss": noised(float("inf"), "loss")},
        {"noised_loss": noised(torch.tensor(4.5), "loss")},
        {"noised_loss_std": Released(float("inf"), Source.LEDGER)},
        # what only another decision of the policy would let out
        {"patients": public(41)},
        {"loss": public(4.5)},
        {"score": public(4.5)},
        # words and constants that are not those of plan, policy and ledger
        {"site": public("p1 was seen")},
        {"site": public(b"east")},
        {"unit": Released("chest pain", Source.PLAN)},
        {"unit": public("patient")},
        {"unit": Released(["patient", "a note"], Source.PLAN)},
        {"steps": Released(3, Source.PLAN)},
        {"steps": Released(2.0, Source.PLAN)},
        {"steps": Released(True, Source.PLAN)},
        {"noise_multiplier": Released(1.3, Source.LEDGER)},
        {"noise_multiplier": Released(1.2, Source.PLAN)},
        {"delta": Released(1e-6, Source.LEDGER)},
        {"epsilon_spent": Released("3.4", Source.LEDGER)},
        {"epsilon_spent": Released(float("nan"), Source.LEDGER)},
    ],
)
def test_one_fact_that_may_not_leave_stops_everything(
    gate: MakeGate, received: Adapter, fact: dict[str, Any]
) -> None:
    detail = refused(gate(own=NOISED_BY_POLICY), moved(received), HONEST | NUMBERS | fact)
    assert "Meier" not in detail


def test_what_is_noised_does_not_leave_where_the_policy_says_never_or_it_was_not_paid(
    gate: MakeGate, received: Adapter
) -> None:
    for name, fact in NUMBERS.items():
        for own in ({}, PUBLISHED):
            assert "not shared" in refused(gate(own=own), moved(received), {name: fact})
    unpaid = replace(CHARGE, mechanisms=frozenset({"gradient"}))
    poor = gate(own=NOISED_BY_POLICY, charge=unpaid)
    assert "provenance" in refused(poor, moved(received), {"noised_loss": NUMBERS["noised_loss"]})


def test_nothing_of_the_ledger_leaves_a_round_that_paid_nothing(
    gate: MakeGate, received: Adapter
) -> None:
    open_site = {"privacy": {"required": False}}
    lax = gate(charge=None, own=open_site, privacy={"enabled": False})
    facts = {"epsilon_spent": HONEST["epsilon_spent"]}
    assert "provenance" in refused(lax, moved(received), facts, Source.POLICY_PUBLIC)


ORIGINS = st.sampled_from([*Source, *(Mechanism(n, s) for n in CHARGE.mechanisms for s in (6, 7))])
VALUES = st.integers() | st.floats() | st.text() | st.booleans() | st.sampled_from(["east", 2, 1.2])


@given(
    facts=st.dictionaries(
        st.sampled_from(sorted(HONEST | NUMBERS | {"patients": 0, "loss": 0})),
        st.builds(Released, VALUES, ORIGINS) | VALUES,
        max_size=2,
    )
)
def test_whatever_is_handed_over_only_declared_and_paid_values_leave(
    facts: dict[str, Any],
) -> None:
    allowed = {name: fact.provenance for name, fact in (HONEST | NUMBERS).items()}
    try:
        out = GATE._facts(facts)
    except Refusal:
        return
    for name, value in out.items():
        assert facts[name] == Released(value, allowed[name])
        assert type(value) is type((HONEST | NUMBERS)[name].value)
        assert not isinstance(value, str) or value in ("east", "patient")


def test_a_reply_comes_back_from_its_bytes_as_it_was(gate: MakeGate, received: Adapter) -> None:
    out = gate().release(Released(moved(received), GRADIENT), HONEST)
    again = Outgoing.from_bytes(out.to_bytes())
    assert again.facts == out.facts
    assert all(again.tensors[name].equal(t) for name, t in out.tensors.items())


GATE = Gate(
    plan=TrainingPlan.model_validate(
        {
            "run": "first", "round": 1, "rounds": 2, "local_steps": 2, "seed": 3,
            "strategy": "ffa", "base_model": "0" * 64, "upload": "B",
            "adapter": {"rank": 2, "alpha": 4.0, "targets": ("q_proj",), "train": "B"},
            "privacy": {
                "enabled": True, "unit": "patient", "epsilon": 8.0, "delta": 1e-5,
                "clip_norm": 1.0, "sampling_rate": 1.0, "denominator": 20,
                "max_notes_per_unit": 1, "max_tokens": 32,
            },
            "optimizer": {"name": "sgd", "learning_rate": 1.0, "final_fraction": 1.0},
        }
    ),
    policy=SitePolicy.model_validate(
        {
            "site": "east", "lineage": "invented", "ledger": "/nowhere/l.sqlite",
            "notes": {"source": "jsonl", "path": "notes.jsonl"}, "model": {"source": "smollm2"},
            "privacy": {"epsilon": 8.0, "delta": 1e-5}, **NOISED_BY_POLICY,
        }
    ),
    received=None,  # type: ignore[arg-type]  # facts need no adapter
    charge=CHARGE,
)  # fmt: skip
