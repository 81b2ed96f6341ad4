"""Strategies that take hospitals one at a time, in memory that does not grow with their number.

``merge`` may hand over adapters that lie on disk until they are asked for. Such a strategy adds
each to its sums and never looks back.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from adapters.adapter import Adapter
from strategies.base import Draw, Strategy, Update


@dataclass(frozen=True)
class Stream:
    """A merge under way.

    ``add(adapter, weight)`` takes one hospital; weights are positive and need not sum to one.
    ``result()`` ends it: merged scaled updates by layer, float64. Both may raise MergeError.
    """

    add: Callable[[Adapter, float], None]
    result: Callable[[], Mapping[str, Update]]


class Streaming(Strategy):
    """A strategy that needs one pass over the hospitals."""

    @abstractmethod
    def stream(self) -> Stream:
        """A new merge."""

    def combine(
        self, adapters: Sequence[Adapter], weights: Sequence[float], draw: Draw
    ) -> Mapping[str, Update]:
        """See ``Strategy.combine``: what the stream gives."""
        stream = self.stream()
        for adapter, weight in zip(adapters, weights, strict=True):
            stream.add(adapter, weight)
        return stream.result()
