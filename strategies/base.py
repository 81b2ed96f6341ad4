"""What every merge strategy is: a pure function of adapters, and a declaration of what it needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch

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


def mean_under_shared(
    adapters: Sequence[Adapter], weights: Sequence[float], shared: Literal["A", "B"]
) -> Adapter | None:
    """The exact mean of adapters that share factor "A" or "B" in every layer; None if they do not.

    The shared factor is kept bit for bit (a mean of equal numbers would round), the other's mean is
    formed in float64.
    """
    moved = "B" if shared == "A" else "A"
    layers = {}
    for name, first in adapters[0].layers.items():
        own = [adapter.layers[name] for adapter in adapters]
        if any(not getattr(layer, shared).equal(getattr(first, shared)) for layer in own):
            return None
        terms = [w * getattr(x, moved).double() for x, w in zip(own, weights, strict=True)]
        layers[name] = replace(first, **{moved: torch.stack(terms).sum(0).to(torch.float32)})
    return Adapter(adapters[0].spec, layers)
