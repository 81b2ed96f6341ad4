"""Numbers beside the adapter: what one unit can change, how much noise there is, what it costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import dp_accounting
import numpy as np
import pytest
import torch
from dp_accounting.pld import PLDAccountant
from hypothesis import given
from hypothesis import strategies as st

from adapters.base_model import load_base
from adapters.plan import TrainingPlan
from client.notes.note import Note
from client.privacy.accountant import GaussianSteps, epsilon
from client.privacy.metadata import (
    SharedNumbers,
    bounded,
    charges,
    charges_of_a_run,
    later_charges,
    noised,
    step_noise,
    unit_losses,
)
from client.privacy.randomness import SecureRandomness
from client.privacy.released import Charge, Mechanism, Source
from conf.policy import ShareLimits, SitePolicy
from conf.schema import ModelSettings

MakePlan = Callable[..., TrainingPlan]
MakePolicy = Callable[..., SitePolicy]

ALL = {"counts": "noised", "losses": "noised", "scores": "noised", "noise": 10.0}
CHARGE = Charge(3, 1.5, frozenset({"gradient", "patients", "notes", "loss", "score"}))


def note(patient: str, i: int = 0) -> Note:
    return Note(f"{patient}-{i}", patient, "Seen for pain.", None, "x")


def patients(*notes: int) -> dict[str, tuple[Note, ...]]:
    """Units with so many notes each."""
    return {f"p{u}": tuple(note(f"p{u}", i) for i in range(n)) for u, n in enumerate(notes)}


class NoNoise(SecureRandomness):
    """Shows the numbers before the noise, and how they were sampled."""

    def normal(self, n: int) -> np.ndarray:
        return np.zeros(n)


def numbers(plan: TrainingPlan, policy: SitePolicy, random: Any = None) -> SharedNumbers:
    return SharedNumbers(plan, policy, CHARGE, random or NoNoise())


def value(facts: dict[str, Any], name: str) -> float:
    return float(facts[name].value)


# --- sensitivity -------------------------------------------------------------------------------


@given(
    sizes=st.lists(st.integers(1, 30), max_size=20),
    more=st.integers(1, 99),
    cap=st.integers(1, 64),
)
def test_one_patient_changes_the_counts_by_at_most_what_the_noise_is_made_for(
    sizes: list[int], more: int, cap: int
) -> None:
    own = POLICY.model_copy(
        update={"privacy": POLICY.privacy.model_copy(update={"max_notes_per_unit": cap})}
    )
    shared = numbers(PLAN, own)
    without, with_one = shared.counts(patients(*sizes)), shared.counts(patients(*sizes, more))
    assert value(with_one, "noised_patients") - value(without, "noised_patients") == 1
    assert 1 <= value(with_one, "noised_notes") - value(without, "noised_notes") <= cap
    assert value(without, "noised_patients_std") == own.share.noise
    assert value(without, "noised_notes_std") == own.share.noise * cap


def test_with_notes_as_units_one_note_changes_each_count_by_one(
    plan: MakePlan, policy: MakePolicy
) -> None:
    shared = numbers(plan(privacy={"unit": "note"}), policy(share=ALL))
    units = {f"p0\n{i}": (note("p0", i),) for i in range(30)}  # far more notes than the cap
    facts = shared.counts(units)
    assert value(facts, "noised_patients") == 1
    assert value(facts, "noised_notes") == 30
    assert value(facts, "noised_notes_std") == 10.0


LOSSES = st.floats(0, 50) | st.sampled_from([math.nan, math.inf, -math.inf, -1.0, 1e308])


@given(losses=st.lists(LOSSES, max_size=20), one=LOSSES, bound=st.floats(0.01, 100))
def test_one_unit_adds_between_nothing_and_the_bound_whatever_its_loss(
    losses: list[float], one: float, bound: float
) -> None:
    before, after = sum(bounded(losses, bound)), sum(bounded([*losses, one], bound))
    assert 0 <= after - before <= bound
    assert sum(bounded([one, *losses[::-1]], bound)) == after


def test_the_loss_of_a_unit_is_the_mean_of_its_notes_and_depends_on_no_other(
    tiny_model: Path,
) -> None:
    model = load_base(ModelSettings(source="path", path=str(tiny_model))).model
    draw = torch.Generator().manual_seed(3)
    rows = [torch.randint(0, 200, (n,), generator=draw).tolist() for n in (9, 30, 4, 17)]
    single = unit_losses(model, [[row] for row in rows])
    together = unit_losses(model, [rows[:2], rows[2:]])
    assert together == pytest.approx([sum(single[:2]) / 2, sum(single[2:]) / 2], rel=1e-5)
    assert unit_losses(model, [rows[2:], rows[:2]]) == together[::-1]  # to the last bit
    assert unit_losses(model, [[[]], [rows[0]]]) == [0.0, single[0]]  # no token, no failure
    assert unit_losses(model, []) == []


# --- noise -------------------------------------------------------------------------------------


def test_the_noise_is_as_large_as_it_is_said_to_be() -> None:
    random = SecureRandomness()
    n = 20_000
    draws = np.array([noised(41.0, 3.0, 7.0, 2.0**-10, random) for _ in range(n)])
    assert draws.std() == pytest.approx(21.0, rel=5 / (2 * n) ** 0.5)
    assert abs(draws.mean() - 41.0) < 5 * 21.0 / n**0.5


@pytest.mark.parametrize("grid", [1.0, 2.0**-10])
def test_what_is_noised_lies_on_the_public_grid(grid: float) -> None:
    random = SecureRandomness()
    for _ in range(50):
        drawn = noised(math.pi, 1.0, 3.0, grid, random)
        assert type(drawn) is float
        assert (drawn / grid).is_integer()


def test_counts_carry_their_noise_and_name_the_mechanism(
    plan: MakePlan, policy: MakePolicy
) -> None:
    shared = numbers(plan(), policy(share=ALL), SecureRandomness())
    many = [shared.counts(patients(*[3] * 40)) for _ in range(2000)]
    assert many[0]["noised_patients"].provenance == Mechanism("patients", 3)
    assert many[0]["noised_notes"].provenance == Mechanism("notes", 3)
    for name, center, std in (("patients", 40, 10.0), ("notes", 120, 80.0)):
        drawn = np.array([value(facts, f"noised_{name}") for facts in many])
        assert drawn.std() == pytest.approx(std, rel=0.08)
        assert drawn.mean() == pytest.approx(center, abs=5 * std / 2000**0.5)


def test_the_mean_loss_carries_the_noise_of_all_its_steps(
    plan: MakePlan, policy: MakePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("client.privacy.metadata.unit_losses", lambda _, units: list(units))
    drawn, own = [], policy(share=ALL)
    for _ in range(2000):
        shared = numbers(plan(), own, SecureRandomness())
        for losses in ([4.0, 6.0], [5.0], [], [99.0]):  # 99 counts as the bound, 8
            shared.step(None, losses, 12.0)  # type: ignore[arg-type]
        facts = shared.loss(12.0)
        drawn.append(value(facts, "noised_loss"))
    std = 12.0 * 8.0 / 20 / 2.0  # of four steps
    assert value(facts, "noised_loss_std") == pytest.approx(std)
    assert np.std(drawn) == pytest.approx(std, rel=0.08)
    expected = (4.0 + 6.0 + 5.0 + 8.0) / 20 / 4  # the public denominator, never the real number
    assert np.mean(drawn) == pytest.approx(expected, abs=5 * std / 2000**0.5)


def test_the_score_is_of_a_poisson_sample_and_divided_by_a_public_number(
    plan: MakePlan, policy: MakePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = plan(privacy={"sampling_rate": 0.3, "max_notes_per_unit": 2})
    taken: list[list[Sequence[Any]]] = []

    def losses(_: Any, units: Any) -> list[float]:
        taken.append(list(units))
        return [2.0] * len(taken[-1])

    monkeypatch.setattr("client.privacy.metadata.unit_losses", losses)
    shared = numbers(asked, policy(share=ALL, notes={"holdout": 0.5}))
    held_out = patients(*[5] * 50)
    for _ in range(200):
        facts = shared.score(None, held_out, lambda n: [n])  # type: ignore[arg-type,list-item]
        assert value(facts, "noised_score") == pytest.approx(2.0 * len(taken[-1]) / 20, abs=1e-3)
    sizes = np.array([len(units) for units in taken])
    assert sizes.mean() == pytest.approx(15, abs=5 * (50 * 0.3 * 0.7 / 200) ** 0.5)
    assert {len(notes) for units in taken for notes in units} == {2}
    assert facts["noised_score_std"].value == pytest.approx(10.0 * 8.0 / 20)
    assert facts["noised_score_std"].provenance is Source.LEDGER


# --- cost --------------------------------------------------------------------------------------


@given(charged=st.floats(0.05, 500), noise=st.floats(1, 1000))
def test_gradient_and_loss_together_are_one_mechanism_of_the_charged_noise(
    charged: float, noise: float
) -> None:
    share = ShareLimits(losses="noised", noise=noise)
    split = step_noise(charged, share)
    assert split.loss is not None
    assert split.loss >= max(noise, 4 * charged)
    sensitivity = math.hypot(1 / split.gradient, 1 / split.loss)
    assert 1 / sensitivity == pytest.approx(charged, rel=1e-9)
    assert charged <= split.gradient <= 1.033 * charged
    assert step_noise(charged, ShareLimits()).gradient == charged


def test_charging_the_loss_as_if_it_had_its_own_sample_would_be_too_little() -> None:
    """Why the loss is charged together with the gradient of the same sample.

    Here at equal noise for both, where it shows most: what two independent samples would cost, and
    what releasing both on one sample costs.
    """
    apart = epsilon((GaussianSteps(0.01, 0.7, 2),), 1e-5)
    together = PLDAccountant()
    joint = dp_accounting.GaussianDpEvent(0.7 / 2**0.5)
    together.compose(dp_accounting.PoissonSampledDpEvent(0.01, joint))
    assert together.get_epsilon(1e-5) > 1.5 * apart


def test_what_is_charged_beside_the_steps_follows_plan_and_policy_alone(plan: MakePlan) -> None:
    first, last = plan(rounds=5, privacy={"sampling_rate": 0.5}), plan(rounds=5, round=5)
    names, events = charges(first, ShareLimits(**ALL))  # type: ignore[arg-type]
    assert names == CHARGE.mechanisms
    assert events == (GaussianSteps(1.0, 10.0, 2), GaussianSteps(0.5, 10.0, 1))
    assert later_charges(first, ShareLimits(**ALL)) == (  # type: ignore[arg-type]
        GaussianSteps(0.5, 10.0, 4),
    )
    assert charges_of_a_run(ShareLimits(**ALL), 0.5, 5) == (  # type: ignore[arg-type]
        GaussianSteps(1.0, 10.0, 2),
        GaussianSteps(0.5, 10.0, 5),
    )
    names, events = charges(last, ShareLimits(**ALL))  # type: ignore[arg-type]
    assert names == {"gradient", "loss", "score"}
    assert events == (GaussianSteps(1.0, 10.0, 1),)
    assert later_charges(last, ShareLimits(**ALL)) == ()  # type: ignore[arg-type]
    for share in (ShareLimits(), ShareLimits(counts="public", losses="public", scores="public")):
        assert charges(first, share) == (frozenset({"gradient"}), ())
        assert later_charges(first, share) == ()


def test_every_number_that_is_made_was_charged_and_every_charge_makes_one(
    plan: MakePlan, policy: MakePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("client.privacy.metadata.unit_losses", lambda _, units: [1.0])
    for kinds in (("counts",), ("losses",), ("scores",), ("counts", "scores"), ()):
        own = policy(share=dict.fromkeys(kinds, "noised"))
        for asked in (plan(), plan(round=2)):
            names, _ = charges(asked, own.share)
            noise = step_noise(1.5, own.share).loss
            shared = SharedNumbers(asked, own, Charge(3, 1.5, names), NoNoise())
            facts = shared.counts(patients(1, 2))
            facts |= shared.score(None, patients(1), lambda n: [1])  # type: ignore[arg-type]
            shared.step(None, [[[1]]], noise)  # type: ignore[arg-type]
            facts |= shared.loss(noise)
            made = {
                f.provenance.name for f in facts.values() if isinstance(f.provenance, Mechanism)
            }
            assert made == names - {"gradient"}


PLAN = TrainingPlan.model_validate(
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
)  # fmt: skip
POLICY = SitePolicy.model_validate(
    {
        "site": "east", "lineage": "invented", "ledger": "/nowhere/l.sqlite",
        "notes": {"source": "jsonl", "path": "notes.jsonl"}, "model": {"source": "smollm2"},
        "privacy": {"epsilon": 8.0, "delta": 1e-5}, "share": ALL,
    }
)  # fmt: skip
