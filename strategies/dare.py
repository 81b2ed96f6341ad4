"""DARE (arXiv 2311.03099): drop entries at random and divide the others by the share kept.

Its expectation is the update itself, so without an election it is the mean plus noise of variance
(1 - p) / p; with one (DARE-TIES) signs are elected among what was kept. What agrees is summed by
weight: its mean, over those who kept an entry, would be the rescaled entry, 1 / p times too long.
The mask follows from run, round, tensor and the update itself, so it can be repeated and does not
depend on order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from adapters.adapter import Adapter
from strategies.base import Declaration, Draw, Strategy, Update
from strategies.entries import (
    Agreeing,
    Density,
    by_layer,
    densities,
    dropped,
    elected,
    fused,
    row_ranks,
)


class Dare(Strategy):
    """Random drop with rescaling, then the mean, or a mean of what agrees in sign."""

    name: ClassVar[str] = "dare"
    declared: ClassVar = Declaration(
        space="entries", paper="arXiv 2311.03099", keeps=frozenset({"gauge"})
    )
    density: Density = 0.5  # probability that an entry is kept
    elect: bool = True  # DARE-TIES; false: DARE-linear
    agreeing: Agreeing = "sum"  # or "mean": of what has the elected sign
    strength: Annotated[float, Field(gt=0, le=10)] = 1.0

    def combine(
        self, adapters: Sequence[Adapter], weights: Sequence[float], draw: Draw
    ) -> Mapping[str, Update]:
        """See ``Strategy.combine``. Raises MergeError with densities for another number."""
        shares = densities(self.density, len(adapters))
        marks = [adapter.fingerprint() for adapter in adapters]

        def merge(name: str, own: list[Tensor]) -> Tensor:
            kept = [
                dropped(d, self.keep(d, share), draw.of(f"{name}:{mark}"))
                for d, mark, share in zip(own, marks, shares, strict=True)
            ]
            signs = elected(kept, weights, "weighted") if self.elect else None
            return self.strength * fused(kept, weights, signs, self.agreeing)

        return by_layer(adapters, merge)

    def keep(self, update: Tensor, density: float) -> Tensor | float:
        """Probability that an entry is kept: one number, or one for each entry (m, n)."""
        return density


class Della(Dare):
    """DELLA (arXiv 2406.11617): larger entries of a row are kept with a higher probability.

    p = density - window + 2 window rank / (n - 1), rank 0 for the least of the row.
    """

    name: ClassVar[str] = "della"
    declared: ClassVar = Declaration(
        space="entries", paper="arXiv 2406.11617", keeps=frozenset({"gauge"})
    )
    window: Annotated[float, Field(gt=0, lt=1)] = 0.1  # half of the authors' --window_size

    @model_validator(mode="after")
    def _probabilities(self) -> Della:
        low, high = self.window, 1 - self.window
        for density in densities(self.density):
            if not low < density <= high:
                raise ValueError(f"strategy.density={density:g}: from {low:g} to {high:g}")
        return self

    def keep(self, update: Tensor, density: float) -> Tensor:
        """See ``Dare.keep``."""
        width = max(1, update.shape[1] - 1)
        lowest = torch.tensor(density - self.window, dtype=torch.float64)
        return lowest + 2 * self.window * row_ranks(update) / width
