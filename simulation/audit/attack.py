"""How well members are told from others by a score, and how well (epsilon, delta) lets them be.

    (epsilon, delta)-DP    TPR <= min(e^eps FPR + delta, 1 - e^-eps (1 - delta - FPR))

(arXiv 1311.0776, theorem 2.1: the attacker tests whether one unit was there). Intervals are of
95 %: Clopper and Pearson's for the true positive rate, at the threshold that the non-members set,
and the bootstrap's for the area under the curve.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

_RESAMPLES = 2000
_TAIL = 0.025


@dataclass(frozen=True)
class Estimate:
    """A measured share with its 95 % interval."""

    value: float
    low: float
    high: float


def roc(members: np.ndarray, others: np.ndarray) -> list[tuple[float, float]]:
    """(false, true) positive rates at every threshold, from (0, 0) to (1, 1); scores are 1-D.

    Equal scores are one threshold, so ties flatter nobody.
    """
    thresholds = np.unique(np.concatenate([members, others]))[::-1]
    points = [(0.0, 0.0)]
    points += [(float((others >= t).mean()), float((members >= t).mean())) for t in thresholds]
    return points


def auc(members: np.ndarray, others: np.ndarray) -> Estimate:
    """Chance that a member scores above another (ties half), with its bootstrap interval."""
    draw = np.random.default_rng(0)  # of the interval only
    wins = (members[:, None] > others) + 0.5 * (members[:, None] == others)
    rows = draw.integers(len(members), size=(_RESAMPLES, len(members)))
    columns = draw.integers(len(others), size=(_RESAMPLES, len(others)))
    means = [float(wins[np.ix_(r, c)].mean()) for r, c in zip(rows, columns, strict=True)]
    low, high = np.quantile(means, [_TAIL, 1 - _TAIL])
    return Estimate(float(wins.mean()), float(low), float(high))


def tpr_at(fpr: float, members: np.ndarray, others: np.ndarray) -> Estimate:
    """Share of members found when at most a share ``fpr`` of the others is accused."""
    allowed = math.floor(fpr * len(others) + 1e-9)
    threshold = np.sort(others)[::-1][allowed] if allowed < len(others) else -np.inf
    found = int((members > threshold).sum())
    return clopper_pearson(found, len(members))


def clopper_pearson(successes: int, trials: int) -> Estimate:
    """Share of successes with its exact 95 % interval."""

    def at_most(k: int, p: float) -> float:
        return math.fsum(
            math.comb(trials, i) * p**i * (1 - p) ** (trials - i) for i in range(k + 1)
        )

    low = 0.0
    if successes > 0:
        low = _root(lambda p: 1 - at_most(successes - 1, p) < _TAIL)
    high = 1.0
    if successes < trials:
        high = _root(lambda p: at_most(successes, p) > _TAIL)
    return Estimate(successes / trials, low, high)


def tpr_bound(fpr: float, epsilon: float, delta: float) -> float:
    """The most members that can be found at ``fpr`` under (epsilon, delta)."""
    e = math.exp(min(epsilon, 700.0))
    return max(0.0, min(1.0, e * fpr + delta, 1 - (1 - delta - fpr) / e))


def auc_bound(epsilon: float, delta: float) -> float:
    """Area under ``tpr_bound``: two straight lines that meet at x, then one."""
    e = math.exp(min(epsilon, 700.0))
    x = (1 - delta) / (1 + e)
    y = delta + e * x
    return (delta + y) / 2 * x + (y + 1) / 2 * (1 - delta - x) + delta


def _root(below: Callable[[float], bool]) -> float:
    """Where ``below``, true on the left in (0, 1), turns false."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) else (low, middle)
    return low
