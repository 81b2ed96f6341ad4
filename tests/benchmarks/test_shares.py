"""Shares of a gain and their intervals: what notes and seeds leave uncertain, and no less."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest

from benchmarks.merging.quality import FULL, Cell, Epsilon, Result
from benchmarks.merging.shares import Row, rows

CHARS = 100


def result(arm: str, epsilon: Epsilon, seed: int, saved: dict[str, np.ndarray]) -> Result:
    """A federation that saved so many bits per character on each note of each department."""
    base = {name: [3.0 * CHARS] * len(own) for name, own in saved.items()}
    bits = {name: [(3.0 - one) * CHARS for one in own] for name, own in saved.items()}
    chars = {name: [CHARS] * len(own) for name, own in saved.items()}
    return Result(Cell(4, arm, epsilon, seed, FULL), base, bits, chars, {})


def row(results: Iterable[Result], arm: str, epsilon: Epsilon) -> Row:
    (found,) = [r for r in rows(list(results), 4) if (r.arm, r.epsilon) == (arm, epsilon)]
    return found


def level(value: float, notes: int = 8) -> dict[str, np.ndarray]:
    return {"east": np.full(notes, value), "west": np.full(notes, value)}


def test_shares_and_differences_are_taken_under_the_same_seeds() -> None:
    """The other arm has one seed only, under which the default did better than on the average."""
    found = [
        result("fedsvd", None, 0, level(0.4)),
        result("fedsvd", None, 1, level(0.2)),
        result("fedsvd", 1.0, 0, level(0.3)),
        result("fedsvd", 1.0, 1, level(0.1)),
        result("core", 1.0, 0, level(0.2)),
    ]
    default, core = row(found, "fedsvd", 1.0), row(found, "core", 1.0)
    assert default.share is not None
    assert default.share.value == pytest.approx(0.4 / 0.6)
    assert default.share.seeds == 2
    assert core.share is not None
    assert core.share.value == pytest.approx(0.2 / 0.4)
    assert core.difference is not None
    assert core.difference.value == pytest.approx((0.2 - 0.3) / 0.4)
    assert (default.difference, row(found, "fedsvd", None).share) == (None, None)


def test_what_varies_with_seeds_alike_in_both_is_no_uncertainty_of_the_share() -> None:
    found = [
        result(arm, epsilon, seed, level(size * factor))
        for seed, size in enumerate((0.2, 0.3, 0.5))
        for arm, epsilon, factor in (("fedsvd", None, 1.0), ("fedsvd", 8.0, 0.9))
    ]
    share = row(found, "fedsvd", 8.0).share
    assert share is not None
    assert (share.low, share.high) == pytest.approx((0.9, 0.9))
    gain = row(found, "fedsvd", 8.0).gain
    half = 4.303 * np.std([0.18, 0.27, 0.45], ddof=1) / 3**0.5  # Student's t, two degrees
    assert gain.high - gain.value == pytest.approx(half, rel=1e-3)


# Of a share: t s / sqrt(n) with the mean of s for three seeds, and 1.96 times the error over notes.
@pytest.mark.parametrize(("seeds", "half"), [(1, 0.029), (3, 0.222)])
def test_the_interval_covers_the_truth_as_often_as_it_says(seeds: int, half: float) -> None:
    """Over seeds and notes; of one seed, over notes for that seed."""
    random = np.random.default_rng(0)
    covered, widths, tries = 0, 0.0, 150
    for _ in range(tries):
        notes = {name: random.normal(0.0, 0.1, 20) for name in ("east", "west")}
        found, true = [], []
        for seed in range(seeds):
            luck = random.normal(0.0, 0.05)
            true.append(0.3 + luck)
            private = {n: 0.3 + luck + own + random.normal(0, 0.02, 20) for n, own in notes.items()}
            reference = {n: 0.5 + own for n, own in notes.items()}
            found += [result("fedsvd", 1.0, seed, private), result("fedsvd", None, seed, reference)]
        share = row(found, "fedsvd", 1.0).share
        assert share is not None
        truth = 0.6 if seeds > 1 else true[0] / 0.5
        covered += share.low <= truth <= share.high
        widths += (share.high - share.low) / 2
    assert covered / tries >= 0.90
    assert widths / tries == pytest.approx(half, rel=0.15)  # and is no wider than that takes
