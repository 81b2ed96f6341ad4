"""Statistics that a hospital may send beside its adapter, for merges that weigh by them.

    fisher   mean over patients of the squared gradient, for every entry of what was trained
    gram     mean over patients of z z^T in every layer, (rank, rank); z = A x is what B multiplies

Either is noised and charged at the hospital (``client.privacy.statistics`` says how) and may leave
only where its policy says so. Both sides check what travels by the same rule.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from adapters.adapter import Adapter
from adapters.tensor_file import write_tensors
from adapters.trained_part import TrainedPart, to_travel

Statistic = Literal["fisher", "gram"]
Statistics = Mapping[str, Tensor]

_FILE = "statistics.safetensors"
_LARGEST = 1e6  # of an entry; what is clipped and noised as it should be comes nowhere near


@dataclass(frozen=True, eq=False)
class MeasuredAdapter(Adapter):
    """An adapter and the statistics that came with it, by name, float32.

    "fisher" is named and shaped as what the round trained; "gram" is named by layer.
    """

    statistics: Statistics

    def save(self, folder: Path, base_model: str = "", dtype: torch.dtype = torch.float32) -> Path:
        """As ``Adapter.save``, with the statistics in a file of their own."""
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(self.statistics, folder / _FILE)
        return super().save(folder, base_model, dtype)


def load_measured(folder: Path) -> Adapter:
    """What ``save`` wrote: a MeasuredAdapter where there are statistics. Raises as Adapter.load."""
    adapter, file = Adapter.load(folder), folder / _FILE
    if not file.exists():
        return adapter
    return MeasuredAdapter(adapter.spec, adapter.layers, load_file(file))


def require_statistics(
    found: Statistics, kind: Statistic | None, sent: Adapter, part: TrainedPart, seed: int
) -> None:
    """Return when ``found`` is what a plan that asks for ``kind`` calls for, sound in all entries.

    ``sent`` is the adapter the round began with, ``part`` what it trained, ``seed`` the plan's.
    Raises ValueError on unknown, missing, misshapen, infinite, huge or asymmetric entries.
    """
    shapes: dict[str, torch.Size] = {}
    if kind == "fisher":
        shapes = {name: tensor.shape for name, tensor in to_travel(sent, part, seed).items()}
    elif kind == "gram":
        shapes = {name: torch.Size((x.rank, x.rank)) for name, x in sent.layers.items()}
    if set(found) != set(shapes):
        raise ValueError("statistics missing or unexpected")
    for name, tensor in found.items():
        if tensor.shape != shapes[name]:
            raise ValueError("statistics of another shape")
        if tensor.dtype != torch.float32:
            raise ValueError("statistics not float32")
        if not torch.isfinite(tensor).all():
            raise ValueError("statistics hold NaN or infinity")
        if tensor.abs().max() > _LARGEST:
            raise ValueError("statistics impossibly large")
        if kind == "gram" and not tensor.equal(tensor.T):
            raise ValueError("statistics not symmetric")
