"""TIES (arXiv 2306.01708): trim, elect a sign, mean of what agrees with it.

The paper trims over the whole model, elects by the sum of the trimmed updates, and divides by how
many agree; the libraries trim by tensor. Scope and election are explicit here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from adapters.adapter import Adapter
from strategies.base import Declaration, Draw, Strategy, Update
from strategies.entries import Agreeing, Density, dense, elected, fused, scaled, trimmed


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
        kept = trimmed(dense(adapters), self.density, self.scope)
        merged = {
            name: fused(own, weights, elected(own, weights, self.election), self.agreeing)
            for name, own in kept.items()
        }
        return scaled(merged, self.strength)
