"""Poisson sampling of units, and the public rule by which a unit's notes are chosen.

Every unit enters a step independently with the public rate q; that independence is what the
accountant's amplification by sampling assumes. A shuffled epoch is not Poisson sampling and would
need another analysis. Nothing here depends on how many units there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

from client.privacy.randomness import Uniform

T = TypeVar("T")


def poisson_sample(
    units: Mapping[str, Sequence[T]], rate: float, max_per_unit: int, random: Uniform
) -> list[list[T]]:
    """Draw one batch: the chosen units, each with at most ``max_per_unit`` of its records.

    The records of a unit are a uniformly random subset. The batch may be empty; such a step still
    adds noise and is still charged.
    """
    chosen = random.uniform(len(units)) < rate
    batch = []
    for take, records in zip(chosen, units.values(), strict=True):
        if not take:
            continue
        if len(records) > max_per_unit:
            order = np.argsort(random.uniform(len(records)), kind="stable")
            records = [records[i] for i in sorted(order[:max_per_unit])]
        batch.append(list(records))
    return batch
