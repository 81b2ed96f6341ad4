"""Steps on the single entries of dense updates, from which the sparse strategies are put together.

Trim or drop entries of each hospital's update, elect a sign for every place, fuse what agrees with
it. The result has full rank: factorised again it loses energy, which every merge reports, and under
the noise of differential privacy most large entries are noise. None of these is a default.

Entries depend on the products B A only, never on how they are factorised.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, ValidatorFunctionWrapHandler, WrapValidator
from torch import Tensor

from adapters.adapter import Adapter
from strategies.base import MergeError, deltas

Dense = dict[str, list[Tensor]]  # by layer, the dense updates (m, n) of all hospitals
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


def dense(adapters: Sequence[Adapter]) -> Dense:
    """dW of every layer and hospital, float64."""
    return {name: [part.dense() for part in parts] for name, parts in deltas(adapters).items()}


def trimmed(updates: Dense, density: PerAdapter, scope: Literal["layer", "model"]) -> Dense:
    """Each hospital's largest entries, ``density`` of them over a layer or over the whole model.

    At least one entry is kept; of equal ones at the threshold, all are. Raises MergeError when
    there are densities for another number of hospitals.
    """
    hospitals = range(len(next(iter(updates.values()))))
    limits: dict[tuple[str, int], Tensor] = {}
    for k, share in enumerate(densities(density, len(hospitals))):
        if scope == "model":
            limit = _threshold(torch.cat([u[k].abs().flatten() for u in updates.values()]), share)
            limits |= {(name, k): limit for name in updates}
        else:
            for name, own in updates.items():
                limits[name, k] = _threshold(own[k].abs().flatten(), share)
    return {
        name: [torch.where(d.abs() >= limits[name, k], d, 0.0) for k, d in enumerate(own)]
        for name, own in updates.items()
    }


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


def scaled(updates: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
    """Every update times ``factor``."""
    return {name: update * factor for name, update in updates.items()}


def _threshold(magnitudes: Tensor, density: float) -> Tensor:
    count = max(1, round(density * magnitudes.numel()))
    return magnitudes.kthvalue(magnitudes.numel() - count + 1).values
