"""From bits of held-out notes to gains, shares of a reference's gain, and what they are good for.

Gain: bits per character of the base model less those of the adapter, mean over departments, mean
over seeds. Share: gain / gain of the federation without privacy (strategy fedsvd), under the same
seeds and on the same notes. Difference: share less that of fedsvd at the same epsilon.

95 % intervals: value +- sqrt((t s / sqrt(n))^2 + (1.96 e)^2), with s the standard deviation over n
seeds, t Student's quantile of n - 1 degrees of freedom, and e the standard error over notes, by a
bootstrap that draws them within each department, the same for all seeds and for the reference. A
ratio is linearised: its deviation under one seed is (gain - share reference) / mean reference.
Under one seed alone nothing is known of seeds, and the interval is that of notes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

from benchmarks.merging.quality import (
    ALONE,
    ARMS,
    AT_OTHER_RATES,
    EPSILONS,
    IN_ROUNDS,
    MIXED,
    OWN_NOTES,
    POOLED,
    STATISTICS,
    WITHOUT_PRIVACY,
    Epsilon,
    Result,
)

_DEFAULT = "fedsvd"
_DRAWS = 1000
_NORMAL = 1.96
Draws = dict[str, np.ndarray]  # department -> numbers of its notes, (draws, notes); all come first


@dataclass(frozen=True)
class Figure:
    """A number with its 95 % interval; ``seeds`` it rests on."""

    value: float
    low: float
    high: float
    seeds: int


@dataclass(frozen=True)
class Row:
    """One arm (or rule) at one epsilon: gain in bits per character, and share of the reference."""

    arm: str
    epsilon: Epsilon
    gain: Figure
    share: Figure | None
    difference: Figure | None  # of shares, to fedsvd at the same epsilon under the same seeds


def rows(results: Sequence[Result], hospitals: int) -> list[Row]:
    """Every arm that was measured with so many hospitals, in the order of ``ARMS``."""
    own = [r for r in results if r.cell.hospitals == hospitals]
    arms = (
        *ARMS, *STATISTICS, *MIXED, POOLED, ALONE, OWN_NOTES, *IN_ROUNDS, *WITHOUT_PRIVACY,
        *AT_OTHER_RATES,
    )  # fmt: skip
    return _rows(arms, lambda arm, epsilon: _of(own, arm, epsilon))


def rules(results: Sequence[Result], hospitals: int) -> list[Row]:
    """The last round of the fedsvd federation merged by other strategies."""
    own = [r for r in results if r.cell.hospitals == hospitals and r.cell.arm == _DEFAULT]
    names = list(dict.fromkeys(name for r in own for name in r.rules))
    return _rows(
        names,
        lambda name, epsilon: {
            r.cell.seed: (r, r.rules[name])
            for r in own
            if r.cell.epsilon == epsilon and name in r.rules
        },
    )


BySeed = dict[int, tuple[Result, dict[str, list[float]]]]


def _of(results: Sequence[Result], arm: str, epsilon: Epsilon) -> BySeed:
    """Bits by department; ``OWN_NOTES`` are those of each hospital alone, on its own notes."""
    if arm == OWN_NOTES:
        found = _of(results, ALONE, epsilon)
        return {s: (r, r.rules[OWN_NOTES]) for s, (r, _) in found.items() if OWN_NOTES in r.rules}
    return {
        r.cell.seed: (r, r.bits) for r in results if r.cell.arm == arm and r.cell.epsilon == epsilon
    }


def _rows(arms: Iterable[str], measured: Callable[[str, Epsilon], BySeed]) -> list[Row]:
    reference = measured(_DEFAULT, None)
    if not reference:
        return []
    found = []
    for arm in arms:
        for epsilon in EPSILONS:
            if own := measured(arm, epsilon):
                found.append(_row(arm, epsilon, own, reference, measured(_DEFAULT, epsilon)))
    return found


def _row(arm: str, epsilon: Epsilon, own: BySeed, reference: BySeed, default: BySeed) -> Row:
    sizes = {name: len(bits) for name, bits in next(iter(own.values()))[1].items()}
    random = np.random.default_rng(0)
    draws = {
        name: np.vstack([np.arange(n), random.integers(0, n, (_DRAWS, n))])
        for name, n in sizes.items()
    }

    def gains(of: BySeed, seeds: Sequence[int]) -> np.ndarray:
        return np.stack([_gain(*of[seed], draws) for seed in seeds], axis=1)

    share = difference = None
    if (shared := sorted(own.keys() & reference.keys())) and (arm, epsilon) != (_DEFAULT, None):
        share = _ratio(gains(own, shared), gains(reference, shared))
    both = [seed for seed in shared if seed in default]
    if both and arm != _DEFAULT:
        difference = _ratio(gains(own, both) - gains(default, both), gains(reference, both))
    every = gains(own, shared or sorted(own))
    return Row(arm, epsilon, _ratio(every, np.ones_like(every)), share, difference)


def _ratio(above: np.ndarray, below: np.ndarray) -> Figure:
    """mean(above) / mean(below), each (draws of notes, seeds); all notes first."""
    values = above.mean(1) / below.mean(1)
    value, seeds = values[0], above.shape[1]
    squared = (_NORMAL * values[1:].std()) ** 2
    if seeds > 1:
        deviations = (above[0] - value * below[0]) / below[0].mean()
        squared += (student.ppf(0.975, seeds - 1) * deviations.std(ddof=1)) ** 2 / seeds
    half = float(np.sqrt(squared))
    return Figure(float(value), float(value) - half, float(value) + half, seeds)


def _gain(result: Result, bits: Mapping[str, Sequence[float]], draws: Draws) -> np.ndarray:
    """Mean over departments of the bits per character saved, for each draw of notes."""
    gains = []
    for name, notes in draws.items():
        after = np.array(bits[name])  # rules are scored on the first notes only
        saved = np.array(result.base[name])[: len(after)] - after
        chars = np.array(result.chars[name])
        gains.append(saved[notes].sum(1) / chars[notes].sum(1))
    return np.mean(gains, axis=0)
