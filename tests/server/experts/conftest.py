"""Three random experts of a tiny model, and files of invented tasks for them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from adapters import lora
from adapters.adapter import Adapter, AdapterSpec
from adapters.base_model import BaseModel, load_base
from adapters.lowrank import LowRank
from conf.schema import ModelSettings

TARGETS = ("q_proj", "down_proj")


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> BaseModel:
    """The tiny model, loaded."""
    return load_base(ModelSettings(source="path", path=str(tiny_model)))


@pytest.fixture(scope="module")
def random_adapter(base: BaseModel) -> Callable[..., Adapter]:
    """An adapter with random factors: seed, rank, size of B and targets."""

    def make(
        seed: int, rank: int = 2, size: float = 0.1, targets: tuple[str, ...] = TARGETS
    ) -> Adapter:
        start = lora.initial(base.model, AdapterSpec(rank, 2.0 * rank, targets), seed)
        g = torch.Generator().manual_seed(seed)
        layers = {
            name: LowRank(size * torch.randn(layer.B.shape, generator=g), layer.A)
            for name, layer in start.layers.items()
        }
        return Adapter(start.spec, layers)

    return make


@pytest.fixture
def experts(tmp_path: Path, random_adapter: Callable[..., Adapter]) -> list[Path]:
    """Folders of three experts of different rank, all called ``adapter``."""
    return [
        random_adapter(seed, rank).save(tmp_path / f"expert-{seed}" / "adapter")
        for seed, rank in ((1, 2), (2, 3), (3, 2))
    ]


@pytest.fixture
def task_files(tmp_path: Path) -> list[Path]:
    """A file of texts and a file of instructions."""
    ward = [{"text": f"the patient of bed {i} was seen today"} for i in range(4)]
    lab = [
        {"instruction": "Read the value.", "input": f"sodium 13{i}", "output": f"it is 13{i}"}
        for i in range(4)
    ]
    files = []
    for name, rows in (("ward", ward), ("lab", lab)):
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files
