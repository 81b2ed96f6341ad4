"""Tiny models and adapters on disk, and recipes that name them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import wardround

Call = Callable[..., int]


def tuned(base: Path, folder: Path, seed: int, size: float = 0.05) -> Path:
    """A model that differs from ``base`` a little in every tensor, vectors included."""
    model = AutoModelForCausalLM.from_pretrained(base)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=g))
    model.save_pretrained(folder)
    return folder


def lora(base: Path, folder: Path, seed: int, **options: Any) -> Path:
    """A random PEFT adapter for ``base``, both factors filled."""
    chosen = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **options}
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **chosen)
    )
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=g))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def models(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three models tuned from ``tiny_model``."""
    folder = tmp_path_factory.mktemp("tuned")
    return [tuned(tiny_model, folder / f"model-{i}", i) for i in range(3)]


@pytest.fixture(scope="session")
def adapters(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three adapters of ``tiny_model`` of different rank, alpha and scaling."""
    folder = tmp_path_factory.mktemp("lora")
    return [
        lora(tiny_model, folder / "one", 1),
        lora(tiny_model, folder / "two", 2, r=2, lora_alpha=3),
        lora(tiny_model, folder / "three", 3, r=3, lora_alpha=5, use_rslora=True),
    ]


@pytest.fixture
def call(tmp_path: Path) -> Call:
    """``wardround merge`` on a recipe given as keys; models as {path: parameters} or a list."""

    def merge(out: Path | None = None, **recipe: Any) -> int:
        if isinstance(recipe.get("models"), list):
            recipe["models"] = {path: {} for path in recipe["models"]}
        recipe["models"] = [
            {"model": str(path), **({"parameters": dict(own)} if own else {})}
            for path, own in recipe.get("models", {}).items()
        ]
        plain = {k: str(v) if isinstance(v, Path) else v for k, v in recipe.items()}
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(plain))
        return wardround.main(["merge", str(file), str(out or tmp_path / "out")])

    return merge
