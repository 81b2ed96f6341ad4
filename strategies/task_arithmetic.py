"""Task arithmetic (arXiv 2212.04089): the sum of all updates, times lambda.

With K hospitals lambda = 1/K is the mean; the paper's 0.3 to 0.4 for sums goes further than the
mean from three hospitals on.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from strategies.base import Declaration
from strategies.streaming import Stream, Streaming
from strategies.sums import ProductMeans


class TaskArithmetic(Streaming):
    """lambda K times the weighted mean."""

    name: ClassVar[str] = "task_arithmetic"
    declared: ClassVar = Declaration(
        space="gram",
        paper="arXiv 2212.04089",
        streams=True,
        keeps=frozenset({"scale", "gauge"}),
    )
    strength: Annotated[float, Field(gt=0, le=10)] = 0.4  # the paper's lambda

    def stream(self) -> Stream:
        """See ``Streaming.stream``."""
        means = ProductMeans()
        return Stream(means.add, lambda: means.take(self.strength * means.count))
