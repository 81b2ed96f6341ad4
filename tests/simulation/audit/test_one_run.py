"""Lower bounds on epsilon: against closed forms, exact probabilities and simulated games."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.privacy.accountant import GaussianSteps, epsilon
from simulation.audit.one_run import (
    epsilon_gaussian,
    epsilon_steinke,
    gaussian,
    gaussian_epsilon,
    right_guesses,
    steinke,
)


def game(m: int, sigma: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores and coins of m orthogonal canaries in one Gaussian release."""
    draw = np.random.default_rng(seed)
    included = draw.random(m) < 0.5
    return included + sigma * draw.standard_normal(m), included


@pytest.mark.parametrize(("sigma", "steps"), [(1.0, 1), (0.5, 1), (4.0, 16)])
def test_gaussian_epsilon_is_what_the_accountant_says(sigma: float, steps: int) -> None:
    exact = gaussian_epsilon(math.sqrt(steps) / sigma, 1e-5)
    assert exact == pytest.approx(epsilon((GaussianSteps(1.0, sigma, steps),), 1e-5), rel=2e-3)


@pytest.mark.parametrize("guesses", [10, 100, 1000])
def test_when_every_guess_is_right_steinke_is_a_root(guesses: int) -> None:
    """P[B >= r] = q^r, so the bound is logit(significance^(1/r))."""
    share = 0.05 ** (1 / guesses)
    expected = math.log(share / (1 - share))
    assert steinke(guesses, guesses, guesses, 0.0, 0.05) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("confidence", [0.6, 0.8, 0.99])
def test_one_canary_gives_the_gaussian_bound_of_one_test(confidence: float) -> None:
    """A fair coin is guessed right with probability Phi(mu / 2) at most."""
    expected = 2 * NormalDist().inv_cdf(confidence)
    assert gaussian(1, 1, 1, confidence) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("true_epsilon", [0.5, 2.0])
def test_steinke_is_valid_and_nearly_exact_for_randomised_response(true_epsilon: float) -> None:
    """There W is binomial, so the chance of a wrong bound is a finite sum: at most 5 %."""
    m, q = 200, 1 / (1 + math.exp(-true_epsilon))
    wrong = sum(
        math.comb(m, v) * q**v * (1 - q) ** (m - v)
        for v in range(m + 1)
        if steinke(m, m, v, 0.0, 0.05) > true_epsilon
    )
    assert 0.02 < wrong <= 0.05


@pytest.mark.parametrize("bound", [epsilon_steinke, epsilon_gaussian])
def test_the_bound_covers_the_exact_gaussian_mechanism(bound: object) -> None:
    """One canary's worth of noise: 100 games, at most 5 % of which may prove too much."""
    exact = gaussian_epsilon(1.0, 1e-5)
    assert callable(bound)
    proved = np.array([bound(*game(200, 1.0, seed), 1e-5) for seed in range(100)])
    assert (proved > exact).mean() <= 0.05
    assert np.median(proved) > 0.3  # it says something


def test_gaussian_bound_is_valid_where_it_is_tightest() -> None:
    """A single guess of a single canary at its exact mu: wrong with probability 1 - confidence."""
    mu, wins = 1.0, NormalDist().cdf(0.5)
    assert gaussian(1, 1, 1, wins + 0.01) > mu
    assert gaussian(1, 1, 1, wins - 0.01) < mu


def test_the_figures_of_two_thousand_canaries() -> None:
    """Honest noise proves about a third of the claim of 4.38; a quarter of it proves more."""
    honest = game(2000, 1.0, 1)
    quarter = game(2000, 0.25, 1)
    claim = gaussian_epsilon(1.0, 1e-5)
    assert claim == pytest.approx(4.38, abs=0.01)
    assert 1.2 < epsilon_steinke(*honest, 1e-5) < epsilon_gaussian(*honest, 1e-5) < 3.5
    assert claim < epsilon_steinke(*quarter, 1e-5) < epsilon_gaussian(*quarter, 1e-5)


def test_scores_that_know_nothing_prove_nothing() -> None:
    draw = np.random.default_rng(5)
    included = draw.random(500) < 0.5
    assert epsilon_steinke(draw.random(500), included, 1e-5) < 0.2
    assert epsilon_gaussian(-included.astype(float), included, 1e-5) == 0.0


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 60), st.data())
def test_more_right_guesses_prove_more_and_a_delta_proves_less(r: int, data: st.DataObject) -> None:
    v = data.draw(st.integers(0, r - 1))
    m = 60
    assert steinke(m, r, v, 1e-5, 0.05) <= steinke(m, r, v + 1, 1e-5, 0.05) + 1e-3
    assert gaussian(m, r, v, 0.05) <= gaussian(m, r, v + 1, 0.05) + 1e-3
    assert steinke(m, r, v, 1e-3, 0.05) <= steinke(m, r, v, 0.0, 0.05) + 1e-3


def test_guesses_are_the_extremes_and_the_rest_abstains() -> None:
    scores = np.array([0.9, 0.1, 0.5, 0.8, 0.2])
    included = np.array([True, False, True, False, True])
    assert right_guesses(scores, included, 2) == 2
    assert right_guesses(scores, included, 4) == 2
    assert right_guesses(scores, included, 5) == 3
