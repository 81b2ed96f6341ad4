"""What a round has changed: every hospital's update less the one that all of them began with.

    dW_k - dW_0,  and the merge of these is added to dW_0

A rule that shortens, thins out, bounds or turns updates must act on a round's changes. On whole
updates it would act in every round once more on what earlier rounds have merged: a sum of K updates
grows K-fold each round, a scaling by depth fades the lower layers away, and a bound on norms bounds
nothing once the adapter is longer than any step. Means are the same either way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from typing import Literal, overload

import torch

from adapters.adapter import Adapter, AdapterSpec
from adapters.lowrank import Dense, LowRank, stack
from strategies.base import Draw, Noise
from strategies.sums import MergeError, ProductSum, Update, norm, squared_distance


class Changes(Sequence[Adapter]):
    """``adapters`` less ``origin``, one at a time; as many are in memory as are asked for.

    Where all share a factor with ``origin`` a change has their rank, else the sum of both ranks.
    Who has learned nothing has changed exactly nothing. Raises MergeError when one has other layers
    or shapes than ``origin``.
    """

    def __init__(self, adapters: Sequence[Adapter], origin: Adapter) -> None:
        self._adapters, self._origin, self._in_columns = adapters, origin, False
        shared = {"A", "B"}
        shapes = {name: layer.shape for name, layer in origin.layers.items()}
        for adapter in adapters:
            if {name: layer.shape for name, layer in adapter.layers.items()} != shapes:
                raise MergeError(
                    "adapters differ in layers or shapes from what the round began with"
                )
            shared = {factor for factor in shared if _shares(adapter, origin, factor)}
        self._shared = min(shared, default=None)

    def __len__(self) -> int:
        return len(self._adapters)

    @overload
    def __getitem__(self, index: int) -> Adapter: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Adapter]: ...
    def __getitem__(self, index: int | slice) -> Adapter | Sequence[Adapter]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.of(self._adapters[index])

    def in_columns(self) -> Changes:
        """The same, for what acts on factors: every column is the same thing in all of them."""
        found = copy(self)
        found._in_columns = True
        return found

    def draw(self, draw: Draw) -> Draw:
        """The same round, which began from nothing."""
        if draw.noise is None:
            return draw
        return replace(draw, noise=Noise(self.of(draw.noise.start), draw.noise.stds))

    def whole(self, layer: str, change: Update) -> Update:
        """A merged ``change`` of one layer and ``origin`` together."""
        total = ProductSum()
        total.add(change if isinstance(change, LowRank) else Dense(change), 1.0)
        total.add(self._before(layer), 1.0)
        return total.take()

    def distance(self, layer: str, whole: Update) -> float:
        """Frobenius norm of what ``whole`` has changed in one layer."""
        return math.sqrt(max(squared_distance(whole, norm(whole), self._before(layer)), 0.0))

    def of(self, adapter: Adapter) -> Adapter:
        """What has changed from ``origin`` to ``adapter``, one of those that this was made for."""
        ratio = self._origin.spec.scale / adapter.spec.scale
        layers = {}
        for name, layer in adapter.layers.items():
            own, before = layer.to(torch.float64), self._origin.layers[name].to(torch.float64)
            if self._shared == "A":
                layers[name] = LowRank(own.B - ratio * before.B, own.A)
            elif self._shared == "B":
                layers[name] = LowRank(own.B, own.A - ratio * before.A)
            elif self._in_columns or ratio != 1 or not _equal(own, before):
                layers[name] = stack([before * -ratio, own])  # in the same columns everywhere
            else:
                both = stack([before, before])  # whose difference would be rounding, not zero
                layers[name] = LowRank(both.B, torch.zeros_like(both.A))
        rank = next(iter(layers.values())).rank
        spec = adapter.spec
        return replace(
            adapter, spec=AdapterSpec(rank, spec.scale * rank, spec.targets), layers=layers
        )

    def _before(self, layer: str) -> LowRank:
        return self._origin.layers[layer].to(torch.float64) * self._origin.spec.scale


def _equal(one: LowRank, other: LowRank) -> bool:
    return one.B.equal(other.B) and one.A.equal(other.A)


def _shares(adapter: Adapter, origin: Adapter, factor: Literal["A", "B"] | str) -> bool:
    return all(
        getattr(layer, factor).equal(getattr(origin.layers[name], factor))
        for name, layer in adapter.layers.items()
    )
