"""The training plan: what it derives, and what it refuses."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from adapters.plan import TrainingPlan, plan_round
from client.privacy.engine import noised_mean
from conf.load import ConfigError, load
from conf.schema import RunSettings

SETTINGS = load("simulate", ["federation.rounds=3", "federation.local_steps=4"], RunSettings)
PRINT = "a" * 64


def test_steps_left_count_this_round_and_all_that_follow() -> None:
    left = [plan_round(SETTINGS, "run", n, PRINT).steps_left for n in (1, 2, 3)]
    assert left == [12, 8, 4]


def test_statistics_count_as_one_more_step_a_round() -> None:
    plans = [plan_round(SETTINGS, "run", n, PRINT, "gram") for n in (1, 2, 3)]
    assert [plan.steps_left for plan in plans] == [15, 10, 5]
    assert {plan.charged_steps for plan in plans} == {5}
    assert plan_round(SETTINGS, "run", 1, PRINT).charged_steps == 4
    rates = [plan_round(SETTINGS, "run", 3, PRINT).learning_rate(3), plans[2].learning_rate(3)]
    assert rates[0] == rates[1]  # but they move nothing


def test_statistics_without_privacy_are_no_plan() -> None:
    raw = plan_round(SETTINGS, "run", 1, PRINT, "fisher").model_dump()
    raw["privacy"]["enabled"] = False
    with pytest.raises(ValidationError, match="statistics leave noised only"):
        TrainingPlan.model_validate(raw)


def test_learning_rate_decays_linearly_over_the_whole_plan() -> None:
    plans = [plan_round(SETTINGS, "run", n, PRINT) for n in (1, 2, 3)]
    rates = [plan.learning_rate(step) for plan in plans for step in range(4)]
    optimizer = SETTINGS.optimizer
    assert rates[0] == optimizer.learning_rate
    assert rates[-1] == pytest.approx(optimizer.learning_rate * optimizer.final_fraction)
    drops = [a - b for a, b in pairwise(rates)]
    assert drops == pytest.approx([drops[0]] * 11)


def test_the_noise_of_a_round_is_what_its_steps_of_noise_add_up_to() -> None:
    """Gradients of nothing, released as a hospital does, at rates that decay within the round."""
    plan, normal = plan_round(SETTINGS, "run", 2, PRINT), np.random.default_rng(0).standard_normal
    entries = torch.zeros(40_000, requires_grad=True)
    sgd = torch.optim.SGD([entries])
    for step in range(plan.local_steps):
        sums = {"q": torch.zeros(40_000, dtype=torch.float64)}
        std = 1.7 * plan.privacy.clip_norm
        entries.grad = noised_mean(sums, std, plan.privacy.denominator, normal)["q"].float()
        sgd.param_groups[0]["lr"] = plan.learning_rate(step)
        sgd.step()
    assert plan.local_steps > 1
    assert plan.noise_std(1.7) == pytest.approx(float(entries.detach().std()), rel=0.02)


def test_plan_survives_the_wire() -> None:
    plan = plan_round(SETTINGS, "run", 2, PRINT)
    assert TrainingPlan.model_validate_json(plan.model_dump_json()) == plan


@pytest.mark.parametrize(
    "change",
    [
        {"base_model": "x"},
        {"run": "../up"},
        {"round": 0},
        {"notes": "all"},
        {"statistics": "hessian"},
        {"rounds": 1000, "local_steps": 101},  # more than a hospital can account for in seconds
        {"privacy": SETTINGS.privacy.model_dump() | {"delta": 1e-13}},
    ],
)
def test_impossible_plans_are_refused(change: dict[str, object]) -> None:
    raw = plan_round(SETTINGS, "run", 1, PRINT).model_dump() | change
    with pytest.raises(ValidationError):
        TrainingPlan.model_validate(raw)


def test_a_coordinator_is_told_of_more_steps_than_hospitals_can_account_for() -> None:
    many = ["federation.rounds=1000", "federation.local_steps=101"]
    with pytest.raises(ConfigError, match="local_steps = 101,000: at most 100,000"):
        load("simulate", many, RunSettings)
