"""What private steps cost: epsilon at a given delta, under adding or removing one unit.

Authority is the privacy loss distribution of ``dp-accounting`` (a pessimistic bound); Opacus's PRV
accountant, written by other people on other principles, must agree with it. The Gaussian-DP
approximation is not offered: it reports less than what is spent.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version

import dp_accounting
from dp_accounting.pld import PLDAccountant
from opacus.accountants import PRVAccountant

NAME = (
    f"PLD (dp-accounting {version('dp-accounting')}), checked by PRV (opacus {version('opacus')})"
)
_AGREEMENT = 0.02  # relative difference of the two accountants that is put down to numerics
_MAX_SIGMA = 1000.0


class AccountingError(RuntimeError):
    """Two independent accountants disagree: no figure can be trusted."""


class BudgetExhausted(ValueError):
    """The steps asked for do not fit into what is left."""


@dataclass(frozen=True)
class GaussianSteps:
    """``steps`` releases of a Poisson-sampled Gaussian mechanism. Immutable; never reinterpreted.

    ``sampling_rate`` in (0, 1]; ``noise_multiplier`` = noise standard deviation / clip norm > 0.
    """

    sampling_rate: float
    noise_multiplier: float
    steps: int

    def __post_init__(self) -> None:
        if not (0 < self.sampling_rate <= 1 and self.noise_multiplier > 0 and self.steps >= 1):
            raise ValueError(f"not a valid mechanism: {self}")


History = tuple[GaussianSteps, ...]


@lru_cache(maxsize=4096)
def epsilon(history: History, delta: float) -> float:
    """Epsilon of the composition of everything in ``history``; 0.0 when it is empty.

    Raises AccountingError when PRV and PLD differ by more than 2 % (and by more than 0.01).
    """
    if not history:
        return 0.0
    accountant = PLDAccountant()
    for event in _merged(history):
        gaussian = dp_accounting.GaussianDpEvent(event.noise_multiplier)
        sampled = dp_accounting.PoissonSampledDpEvent(event.sampling_rate, gaussian)
        accountant.compose(sampled, event.steps)
    authority = float(accountant.get_epsilon(delta))
    check = epsilon_prv(history, delta)
    if abs(check - authority) > max(_AGREEMENT * authority, 0.01):
        raise AccountingError(f"PLD says epsilon {authority:.4f}, PRV says {check:.4f}")
    return authority


def epsilon_prv(history: Sequence[GaussianSteps], delta: float) -> float:
    """The same by Opacus's PRV accountant (an upper bound within 0.01): the independent check."""
    accountant = PRVAccountant()
    events = _merged(history)
    accountant.history = [(e.noise_multiplier, e.sampling_rate, e.steps) for e in events]
    return float(accountant.get_epsilon(delta))


def _merged(history: Sequence[GaussianSteps]) -> History:
    """Equal mechanisms as one event: composition commutes, and costs per distinct event."""
    steps: Counter[tuple[float, float]] = Counter()
    for e in history:
        steps[e.sampling_rate, e.noise_multiplier] += e.steps
    return tuple(GaussianSteps(q, sigma, n) for (q, sigma), n in sorted(steps.items()))


@lru_cache(maxsize=256)
def calibrate(
    history: History, sampling_rate: float, steps: int, budget: float, delta: float
) -> float:
    """Smallest noise multiplier (to 0.2 %) for which ``history`` and ``steps`` more stay in budget.

    Rounded up to three decimals, so that the rounds of a run share one mechanism.

    ``steps`` must be ALL steps still planned: calibrating round by round overspends. Raises
    BudgetExhausted when even a noise multiplier of 1,000 would not fit.
    """

    def fits(sigma: float) -> bool:
        try:
            planned = (*history, GaussianSteps(sampling_rate, sigma, steps))
            return epsilon_prv(planned, delta) <= budget
        except (ValueError, RuntimeError, OverflowError):  # PRV gives up where epsilon is huge
            return False

    low, high = 0.3, 1.0
    while not fits(high):
        low, high = high, high * 2
        if high > _MAX_SIGMA:
            raise BudgetExhausted(f"{steps} more steps do not fit into epsilon {budget:g}")
    while high / low > 1.001:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if fits(middle) else (middle, high)
    sigma = math.ceil(high * 1000) / 1000
    while epsilon((*history, GaussianSteps(sampling_rate, sigma, steps)), delta) > budget:
        sigma += 0.001  # PRV is an upper bound on PLD up to its own error; PLD has the last word
    return sigma
