"""Random hospitals for tests of strategies, and how far apart merged updates are."""

from __future__ import annotations

import math

import torch

from adapters.adapter import Adapter, AdapterSpec
from adapters.lowrank import LowRank
from adapters.statistics import MeasuredAdapter
from strategies.base import Strategy
from strategies.registry import OURS, create

TARGETS = ("q", "v")
SHAPES = {"layers.0.q": (9, 7), "layers.1.v": (6, 8)}
NAMES = [kind.name for kind in OURS]
SHARED = {"ffa", "fedsvd", "rolora", "regmean", "fisher", "noise_aware"}  # need the same A


def hospitals(count: int, seed: int, shared: bool, ranks: tuple[int, ...] = (3,)) -> list[Adapter]:
    """Random adapters of the given ranks in turn, float32; with ``shared`` they hold one A."""
    g = torch.Generator().manual_seed(seed)
    A = {n: torch.linalg.qr(torch.randn(w, 3, generator=g)).Q.T for n, (_, w) in SHAPES.items()}
    made = []
    for k in range(count):
        r = ranks[k % len(ranks)]
        layers = {
            n: LowRank(
                torch.randn(m, r, generator=g), A[n] if shared else torch.randn(r, w, generator=g)
            )
            for n, (m, w) in SHAPES.items()
        }
        made.append(Adapter(AdapterSpec(r, 2.0 * r, TARGETS), layers))
    return made


def measured(adapters: list[Adapter], kind: str) -> list[Adapter]:
    """The same with random statistics of that kind, float32, as their hospitals would send."""
    g = torch.Generator().manual_seed(8)
    made: list[Adapter] = []
    for a in adapters:
        if kind == "gram":
            z = {n: torch.randn(20, x.rank, generator=g) for n, x in a.layers.items()}
            statistics = {n: own.T @ own for n, own in z.items()}
        else:
            statistics = {
                f"{n}.lora_B.weight": torch.rand(x.B.shape, generator=g)
                for n, x in a.layers.items()
            }
        made.append(MeasuredAdapter(a.spec, a.layers, statistics))
    return made


def strategy(name: str) -> Strategy:
    return create(name)


def dense(adapter: Adapter) -> dict[str, torch.Tensor]:
    return {n: d.to(torch.float64).dense() for n, d in adapter.deltas().items()}


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Relative to the larger one."""
    gap = math.sqrt(sum(float((one[n] - other[n]).square().sum()) for n in one))
    size = max(math.sqrt(sum(float(x.square().sum()) for x in d.values())) for d in (one, other))
    return gap / size if size else 0.0


def equal_weights(adapters: list[Adapter]) -> list[float]:
    return [1 / len(adapters)] * len(adapters)
