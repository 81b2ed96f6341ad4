"""What private steps cost: epsilon at a given delta, under adding or removing one unit.

Authority is the privacy loss distribution of ``dp-accounting`` (a pessimistic bound); Opacus's PRV
accountant, written by other people on other principles, must agree with it (``dp-accounting`` only
tells it how wide its grid has to be). The Gaussian-DP approximation is not offered: it reports less
than what is spent.

What a figure covers. PLD (and PRV) compose mechanisms whose parameters were chosen in advance: by
the plan, or by what the public knew before the first of them. A coordinator may instead choose the
next round's sampling rate and steps in reaction to outputs it has seen (composition is then *fully
adaptive*). Renyi privacy adds up in that case too: Feldman and Zrnic, "Individual Privacy
Accounting via a Renyi Filter" (NeurIPS 2021), show it for an order and a bound fixed beforehand.
``epsilon_rdp``, loose by about a quarter, is therefore shown beside the authority.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, reduce
from importlib.metadata import version

import dp_accounting
import numpy as np
from dp_accounting.pld.privacy_loss_distribution import (
    PrivacyLossDistribution,
    from_gaussian_mechanism,
)
from dp_accounting.rdp import RdpAccountant
from opacus.accountants import PRVAccountant
from opacus.accountants.analysis.prv import Domain

NAME = (
    f"PLD (dp-accounting {version('dp-accounting')}), checked by PRV (opacus {version('opacus')})"
)
_AGREEMENT = 0.02  # relative difference of the two accountants that is put down to numerics
_ROUNDING = 1e-4  # of epsilon, relative where it is above 1: about what the grid of losses may add
_INTERVALS = (1e-3, 5e-4, 2e-4, 1e-4, 5e-5, 2e-5, 1e-5, 5e-6, 2e-6, 1e-6)  # of that grid
_COARSE = 10  # times that interval, to find about where a figure lies
_PRV_ERROR = 0.01  # of epsilon: PRV adds its own error bound to its figure
# Renyi orders; below 2 the series of a sampled Gaussian often does not converge.
_WHOLE_ORDERS = (*range(2, 64), 128, 256, 512, 1024)
_ORDERS = (*(2 + i / 4 for i in range(40)), *(o for o in _WHOLE_ORDERS if o >= 12))
_MIN_SIGMA, _MAX_SIGMA = 0.3, 1000.0


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


def epsilon(history: History, delta: float) -> float:
    """Epsilon of the composition of everything in ``history``; 0.0 when it is empty.

    Raises AccountingError when PRV, less its own error bound, and PLD differ by more than 2 % (and
    by more than 0.01).
    """
    return _epsilon(_merged(history), delta) if history else 0.0


@lru_cache(maxsize=4096)
def _epsilon(history: History, delta: float) -> float:
    authority = _authority(history, delta)
    check = epsilon_prv(history, delta)
    if not abs(check - _PRV_ERROR - authority) <= max(_AGREEMENT * authority, 0.01):  # nor NaN
        raise AccountingError(f"PLD says epsilon {authority:.4f}, PRV says {check:.4f}")
    return authority


def _authority(history: History, delta: float, coarse: int = 1) -> float:
    interval = _interval(history, delta) * coarse
    losses = (
        _loss(e.sampling_rate, e.noise_multiplier, interval).self_compose(e.steps)
        for e in _merged(history)
    )
    return float(reduce(PrivacyLossDistribution.compose, losses).get_epsilon_for_delta(delta))


@lru_cache(maxsize=16)  # a plan's steps share it: to compute it costs more than to compose it
def _loss(
    sampling_rate: float, noise_multiplier: float, interval: float
) -> PrivacyLossDistribution:
    """Privacy loss distribution of one step, adding or removing one unit, rounded upwards."""
    return from_gaussian_mechanism(
        noise_multiplier, sampling_prob=sampling_rate, value_discretization_interval=interval
    )


def _interval(history: History, delta: float) -> float:
    """Widest grid of privacy losses whose rounding adds about ``_ROUNDING`` to epsilon.

    Losses are rounded to an interval h upwards in divergence ("connect the dots": Doroshenko et
    al., 2022), which makes the variance of one step's loss h^2 / 6 larger. Near the Gaussian limit
    epsilon = sqrt(2 log(1 / delta) V) over the whole variance V, so it grows by
    N h^2 sqrt(2 log(1 / delta) / V) / 12 in N steps. One step's variance is q^2 (e^(1 / sigma^2) -
    1) where q is small, and 1 / sigma^2 where q is 1. Time goes with 1 / h.
    """
    steps = sum(e.steps for e in history)
    variance = sum(
        e.steps
        * min(
            e.sampling_rate**2 * math.expm1(min(e.noise_multiplier**-2, 50.0)),
            e.noise_multiplier**-2,
        )
        for e in history
    )
    spread = 2 * math.log(1 / delta)
    allowed = _ROUNDING * max(1.0, (spread * variance) ** 0.5)
    widest = (12 * allowed / (steps * (spread / variance) ** 0.5)) ** 0.5
    return next((h for h in _INTERVALS if h <= widest), _INTERVALS[-1])


class _PRV(PRVAccountant):
    """Opacus's accountant, told how wide its grid must be by a Renyi bound that is cheap.

    Its own takes 97 % of its time, for 151 orders of which one is used.
    """

    def _get_domain(
        self, prvs: object, num_self_compositions: list[int], eps_error: float, delta_error: float
    ) -> Domain:
        """Remark 5.6 of Gopi, Lee and Wutschitz, "Numerical Composition of Differential Privacy"
        (NeurIPS 2021): the composition's loss, and that of each single step, lie within it."""
        events = tuple(GaussianSteps(q, sigma, steps) for sigma, q, steps in self.history)
        steps = sum(num_self_compositions)
        widest = max(
            eps_error,
            _renyi(events, delta_error / 4, _WHOLE_ORDERS),
            *(
                _renyi((replace(e, steps=1),), delta_error / (8 * steps), _WHOLE_ORDERS)
                for e in events
            ),
        )
        mesh = eps_error / (steps * math.log(12 / delta_error) / 2) ** 0.5
        return Domain.create_aligned(-widest - 3, widest + 3, mesh)


