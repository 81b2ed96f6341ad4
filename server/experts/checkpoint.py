"""Full models as folders of safetensors: read one tensor at a time, written whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer

from adapters.base_model import ModelError, embedded_model, skeleton
from conf.load import ConfigError
from conf.schema import ModelSettings


class Checkpoint:
    """A folder with ``config.json`` and weights in one or more safetensors files."""

    def __init__(self, key: str, where: Path | str) -> None:
        """``where`` is a folder, or "smollm2" for the embedded model; ``key`` the option's name.

        Raises ConfigError when it is no such folder.
        """
        self.key = key
        self.folder = embedded_model() if str(where) == "smollm2" else Path(where)
        self.files = sorted(self.folder.glob("*.safetensors"))
        if not self.files or not (self.folder / "config.json").is_file():
            raise ConfigError(
                f"{key}={where}: not a model folder (needs config.json and *.safetensors)"
            )
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._file_of: dict[str, Path] = {}
        for file in self.files:
            try:
                with safe_open(file, framework="pt") as tensors:
                    for name in tensors.keys():  # noqa: SIM118  no mapping
                        self._file_of[name] = file
                        self.shapes[name] = tuple(tensors.get_slice(name).get_shape())
            except (SafetensorError, OSError) as problem:
                raise ConfigError(f"{key}={where}: {file.name} is broken ({problem})") from None

    @property
    def name(self) -> str:
        """The folder's own name: no path of this machine."""
        return self.folder.resolve().name

    def tensor(self, name: str) -> Tensor:
        """One weight, in the precision that it is stored in."""
        with safe_open(self._file_of[name], framework="pt") as tensors:
            return tensors.get_tensor(name)

    def architecture(self) -> list[str]:
        """What ``config.json`` says the model is. Raises ConfigError when it cannot be read."""
        config = self._config()
        return [str(config.get("model_type")), *map(str, config.get("architectures") or ())]

    def tokens(self) -> int:
        """Rows of the embedding: the vocabulary, and often some spare ones."""
        config = self._config()
        return int(config.get("vocab_size") or config.get("text_config", {}).get("vocab_size", 0))

    @cached_property
    def token_wise(self) -> frozenset[str]:
        """Names of weights with one row for each token: embedding and output layer, tied or not.

        Raises ConfigError when ``config.json`` describes no causal language model.
        """
        try:
            model = skeleton(ModelSettings(source="path", path=str(self.folder)))
        except ModelError as problem:
            said = str(problem).partition(": ")[2]
            raise ConfigError(f"{self.key}={self.folder}: {said}") from None
        layers = (model.get_input_embeddings(), model.get_output_embeddings())
        whole = [n for n, m in model.named_modules() if any(m is layer for layer in layers)]
        # A stored name may lack the prefix of the head's wrapper, as those of GPT-2 do.
        return frozenset(
            name
            for name in self.shapes
            if any(f".{layer}".endswith(f".{name.rpartition('.')[0]}") for layer in whole)
        )

    def _config(self) -> dict[str, Any]:
        try:
            config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        except ValueError:
            config = None
        if not isinstance(config, dict):
            raise ConfigError(f"{self.key}={self.folder}: config.json is broken")
        return config

    def vocabulary(self) -> dict[str, int]:
        """Token -> id. Raises ConfigError when the folder holds no tokenizer."""
        try:
            found: dict[str, int] = AutoTokenizer.from_pretrained(self.folder).get_vocab()
        except (OSError, ValueError, KeyError, TypeError):
            raise ConfigError(f"{self.key}={self.folder}: holds no tokenizer") from None
        return found

    def copy(self, out: Path, changed: Callable[[str, Tensor], Tensor]) -> None:
        """Write the same folder to ``out`` with every tensor passed through ``changed``."""
        for item in self.folder.iterdir():
            if item.is_file() and item not in self.files:
                shutil.copyfile(item, out / item.name)
        for file in self.files:
            with safe_open(file, framework="pt") as tensors:
                names = list(tensors.keys())
                written = {n: changed(n, tensors.get_tensor(n)).contiguous() for n in names}
            save_file(written, out / file.name, metadata={"format": "pt"})
