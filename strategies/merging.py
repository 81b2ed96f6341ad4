"""From hospitals' adapters to the merged one: check, combine, re-factorise, report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from adapters.adapter import Adapter, AdapterSpec
from adapters.lowrank import Dense, LowRank, svd
from strategies.base import Draw, MergeError, Strategy, Update, Updates
from strategies.changes import Changes
from strategies.figures import Figures
from strategies.inner_products import cosines
from strategies.sums import ProductMeans, norm

_ROUNDING = 1e-12  # singular value, relative to the layer's largest, that is rounding


@dataclass(frozen=True)
class Merge:
    """A merged adapter and what is worth knowing of how it came about.

    ``discrepancy``: relative Frobenius norm of what averaging A and B separately would have got
    wrong, ||mean(B) mean(A) - mean(B A)|| / ||mean(B A)|| over all layers; 0 if a factor is shared,
    None where ranks differ and factors have no mean.
    ``kept_energy``: share of the squared norm that the output rank keeps, smallest over layers;
    ``kept_by_layer``: of each layer.
    ``mean_cosine``: of all pairs of hospitals, each taken as one vector; None for one hospital.
    ``norm_ratio``: norm of ``adapter``'s update, after the cut to its rank, over that of the exact
    mean before any cut; 1 when that is zero.
    """

    adapter: Adapter
    discrepancy: float | None
    kept_energy: float
    mean_cosine: float | None
    norm_ratio: float
    kept_by_layer: Mapping[str, float]


def merge(
    strategy: Strategy,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    draw: Draw | None = None,
    rank: int | Literal["exact"] | None = None,
    dtype: torch.dtype = torch.float32,
    origin: Adapter | None = None,
    orthonormal: Literal["A", "B"] = "A",
) -> Merge:
    """Merge ``adapters``, whose ranks and scales may differ, into one of the given rank.

    ``weights`` are positive, public and sum to one, and equal where the strategy would ignore
    them; ``rank`` None takes the first adapter's, and "exact" the rank that the merged update has,
    so that nothing is lost; ``dtype`` is that of the merged factors, computed in float64;
    ``origin`` is the adapter that a round began with (see ``strategies.changes``); ``orthonormal``
    is the factor that is so where an update is re-factorised, the other one having its size: the
    one that the next round freezes, or else a step would be as short as what was learned so far.
    ``adapters`` are gone through one at a time, more than once, and may be loaded each time. Raises
    MergeError when the adapters do not fit each other or the strategy.
    """
    if not adapters:
        raise MergeError("no adapter to merge")
    if len(weights) != len(adapters) or min(weights) <= 0 or abs(sum(weights) - 1) > 1e-9:
        raise MergeError("weights must be positive, one for each adapter, and sum to one")
    if not strategy.weighted and max(weights) - min(weights) > 1e-9:
        raise MergeError(f"{strategy.name} counts all adapters alike; weights must be equal")
    figures = Figures(adapters, weights)
    combined = _combined(strategy, adapters, weights, draw or Draw(), origin)
    if rank == "exact":
        compressed, rank = _compressed(combined)
        combined.update(compressed)
    first, exact = figures.first, strategy.declared.exact
    spec = first if rank is None else replace(first, rank=rank, alpha=float(rank))
    layers, kept, squared = {}, {}, 0.0
    for name in list(combined):
        update = combined.pop(name)  # a dense one takes much memory
        layers[name], kept[name], size = _of_rank(update, spec, orthonormal)
        squared += kept[name] * size**2
        if exact:
            figures.compare(name, update, size)
    merged = Adapter.from_deltas(layers, spec, dtype)
    if not merged.is_finite():
        raise MergeError(f"{strategy.name} gave NaN or infinity")
    if not exact:
        for name, mean in _exact_means(adapters, weights).items():
            figures.compare(name, mean, norm(mean))
    size = figures.size
    return Merge(
        merged,
        figures.discrepancy,
        min(kept.values()),
        figures.mean_cosine,
        math.sqrt(squared) / size if size else 1.0,
        kept,
    )


def _combined(
    strategy: Strategy,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    draw: Draw,
    origin: Adapter | None,
) -> Updates:
    if origin is None or not strategy.declared.of_changes:
        return dict(strategy.combine(adapters, weights, draw))
    changes = Changes(adapters, origin, strategy.on_factors)
    return changes.added(strategy.combine(changes, weights, changes.draw(draw)))


def _exact_means(adapters: Sequence[Adapter], weights: Sequence[float]) -> Updates:
    means = ProductMeans()
    for adapter, weight in zip(adapters, weights, strict=True):
        means.add(adapter, weight)
    return means.take()


def _of_rank(
    update: Update, spec: AdapterSpec, orthonormal: Literal["A", "B"]
) -> tuple[LowRank, float, float]:
    """Factors of exactly its rank, the share of the squared norm that they keep, and the norm."""
    if isinstance(update, LowRank) and update.rank == spec.rank:
        return update, 1.0, update.norm()  # as it is: what is shared stays the same bit for bit
    parts = svd(update if isinstance(update, LowRank) else Dense(update), spec.rank)
    found = parts.truncate(spec.rank, orthonormal)
    if orthonormal == "B":  # also once LoRA's scale is taken off it
        found = LowRank(found.B * spec.scale, found.A / spec.scale)
    return found, parts.kept_energy(spec.rank), float(parts.S.norm())


def _compressed(updates: Mapping[str, Update]) -> tuple[dict[str, LowRank], int]:
    """All updates as factors of one rank: the least that keeps every singular value above rounding.

    Narrower layers are filled up with zeros: PEFT knows one rank for all.
    """
    found = {
        name: svd(update if isinstance(update, LowRank) else Dense(update))
        for name, update in updates.items()
    }
    ranks = {
        name: int((_ROUNDING * parts.S.max() < parts.S).sum()) for name, parts in found.items()
    }
    rank = max(1, *ranks.values())
    layers = {}
    for name, parts in found.items():
        own = parts.truncate(max(1, ranks[name]))
        more = rank - own.rank
        layers[name] = LowRank(
            torch.cat([own.B, own.B.new_zeros(own.B.shape[0], more)], 1),
            torch.cat([own.A, own.A.new_zeros(more, own.A.shape[1])]),
        )
    return layers, rank


def mean_cosine(products: Tensor) -> float | None:
    """Over all pairs of hospitals that learned anything, from the inner products (K, K)."""
    learned = products.diagonal() > 0
    found = cosines(products[learned][:, learned])
    pairs = torch.ones_like(found).triu(1) > 0
    return float(found[pairs].mean()) if pairs.any() else None
