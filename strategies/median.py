"""Coordinate-wise median and trimmed mean (arXiv 1803.01498) of the dense updates.

Up to the trimmed share of hospitals may send anything at all, and every entry of the result still
lies within the range of the others'. Hospitals count equally: a weight would be a way to lie, so
unequal ones are refused. Of two hospitals nobody can say who lies, so both rules need three.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field, PrivateAttr

from adapters.adapter import Adapter
from strategies.base import Declaration, Draw, MergeError, Strategy, Update
from strategies.entries import by_layer


class Median(Strategy):
    """Median of every entry; of an even number of hospitals, the mean of the middle two.

    Fewer than half of the hospitals may lie.
    """

    name: ClassVar[str] = "median"
    declared: ClassVar = Declaration(
        space="entries",
        paper="arXiv 1803.01498",
        keeps=frozenset({"equal", "scale", "gauge"}),
        weighted=False,
    )

    _fewest: int = PrivateAttr(3)  # of two, one that lies is half

    def require_count(self, count: int) -> None:
        """See ``Strategy.require_count``."""
        if count < self._fewest:
            raise MergeError(f"{self.name} needs at least {self._fewest} to merge")

    def after(self, caught: int, asked: int) -> Median:
        """See ``Strategy.after``. Fewer than half of those that were asked may lie."""
        same = self.model_copy()
        left = max(0, (asked - 1) // 2 - caught)
        same._fewest = min(self._fewest, 2 * left + 1)
        return same

    def combine(
        self, adapters: Sequence[Adapter], weights: Sequence[float], draw: Draw
    ) -> Mapping[str, Update]:
        """See ``Strategy.combine``. Raises MergeError with fewer than three hospitals."""
        self.require_count(len(adapters))
        return by_layer(adapters, lambda _, own: torch.stack(own).quantile(0.5, dim=0))


class TrimmedMean(Strategy):
    """Mean of every entry without its ``liars`` largest and ``liars`` smallest values."""

    name: ClassVar[str] = "trimmed_mean"
    declared: ClassVar = Declaration(
        space="entries",
        paper="arXiv 1803.01498",
        keeps=frozenset({"equal", "scale", "gauge"}),
        weighted=False,
    )
    liars: Annotated[int, Field(ge=1)] = 1  # hospitals that may send anything

    def require_count(self, count: int) -> None:
        """See ``Strategy.require_count``."""
        least = 2 * self.liars + 1
        if count < least:
            raise MergeError(f"{self.name} with liars={self.liars} needs at least {least} to merge")

    def after(self, caught: int, asked: int) -> TrimmedMean:
        """See ``Strategy.after``."""
        return self.model_copy(update={"liars": max(0, self.liars - caught)})

    def combine(
        self, adapters: Sequence[Adapter], weights: Sequence[float], draw: Draw
    ) -> Mapping[str, Update]:
        """See ``Strategy.combine``. Raises MergeError with too few hospitals."""
        k, f = len(adapters), self.liars
        self.require_count(k)
        return by_layer(adapters, lambda _, own: torch.stack(own).sort(0).values[f : k - f].mean(0))
