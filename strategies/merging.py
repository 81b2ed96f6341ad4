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

_ROUNDING = 1e-12  # of a layer's largest singular value, or of its norm: what is less is rounding


@dataclass(frozen=True)
class Exact:
    """The rank at which nothing is lost, or ``most`` where that is less."""

    most: int | None = None


@dataclass(frozen=True)
class Merge:
    """A merged adapter and what is worth knowing of how it came about.

    In a round figures are of what it has changed, dW_k - dW_0, and not of whole updates: beside
    what earlier rounds have learned a step would not show.

    ``discrepancy``: Frobenius norm of what averaging A and B separately would have got wrong,
    mean(B) mean(A) - mean(B A), over that of the exact mean; 0 if a factor is shared, None where
    ranks differ and factors have no mean.
    ``kept_energy``: 1 - (norm of what the cut to the rank takes / norm before the cut)^2, smallest
    over layers; ``kept_by_layer``: of each layer.
    ``mean_cosine``: of all pairs of hospitals, each taken as one vector; None for one hospital.
    ``norm_ratio``: norm of what was merged, after the cut, over that of the exact mean before any;
    1 when that is zero.
    ``exact_rank``: the rank that loses nothing, where ``Exact`` was asked for.
    """

    adapter: Adapter
    discrepancy: float | None
    kept_energy: float
    mean_cosine: float | None
    norm_ratio: float
    kept_by_layer: Mapping[str, float]
    exact_rank: int | None = None


def merge(
    strategy: Strategy,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    draw: Draw | None = None,
    rank: int | Exact | None = None,
    dtype: torch.dtype = torch.float32,
    origin: Adapter | None = None,
    orthonormal: Literal["A", "B"] = "A",
) -> Merge:
    """Merge ``adapters``, whose ranks and scales may differ, into one of the given rank.

    ``weights`` are positive, public and sum to one, and equal where the strategy would ignore
    them; ``rank`` None takes the first adapter's; ``dtype`` is that of the merged factors, computed
    in float64; ``origin`` is the adapter that a round began with (see ``strategies.changes``);
    ``orthonormal`` is the factor that is so where an update is re-factorised, the other one having
    its size: the one that the next round freezes, or else a step would be as short as what was
    learned so far. ``adapters`` are gone through one at a time, more than once, and may be loaded
    each time. Raises MergeError when the adapters do not fit each other or the strategy.
    """
    if not adapters:
        raise MergeError("no adapter to merge")
    if len(weights) != len(adapters) or min(weights) <= 0 or abs(sum(weights) - 1) > 1e-9:
        raise MergeError("weights must be positive, one for each adapter, and sum to one")
    if not strategy.weighted and max(weights) - min(weights) > 1e-9:
        raise MergeError(f"{strategy.name} counts all adapters alike; weights must be equal")
    changes = None if origin is None else Changes(adapters, origin)
    figures = Figures(adapters, weights, changes)
    combined = _combined(strategy, adapters, weights, draw or Draw(), changes, figures.shapes)
    exact = strategy.declared.exact
    spec = figures.first
    if isinstance(rank, int):
        spec = replace(spec, rank=rank, alpha=float(rank))
    layers, kept, exact_rank, squared = {}, {}, 0, 0.0
    for name in list(combined):
        update = combined.pop(name)  # a dense one takes much memory
        if isinstance(rank, Exact):
            cut = _without_rounding(update, rank.most)
        else:
            cut = _of_rank(update, spec, orthonormal)
        exact_rank = max(exact_rank, cut.exact_rank)
        before, after = cut.before, cut.after
        if changes is not None:
            before, after = changes.distance(name, update), changes.distance(name, cut.factors)
        known = before > _ROUNDING * cut.before
        kept[name] = 1 - min(1.0, cut.lost / before) ** 2 if known else 1.0
        layers[name] = cut.factors
        squared += after**2
        if exact:
            figures.compare(name, update, cut.before, before)
    if isinstance(rank, Exact):
        widest = max(layer.rank for layer in layers.values())
        spec = replace(spec, rank=widest, alpha=float(widest))
        layers = {name: _filled_up(layer, widest) for name, layer in layers.items()}
    merged = Adapter.from_deltas(layers, spec, dtype)
    if not merged.is_finite():
        raise MergeError(f"{strategy.name} gave NaN or infinity")
    if not exact:
        for name, mean in _exact_means(changes or adapters, weights).items():
            whole = mean if changes is None else changes.whole(name, mean)
            figures.compare(name, whole, norm(whole), norm(mean))
    size = figures.size
    return Merge(
        merged,
        figures.discrepancy,
        min(kept.values()),
        figures.mean_cosine,
        math.sqrt(squared) / size if size else 1.0,
        kept,
        exact_rank or None,
    )


