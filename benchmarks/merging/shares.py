"""From bits of held-out notes to gains, shares of a reference's gain, and what they are good for.

Gain: bits per character of the base model less those of the adapter, mean over departments, mean
over seeds. Share: gain / gain of the federation without privacy (strategy fedsvd). Intervals are
95 % percentile bootstraps that draw seeds, and held-out notes within each department, with
replacement; the reference is drawn with the same seeds and notes, for it was measured on the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.merging.quality import (
    ALONE,
    ARMS,
    AT_OTHER_RATES,
    EPSILONS,
    IN_ROUNDS,
    MIXED,
    POOLED,
    STATISTICS,
    Epsilon,
    Result,
)

_DRAWS = 1000
Notes = dict[str, np.ndarray]  # department -> numbers of its notes


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


def rows(results: Sequence[Result], hospitals: int) -> list[Row]:
    """Every arm that was measured with so many hospitals, in the order of ``ARMS``."""
    own = [r for r in results if r.cell.hospitals == hospitals]
    reference = _of(own, "fedsvd", None)
    if not reference:
        return []
    found = []
    for arm in (*ARMS, *STATISTICS, *MIXED, POOLED, ALONE, *IN_ROUNDS, *AT_OTHER_RATES):
        for epsilon in EPSILONS:
            measured = _of(own, arm, epsilon)
            if measured:
                found.append(_row(arm, epsilon, measured, reference))
    return found


def rules(results: Sequence[Result], hospitals: int) -> list[Row]:
    """The last round of the fedsvd federation merged by other strategies."""
    own = [r for r in results if r.cell.hospitals == hospitals and r.rules]
    reference = _of(own, "fedsvd", None)
    if not reference:
        return []
    found = []
    for name in dict.fromkeys(name for r in own for name in r.rules):
        for epsilon in EPSILONS:
            measured = [
                (r, r.rules[name]) for r, _ in _of(own, "fedsvd", epsilon) if name in r.rules
            ]
            if measured:
                found.append(_row(name, epsilon, measured, reference))
    return found


Measured = list[tuple[Result, dict[str, list[float]]]]
BySeed = dict[int, tuple[Result, dict[str, list[float]]]]


def _of(results: Sequence[Result], arm: str, epsilon: Epsilon) -> Measured:
    return [(r, r.bits) for r in results if r.cell.arm == arm and r.cell.epsilon == epsilon]


def _row(arm: str, epsilon: Epsilon, measured: Measured, reference: Measured) -> Row:
    random = np.random.default_rng(0)
    sizes = {name: len(bits) for name, bits in measured[0][1].items()}
    everything = {name: np.arange(n) for name, n in sizes.items()}
    own = {result.cell.seed: (result, bits) for result, bits in measured}
    same = {result.cell.seed: (result, bits) for result, bits in reference}
    seeds = sorted(own)
    shared = [seed for seed in seeds if seed in same]
    gains, shares = [_gain([own[s] for s in seeds], everything)], []
    if shared:
        shares = [_share(own, same, shared, everything)]
    for _ in range(_DRAWS):
        notes = {name: random.integers(0, n, n) for name, n in sizes.items()}
        gains.append(_gain([own[s] for s in random.choice(seeds, len(seeds))], notes))
        if shared:
            shares.append(_share(own, same, random.choice(shared, len(shared)).tolist(), notes))
    share = _figure(shares, len(shared)) if shares and (arm, epsilon) != ("fedsvd", None) else None
    return Row(arm, epsilon, _figure(gains, len(measured)), share)


def _share(own: BySeed, reference: BySeed, seeds: Sequence[int], notes: Notes) -> float:
    """Of the reference's gain, under the same seeds and on the same notes."""
    return _gain([own[s] for s in seeds], notes) / _gain([reference[s] for s in seeds], notes)


def _gain(measured: Measured, notes: Notes) -> float:
    """Mean over seeds and departments of the bits per character saved on the chosen notes."""
    gains = []
    for result, bits in measured:
        for name, chosen in notes.items():
            after = np.array(bits[name])  # rules are scored on the first notes only
            saved = np.array(result.base[name])[: len(after)] - after
            gains.append(saved[chosen].sum() / np.array(result.chars[name])[chosen].sum())
    return float(np.mean(gains))


def _figure(draws: Sequence[float], seeds: int) -> Figure:
    low, high = np.percentile(draws[1:], [2.5, 97.5])
    return Figure(draws[0], float(low), float(high), seeds)
