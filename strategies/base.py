"""What every merge strategy is: a pure function of adapters, and a declaration of what it needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from adapters.adapter import Adapter, AdapterSpec
from adapters.lowrank import LowRank, weighted_sum


class MergeError(ValueError):
    """The adapters cannot be merged by this strategy; the message says why."""


@dataclass(frozen=True)
class Merge:
    """A merged adapter and what is worth knowing of how it came about.

    ``discrepancy``: relative Frobenius norm of what averaging A and B separately would have got
    wrong, ||mean(B) mean(A) - mean(B A)|| / ||mean(B A)|| over all layers; 0 if a factor is shared.
    ``kept_energy``: share of the squared norm that the output rank keeps, smallest over layers.
    """

    adapter: Adapter
    discrepancy: float
    kept_energy: float


class Strategy(Protocol):
    """Merges one round's adapters. ``exact``: the result is the weighted mean of the products."""

    name: str
    exact: bool

    def merge(self, adapters: Sequence[Adapter], weights: Sequence[float]) -> Merge:
        """Merge adapters of one spec; ``weights`` are positive, public and sum to one.

        Raises MergeError when the adapters do not fit the strategy.
        """
        ...


def check(adapters: Sequence[Adapter], weights: Sequence[float]) -> AdapterSpec:
    """Common shape of the adapters. Raises MergeError when there is none or weights are off."""
    if not adapters:
        raise MergeError("no adapter to merge")
    if len(weights) != len(adapters) or min(weights) <= 0 or abs(sum(weights) - 1) > 1e-9:
        raise MergeError("weights must be positive, one for each adapter, and sum to one")
    spec, names = adapters[0].spec, set(adapters[0].layers)
    if any(a.spec != spec or set(a.layers) != names for a in adapters):
        raise MergeError("adapters differ in rank, alpha, targets or layers")
    return spec


def product_means(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, LowRank]:
    """Exact sum_k w_k scale_k B_k A_k by layer, at rank sum of ranks."""
    deltas = [adapter.deltas() for adapter in adapters]
    return {name: weighted_sum([d[name] for d in deltas], weights) for name in deltas[0]}


def factor_means(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, LowRank]:
    """Mean of B and mean of A by layer, float64, scaled: what FedAvg on factors gives."""
    means = {}
    for name in adapters[0].layers:
        B = sum(w * a.layers[name].B.double() for a, w in zip(adapters, weights, strict=True))
        A = sum(w * a.layers[name].A.double() for a, w in zip(adapters, weights, strict=True))
        means[name] = LowRank(B, A) * adapters[0].spec.scale  # type: ignore[arg-type]
    return means


def discrepancy(naive: Mapping[str, LowRank], exact: Mapping[str, LowRank]) -> float:
    """||naive - exact|| / ||exact|| over all layers; 0 when exact is zero.

    The difference is exactly -sum_k w_k (B_k - mean B)(A_k - mean A).
    """
    gap = sum((naive[name] - exact[name]).norm() ** 2 for name in exact)
    size = sum(exact[name].norm() ** 2 for name in exact)
    return (gap / size) ** 0.5 if size > 0 else 0.0


def shared_A(adapters: Sequence[Adapter]) -> bool:
    """True when every adapter holds the very same A in every layer."""
    first = adapters[0].layers
    return all(
        other.layers[name].A.equal(first[name].A) for other in adapters[1:] for name in first
    )
