"""From hospitals' adapters to the merged one: check, combine, re-factorise, report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.adapter import Adapter, AdapterSpec
from adapters.lowrank import LowRank, svd, weighted_sum
from strategies.base import (
    Draw,
    MergeError,
    Strategy,
    Update,
    factor_means,
    product_means,
)

_ROUNDING = 1e-12  # relative; below it two factors are the same


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
    Raises MergeError when the adapters do not fit each other or the strategy.
    """
    _check(adapters, weights)
    first = adapters[0].spec
    spec = first if rank is None else AdapterSpec(rank, float(rank), first.targets)
    combined = strategy.combine(adapters, weights, draw or Draw())
    layers, kept = {}, 1.0
    for name, update in combined.items():
        layers[name], share = _of_rank(update, spec.rank)
        kept = min(kept, share)
    merged = Adapter.from_deltas(layers, spec)
    if not merged.is_finite():
        raise MergeError(f"{strategy.name} gave NaN or infinity")
    exact = product_means(adapters, weights)
    size = _norm(exact)
    return Merge(
        merged,
        _discrepancy(adapters, weights, size),
        kept,
        _mean_cosine(adapters),
        _norm(combined) / size if size else 1.0,
    )


def _check(adapters: Sequence[Adapter], weights: Sequence[float]) -> None:
    if not adapters:
        raise MergeError("no adapter to merge")
    if len(weights) != len(adapters) or min(weights) <= 0 or abs(sum(weights) - 1) > 1e-9:
        raise MergeError("weights must be positive, one for each adapter, and sum to one")
    shapes = [{name: layer.shape for name, layer in a.layers.items()} for a in adapters]
    if any(shape != shapes[0] for shape in shapes):
        raise MergeError("adapters differ in layers or in the shapes of layers")
    if not all(adapter.is_finite() for adapter in adapters):
        raise MergeError("an adapter holds NaN or infinity")


def _of_rank(update: Update, rank: int) -> tuple[LowRank, float]:
    """Factors of exactly ``rank``, and the share of the squared norm that they keep."""
    if isinstance(update, LowRank):
        if update.rank == rank:  # as it is: what is shared or frozen stays the same bit for bit
            return update, 1.0
        parts = svd(update)
        return parts.truncate(rank), parts.kept_energy(rank)
    parts = svd(_factors(update))
    return parts.truncate(rank), parts.kept_energy(rank)


def _factors(dense: Tensor) -> LowRank:
    """A dense update as factors of full rank, the identity being one of them."""
    m, n = dense.shape
    if m <= n:
        return LowRank(torch.eye(m, dtype=dense.dtype), dense)
    return LowRank(dense, torch.eye(n, dtype=dense.dtype))


def _norm(updates: Mapping[str, Update]) -> float:
    return math.sqrt(sum(float(u.norm()) ** 2 for u in updates.values()))


def _discrepancy(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    size: float,
) -> float | None:
    """The difference is exactly -sum_k w_k s (B_k - mean B)(A_k - mean A), which is formed here:

    as a difference of two norms it would drown in rounding where a factor is shared.
    """
    try:
        means = factor_means(adapters, weights)
    except MergeError:
        return None
    scale = adapters[0].spec.scale
    gap = {}
    for name, mean in means.items():
        parts = [
            LowRank(a.layers[name].B.double() * scale - mean.B, a.layers[name].A.double() - mean.A)
            for a in adapters
        ]
        gap[name] = weighted_sum(parts, weights)
    found = _norm(gap) / size if size else 0.0
    return found if found > _ROUNDING else 0.0


def _mean_cosine(adapters: Sequence[Adapter]) -> float | None:
    own = [adapter.deltas() for adapter in adapters]
    norms = [_norm(d) for d in own]
    cosines = [
        sum(own[i][n].inner(own[j][n]) for n in own[i]) / (norms[i] * norms[j])
        for i in range(len(own))
        for j in range(i)
        if norms[i] * norms[j]
    ]
    return sum(cosines) / len(cosines) if cosines else None
