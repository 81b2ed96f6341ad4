"""Task arithmetic (arXiv 2212.04089): the sum of all updates, times lambda.

With K hospitals lambda = 1/K is the mean; the paper's 0.3 to 0.4 for sums goes further than the
mean from three hospitals on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar

from pydantic import Field

from adapters.adapter import Adapter
from strategies.base import Declaration, Draw, Strategy, Update, product_means


class TaskArithmetic(Strategy):
    """lambda K times the weighted mean."""

    name: ClassVar[str] = "task_arithmetic"
    declared: ClassVar = Declaration(
        space="gram", paper="arXiv 2212.04089", sums=True, keeps=frozenset({"scale", "gauge"})
    )
    strength: Annotated[float, Field(gt=0, le=10)] = 0.4  # the paper's lambda

    def combine(
        self, adapters: Sequence[Adapter], weights: Sequence[float], draw: Draw
    ) -> Mapping[str, Update]:
        """See ``Strategy.combine``."""
        return product_means(adapters, [w * len(weights) * self.strength for w in weights])
