"""Model Breadcrumbs (arXiv 2312.06795): every row without its largest and its smallest entries.

Of a row the largest ``outliers`` are dropped, then the next ``density`` kept; the paper takes 0.006
to 0.01 and 0.05 to 0.4. Where the signal sits in few entries, the outliers are the signal.
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
    elected,
    fused,
    row_ranks,
)


class Breadcrumbs(Strategy):
    """The middle of every row, then the mean, or a mean of what agrees in sign."""

    name: ClassVar[str] = "breadcrumbs"
    declared: ClassVar = Declaration(
        space="entries", paper="arXiv 2312.06795", keeps=frozenset({"scale", "gauge"})
    )
    density: Density = 0.15
    outliers: Annotated[float, Field(ge=0, lt=1)] = 0.01
    elect: bool = False  # true: Breadcrumbs with the election of TIES
    agreeing: Agreeing = "mean"  # or "sum": of what has the elected sign
    strength: Annotated[float, Field(gt=0, le=10)] = 1.0

    @model_validator(mode="after")
    def _shares_of_a_row(self) -> Breadcrumbs:
        for density in densities(self.density):
            if density + self.outliers > 1:
                raise ValueError(
                    f"strategy.density={density:g}: with strategy.outliers={self.outliers:g} "
                    "at most 1"
                )
        return self

    def combine(
        self, adapters: Sequence[Adapter], weights: Sequence[float], draw: Draw
    ) -> Mapping[str, Update]:
        """See ``Strategy.combine``. Raises MergeError with densities for another number."""
        shares = densities(self.density, len(adapters))

        def merge(name: str, own: list[Tensor]) -> Tensor:
            kept = [self._middle(d, share) for d, share in zip(own, shares, strict=True)]
            signs = elected(kept, weights, "weighted") if self.elect else None
            return self.strength * fused(kept, weights, signs, self.agreeing)

        return by_layer(adapters, merge)

    def _middle(self, update: Tensor, density: float) -> Tensor:
        n = update.shape[1]
        from_top = n - 1 - row_ranks(update)
        first = round(self.outliers * n)
        kept = (from_top >= first) & (from_top < first + max(1, round(density * n)))
        return torch.where(kept, update, 0.0)
