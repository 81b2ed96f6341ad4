"""Which part of the factors a round trains, and so which part travels to the coordinator.

    B      dW = s B A, A frozen and shared               FFA-LoRA, arXiv 2403.12313
    A      the same with B frozen
    both   both factors: noise multiplies noise, and means of factors are no means of products
    core   dW = s P R A, only R (rank x rank) trained    Fed-SB, arXiv 2502.15436

P and A have orthonormal columns and rows drawn from a public seed, so a core of rank r carries r^2
numbers and as little noise, whatever the width of the layer; Fed-SB's own start from gradients on
training data would have to be paid for. A plan may also alternate B and A from round to round
(RoLoRA, arXiv 2409.02346): each round has one shared factor, so the mean stays exact.

A core adapter is kept in the usual form, B = P R, and R = P^T B is read off when it travels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from adapters.adapter import Adapter
from adapters.lowrank import LowRank
from conf.schema import TrainedFactors

TrainedPart = Literal["B", "A", "both", "core"]

_CORE = ".lora_core.weight"


def part_of_round(train: TrainedFactors, number: int) -> TrainedPart:
    """What round ``number`` (from 1) trains: ``alternate`` begins with B, which starts at zero."""
    if train == "alternate":
        return "B" if number % 2 else "A"
    return train


def orthonormal_rows(rank: int, width: int, key: str) -> Tensor:
    """(rank, width) float32 with orthonormal rows, the same wherever it is drawn from ``key``."""
    digest = hashlib.sha256(key.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    q, r = torch.linalg.qr(torch.randn(width, rank, generator=generator, dtype=torch.float64))
    return (q * r.diagonal().sign()).T.float()


def frame(layer: str, width: int, rank: int, seed: int) -> Tensor:
    """P of a core adapter's ``layer``: (width, rank) float32 with orthonormal columns."""
    return orthonormal_rows(rank, width, f"{seed}:{layer}:B").T.contiguous()


def to_travel(adapter: Adapter, part: TrainedPart, seed: int) -> dict[str, Tensor]:
    """The tensors of ``adapter`` that a round of this ``part`` sends, by name; float32 for cores.

    ``seed`` is the plan's; it matters for cores only.
    """
    if part == "core":
        return {
            name + _CORE: (_frame_of(name, layer, seed).T @ layer.B.double()).float()
            for name, layer in sorted(adapter.layers.items())
        }
    frozen = frozen_suffix(part)
    return {n: t for n, t in adapter.tensors().items() if frozen is None or not n.endswith(frozen)}


def joined(sent: Adapter, travelled: Mapping[str, Tensor], part: TrainedPart, seed: int) -> Adapter:
    """``sent`` with the part that came back in place of its own: inverse of ``to_travel``.

    Raises ValueError on unknown, missing or misshapen entries.
    """
    expected = to_travel(sent, part, seed)
    if set(travelled) != set(expected):
        raise ValueError("factors missing or unexpected")
    if any(travelled[name].shape != tensor.shape for name, tensor in expected.items()):
        raise ValueError("factors of another shape")
    if part != "core":
        return Adapter.from_tensors({**sent.tensors(), **travelled}, sent.spec)
    layers = {}
    for name, layer in sent.layers.items():
        core = travelled[name + _CORE].double()
        layers[name] = LowRank((_frame_of(name, layer, seed) @ core).float(), layer.A)
    return Adapter(sent.spec, layers)


def frozen_suffix(part: TrainedPart) -> str | None:
    """How the names of the factors end that such a round must leave as they are; None: no factor.

    Of a core adapter A is frozen as a whole, and B outside its frame, which does not travel.
    """
    return {"B": "lora_A.weight", "core": "lora_A.weight", "A": "lora_B.weight"}.get(part)


def _frame_of(name: str, layer: LowRank, seed: int) -> Tensor:
    return frame(name, layer.shape[0], layer.rank, seed).double()
