"""LiNeS (arXiv 2410.17146): scale a merged update by depth, little at the bottom, more at the top.

    layer l of L:   (first + (last - first) l / (L - 1)) dW_l

General features lie in the first layers, what a task needs in the last. It wraps any strategy:
``strategy=lines strategy.of=ties``. Layers without a number in their path count as first. An
adapter does not say how many blocks its model has: unless ``blocks`` does, L is the number of the
last adapted block plus one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field, PrivateAttr

from adapters.adapter import Adapter
from adapters.statistics import Statistic
from strategies.base import Declaration, Draw, MergeError, Strategy, Update

_DEPTH = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)\.")


class Lines(Strategy):
    """Another strategy's result, scaled layer by layer."""

    name: ClassVar[str] = "lines"
    declared: ClassVar = Declaration(
        space="gram", paper="arXiv 2410.17146", keeps=frozenset({"scale", "gauge"})
    )
    of: str = "product_mean"  # the strategy that is wrapped
    parameters: dict[str, Any] = Field(default_factory=dict)  # of that strategy
    first: Annotated[float, Field(ge=0, le=10)] = 0.5
    last: Annotated[float, Field(ge=0, le=10)] = 1.0
    blocks: Annotated[int, Field(ge=1)] | None = None  # L; None: up to the last adapted one
    _round: tuple[int, int] | None = PrivateAttr(None)  # how many were caught, and asked

    @property
    def statistics(self) -> Statistic | None:
        """What the wrapped strategy needs."""
        return self.wrapped.statistics

    @property
    def needs_noise(self) -> bool:
        """Whether the wrapped strategy does."""
        return self.wrapped.needs_noise

    @property
    def weighted(self) -> bool:
        """Whether weights have an effect on the wrapped strategy."""
        return self.wrapped.weighted

    @property
    def on_factors(self) -> bool:
        """Whether the wrapped strategy does."""
        return self.wrapped.on_factors

    def require_count(self, count: int) -> None:
        """See ``Strategy.require_count``: what the wrapped strategy can merge."""
        self.wrapped.require_count(count)

    def require_layers(self, names: Iterable[str]) -> None:
        """See ``Strategy.require_layers``: of this model there are so many blocks at most."""
        known = list(names)
        self.factors(known)
        self.wrapped.require_layers(known)

    def after(self, caught: int, asked: int) -> Lines:
        """See ``Strategy.after``."""
        same = self.model_copy()
        same._round = caught, asked
        return same

    def combine(
        self, adapters: Sequence[Adapter], weights: Sequence[float], draw: Draw
    ) -> Mapping[str, Update]:
        """See ``Strategy.combine``. Raises MergeError when the model has more than ``blocks``."""
        merged = self.wrapped.combine(adapters, weights, draw)
        factors = self.factors(merged)
        return {name: update * factors[name] for name, update in merged.items()}

    @property
    def wrapped(self) -> Strategy:
        """The strategy whose result is scaled."""
        from strategies.registry import create  # which knows this class too

        made = create(self.of, self.parameters)
        return made.after(*self._round) if self._round else made

    def factors(self, layers: Iterable[str]) -> dict[str, float]:
        """By what each of these layers is scaled. Raises MergeError as ``combine`` does."""
        depths = {name: int(d[1]) if (d := _DEPTH.search(name)) else 0 for name in layers}
        deepest = max(depths.values())
        if self.blocks is not None and deepest >= self.blocks:
            raise MergeError(f"lines: block {deepest} is adapted, strategy.blocks={self.blocks}")
        top = max((self.blocks or deepest + 1) - 1, 1)
        return {
            name: self.first + (self.last - self.first) * depth / top
            for name, depth in depths.items()
        }