def epsilon_prv(history: Sequence[GaussianSteps], delta: float) -> float:
    """The same by Opacus's PRV accountant (an upper bound within 0.01): the independent check."""
    accountant = _PRV()
    events = _merged(history)
    accountant.history = [(e.noise_multiplier, e.sampling_rate, e.steps) for e in events]
    with np.errstate(divide="ignore"):  # it takes the log of zero where it then does not use it
        return float(accountant.get_epsilon(delta, eps_error=_PRV_ERROR))


def epsilon_rdp(history: History, delta: float, order: float | None = None) -> float:
    """The same by Renyi composition (Mironov 2017; Mironov, Talwar and Zhang 2019): cheap, loose.

    The smallest epsilon over a usual range of orders, or that of one ``order`` > 1. Strictly, only
    the figure of an order that was fixed before the first round also holds for a coordinator that
    chooses in reaction to outputs.
    """
    return _renyi(history, delta, [order] if order else _ORDERS) if history else 0.0


def _renyi(history: History, delta: float, orders: Sequence[float]) -> float:
    accountant = RdpAccountant(orders)
    for event in _merged(history):
        gaussian = dp_accounting.GaussianDpEvent(event.noise_multiplier)
        sampled = dp_accounting.PoissonSampledDpEvent(event.sampling_rate, gaussian)
        accountant.compose(sampled, event.steps)
    return float(accountant.get_epsilon(delta))


def _merged(history: Sequence[GaussianSteps]) -> History:
    """Equal mechanisms as one event: composition commutes, and costs per distinct event."""
    steps: Counter[tuple[float, float]] = Counter()
    for e in history:
        steps[e.sampling_rate, e.noise_multiplier] += e.steps
    return tuple(GaussianSteps(q, sigma, n) for (q, sigma), n in sorted(steps.items()))


def steps_within(
    history: History,
    sampling_rate: float,
    noise_multiplier: float,
    budget: float,
    delta: float,
    most: int,
) -> int:
    """How many steps of one mechanism fit into ``budget`` after ``history``; at most ``most``.

    Compositions far beyond the budget, whose grid of losses would fill the memory, are not formed.
    """

    def fits(steps: int) -> bool:
        planned = (*history, GaussianSteps(sampling_rate, noise_multiplier, steps))
        return _authority(planned, delta) <= budget

    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, high * 2
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


@lru_cache(maxsize=256)
def calibrate(
    history: History, sampling_rate: float, steps: int, budget: float, delta: float
) -> float:
    """Smallest noise multiplier (to 0.2 %) for which ``history`` and ``steps`` more stay in budget.

    Rounded up to three decimals, so that the rounds of a run share one mechanism.

    ``steps`` must be ALL steps still planned: calibrating round by round overspends. Raises
    BudgetExhausted when even a noise multiplier of 1,000 would not fit.
    """

    def fits(sigma: float, coarse: int) -> bool:
        planned = (*history, GaussianSteps(sampling_rate, sigma, steps))
        return _authority(planned, delta, coarse) <= budget

    low, high = _MIN_SIGMA, 1.0
    for coarse, precision in ((_COARSE, 1.004), (1, 1.001)):
        while high < _MAX_SIGMA and not fits(high, coarse):
            low, high = high, min(high * 2, _MAX_SIGMA)
        while low > _MIN_SIGMA and fits(low, coarse):  # the coarse figure was too high
            low, high = max(_MIN_SIGMA, low * (low / high) ** 2), low
        while high / low > precision:
            middle = (low * high) ** 0.5
            low, high = (low, middle) if fits(middle, coarse) else (middle, high)
    if not fits(high, 1):
        raise BudgetExhausted(f"{steps} more steps do not fit into epsilon {budget:g}")
    sigma = math.ceil(high * 1000) / 1000
    while epsilon((*history, GaussianSteps(sampling_rate, sigma, steps)), delta) > budget:
        sigma += 0.001
    return sigma
