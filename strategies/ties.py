"""TIES (arXiv 2306.01708): trim, elect a sign, mean of what agrees with it.

The paper trims over the whole model, elects by the sum of the trimmed updates, and divides by how
many agree; the libraries trim by tensor. Scope and election are explicit here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from adapters.adapter import Adapter
from strategies.base import Declaration, Draw, Strategy, Update, deltas
from strategies.entries import (
    Agreeing,
    Density,
    by_layer,
    densities,
    elected,
    fused,
    least_kept,
    trimmed,
)


class Ties(Strategy):
    """Trim, elect, disjoint mean."""

    name: ClassVar[str] = "ties"
    declared: ClassVar = Declaration(
        space="entries", paper="arXiv 2306.01708", keeps=frozenset({"scale", "gauge"})
    )
    density: Density = 0.2  # share of entries kept
    scope: Literal["layer", "model"] = "model"  # in which the largest are sought
    election: Literal["weighted", "unweighted"] = "weighted"
    agreeing: Agreeing = "mean"  # the paper's; what agrees may be summed instead
    strength: Annotated[float, Field(gt=0, le=10)] = 1.0  # the paper's lambda

    def combine(
        self, adapters: Sequence[Adapter], weights: Sequence[float], draw: Draw
    ) -> Mapping[str, Update]:
        """See ``Strategy.combine``. Raises MergeError with densities for another number."""
        shares = densities(self.density, len(adapters))
        whole = self._least_of_models(adapters, shares) if self.scope == "model" else None

        def merge(name: str, own: list[Tensor]) -> Tensor:
            least = whole or [least_kept([d], s) for d, s in zip(own, shares, strict=True)]
            kept = [trimmed(d, limit) for d, limit in zip(own, least, strict=True)]
            signs = elected(kept, weights, self.election)
            return self.strength * fused(kept, weights, signs, self.agreeing)

        return by_layer(adapters, merge)

    def _least_of_models(
        self, adapters: Sequence[Adapter], shares: Sequence[float]
    ) -> list[Tensor]:
        """The magnitude from which on entries are kept, of each hospital over all layers."""
        return [
            least_kept((update.dense() for (update,) in deltas([adapter]).values()), share)
            for adapter, share in zip(adapters, shares, strict=True)
        ]
