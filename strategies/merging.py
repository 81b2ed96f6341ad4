"""From hospitals' adapters to the merged one: check, combine, re-factorise, report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.adapter import Adapter, AdapterSpec
from adapters.lowrank import LowRank, svd
from strategies.base import Draw, MergeError, Strategy, Update, Updates
from strategies.figures import Figures
from strategies.sums import ProductMeans


@dataclass(frozen=True)
class Merge:
    """A merged adapter and what is worth knowing of how it came about.

    ``discrepancy``: relative Frobenius norm of what averaging A and B separately would have got
    wrong, ||mean(B) mean(A) - mean(B A)|| / ||mean(B A)|| over all layers; 0 if a factor is shared,
    None where ranks differ and factors have no mean.
    ``kept_energy``: share of the squared norm that the output rank keeps, smallest over layers.
    ``mean_cosine``: of all pairs of hospitals, each taken as one vector; None for one hospital.
    ``norm_ratio``: norm of the merged update over that of the exact mean; 1 when both are zero.
    """

    adapter: Adapter
    discrepancy: float | None
    kept_energy: float
    mean_cosine: float | None
    norm_ratio: float


def merge(
    strategy: Strategy,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    draw: Draw | None = None,
    rank: int | None = None,
) -> Merge:
    """Merge ``adapters``, whose ranks and scales may differ, into one of the given rank.

    ``weights`` are positive, public and sum to one; ``rank`` None takes the first adapter's.
    ``adapters`` are gone through one at a time, more than once, and may be loaded each time.
    Raises MergeError when the adapters do not fit each other or the strategy.
    """
    if not adapters:
        raise MergeError("no adapter to merge")
    if len(weights) != len(adapters) or min(weights) <= 0 or abs(sum(weights) - 1) > 1e-9:
        raise MergeError("weights must be positive, one for each adapter, and sum to one")
    figures = Figures(adapters, weights)
    first = figures.first
    spec = first if rank is None else AdapterSpec(rank, float(rank), first.targets)
    combined = dict(strategy.combine(adapters, weights, draw or Draw()))
    layers, kept, squared = {}, 1.0, 0.0
    for name in list(combined):
        update = combined.pop(name)  # a dense one takes much memory
        if strategy.declared.exact:
            figures.compare(name, update)
        layers[name], share, norm = _of_rank(update, spec.rank)
        kept, squared = min(kept, share), squared + norm**2
    merged = Adapter.from_deltas(layers, spec)
    if not merged.is_finite():
        raise MergeError(f"{strategy.name} gave NaN or infinity")
    if not strategy.declared.exact:
        for name, mean in _exact_means(adapters, weights).items():
            figures.compare(name, mean)
    size = figures.size
    return Merge(
        merged,
        figures.discrepancy,
        kept,
        figures.mean_cosine,
        math.sqrt(squared) / size if size else 1.0,
    )


def _exact_means(adapters: Sequence[Adapter], weights: Sequence[float]) -> Updates:
    means = ProductMeans()
    for adapter, weight in zip(adapters, weights, strict=True):
        means.add(adapter, weight)
    return means.take()


def _of_rank(update: Update, rank: int) -> tuple[LowRank, float, float]:
    """Factors of exactly ``rank``, the share of the squared norm that they keep, and the norm."""
    if isinstance(update, LowRank) and update.rank == rank:
        return update, 1.0, update.norm()  # as it is: what is shared stays the same bit for bit
    parts = svd(update if isinstance(update, LowRank) else _factors(update), rank)
    return parts.truncate(rank), parts.kept_energy(rank), float(parts.S.norm())


def _factors(dense: Tensor) -> LowRank:
    """A dense update as factors of full rank, the identity being one of them."""
    m, n = dense.shape
    if m <= n:
        return LowRank(torch.eye(m, dtype=dense.dtype), dense)
    return LowRank(dense, torch.eye(n, dtype=dense.dtype))
