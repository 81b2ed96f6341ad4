"""What these commands are given: adapter folders, and the base weights under an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from adapters.adapter import Adapter
from adapters.base_model import BaseModel
from conf.load import ConfigError


def load_adapter(key: str, folder: Path) -> Adapter:
    """The PEFT adapter in ``folder``. Raises ConfigError naming the option ``key``."""
    try:
        adapter = Adapter.load(folder)
    except (OSError, KeyError, ValueError, TypeError, AttributeError) as problem:
        raise ConfigError(f"{key}={folder}: not a LoRA folder ({problem})") from None
    if not adapter.is_finite():
        raise ConfigError(f"{key}={folder}: holds NaN or infinity")
    layers = {
        name: layer.to(torch.promote_types(layer.A.dtype, torch.float32))
        for name, layer in adapter.layers.items()
    }
    return replace(adapter, layers=layers)  # lest scaling it round what is stored in less


def distinct_names(key: str, folders: Sequence[Path]) -> list[str]:
    """As many of the last parts of each path as tell all apart: no more of this machine is told.

    Raises ConfigError when two are the same folder.
    """
    whole = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, whole)) + 1):
        names = ["/".join(parts[-count:]) for parts in whole]
        if len(set(names)) == len(names):
            return names
    twice = next(folder for folder in folders if whole.count(folder.resolve().parts) > 1)
    raise ConfigError(f"{key}: {twice} is named twice")


def weights_under(base: BaseModel, adapter: Adapter) -> dict[str, Tensor]:
    """The base weights of the adapted layers, (out, in) like the updates.

    Raises ConfigError when the model lacks a layer or has it in another shape.
    """
    modules = dict(base.model.named_modules())
    found = {}
    for name, layer in adapter.layers.items():
        if name not in modules:
            raise ConfigError(f"an adapter does not fit {base.name}, which has no {name}")
        weight = cast(Tensor, modules[name].weight)
        found[name] = weight.T if isinstance(modules[name], Conv1D) else weight
        # Weights of 4 bits are packed, and have no shape of their own.
        if weight.is_floating_point() and found[name].shape != layer.shape:
            raise ConfigError(f"an adapter does not fit {base.name}: shape of {name}")
    return found
