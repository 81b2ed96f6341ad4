"""LoRA on a live model: attach it, read it out, write it back, fold it into the base weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adapters.adapter import Adapter, AdapterSpec
from adapters.base_model import ModelError
from adapters.lowrank import LowRank

_NAME = "default"


class UnsupportedAdapter(ValueError):
    """The adapter asked for cannot be trained privately on this base model."""


def attach(model: PreTrainedModel, spec: AdapterSpec, train: str = "both") -> PeftModel:
    """Attach a fresh LoRA and choose what is trained: ``train`` is "B" or "both".

    Raises UnsupportedAdapter when a target matches nothing or is not a plain linear layer
    (an embedding, for one, has no per-sample gradient here).
    """
    try:
        peft_model = get_peft_model(model, spec.peft_config())
    except ValueError:
        raise UnsupportedAdapter(
            f"no module of {type(model).__name__} matches targets={list(spec.targets)}"
        ) from None
    layers = _lora_layers(peft_model)
    adapted = sum(1 for name, _ in peft_model.named_modules() if name.endswith(".lora_A"))
    if not layers or adapted != len(layers):
        raise UnsupportedAdapter(
            f"targets={list(spec.targets)} names a module that is not a linear layer"
        )
    for layer in layers.values():
        _factor(layer, "A").requires_grad_(train == "both")
    # Dropout would make the loss of a note depend on a draw that no ledger records.
    peft_model.eval()
    return peft_model


def initial(model: PreTrainedModel, spec: AdapterSpec, seed: int) -> Adapter:
    """A public starting point: B = 0, and A with orthonormal rows drawn from seed and layer.

    Every hospital gets the same A from the coordinator, so B can be averaged exactly (FFA-LoRA,
    arXiv 2403.12313); orthonormal rows keep the gradient of B on the scale of that of dW
    (FedSVD, arXiv 2505.12805).
    """
    peft_model = attach(model, spec)
    layers = {}
    for name, layer in _lora_layers(peft_model).items():
        (m, _), (_, n) = _factor(layer, "B").shape, _factor(layer, "A").shape
        if spec.rank > n:
            raise UnsupportedAdapter(f"adapter.rank={spec.rank} exceeds the width {n} of {name}")
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        rows = torch.randn(n, spec.rank, generator=generator, dtype=torch.float64)
        layers[name] = LowRank(torch.zeros(m, spec.rank), torch.linalg.qr(rows).Q.T.float())
    detach(peft_model)
    return Adapter(spec, layers)


def read(peft_model: PeftModel, spec: AdapterSpec) -> Adapter:
    """A copy of the factors that the live model holds now, float32 on the CPU."""
    layers = {
        name: LowRank(
            _factor(layer, "B").detach().float().cpu().clone(),
            _factor(layer, "A").detach().float().cpu().clone(),
        )
        for name, layer in _lora_layers(peft_model).items()
    }
    return Adapter(spec, layers)


def write(peft_model: PeftModel, adapter: Adapter) -> None:
    """Put the adapter's factors into the live model.

    Raises ValueError when layers or shapes differ: a partial load would train the wrong thing.
    """
    live = _lora_layers(peft_model)
    if set(live) != set(adapter.layers):
        differing = sorted(set(live) ^ set(adapter.layers))
        raise ValueError(
            f"adapter and model differ in {len(differing)} layers, first {differing[0][:120]!a}"
        )
    with torch.no_grad():
        for name, layer in live.items():
            for weight, value in (
                (_factor(layer, "A"), adapter.layers[name].A),
                (_factor(layer, "B"), adapter.layers[name].B),
            ):
                if weight.shape != value.shape:
                    raise ValueError(
                        f"{name}: shape {tuple(value.shape)}, expected {tuple(weight.shape)}"
                    )
                weight.copy_(value)


def detach(peft_model: PeftModel) -> PreTrainedModel:
    """Remove the LoRA modules again; the base weights are as before."""
    model = peft_model.unload()
    if hasattr(model, "peft_config"):
        del model.peft_config
    return model


def fold(model: PreTrainedModel, adapter: Adapter) -> None:
    """Add dW to the base weights in place; the sum is formed in float64.

    Raises ModelError when the model lacks one of the layers or has it in another shape.
    """
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name, delta in adapter.deltas().items():
            if name not in modules:
                raise ModelError(f"the adapter does not fit the base model, which has no {name}")
            weight = cast(Tensor, modules[name].weight)
            dense = delta.to(torch.float64).dense()
            if isinstance(modules[name], Conv1D):  # GPT-2 keeps its weights as (in, out)
                dense = dense.T
            if dense.shape != weight.shape:
                raise ModelError(f"the adapter does not fit the base model: shape of {name}")
            weight.copy_(weight.double() + dense)


@contextmanager
def folded(model: PreTrainedModel, adapter: Adapter) -> Iterator[None]:
    """Fold the adapter in while the context is open; afterwards all is bit for bit as before."""
    modules = dict(model.named_modules())
    weights = {n: cast(Tensor, modules[n].weight) for n in adapter.layers if n in modules}
    before = {name: weight.clone() for name, weight in weights.items()}
    try:
        fold(model, adapter)
        yield
    finally:
        with torch.no_grad():
            for name, weight in before.items():
                weights[name].copy_(weight)


def _factor(layer: LoraLinear, which: str) -> Tensor:
    """The live factor "A" or "B" of an adapted layer."""
    factors = layer.lora_A if which == "A" else layer.lora_B
    return cast(Tensor, factors[_NAME].weight)


def _lora_layers(peft_model: PeftModel) -> dict[str, LoraLinear]:
    """Adapted linear layers by their module path in the base model."""
    prefix = "base_model.model."
    return {
        name.removeprefix(prefix): module
        for name, module in peft_model.named_modules()
        if isinstance(module, LoraLinear)
    }
