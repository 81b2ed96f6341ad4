"""Merges as their papers define them: from all hospitals of a layer at once, dense, in float64.

Nothing is computed by ``strategies/``, whose sums run over hospitals one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from adapters.adapter import Adapter
from adapters.statistics import MeasuredAdapter
from strategies.base import Draw


@dataclass(frozen=True)
class Hospital:
    """One layer of one hospital: its weight, factors with the scale in B, statistics, noise."""

    w: float
    B: Tensor
    A: Tensor
    gram: Tensor
    fisher: Tensor
    moved: Tensor
    tau: float

    @property
    def dW(self) -> Tensor:
        """The update, (m, n)."""
        return self.B @ self.A


Layers = list[list[Hospital]]  # by layer, all hospitals


def merged(name: str, adapters: Sequence[Adapter], weights: Sequence[float], draw: Draw) -> dict:
    """The merged update of each layer, (m, n), by the definition of that strategy's defaults."""
    layers = {n: _layer(n, adapters, weights, draw) for n in adapters[0].layers}
    if name == "noise_aware":
        return dict(zip(layers, _noise_aware(list(layers.values()), draw), strict=True))
    return {n: _BY_LAYER[name](own) for n, own in layers.items()}


def _layer(n: str, adapters: Sequence[Adapter], weights: Sequence[float], draw: Draw) -> list:
    made = []
    for k, (a, w) in enumerate(zip(adapters, weights, strict=True)):
        B, A, s = a.layers[n].B.double(), a.layers[n].A.double(), a.spec.scale
        own = a.statistics if isinstance(a, MeasuredAdapter) else {}
        gram, fisher = (own[key].double() for key in (n, f"{n}.lora_B.weight"))
        noise = draw.noise
        moved = B - noise.start.layers[n].B.double() if noise else B
        made.append(Hospital(w, s * B, A, gram, fisher, moved, noise.stds[k] if noise else 0.0))
    return made


def mean(own: list[Hospital]) -> Tensor:
    """Of the products."""
    return torch.stack([h.w * h.dW for h in own]).sum(0)


def mean_of_factors(own: list[Hospital]) -> Tensor:
    """Mean of B times mean of A: FedAvg."""
    return sum(h.w * h.B for h in own) @ sum(h.w * h.A for h in own)  # type: ignore[operator]


def _padded_mean(own: list[Hospital]) -> Tensor:
    """HetLoRA: factors filled with zeros, by the norms of the products."""
    sizes = [h.w * float(h.dW.norm()) for h in own]
    rank, pad = max(h.B.shape[1] for h in own), torch.nn.functional.pad
    B = [s * pad(h.B, (0, rank - h.B.shape[1])) for s, h in zip(sizes, own, strict=True)]
    A = [s * pad(h.A, (0, 0, 0, rank - len(h.A))) for s, h in zip(sizes, own, strict=True)]
    return torch.stack(B).sum(0) @ torch.stack(A).sum(0) / sum(sizes) ** 2


def _lora_fair(own: list[Hospital]) -> Tensor:
    """The ridge regression as one least-squares problem with the ridge as further rows."""
    A = torch.stack([h.w * h.A for h in own]).sum(0)
    B = torch.stack([h.w * h.B for h in own]).sum(0)
    c = 0.01 * float(A.square().sum()) / len(A)
    rows = torch.cat([A.T, c**0.5 * torch.eye(len(A), dtype=A.dtype)])
    gap = torch.cat([(mean(own) - B @ A).T, torch.zeros(len(A), len(B), dtype=A.dtype)])
    return (B + torch.linalg.lstsq(rows, gap).solution.T) @ A


def _norm_weighted(own: list[Hospital]) -> Tensor:
    direction = torch.stack([h.w * h.dW / h.dW.norm() for h in own]).sum(0)
    return direction / direction.norm() * sum(h.w * float(h.dW.norm()) for h in own)


def _model_stock(own: list[Hospital]) -> Tensor:
    units = [h.dW.flatten() / h.dW.norm() for h in own]
    cosines = [float(one @ other) for one, other in combinations(units, 2)]
    k, c = len(own), sum(cosines) / len(cosines)
    return max(0.0, k * c / (1 + (k - 1) * c)) * mean(own)


def _norm_bound(own: list[Hospital]) -> Tensor:
    sizes = sorted(float(h.dW.norm()) for h in own)
    bound = sizes[(len(sizes) - 1) // 2]
    return torch.stack([h.w * min(1.0, bound / float(h.dW.norm())) * h.dW for h in own]).sum(0)


def _regmean(own: list[Hospital]) -> Tensor:
    total, pull = (torch.stack(x).sum(0) for x in (
        [h.w * h.gram for h in own], [h.w * (h.B - _mean_B(own)) @ h.gram for h in own]
    ))  # fmt: skip
    ridge = float(total.trace()) / len(total) * torch.eye(len(total), dtype=total.dtype)
    return (_mean_B(own) + torch.linalg.solve(total + ridge, pull.T).T) @ own[0].A


def _fisher(own: list[Hospital]) -> Tensor:
    least = float(torch.stack([h.fisher for h in own]).abs().mean())
    F = torch.stack([h.w * h.fisher.clamp(min=least) for h in own])
    return (F * torch.stack([h.B for h in own])).sum(0) / F.sum(0) @ own[0].A


def _mean_B(own: list[Hospital]) -> Tensor:
    return torch.stack([h.w * h.B for h in own]).sum(0)


def _noise_aware(layers: Layers, draw: Draw) -> list[Tensor]:
    """Precision weights with the variance between hospitals by the method of moments."""
    assert draw.noise is not None
    moved = torch.stack([torch.cat([own[k].moved.flatten() for own in layers])
                         for k in range(len(layers[0]))])  # fmt: skip
    given = torch.tensor([h.w for h in layers[0]], dtype=torch.float64)
    variance = torch.tensor([h.tau**2 for h in layers[0]], dtype=torch.float64)
    p = given / variance / (given / variance).sum()
    spread = float((p[:, None] * (moved - p @ moved).square()).sum()) / moved.shape[1]
    shares = p * (1 - p)
    between = max(0.0, float((spread - shares @ variance) / shares.sum()))
    a = given / (variance + between)
    a /= a.sum()
    return [
        torch.stack([a_k * h.dW for a_k, h in zip(a, own, strict=True)]).sum(0) for own in layers
    ]


_BY_LAYER: dict[str, Callable[[list[Hospital]], Tensor]] = {
    **dict.fromkeys(("product_mean", "ffa", "fedsvd", "rolora"), mean),
    "fedavg": mean_of_factors,
    "task_arithmetic": lambda own: 0.4 * len(own) * mean(own),
    "hetlora": _padded_mean,
    "lora_fair": _lora_fair,
    "norm_weighted": _norm_weighted,
    "model_stock": _model_stock,
    "norm_bound": _norm_bound,
    "regmean": _regmean,
    "fisher": _fisher,
}
