"""A LoRA adapter as a value: its shape, its factors by layer, its file.

The file format is PEFT's (``adapter_config.json`` and ``adapter_model.safetensors``), so that any
PEFT user can load what Wardround writes. PEFT computes W = W0 + scale * B A with
scale = alpha / rank; factors are kept here exactly as PEFT stores them and the scale beside them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from adapters.chosen_layers import chosen_layers
from adapters.disk import to_disk
from adapters.lowrank import LowRank, stack
from adapters.peft_config import NAME, read_config
from adapters.tensor_file import write_tensors
from conf.schema import AdapterSettings, Layers

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class AdapterSpec:
    """Rank, alpha, target modules and layers of an adapter; the factor scale is alpha / rank.

    ``targets`` are names such as ``q_proj``, or whole paths of modules; ``layers`` chooses blocks
    of the base model (see ``adapters.chosen_layers``); ``task_type`` is one of PEFT's, or None
    where a folder does not say.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    layers: Layers = None
    task_type: str | None = "CAUSAL_LM"

    @classmethod
    def of(cls, settings: AdapterSettings) -> AdapterSpec:
        """The shape that settings ask for; rsLoRA becomes the alpha that gives the same scale."""
        alpha = settings.alpha * (settings.rank**0.5 if settings.rslora else 1)
        return cls(settings.rank, alpha, settings.targets, settings.layers)

    @property
    def scale(self) -> float:
        """Factor by which B A is multiplied before it is added to the base weight."""
        return self.alpha / self.rank

    def peft_config(self, base_model: str = "", depth: int | None = None) -> LoraConfig:
        """The equivalent PEFT configuration for a language model of ``depth`` blocks.

        Raises ValueError when the layers chosen are not among them; without ``depth`` only an
        adapter in all layers has one.
        """
        if self.layers is not None and depth is None:
            raise ValueError("which layers are chosen depends on the base model")
        chosen = None if self.layers is None else chosen_layers(self.layers, depth or 0)
        return LoraConfig(
            layers_to_transform=None if chosen is None else list(chosen),
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # PEFT divides, a float is right
            target_modules=list(self.targets),
            lora_dropout=0.0,
            bias="none",
            task_type=self.task_type,
            base_model_name_or_path=base_model,
        )


