"""What every merge strategy is: parameters, a declaration, and one pure function of adapters."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from adapters.adapter import Adapter
from adapters.lowrank import LowRank, weighted_sum
from conf.schema import Settings, TrainedFactors
from strategies.sums import FactorSums, MergeError, Update, Updates

__all__ = [
    "EVERY_PART", "Declaration", "Draw", "MergeError", "Strategy", "Update", "Updates", "deltas",
    "factor_means", "product_means",
]  # fmt: skip

EVERY_PART: tuple[TrainedFactors, ...] = ("B", "A", "alternate", "both")  # as products, not cores


@dataclass(frozen=True)
class Declaration:
    """What a strategy promises, and what it asks for.

    ``space``: what it computes on. "factors" B and A themselves; "gram" a combination of the
    updates, whose coefficients follow from their inner products; "core" the small core between the
    bases that all updates share; "entries" the dense updates, which costs memory, and energy when
    the result is factorised again.
    ``exact``: the result is the weighted mean of the products, wherever it fits into the rank.
    ``sums``: it needs only weighted sums over hospitals, so it works under secure aggregation.
    ``streams``: its memory does not grow with the number of hospitals, whose adapters it takes one
    at a time.
    ``keeps``: what of one hospital, of equal hospitals, of a common scale comes out unchanged:
    "one" (one hospital merges to itself), "equal" (equal hospitals merge to themselves), "scale"
    (scaling all by c scales the result by c), "gauge" (only products matter).
    ``trains``: settings of ``adapter.train`` under which what was frozen stays what it was.
    ``paper``: where it comes from.
    """

    space: Literal["factors", "gram", "core", "entries"]
    paper: str
    exact: bool = False
    sums: bool = False
    streams: bool = False
    keeps: frozenset[str] = frozenset({"one", "equal", "scale", "gauge"})
    trains: tuple[TrainedFactors, ...] = EVERY_PART


@dataclass(frozen=True)
class Draw:
    """Randomness that can be repeated: a generator for each round and each tensor of it."""

    run: str = ""
    round: int = 0

    def of(self, tensor: str) -> torch.Generator:
        """The generator of one tensor, from which nothing of another's is learned."""
        digest = hashlib.sha256(f"{self.run}:{self.round}:{tensor}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


class Strategy(Settings):
    """A merge strategy. Its fields are its parameters, checked and immutable."""

    name: ClassVar[str]
    declared: ClassVar[Declaration]

    @abstractmethod
    def combine(
        self, adapters: Sequence[Adapter], weights: Sequence[float], draw: Draw
    ) -> Mapping[str, Update]:
        """Merged scaled updates by layer, float64, of any rank.

        ``adapters`` have the same layers of the same shapes (ranks may differ) and are finite;
        ``weights`` are positive, public and sum to one. ``adapters`` may lie on disk and be loaded
        each time they are asked for; a strategy that streams holds on to none. Raises MergeError
        when the adapters do not fit the strategy.
        """


def deltas(adapters: Sequence[Adapter]) -> dict[str, list[LowRank]]:
    """Scaled updates of all adapters by layer, float64."""
    found: dict[str, list[LowRank]] = {}
    for adapter in adapters:
        for name, layer in adapter.layers.items():
            found.setdefault(name, []).append(layer.to(torch.float64) * adapter.spec.scale)
    return found


def product_means(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, LowRank]:
    """Exact sum_k w_k scale_k B_k A_k by layer, at rank sum of ranks."""
    return {name: weighted_sum(parts, weights) for name, parts in deltas(adapters).items()}


def factor_means(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, LowRank]:
    """Mean of B and mean of A by layer, float64, scaled: what FedAvg on factors gives.

    Raises MergeError when ranks or scales differ: then factors have no mean.
    """
    sums = FactorSums()
    for adapter, weight in zip(adapters, weights, strict=True):
        sums.add(adapter, weight)
    return sums.means()
