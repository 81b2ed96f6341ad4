"""Combinations sum_k c_k dW_k whose coefficients follow from norms: of updates, of sums of them.

Hospitals are taken one at a time, in several passes, so memory grows with their number by one float
a layer only. A vector is a layer's update, or with scope "model" all layers' together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from adapters.adapter import Adapter
from strategies.sums import ProductSums, Updates, norm

Scope = Literal["layer", "model"]  # what counts as one vector


def norms_of(adapters: Iterable[Adapter], scope: Scope) -> dict[str, Tensor]:
    """By layer, the norms (K) of the scaled updates, float64; under "model" the same for all."""
    found: dict[str, list[float]] = {}
    for adapter in adapters:
        for name, layer in adapter.layers.items():
            found.setdefault(name, []).append(layer.norm() * abs(adapter.spec.scale))
    return _joined(
        {name: torch.tensor(own, dtype=torch.float64) for name, own in found.items()}, scope
    )


def lengths(updates: Updates, scope: Scope) -> dict[str, float]:
    """By layer, the norm of one update; under "model" that of all, the same for every layer."""
    found = {n: torch.tensor(norm(update), dtype=torch.float64) for n, update in updates.items()}
    return {name: float(length) for name, length in _joined(found, scope).items()}


def combination(adapters: Iterable[Adapter], coefficients: Mapping[str, Tensor]) -> Updates:
    """sum_k c_k dW_k by layer, with the layer's coefficients (K)."""
    sums = ProductSums()
    for k, adapter in enumerate(adapters):
        sums.add(adapter, {name: float(c[k]) for name, c in coefficients.items()})
    return sums.take()


def inverse(sizes: Tensor) -> Tensor:
    """1 / size, and 0 for an update of zero, which has no direction."""
    return torch.where(sizes > 0, 1 / sizes.clamp(min=1e-300), 0.0)


def _joined(found: dict[str, Tensor], scope: Scope) -> dict[str, Tensor]:
    if scope == "layer":
        return found
    return dict.fromkeys(found, torch.stack(list(found.values())).square().sum(0).sqrt())
