"""A full model under the name of the option that it was given for, for checks and for a copy."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from torch import Tensor
from transformers import AutoTokenizer

from adapters.base_model import ModelError, embedded_model, skeleton
from conf.load import ConfigError
from conf.schema import ModelSettings
from server.model_folder import ModelFolder, write_weights
from strategies.base import MergeError

_WEIGHTS = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx",
}  # fmt: skip


class Checkpoint:
    """A folder with ``config.json`` and weights in one or more safetensors files."""

    def __init__(self, key: str, where: Path | str) -> None:
        """``where`` is a folder, or "smollm2" for the embedded model; ``key`` the option's name.

        Raises ConfigError when it is no such folder.
        """
        self.key = key
        self.folder = embedded_model() if str(where) == "smollm2" else Path(where)
        try:
            self._model = ModelFolder.open(str(self.folder))
        except MergeError as problem:
            raise ConfigError(f"{key}={problem}") from None
        self.shapes = {name: header.shape for name, header in self._model.headers.items()}

    @property
    def name(self) -> str:
        """The folder's own name: no path of this machine."""
        return self.folder.resolve().name

    def tensor(self, name: str) -> Tensor:
        """One weight, in the precision that it is stored in. Raises ConfigError on NaN."""
        try:
            return self._model.tensor(name)
        except MergeError as problem:
            raise ConfigError(f"{self.key}={problem}") from None

    def architecture(self) -> list[str]:
        """What ``config.json`` says the model is: what the shapes of its weights do not tell."""
        config = self._model.config
        found = [str(config.get("model_type")), *map(str, config.get("architectures") or ())]
        return found if (heads := self._model.heads) is None else [*found, f"{heads} heads"]

    def differing(self, other: Checkpoint) -> list[str]:
        """Keys in which the two configurations differ, such as the base of rotary positions."""
        return self._model.differing(other._model)

    def tokens(self) -> int:
        """Rows of the embedding: the vocabulary, and often some spare ones."""
        config = self._model.config
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

    def vocabulary(self) -> dict[str, int]:
        """Token -> id. Raises ConfigError when the folder holds no tokenizer."""
        try:
            found: dict[str, int] = AutoTokenizer.from_pretrained(self.folder).get_vocab()
        except (OSError, ValueError, KeyError, TypeError):
            raise ConfigError(f"{self.key}={self.folder}: holds no tokenizer") from None
        return found

    def copy(self, out: Path, changed: Callable[[str, Tensor], Tensor]) -> None:
        """Write the same folder to ``out`` with every tensor passed through ``changed``.

        ``changed`` keeps shape and precision. Weights in other formats, which nobody has moved, are
        left out.
        """
        for item in self.folder.iterdir():
            if item.is_file() and not _WEIGHTS & set(item.suffixes):
                shutil.copyfile(item, out / item.name)
        write_weights(out, self._model.headers, lambda n: changed(n, self.tensor(n)))