def _combined(
    strategy: Strategy,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    draw: Draw,
    changes: Changes | None,
    shapes: Mapping[str, tuple[int, int]],
) -> Updates:
    if not strategy.declared.of_changes:
        changes = None
    acted_on = adapters
    if changes is not None:
        acted_on = changes.in_columns() if strategy.on_factors else changes
        draw = changes.draw(draw)
    found = dict(strategy.combine(acted_on, weights, draw))
    _require_whole(strategy, found, shapes)
    if changes is None:
        return found
    # One is given away before the next is made: dense ones take much memory.
    return {name: changes.whole(name, found.pop(name)) for name in list(found)}


def _require_whole(
    strategy: Strategy, combined: Updates, shapes: Mapping[str, tuple[int, int]]
) -> None:
    """Return when a strategy, which may be another package's, gave every layer in its shape.

    Raises MergeError, also on NaN or infinity.
    """
    found = {
        name: tuple(update.shape) if isinstance(update, LowRank | Tensor) else type(update).__name__
        for name, update in combined.items()
    }
    for name in sorted(found.keys() | shapes.keys()):
        if found.get(name) != shapes.get(name):
            raise MergeError(
                f"{strategy.name} gave {found.get(name, 'nothing')} for {name}, where the adapters "
                f"have {shapes.get(name, 'nothing')}; tell who wrote that strategy"
            )
        update = combined[name]
        if not (update if isinstance(update, LowRank) else Dense(update)).is_finite():
            raise MergeError(f"{strategy.name} gave NaN or infinity for {name}")


def _exact_means(adapters: Sequence[Adapter], weights: Sequence[float]) -> Updates:
    means = ProductMeans()
    for adapter, weight in zip(adapters, weights, strict=True):
        means.add(adapter, weight)
    return means.take()


@dataclass(frozen=True)
class _Cut:
    """Factors of an update, its Frobenius norm ``before``, and that of what they have ``lost``."""

    factors: LowRank
    before: float
    lost: float
    exact_rank: int = 0  # that which loses nothing, where it is known

    @property
    def after(self) -> float:
        return math.sqrt(max(self.before**2 - self.lost**2, 0.0))


def _of_rank(update: Update, spec: AdapterSpec, orthonormal: Literal["A", "B"]) -> _Cut:
    """Factors of exactly the rank of ``spec``."""
    if isinstance(update, LowRank) and update.rank == spec.rank:
        return _Cut(update, update.norm(), 0.0)  # what is shared stays the same bit for bit
    parts = svd(update if isinstance(update, LowRank) else Dense(update), spec.rank)
    found = parts.truncate(spec.rank, orthonormal)
    if orthonormal == "B":  # also once LoRA's scale is taken off it
        found = LowRank(found.B * spec.scale, found.A / spec.scale)
    return _Cut(found, float(parts.S.norm()), float(parts.S[spec.rank :].norm()))


def _without_rounding(update: Update, most: int | None) -> _Cut:
    """Factors of the least rank that keeps every singular value above rounding, or of ``most``."""
    parts = svd(update if isinstance(update, LowRank) else Dense(update))
    exact = max(1, int((_ROUNDING * parts.S.max() < parts.S).sum()))
    own = exact if most is None else min(exact, most)
    lost = float(parts.S[own:exact].norm())
    return _Cut(parts.truncate(own), float(parts.S.norm()), lost, exact)


def _filled_up(layer: LowRank, rank: int) -> LowRank:
    """With zeros to ``rank``, for PEFT knows one rank for all layers."""
    more = rank - layer.rank
    return LowRank(
        torch.cat([layer.B, layer.B.new_zeros(layer.B.shape[0], more)], 1),
        torch.cat([layer.A, layer.A.new_zeros(more, layer.A.shape[1])]),
    )


def mean_cosine(products: Tensor) -> float | None:
    """Over all pairs of hospitals that learned anything, from the inner products (K, K)."""
    learned = products.diagonal() > 0
    found = cosines(products[learned][:, learned])
    pairs = torch.ones_like(found).triu(1) > 0
    return float(found[pairs].mean()) if pairs.any() else None
