"""What every merge strategy is: parameters, a declaration, and one pure function of adapters."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from adapters.adapter import Adapter
from adapters.lowrank import LowRank, weighted_sum
from adapters.statistics import MeasuredAdapter, Statistic, Statistics
from conf.schema import Settings, TrainedFactors
from strategies.sums import MergeError, Update, Updates

__all__ = [
    "EVERY_PART", "Declaration", "Draw", "MergeError", "Noise", "Strategy", "Update", "Updates",
    "deltas", "product_means", "statistics_of",
]  # fmt: skip

_MOST = 10_000  # hospitals
EVERY_PART: tuple[TrainedFactors, ...] = ("B", "A", "alternate", "both")  # as products, not cores


@dataclass(frozen=True)
class Declaration:
    """What a strategy promises, and what it asks for.

    ``space``: what it computes on. "factors" B and A themselves; "gram" a combination of the
    updates, whose coefficients follow from their inner products; "core" the small core between the
    bases that all updates share; "entries" the dense updates, which costs memory, and energy when
    the result is factorised again.
    ``exact``: the result is the weighted mean of the products, wherever it fits into the rank.
    ``sums``: it needs only weighted sums over hospitals of the factors that travel, so it works
    under secure aggregation. Products are no such sums.
    ``ranks``: factors that it works on may be of different ranks, as products may anyway.
    ``streams``: its memory does not grow with the number of hospitals, whose adapters it takes one
    at a time.
    ``keeps``: what of one hospital, of equal hospitals, of a common scale comes out unchanged:
    "one" (one hospital merges to itself), "equal" (equal hospitals merge to themselves), "scale"
    (scaling all by c scales the result by c), "gauge" (only products matter).
    ``trains``: settings of ``adapter.train`` under which what was frozen stays what it was.
    ``statistics``: what it needs from hospitals beside adapters; it costs them privacy budget.
    ``noise``: it needs ``Draw.noise``, which rounds of plain SGD know.
    ``weighted``: weights have an effect; where not, only equal ones are accepted.
    ``paper``: where it comes from.
    """

    space: Literal["factors", "gram", "core", "entries"]
    paper: str
    exact: bool = False
    sums: bool = False
    ranks: bool = False
    streams: bool = False
    keeps: frozenset[str] = frozenset({"one", "equal", "scale", "gauge"})
    trains: tuple[TrainedFactors, ...] = EVERY_PART
    statistics: Statistic | None = None
    noise: bool = False
    weighted: bool = True

    @property
    def of_changes(self) -> bool:
        """Whether a round merges by it what the round has changed, not all that was learned so far.

        Means are the same either way, and what averages factors needs the factors themselves.
        """
        return not self.exact and self.space != "factors"


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

    @property
    def needs_noise(self) -> bool:
        """Whether it needs ``Draw.noise``."""
        return self.declared.noise

    @property
    def weighted(self) -> bool:
        """Whether weights have an effect."""
        return self.declared.weighted

    @property
    def on_factors(self) -> bool:
        """Whether it computes on B and A, so that their columns must mean the same everywhere."""
        return self.declared.space == "factors"

    def require_count(self, count: int) -> None:
        """Return when so many adapters can be merged; asked before hospitals pay for a round.

        Raises MergeError.
        """

    def fewest(self) -> int:
        """How many adapters it needs at least, whatever ``require_count`` says of more."""
        for count in range(1, _MOST):
            with suppress(MergeError):
                self.require_count(count)
                return count
        return 1

    def require_layers(self, names: Iterable[str]) -> None:
        """Return when it can merge these layers; asked before hospitals pay for a round.

        Raises MergeError.
        """

    def after(self, caught: int, asked: int) -> Strategy:
        """The same in a round that left out ``caught`` of ``asked`` hospitals because they lied.

        Of those that a robust rule must bear, there are so many fewer among the others.
        """
        return self

    @abstractmethod
    def combine(
        self, adapters: Sequence[Adapter], weights: Sequence[float], draw: Draw
    ) -> Mapping[str, Update]:
        """Merged scaled updates by layer, float64, of any rank.

        ``adapters`` have the same layers of the same shapes (ranks may differ) and are finite; for
        a strategy that declares ``statistics`` they are ``MeasuredAdapter``s. They may lie on disk
        and be loaded each time they are asked for; a strategy that streams holds on to none.
        ``weights`` are positive, public and sum to one. Raises MergeError when the adapters do not
        fit the strategy.
        """


def statistics_of(adapter: Adapter, names: Iterable[str]) -> Statistics:
    """The adapter's statistics of these names, float64. Raises MergeError where one is missing."""
    own = adapter.statistics if isinstance(adapter, MeasuredAdapter) else {}
    try:
        return {name: own[name].double() for name in names}
    except KeyError as missing:
        raise MergeError(f"an adapter without statistics of {missing.args[0]}") from None


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
