"""What every merge strategy is: parameters, a declaration, and one pure function of adapters."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from adapters.adapter import Adapter
from adapters.lowrank import LowRank, weighted_sum
from adapters.statistics import MeasuredAdapter, Statistic, Statistics
from conf.schema import Settings, TrainedFactors

Update = LowRank | Tensor  # a layer's merged dW: as factors, or dense (m, n) where it has full rank
Updates = dict[str, Update]

EVERY_PART: tuple[TrainedFactors, ...] = ("B", "A", "alternate", "both")  # as products, not cores


class MergeError(ValueError):
    """The adapters cannot be merged by this strategy; the message says why."""


@dataclass(frozen=True)
class Declaration:
    """What a strategy promises, and what it asks for.

    ``space``: what it computes on. "factors" B and A themselves; "gram" a combination of the
    updates, whose coefficients follow from their inner products; "core" the small core between the
    bases that all updates share; "entries" the dense updates, which costs memory, and energy when
    the result is factorised again.
    ``exact``: the result is the weighted mean of the products, wherever it fits into the rank.
    ``sums``: it needs only weighted sums over hospitals, so it works under secure aggregation, and
    in memory that does not grow with the number of hospitals.
    ``keeps``: what of one hospital, of equal hospitals, of a common scale comes out unchanged:
    "one" (one hospital merges to itself), "equal" (equal hospitals merge to themselves), "scale"
    (scaling all by c scales the result by c), "gauge" (only products matter).
    ``trains``: settings of ``adapter.train`` under which what was frozen stays what it was.
    ``statistics``: what it needs from hospitals beside adapters; it costs them privacy budget.
    ``noise``: it needs ``Draw.noise``, which rounds of plain SGD know.
    ``paper``: where it comes from.
    """

    space: Literal["factors", "gram", "core", "entries"]
    paper: str
    exact: bool = False
    sums: bool = False
    keeps: frozenset[str] = frozenset({"one", "equal", "scale", "gauge"})
    trains: tuple[TrainedFactors, ...] = EVERY_PART
    statistics: Statistic | None = None
    noise: bool = False


@dataclass(frozen=True, eq=False)
class Noise:
    """What a round knows of the noise in its adapters.

    ``start`` is the adapter that every hospital was sent; ``stds`` the standard deviation of the
    noise in every entry of the factor that each of them trained, in the order of the adapters and
    before LoRA's scale (``TrainingPlan.noise_std``).
    """

    start: Adapter
    stds: tuple[float, ...]


@dataclass(frozen=True)
class Draw:
    """Which round is merged: randomness that can be repeated, and what is known of its noise."""

    run: str = ""
    round: int = 0
    noise: Noise | None = None

    def of(self, tensor: str) -> torch.Generator:
        """The generator of one tensor, from which nothing of another's is learned."""
        digest = hashlib.sha256(f"{self.run}:{self.round}:{tensor}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


class Strategy(Settings):
    """A merge strategy. Its fields are its parameters, checked and immutable."""

    name: ClassVar[str]
    declared: ClassVar[Declaration]

    @property
    def statistics(self) -> Statistic | None:
        """What hospitals must measure for it."""
        return self.declared.statistics

    @abstractmethod
    def combine(
        self, adapters: Sequence[Adapter], weights: Sequence[float], draw: Draw
    ) -> Mapping[str, Update]:
        """Merged scaled updates by layer, float64, of any rank.

        ``adapters`` have the same layers of the same shapes (ranks may differ) and are finite; for
        a strategy that declares ``statistics`` they are ``MeasuredAdapter``s;
        ``weights`` are positive, public and sum to one. Raises MergeError when the adapters do not
        fit the strategy.
        """


def statistics_of(adapters: Sequence[Adapter], names: Iterable[str]) -> list[Statistics]:
    """Each adapter's statistics of these names, float64. Raises MergeError where one is missing."""
    found: list[Statistics] = []
    for adapter in adapters:
        own = adapter.statistics if isinstance(adapter, MeasuredAdapter) else {}
        try:
            found.append({name: own[name].double() for name in names})
        except KeyError as missing:
            raise MergeError(f"an adapter without statistics of {missing.args[0]}") from None
    return found


def deltas(adapters: Sequence[Adapter]) -> dict[str, list[LowRank]]:
    """Scaled updates of all adapters by layer, float64."""
    own = [adapter.deltas() for adapter in adapters]
    return {name: [d[name].to(torch.float64) for d in own] for name in own[0]}


def product_means(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, LowRank]:
    """Exact sum_k w_k scale_k B_k A_k by layer, at rank sum of ranks."""
    return {name: weighted_sum(parts, weights) for name, parts in deltas(adapters).items()}


def factor_means(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, LowRank]:
    """Mean of B and mean of A by layer, float64, scaled: what FedAvg on factors gives.

    Raises MergeError when ranks or scales differ: then factors have no mean.
    """
    if len({(adapter.spec.rank, adapter.spec.scale) for adapter in adapters}) > 1:
        raise MergeError("adapters of different rank or scale have no mean of factors")
    means = {}
    for name in adapters[0].layers:
        B = sum(w * a.layers[name].B.double() for a, w in zip(adapters, weights, strict=True))
        A = sum(w * a.layers[name].A.double() for a, w in zip(adapters, weights, strict=True))
        means[name] = LowRank(B, A) * adapters[0].spec.scale  # type: ignore[arg-type]
    return means


def mean_under_shared(
    adapters: Sequence[Adapter], weights: Sequence[float], shared: Literal["A", "B"]
) -> dict[str, LowRank] | None:
    """The exact mean of adapters that share factor "A" or "B" in every layer; None if they do not.

    The shared factor is kept bit for bit: a mean of equal numbers would round.
    """
    means = factor_means(adapters, weights)
    for name, first in adapters[0].layers.items():
        kept = getattr(first, shared)
        if any(not getattr(a.layers[name], shared).equal(kept) for a in adapters[1:]):
            return None
        scale = adapters[0].spec.scale
        if shared == "A":
            means[name] = LowRank(means[name].B, kept.double())
        else:
            means[name] = LowRank(kept.double() * scale, means[name].A)
    return means
