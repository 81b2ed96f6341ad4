"""The checks of one engine: each measures one promise and says how far it may be from it.

    canaries      the epsilon that canaries prove            <= the claimed epsilon
    sensitivity   how far one unit moves the un-noised sum   <= C
    isolation     effect of batch mates on what a unit adds  =  0
    fresh noise   correlation of the noise of two rounds     =  0
    constant      released scale at N, N + 4, 2N units       is the same
    noise         measured standard deviation of the noise   =  sigma C

Limits leave room for rounding and chance: a sound engine fails one of them less than once in 10^8
runs, except for ``canaries``, whose bound is wrong in at most 5 % of the runs, and far less often
as it stays well below the claim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from peft import PeftModel

from client.privacy.accountant import GaussianSteps, epsilon
from client.privacy.engine import Unit, trained_parameters
from client.privacy.randomness import SecureRandomness
from simulation.audit.engine import Engine, Gradient, Mechanism
from simulation.audit.one_run import epsilon_gaussian, epsilon_steinke
from simulation.audit.planted import Plant

T = TypeVar("T")

_ROUNDING = 1e-4  # float32 gradients, relative
_NUMBERS = 500_000  # of noise, so that its standard deviation is known to 0.1 %
_NOISE = 0.01
_UNCLIPPED = 1e6
_LOUD = 10.0  # norm of a planted gradient in units of C


@dataclass(frozen=True)
class Finding:
    """One check: ``measured`` must be at most ``limit``, or with ``least`` at least that."""

    check: str
    measured: float
    limit: float
    least: bool = False

    @property
    def passed(self) -> bool:
        """False also when the measurement is not a number."""
        return self.measured >= self.limit if self.least else self.measured <= self.limit


@dataclass(frozen=True, eq=False)
class Bench:
    """What engines are tried on: a model with its adapter, notes, and the promise.

    ``notes`` are token rows of at least two tokens and of different lengths; ``canaries`` is how
    many canaries play the game, at most the number of planted rows. What depends on the gradient
    sum alone is computed once for all engines that share it.
    """

    model: PeftModel
    notes: Sequence[Sequence[int]]
    mechanism: Mechanism
    delta: float
    canaries: int
    _known: dict[Any, Any] = field(default_factory=dict, repr=False)

    def once(self, engine: Engine, compute: Callable[[Engine, Bench], T]) -> T:
        """``compute(engine, self)``, or what it gave for an engine with the same gradient sum."""
        key = compute, engine.gradient_sum
        if key not in self._known:
            self._known[key] = compute(engine, self)
        known: T = self._known[key]
        return known

    @property
    def claimed(self) -> float:
        """Epsilon of one step in which every unit takes part, by the accountant."""
        return epsilon((GaussianSteps(1.0, self.mechanism.noise_multiplier, 1),), self.delta)

    def plant(self) -> Plant:
        """Planted gradients that have to be clipped."""
        return Plant(self.model, _LOUD * self.mechanism.clip_norm)

    @property
    def usual_units(self) -> int:
        """Hospital size at which a denominator of a quarter of it would be the public one."""
        return 4 * self.mechanism.denominator


@dataclass(frozen=True)
class CanaryGame:
    """Scores of all canaries in one release, who was in it, and what that proves."""

    scores: np.ndarray  # (m), about 1 for those included and 0 for the others, plus noise
    included: np.ndarray  # (m) bool
    claimed: float
    steinke: float
    gaussian: float

    @property
    def proved(self) -> float:
        """The larger of the two lower bounds on epsilon."""
        return max(self.steinke, self.gaussian)


@dataclass(frozen=True)
class _Sum:
    """The un-noised sum over the canaries that a fair coin included."""

    rows: np.ndarray
    included: np.ndarray
    total: Gradient


def _canary_sum(engine: Engine, bench: Bench) -> _Sum:
    plant = bench.plant()
    rows = np.unique(np.linspace(0, plant.rows - 1, min(bench.canaries, plant.rows)).astype(int))
    included = SecureRandomness().uniform(len(rows)) < 0.5
    units = [plant.unit(int(row)) for row in rows[included]]
    with plant.open():
        total = engine.gradient_sum(bench.model, units, bench.mechanism.clip_norm)
    return _Sum(rows, included, total)


def canaries(engine: Engine, bench: Bench) -> tuple[Finding, CanaryGame]:
    """One release over canaries that a fair coin included, and the attack on it."""
    mechanism, known = bench.mechanism, bench.once(engine, _canary_sum)
    released = engine.release(known.total, mechanism, bench.usual_units)
    scores = bench.plant().scores(released, known.rows)
    scores *= mechanism.denominator / mechanism.clip_norm
    included = known.included
    game = CanaryGame(
        scores,
        included,
        bench.claimed,
        epsilon_steinke(scores, included, bench.delta),
        epsilon_gaussian(scores, included, bench.delta),
    )
    return Finding("canaries", game.proved, game.claimed), game


def sensitivity(engine: Engine, bench: Bench) -> Finding:
    """The farthest that one unit moves the sum, in units of C, over hard neighbours.

    The unit comes first or last; it opposes its mates, repeats one, is one note or several.
    """
    plant, c = bench.plant(), bench.mechanism.clip_norm
    notes = [[row] for row in sorted(bench.notes, key=len)]
    against: list[tuple[list[Unit], Unit]] = [
        ([plant.unit(0)], plant.unit(0, -5)),
        ([plant.unit(0), plant.unit(1)], [*plant.unit(2), *plant.unit(3)]),
        ([*notes[:3]], notes[-1]),
        ([*notes[-3:]], notes[0]),
        ([*notes[:2], plant.unit(0)], [notes[0][0], notes[-1][0], notes[1][0]]),
    ]
    worst = 0.0
    with plant.open():
        for mates, unit in against:
            without = engine.gradient_sum(bench.model, mates, c)
            for order in ([unit, *mates], [*mates, unit]):
                moved = _difference(engine.gradient_sum(bench.model, order, c), without)
                worst = max(worst, _norm(moved) / c)
    return Finding("sensitivity", worst, 1 + _ROUNDING)


def isolation(engine: Engine, bench: Bench) -> Finding:
    """How much the parts of a batch differ from their sum, relative, where nothing is clipped."""
    units = [[row] for row in sorted(bench.notes, key=len)]
    units = [units[0], units[-1], units[len(units) // 2]]
    together = engine.gradient_sum(bench.model, units, _UNCLIPPED)
    apart = {name: torch.zeros_like(t) for name, t in together.items()}
    for unit in units:
        for name, t in engine.gradient_sum(bench.model, [unit], _UNCLIPPED).items():
            apart[name] += t
    return Finding("isolation", _norm(_difference(together, apart)) / _norm(apart), 10 * _ROUNDING)


def fresh_noise(engine: Engine, bench: Bench) -> Finding:
    """Correlation of what two rounds release from the same sum."""
    one, two = (_flat(_silence(engine, bench, bench.usual_units)) for _ in range(2))
    lengths = float(np.linalg.norm(one) * np.linalg.norm(two))
    correlation = abs(float(one @ two)) / lengths if lengths else 1.0  # no noise repeats itself
    return Finding("fresh noise", correlation, 6 / math.sqrt(len(one)))


def constant(engine: Engine, bench: Bench) -> Finding:
    """Largest relative change of the released scale among hospitals of different size."""
    units = bench.usual_units
    scales = [_scale(engine, bench, n) for n in (units, units + 4, 2 * units)]
    change = max(scales) / min(scales) - 1 if min(scales) else 1.0  # nothing to measure
    return Finding("constant", change, _NOISE)


def noise(engine: Engine, bench: Bench) -> Finding:
    """Relative error of the noise's standard deviation, scaled back to the sum, against sigma C."""
    m = bench.mechanism
    measured = _scale(engine, bench, bench.usual_units) * m.denominator
    return Finding("noise", abs(measured / (m.noise_multiplier * m.clip_norm) - 1), _NOISE)


