"""Whole models as folders of safetensors: read and written tensor by tensor, never all at once."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from adapters.tensor_file import write_tensors
from strategies.base import MergeError

SHARD = 1 << 30  # bytes of one output file, and so of what is held to be written
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_KEPT = ("generation_config.json", "LICENSE*", "NOTICE*")  # beside config.json
_TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "spiece.model", "sentencepiece*", "chat_template*",
)  # fmt: skip
_TRIVIAL = ("transformers_version", "dtype", "torch_dtype", "_name_or_path", "use_cache")
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class Header:
    """Shape and type of a tensor in a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class ModelFolder:
    """A model as it lies on disk. ``typed`` is its path as a person wrote it."""

    typed: str
    path: Path
    config: Mapping[str, Any]
    files: Mapping[str, str]  # by tensor, the file that holds it
    headers: Mapping[str, Header]

    @classmethod
    def open(cls, typed: str) -> ModelFolder:
        """Read config and headers. Raises MergeError naming the folder and what is wrong."""
        path = Path(typed)
        try:
            config = json.loads((path / "config.json").read_text())
        except (OSError, ValueError):
            config = None
        if not isinstance(config, dict):
            raise MergeError(f"{typed}: config.json is absent or broken")
        if config.get("quantization_config"):
            raise MergeError(f"{typed}: its weights are quantised; take the model as it was before")
        names = [_SINGLE]
        if (path / _INDEX).exists():
            try:
                names = sorted(set(json.loads((path / _INDEX).read_text())["weight_map"].values()))
                names = [str(Path(name)) for name in names]
            except (ValueError, KeyError, AttributeError, TypeError):
                raise MergeError(f"{typed}: {_INDEX} is broken") from None
        files, headers = {}, {}
        for name in names:
            if not (path / name).is_file():
                raise MergeError(f"{typed}: {name} is absent; only safetensors are read")
            try:
                with safe_open(path / name, framework="pt") as file:
                    for key in file.keys():  # noqa: SIM118 (not a mapping)
                        part = file.get_slice(key)
                        files[key] = name
                        headers[key] = Header(tuple(part.get_shape()), _DTYPES[part.get_dtype()])
            except SafetensorError:
                raise MergeError(f"{typed}: {name} is broken") from None
            except KeyError as unknown:
                raise MergeError(f"{typed}: {name} holds {unknown.args[0]} numbers") from None
        return cls(typed, path, config, files, headers)

    @property
    def heads(self) -> int | None:
        """Attention heads, which the shapes of weights do not tell; None where it does not say."""
        inner = self.config.get("text_config")
        for config in (self.config, inner if isinstance(inner, dict) else {}):
            for key in ("num_attention_heads", "n_head"):
                if isinstance(config.get(key), int):
                    return int(config[key])
        return None

    def differing(self, other: ModelFolder) -> list[str]:
        """Keys of ``config.json`` in which the two differ, but those that change no result."""
        keys = sorted(set(self.config) | set(other.config))
        return [
            key
            for key in keys
            if key not in _TRIVIAL and self.config.get(key) != other.config.get(key)
        ]

    def tensor(self, name: str) -> Tensor:
        """A tensor as it is stored. Raises MergeError on NaN or infinity."""
        with safe_open(self.path / self.files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise MergeError(f"{self.typed}: {name} holds NaN or infinity")
        return tensor


class Fingerprint:
    """SHA-256 over names, types, shapes and bytes of tensors that come by in order of their names.

    It does not depend on how they are spread over files, nor on the files' metadata.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, name: str, tensor: Tensor) -> None:
        """Take in the next tensor."""
        self._digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        self._digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)

    def hex(self) -> str:
        """Of all that were added."""
        return self._digest.hexdigest()


def write_weights(
    folder: Path, headers: Mapping[str, Header], make: Callable[[str], Tensor]
) -> None:
    """Write a model's tensors, each made when it is its turn, in order of their names.

    ``headers`` say what ``make`` will give. Several files where one would exceed ``SHARD`` bytes;
    a single larger tensor has a file of its own. Raises OSError when the disk is full.
    """
    parts: list[list[str]] = [[]]
    filled = 0
    for name in sorted(headers):
        size = math.prod(headers[name].shape) * headers[name].dtype.itemsize
        if parts[-1] and filled + size > SHARD:
            parts.append([])
            filled = 0
        parts[-1].append(name)
        filled += size
    where: dict[str, str] = {}
    total = 0
    for number, names in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors" if len(parts) > 1 else _SINGLE
        tensors = {name: make(name).contiguous() for name in names}
        total += sum(tensor.nbytes for tensor in tensors.values())
        write_tensors(tensors, folder / file, {"format": "pt"})
        where |= dict.fromkeys(names, file)
    if len(parts) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / _INDEX).write_text(json.dumps(index, indent=2))


def copy_rest(folder: Path, model: ModelFolder, tokenizer: Path, dtype: torch.dtype | None) -> None:
    """Everything of a model but its weights: its configuration, and the tokenizer of a folder."""
    config = dict(model.config)
    config.pop("_name_or_path", None)
    if dtype is not None:
        for key in ("dtype", "torch_dtype"):
            if key in config:
                config[key] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    _copy(_KEPT, model.path, folder)
    _copy(_TOKENIZER, tokenizer, folder)


def same_tokenizer(one: Path, other: Path) -> bool:
    """Whether both have the same tokenizer file, or one has none."""
    with suppress(OSError):
        return (one / "tokenizer.json").read_bytes() == (other / "tokenizer.json").read_bytes()
    return True


def _copy(patterns: Iterable[str], source: Path, target: Path) -> None:
    for pattern in patterns:
        for file in sorted(source.glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, target / file.name)