@dataclass(frozen=True, eq=False)
class Adapter:
    """Factors of every adapted layer, by module path in the base model, unscaled as in PEFT."""

    spec: AdapterSpec
    layers: Mapping[str, LowRank]

    def deltas(self) -> dict[str, LowRank]:
        """Scaled updates dW = scale * B A by layer: what merging acts on."""
        return {name: layer * self.spec.scale for name, layer in self.layers.items()}

    @staticmethod
    def from_deltas(
        deltas: Mapping[str, LowRank], spec: AdapterSpec, dtype: torch.dtype = torch.float32
    ) -> Adapter:
        """An adapter of the given spec whose scaled updates are ``deltas``.

        Raises ValueError when a layer's factors are not of rank ``spec.rank``.
        """
        for name, delta in deltas.items():
            if delta.rank != spec.rank:
                raise ValueError(f"{name}: factors of rank {delta.rank}, expected {spec.rank}")
        layers = {name: (delta * (1 / spec.scale)).to(dtype) for name, delta in deltas.items()}
        return Adapter(spec, layers)

    def tensors(self) -> dict[str, Tensor]:
        """Flat mapping ``LAYER.lora_A.weight`` / ``LAYER.lora_B.weight`` -> tensor, sorted."""
        flat = {}
        for name in sorted(self.layers):
            flat[f"{name}.lora_A.weight"] = self.layers[name].A
            flat[f"{name}.lora_B.weight"] = self.layers[name].B
        return flat

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor], spec: AdapterSpec) -> Adapter:
        """Inverse of ``tensors``. Raises ValueError on unknown, missing or misshapen entries."""
        names = set()
        for key in tensors:
            layer, _, factor = key.removesuffix(".weight").rpartition(".")
            if factor not in ("lora_A", "lora_B") or not layer or not key.endswith(".weight"):
                raise ValueError(f"not a plain LoRA factor: {key}")
            names.add(layer)
        layers = {}
        for name in sorted(names):
            try:
                B, A = tensors[f"{name}.lora_B.weight"], tensors[f"{name}.lora_A.weight"]
            except KeyError as missing:
                raise ValueError(f"factor missing: {missing.args[0]}") from None
            layers[name] = LowRank(B, A)
            if layers[name].rank != spec.rank:
                raise ValueError(f"{name}: rank {layers[name].rank}, expected {spec.rank}")
        return Adapter(spec, layers)

    def only(self, layers: Collection[str]) -> Adapter:
        """The part of the adapter that lies in the given layers; itself where that is all."""
        if self.layers.keys() <= set(layers):
            return self
        return Adapter(self.spec, {n: x for n, x in self.layers.items() if n in layers})

    def updated(self, part: Adapter) -> Adapter:
        """This adapter with the layers of ``part`` in place of its own."""
        return Adapter(self.spec, {**self.layers, **part.layers})

    @property
    def modules(self) -> tuple[str, ...]:
        """What PEFT must adapt to load it: the target names, or in chosen layers every path."""
        return self.spec.targets if self.spec.layers is None else tuple(sorted(self.layers))

    def is_finite(self) -> bool:
        """True when no factor holds NaN or infinity."""
        return all(layer.is_finite() for layer in self.layers.values())

    def largest(self) -> float:
        """Magnitude of the largest entry of any factor."""
        return max(float(tensor.abs().max()) for tensor in self.tensors().values())

    def fingerprint(self) -> str:
        """SHA-256 over names, shapes and bytes, independent of file metadata and order."""
        digest = hashlib.sha256()
        for name, tensor in self.tensors().items():
            data = tensor.detach().float().contiguous()
            digest.update(f"{name}{tuple(data.shape)}".encode())
            digest.update(data.numpy().tobytes())
        return digest.hexdigest()

    def save(self, folder: Path, base_model: str = "", dtype: torch.dtype = torch.float32) -> Path:
        """Write a PEFT adapter folder, durably; the tensors come last and whole. Raises OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        config = replace(self.spec, targets=self.modules, layers=None).peft_config(base_model)
        config.inference_mode = True
        config.save_pretrained(str(folder))
        to_disk(folder / NAME)
        flat = {_PREFIX + k: v.detach().to(dtype).contiguous() for k, v in self.tensors().items()}
        part = folder / "adapter_model.safetensors.part"
        write_tensors(flat, part)
        to_disk(part)
        part.replace(folder / "adapter_model.safetensors")
        to_disk(folder)
        return folder

    @staticmethod
    def load(folder: Path) -> Adapter:
        """Read a PEFT LoRA folder.

        The scale of an rsLoRA adapter is folded into alpha. Where modules are chosen by a pattern,
        by exclusion or by layer, the targets are the paths of all that have factors. Raises
        ValueError for what the algebra cannot represent (see ``adapters.peft_config``), and for a
        file that is cut or no safetensors; FileNotFoundError when a file is absent.
        """
        config = read_config(folder)
        task = config.task_type and config.task_type.value
        spec = AdapterSpec(config.r, config.alpha, config.targets or (), task_type=task)
        try:
            tensors = load_file(folder / "adapter_model.safetensors")
        except SafetensorError:
            raise ValueError(f"{folder}: adapter_model.safetensors is broken") from None
        loaded = Adapter.from_tensors(
            {k.removeprefix(_PREFIX): v for k, v in tensors.items()}, spec
        )
        if config.targets is None:  # the names of its factors say which
            return Adapter(replace(spec, targets=tuple(sorted(loaded.layers))), loaded.layers)
        return loaded


def sum_exactly(adapters: Sequence[Adapter]) -> Adapter:
    """Exact sum of adapters of the same base, whatever their ranks: rank = sum of ranks.

    The result uses alpha = rank (scale 1). A layer that some adapters lack counts as zero there.
    """
    names = sorted({name for adapter in adapters for name in adapter.layers})
    rank = sum(adapter.spec.rank for adapter in adapters)
    targets = tuple(sorted({module for adapter in adapters for module in adapter.modules}))
    deltas = {}
    for name in names:
        shape = next(a.layers[name] for a in adapters if name in a.layers)
        parts = []
        for adapter in adapters:
            if name in adapter.layers:
                parts.append(adapter.layers[name] * adapter.spec.scale)
            else:
                r = adapter.spec.rank
                parts.append(
                    LowRank(torch.zeros(shape.shape[0], r), torch.zeros(r, shape.shape[1]))
                )
        deltas[name] = stack(parts)
    spec = replace(adapters[0].spec, rank=rank, alpha=float(rank), targets=targets, layers=None)
    return Adapter.from_deltas(deltas, spec)
