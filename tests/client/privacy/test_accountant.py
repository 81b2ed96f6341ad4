"""Two independent accountants, monotonicity, and calibration for the whole plan."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant
from scipy.optimize import brentq
from scipy.stats import norm

from client.privacy import accountant
from client.privacy.accountant import (
    AccountingError,
    BudgetExhausted,
    GaussianSteps,
    calibrate,
    epsilon,
    epsilon_prv,
    epsilon_rdp,
    steps_within,
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


@pytest.mark.parametrize("figure", [1.5, float("nan"), float("inf")])
def test_accountants_that_disagree_stop_everything(
    monkeypatch: pytest.MonkeyPatch, figure: float
) -> None:
    monkeypatch.setattr(accountant, "epsilon_prv", lambda history, delta: figure)
    with pytest.raises(AccountingError, match=f"PRV says {figure:.1f}"):
        epsilon((GaussianSteps(0.11, 0.77, 13),), DELTA)


@pytest.mark.parametrize(
    "charge", [(1.0, 8.0, 1), (1.0, 50.0, 2), (0.1, 8.0, 1), (0.01, 2.0, 10), (0.01, 20.0, 10)]
)
def test_accountants_agree_on_what_is_cheap(charge: tuple[float, float, int]) -> None:
    """PRV adds its own error bound, which must not read as a disagreement."""
    assert 0 < epsilon((GaussianSteps(*charge),), DELTA) < 0.5


def test_renyi_is_a_looser_bound_and_as_published() -> None:
    """N=5000, B=64, sigma=0.8, 200 steps: RDP 2.838 where PLD says 2.218; q=1, sigma=5: 7.077."""
    sampled, full = (GaussianSteps(64 / 5000, 0.8, 200),), (GaussianSteps(1.0, 5.0, 50),)
    assert epsilon_rdp(sampled, DELTA) == pytest.approx(2.838, abs=0.005)
    assert epsilon_rdp(full, DELTA) == pytest.approx(7.077, abs=0.005)
    assert epsilon_rdp((), DELTA) == 0.0
    for history in (full, (GaussianSteps(1.0, 8.0, 1),), (*full, GaussianSteps(1.0, 8.0, 3))):
        assert epsilon(history, DELTA) < epsilon_rdp(history, DELTA)
        one_order = epsilon_rdp(history, DELTA, 3.0)
        assert epsilon_rdp(history, DELTA) <= one_order
    alpha = 3.0  # of q = 1: rho = alpha n / (2 sigma^2); conversion of Canonne et al. 2020
    rho = alpha * 50 / (2 * 25)
    expected = rho + math.log((alpha - 1) / alpha) - (math.log(DELTA) + math.log(alpha)) / 2
    assert epsilon_rdp(full, DELTA, alpha) == pytest.approx(expected)


@settings(deadline=None, max_examples=20)
@given(
    history=st.lists(
        st.builds(GaussianSteps, st.just(1.0), st.sampled_from([4.0, 8.0]), st.integers(1, 3)),
        max_size=4,
    ),
    more=st.builds(GaussianSteps, st.just(1.0), st.sampled_from([4.0, 8.0]), st.integers(1, 3)),
    seed=st.randoms(use_true_random=False),
)
def test_more_never_costs_less_and_order_does_not_matter(
    history: list[GaussianSteps], more: GaussianSteps, seed: random.Random
) -> None:
    mixed = seed.sample([*history, more], len(history) + 1)
    for cost in (epsilon, epsilon_rdp):
        longer = cost((*history, more), DELTA)
        assert longer > cost(tuple(history), DELTA)
        assert longer == cost(tuple(mixed), DELTA)


def test_steps_within_a_budget_are_the_most_that_fit() -> None:
    history = (GaussianSteps(1.0, 8.0, 3),)
    fit = steps_within(history, 1.0, 8.0, 2.0, DELTA, 1000)
    assert epsilon((*history, GaussianSteps(1.0, 8.0, fit)), DELTA) <= 2.0
    assert epsilon((*history, GaussianSteps(1.0, 8.0, fit + 1)), DELTA) > 2.0
    assert steps_within(history, 1.0, 8.0, 0.5, DELTA, 1000) == 0
    assert steps_within(history, 1.0, 8.0, 2.0, DELTA, fit - 1) == fit - 1


_steps = st.builds(
    GaussianSteps,
    sampling_rate=st.sampled_from([0.001, 0.01, 0.25, 1.0]),
    noise_multiplier=st.sampled_from([0.6, 1.0, 4.0, 40.0, 1000.0]) | st.floats(0.6, 40.0),
    steps=st.integers(1, 2000),
)


@settings(max_examples=15, deadline=None)
@given(st.lists(_steps, min_size=1, max_size=2))
@example([GaussianSteps(0.01, 40.0, 99)])  # a grid fit for usual losses is wider than these
@example([GaussianSteps(0.01, 4.0, 7)])
def test_the_grid_of_losses_adds_little_and_never_takes_away(events: list[GaussianSteps]) -> None:
    history = tuple(events)
    finer = PLDAccountant(value_discretization_interval=accountant._interval(history, DELTA) / 4)
    for e in history:
        step = PoissonSampledDpEvent(e.sampling_rate, GaussianDpEvent(e.noise_multiplier))
        finer.compose(step, e.steps)
    exact = finer.get_epsilon(DELTA)
    assume(exact < 500)  # beyond it e^epsilon overflows, and both figures are too high by a little
    added = (accountant._authority(history, DELTA) - exact) / max(1.0, exact)
    assert -1e-8 <= added <= 1.5e-4


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([0.6, 1.0, 4.0, 40.0]) | st.floats(0.6, 200.0), st.integers(1, 2000))
@example(0.6, 421)  # e^epsilon overflows
def test_without_sampling_no_less_than_the_exact_epsilon_is_reported(
    sigma: float, steps: int
) -> None:
    exact = _exact_gaussian_epsilon(steps**0.5 / sigma)
    reported = accountant._authority((GaussianSteps(1.0, sigma, steps),), DELTA)
    assert exact - 1e-9 <= reported <= exact + 1.5e-4 * max(1.0, exact) + (exact > 500)


def _exact_gaussian_epsilon(mu: float) -> float:
    """Balle and Wang, "Improving the Gaussian Mechanism for Differential Privacy" (ICML 2018)."""

    def too_large(epsilon: float) -> float:
        tail = norm.logcdf(-mu / 2 - epsilon / mu)
        return float(norm.cdf(mu / 2 - epsilon / mu) - np.exp(epsilon + tail)) - DELTA

    return float(brentq(too_large, 0.0, 1e5, xtol=1e-12)) if too_large(0.0) > 0 else 0.0


@settings(max_examples=10, deadline=None)
@given(st.lists(_steps, min_size=1, max_size=2))
def test_the_check_is_opacus_own_figure(events: list[GaussianSteps]) -> None:
    assume(epsilon_rdp(tuple(events), DELTA) < 50)  # beyond it both overflow
    opacus = PRVAccountant()
    opacus.history = [(e.noise_multiplier, e.sampling_rate, e.steps) for e in events]
    with np.errstate(all="ignore"):
        assert epsilon_prv(events, DELTA) == pytest.approx(opacus.get_epsilon(DELTA), abs=1e-4)


@pytest.mark.parametrize("budget", [0.3, 1.0, 3.0, 8.0, 20.0])
def test_calibration_wastes_less_than_half_a_percent_of_the_noise(budget: float) -> None:
    history = (GaussianSteps(0.1, 20.0, 3),)
    sigma = calibrate(history, 0.25, 4, budget, DELTA)
    assert epsilon((*history, GaussianSteps(0.25, sigma, 4)), DELTA) <= budget
    assert epsilon((*history, GaussianSteps(0.25, sigma * 0.995, 4)), DELTA) > budget
