"""Lower bounds on epsilon from one run with canaries: what an attacker proved is not private.

Each of m canaries was included by its own fair coin. The attacker ranks them by a score, calls the
highest ``included`` and the lowest ``left out``, and abstains on the rest: r guesses, v of them
right. Under the promise so many right guesses are improbable, unless the promise is weak enough;
the bound is the largest epsilon that the observation refutes. It holds with the stated confidence
for every mechanism (``steinke``) or for every mu-GDP mechanism (``gaussian``), so a bound above the
claim is a defect, whereas a bound below it proves nothing.

    steinke    P[W >= v] <= P[B >= v] + 2 m delta max_i (P[B >= v-i] - P[B >= v]) / i,
               B ~ Binomial(r, e^eps / (1 + e^eps))             arXiv 2305.08846, theorem 5.2
    gaussian   sum_{i in T} i p_i <= F(sum_{i in T} (r-i+1) p_{i-1}), p_i = P[W = i],
               F(x) = Phi(Phi^-1(x) + mu)                       arXiv 2410.22235, theorem 9
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np

CONFIDENCE = 0.95
_SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)  # of the canaries that are guessed
_LARGEST = 60.0  # no audit of a few thousand canaries can prove more
_inverse = NormalDist().inv_cdf


def right_guesses(scores: np.ndarray, included: np.ndarray, guesses: int) -> int:
    """How many are right when the ``guesses`` / 2 highest and lowest scores are guessed.

    ``scores`` (m) float, higher for included ones; ``included`` (m) bool.
    """
    order = np.argsort(scores, kind="stable")
    low, high = guesses // 2, guesses - guesses // 2
    return int((~included[order[:low]]).sum() + included[order[len(order) - high :]].sum())


def steinke(m: int, guesses: int, right: int, delta: float, significance: float) -> float:
    """The largest epsilon refuted at ``significance`` by ``right`` of ``guesses``; 0.0 if none."""

    def refuted(epsilon: float) -> bool:
        tails = _binomial_tails(guesses, 1 / (1 + math.exp(-epsilon)))
        slack = 0.0
        if delta > 0 and right > 0:
            more = tails[right - 1 :: -1] - tails[right]  # P[v > B >= v - i] for i = 1, ..., v
            slack = 2 * m * delta * float((more / np.arange(1, right + 1)).max())
        return float(tails[right]) + slack < significance

    return _largest(refuted, _LARGEST)


def gaussian(m: int, guesses: int, right: int, significance: float) -> float:
    """The largest mu for which mu-GDP is refuted at ``significance``; 0.0 if none."""

    def refuted(mu: float) -> bool:
        hits = significance * right / m
        misses = significance * (guesses - right) / m
        for i in range(right - 1, -1, -1):
            needed = max(misses, normal_cdf(_inverse(hits) - mu)) if hits < 1 else 1.0
            if needed == misses:
                break  # nothing can change any more
            hits = min(1.0, hits + i / (guesses - i) * (needed - misses))
            misses = needed
            if hits + misses > guesses / m:
                return True
        return hits + misses > guesses / m

    return _largest(refuted, _LARGEST) if right else 0.0


def epsilon_steinke(
    scores: np.ndarray, included: np.ndarray, delta: float, confidence: float = CONFIDENCE
) -> float:
    """Lower bound on epsilon at ``delta``, valid for any mechanism with ``confidence``.

    Several numbers of guesses are tried; the significance is divided among them (Bonferroni).
    """
    m = len(scores)
    return max(
        steinke(m, r, right_guesses(scores, included, r), delta, (1 - confidence) / len(_SHARES))
        for r in _numbers_of_guesses(m)
    )


def epsilon_gaussian(
    scores: np.ndarray, included: np.ndarray, delta: float, confidence: float = CONFIDENCE
) -> float:
    """Lower bound on epsilon at ``delta`` for a mechanism with a Gaussian trade-off curve.

    That is the curve of any number of Gaussian releases without subsampling.
    """
    m = len(scores)
    mu = max(
        gaussian(m, r, right_guesses(scores, included, r), (1 - confidence) / len(_SHARES))
        for r in _numbers_of_guesses(m)
    )
    return gaussian_epsilon(mu, delta)


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Epsilon of a mu-GDP mechanism at ``delta`` in (0, 1) (arXiv 1905.02383, corollary 2.13).

    delta(eps) = Phi(mu/2 - eps/mu) - e^eps Phi(-mu/2 - eps/mu)
    """

    def too_small(epsilon: float) -> bool:
        tail = normal_cdf(-mu / 2 - epsilon / mu)
        loss = math.exp(epsilon + math.log(tail)) if tail > 0 else 0.0
        return normal_cdf(mu / 2 - epsilon / mu) - loss > delta

    return _largest(too_small, mu * mu / 2 + 40 * mu) if mu > 0 else 0.0


def normal_cdf(x: float) -> float:
    """Phi(x), exact in the lower tail too."""
    return math.erfc(-x / math.sqrt(2)) / 2


def _numbers_of_guesses(m: int) -> list[int]:
    return sorted({max(1, round(share * m)) for share in _SHARES})


def _binomial_tails(n: int, p: float) -> np.ndarray:
    """P[Binomial(n, p) >= k] for k = 0, ..., n, in float64."""
    k = np.arange(n + 1)
    choose = np.array([math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in k])
    q = -math.expm1(math.log(p)) if p < 1 else 0.0
    if q == 0.0:
        return np.ones(n + 1)
    mass = np.exp(choose + k * math.log(p) + (n - k) * math.log(q))
    return np.minimum(np.cumsum(mass[::-1])[::-1], 1.0)


def _largest(holds: Callable[[float], bool], high: float) -> float:
    """The largest x in [0, high] up to which ``holds`` is true (true below, false above)."""
    if not holds(0.0 if high < 1e-9 else 1e-9):
        return 0.0
    low = 0.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
