"""How well members are told from others: curves, intervals, and what a promise allows."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulation.audit.attack import auc, auc_bound, clopper_pearson, roc, tpr_at, tpr_bound


def test_perfect_and_useless_scores() -> None:
    high, low = np.arange(10.0) + 100, np.arange(200.0) / 10
    assert auc(high, low).value == 1.0
    assert tpr_at(0.01, high, low).value == 1.0
    same = np.ones(50)
    assert auc(same, same).value == 0.5
    assert tpr_at(0.01, same, same).value == 0.0  # a tie accuses everybody, so nobody
    assert roc(same, same) == [(0.0, 0.0), (1.0, 1.0)]


def test_auc_of_two_normals_is_known_and_lies_in_its_interval() -> None:
    draw = np.random.default_rng(2)
    members, others = draw.normal(1, 1, 400), draw.normal(0, 1, 400)
    exact = (1 + math.erf(0.5)) / 2  # Phi(1 / sqrt 2)
    found = auc(members, others)
    assert found.low < exact < found.high
    assert found.value == pytest.approx(exact, abs=0.04)
    area = np.trapezoid(*np.array(roc(members, others)).T[::-1])
    assert found.value == pytest.approx(float(area), abs=1e-9)


def test_at_most_the_allowed_share_is_accused() -> None:
    others = np.arange(150.0)
    assert tpr_at(0.01, np.array([148.5]), others).value == 1.0  # one of 150 accused
    assert tpr_at(0.01, np.array([147.5]), others).value == 0.0  # two would be 1.3 %
    assert tpr_at(1.0, np.array([-5.0]), others).value == 1.0


def test_exact_intervals_of_a_share() -> None:
    none = clopper_pearson(0, 20)
    assert none.low == 0.0
    assert none.high == pytest.approx(1 - 0.025 ** (1 / 20), abs=1e-9)
    half = clopper_pearson(10, 20)
    assert (half.low, half.high) == (
        pytest.approx(0.2720, abs=1e-4),
        pytest.approx(0.7280, abs=1e-4),
    )


@given(st.floats(0, 8), st.floats(0, 0.01), st.floats(0, 1))
def test_the_bound_is_a_curve_between_guessing_and_certainty(e: float, d: float, x: float) -> None:
    y = tpr_bound(x, e, d)
    assert x - 1e-12 <= y <= 1
    assert y <= tpr_bound(x, e + 0.1, d) + 1e-12
    grid = np.linspace(0, 1, 4001)
    area = np.trapezoid([tpr_bound(float(g), e, d) for g in grid], grid)
    assert auc_bound(e, d) == pytest.approx(float(area), abs=1e-3)


def test_randomised_response_reaches_the_bound() -> None:
    """Its one useful threshold: TPR q at FPR 1 - q."""
    q = 1 / (1 + math.exp(-1.5))
    assert tpr_bound(1 - q, 1.5, 0.0) == pytest.approx(q)
    assert tpr_bound(0.01, 0.0, 0.0) == pytest.approx(0.01)
    assert auc_bound(0.0, 0.0) == pytest.approx(0.5)
