"""Steps on the single entries of dense updates, from which the sparse strategies are put together.

Trim or drop entries of each hospital's update, elect a sign for every place, fuse what agrees with
it. The result has full rank: factorised again it loses energy, which every merge reports, and under
the noise of differential privacy most large entries are noise. None of these is a default.

Entries depend on the products B A only, never on how they are factorised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, ValidatorFunctionWrapHandler, WrapValidator
from torch import Tensor

from adapters.adapter import Adapter
from strategies.base import MergeError, deltas

Agreeing = Literal["mean", "sum"]  # of the entries that have the elected sign
PerAdapter = float | tuple[float, ...]  # one number for all, or one for each in their order


def _each(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_each(one, check) for one in value)
    if not isinstance(value, int | float):
        raise ValueError(f"strategy.density={value}: must be a number, or one for each adapter")
    return check(value)


Density = Annotated[PerAdapter, Field(gt=0, lt=1), WrapValidator(_each)]


def densities(density: PerAdapter, count: int | None = None) -> tuple[float, ...]:
    """One for each of ``count`` adapters, or all that were given.

    Raises MergeError when there are more or fewer.
    """
    if not isinstance(density, tuple):
        return (density,) * (count or 1)
    if count is not None and len(density) != count:
        raise MergeError(
            f"density: {len(density)} numbers for {count} adapters; give one for each, or one for "
            "all"
        )
    return density


def by_layer(
    adapters: Sequence[Adapter], merge: Callable[[str, list[Tensor]], Tensor]
) -> dict[str, Tensor]:
    """``merge`` of every layer, from its name and dW of all hospitals, dense, float64.

    Of one layer after the other: what is dense at a time is one layer of all hospitals.
    """
    return {
        name: merge(name, [part.dense() for part in parts])
        for name, parts in deltas(adapters).items()
    }


def least_kept(updates: Iterable[Tensor], density: float) -> Tensor:
    """The smallest magnitude among the largest ``density`` of all entries of these tensors.

    There is at least one; of equal ones at that magnitude all count.
    """
    magnitudes = torch.cat([update.abs().flatten() for update in updates])
    count = max(1, round(density * magnitudes.numel()))
    return magnitudes.kthvalue(magnitudes.numel() - count + 1).values


def trimmed(update: Tensor, least: Tensor) -> Tensor:
    """The entries of at least that magnitude, the others zero."""
    return torch.where(update.abs() >= least, update, 0.0)


def row_ranks(update: Tensor) -> Tensor:
    """Rank of every entry's magnitude within its row, from 0 (least) to n - 1, as float64."""
    return update.abs().argsort(dim=1, stable=True).argsort(dim=1).to(torch.float64)


def dropped(update: Tensor, keep: Tensor | float, generator: torch.Generator) -> Tensor:
    """Each entry kept with probability ``keep`` and divided by it: the expectation is unchanged."""
    probability = torch.as_tensor(keep, dtype=torch.float64).expand(update.shape)
    kept = torch.rand(update.shape, generator=generator, dtype=torch.float64) < probability
    return torch.where(kept, update / probability, 0.0)


def elected(
    own: Sequence[Tensor], weights: Sequence[float], by: Literal["weighted", "unweighted"]
) -> Tensor:
    """Sign of the (weighted) sum at every place; + where it is zero."""
    votes = weights if by == "weighted" else [1.0] * len(own)
    total = torch.stack([v * d for v, d in zip(votes, own, strict=True)]).sum(0)
    return torch.where(total < 0, -1.0, 1.0).to(total.dtype)


def fused(
    own: Sequence[Tensor],
    weights: Sequence[float],
    signs: Tensor | None,
    agreeing: Agreeing = "mean",
) -> Tensor:
    """Weighted mean at every place of the entries that are there and have the elected sign.

    The weights of those that agree are made to sum to one, unless their "sum" is asked for; where
    nobody agrees the result is zero. Without ``signs`` it is the weighted mean of all, zeros
    included.
    """
    if signs is None:
        return torch.stack([w * d for w, d in zip(weights, own, strict=True)]).sum(0)
    total, weight = torch.zeros_like(own[0]), torch.zeros_like(own[0])
    for w, d in zip(weights, own, strict=True):
        agrees = d * signs > 0
        total += torch.where(agrees, w * d, 0.0)
        weight.add_(agrees, alpha=w)  # ``where`` of two bare numbers is float32
    if agreeing == "sum":
        return total
    return torch.where(weight > 0, total / weight.clamp(min=1e-300), 0.0)
