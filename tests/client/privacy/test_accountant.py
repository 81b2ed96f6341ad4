"""Two independent accountants, monotonicity, and calibration for the whole plan."""

from __future__ import annotations

import pytest

from client.privacy import accountant
from client.privacy.accountant import (
    AccountingError,
    BudgetExhausted,
    GaussianSteps,
    calibrate,
    epsilon,
    epsilon_prv,
)

DELTA = 1e-5


def test_published_figures_are_reproduced() -> None:
    """N=5000, B=64, sigma=0.8, 200 steps: PLD 2.218, PRV 2.228 at delta 1e-5."""
    history = (GaussianSteps(64 / 5000, 0.8, 200),)
    assert epsilon(history, DELTA) == pytest.approx(2.218, abs=0.002)
    assert epsilon_prv(history, DELTA) == pytest.approx(2.228, abs=0.002)


def test_full_participation_matches_the_gaussian_mechanism() -> None:
    """q = 1, sigma = 5, 50 steps: PLD 6.573."""
    assert epsilon((GaussianSteps(1.0, 5.0, 50),), DELTA) == pytest.approx(6.573, abs=0.005)


def test_nothing_spent_costs_nothing() -> None:
    assert epsilon((), DELTA) == 0.0


def test_more_steps_less_noise_or_more_sampling_cost_more() -> None:
    middle = epsilon((GaussianSteps(0.1, 1.0, 10),), DELTA)
    assert epsilon((GaussianSteps(0.1, 1.0, 11),), DELTA) > middle
    assert epsilon((GaussianSteps(0.1, 0.9, 10),), DELTA) > middle
    assert epsilon((GaussianSteps(0.2, 1.0, 10),), DELTA) > middle


def test_composition_does_not_depend_on_how_steps_are_entered() -> None:
    whole = epsilon((GaussianSteps(0.1, 1.0, 6),), DELTA)
    assert epsilon(
        (GaussianSteps(0.1, 1.0, 2), GaussianSteps(0.1, 1.0, 4)), DELTA
    ) == pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize(
    ("rate", "steps", "budget"), [(0.25, 4, 8.0), (0.05, 30, 1.0), (1.0, 2, 3.0)]
)
def test_calibration_meets_the_budget_tightly(rate: float, steps: int, budget: float) -> None:
    sigma = calibrate((), rate, steps, budget, DELTA)
    assert budget * 0.98 < epsilon((GaussianSteps(rate, sigma, steps),), DELTA) <= budget


def test_rounds_calibrated_on_what_is_left_end_within_the_budget() -> None:
    history: tuple[GaussianSteps, ...] = ()
    sigmas = []
    for left in (6, 4, 2):
        sigmas.append(calibrate(history, 0.2, left, 3.0, DELTA))
        history += (GaussianSteps(0.2, sigmas[-1], 2),)
    assert 3.0 * 0.98 < epsilon(history, DELTA) <= 3.0
    assert max(sigmas) / min(sigmas) < 1.02


def test_a_burnt_round_makes_the_rest_noisier() -> None:
    planned = calibrate((), 0.2, 4, 3.0, DELTA)
    after = calibrate((GaussianSteps(0.2, planned, 2),), 0.2, 4, 3.0, DELTA)
    assert after > planned


def test_a_spent_budget_is_exhausted() -> None:
    history = (GaussianSteps(0.5, 0.5, 50),)
    with pytest.raises(BudgetExhausted, match="do not fit"):
        calibrate(history, 0.2, 1, 1.0, DELTA)


@pytest.mark.parametrize("bad", [(0.0, 1.0, 1), (1.1, 1.0, 1), (0.1, 0.0, 1), (0.1, 1.0, 0)])
def test_impossible_mechanisms_are_refused(bad: tuple[float, float, int]) -> None:
    with pytest.raises(ValueError, match="not a valid mechanism"):
        GaussianSteps(*bad)


def test_accountants_that_disagree_stop_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accountant, "epsilon_prv", lambda history, delta: 1.5)
    with pytest.raises(AccountingError, match=r"PRV says 1\.5"):
        epsilon((GaussianSteps(0.11, 0.77, 13),), DELTA)