@dataclass(frozen=True)
class Verdict:
    """All checks of one engine."""

    engine: str
    defect: str | None
    findings: tuple[Finding, ...]
    game: CanaryGame

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the checks that did not pass: those that caught it, if it is sabotaged."""
        return tuple(f.check for f in self.findings if not f.passed)

    @property
    def as_it_should_be(self) -> bool:
        """The honest engine passes everything, a sabotaged one fails something."""
        return bool(self.failed) == (self.defect is not None)


def examine(engine: Engine, bench: Bench) -> Verdict:
    """Put one engine through every check."""
    first, game = canaries(engine, bench)
    sums = (bench.once(engine, check) for check in (sensitivity, isolation))
    noises = (check(engine, bench) for check in (fresh_noise, constant, noise))
    return Verdict(engine.name, engine.defect, (first, *sums, *noises), game)


def _silence(engine: Engine, bench: Bench, units: int) -> Gradient:
    """What is released when the sum is zero."""
    total = {
        name: torch.zeros(p.shape, dtype=torch.float64, device=p.device)
        for name, p in trained_parameters(bench.model).items()
    }
    return engine.release(total, bench.mechanism, units)


def _scale(engine: Engine, bench: Bench, units: int) -> float:
    """Standard deviation of what is released when the sum is zero."""
    squares, count = 0.0, 0
    while count < _NUMBERS:
        numbers = _flat(_silence(engine, bench, units))
        squares, count = squares + float(numbers @ numbers), count + len(numbers)
    return math.sqrt(squares / count)


def _flat(gradient: Gradient) -> np.ndarray:
    return np.concatenate([g.double().cpu().flatten().numpy() for g in gradient.values()])


def _difference(one: Gradient, other: Gradient) -> Gradient:
    return {name: one[name].double() - other[name].double() for name in one}


def _norm(gradient: Gradient) -> float:
    return float(sum(g.double().square().sum() for g in gradient.values())) ** 0.5
