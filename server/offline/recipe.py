"""The recipe: a YAML file that says what is merged and how, in the words that mergekit users know.

    merge_method: ties
    models:
      - model: experts/cardiology
        parameters: {weight: 0.6}
      - model: experts/oncology
        parameters: {weight: 0.4}
    base_model: models/base
    parameters: {density: 0.3, lambda: 1.0}
    dtype: bfloat16

Nothing in it is ignored: what is not known, or known and not supported, is refused by name.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from conf.load import ConfigError, validate
from conf.schema import Settings

Dtype = Literal["float32", "float16", "bfloat16"]
Output = Literal["adapter", "model", "both"]

_UNSUPPORTED = {  # keys of mergekit that a recipe may not have
    "slices": "layers cannot be taken from different models; list whole models under models",
    "modules": "only one model is merged; list its parts under models",
    "tokenizer": "give tokenizer_source: base, or one of the models",
    "chat_template": "the one of tokenizer_source is kept; change it in the merged model",
}


class Input(Settings):
    """One adapter or model folder, and parameters of its own."""

    model: Annotated[str, Field(min_length=1)]
    parameters: dict[str, Any] = Field(default_factory=dict)


class Recipe(Settings):
    """A merge as written down. Paths are as typed, from where the command is called."""

    merge_method: str
    models: Annotated[tuple[Input, ...], Field(min_length=1)]
    base_model: str | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)
    dtype: Dtype | None = None  # what is saved; sums are float64 throughout
    out_dtype: Dtype | None = None  # the same, in mergekit's other word for it
    tokenizer_source: str | None = None  # base, or a folder under models
    output: Output | None = None  # default: of adapters an adapter, of models a model
    seed: Annotated[int, Field(ge=0)] = 0  # of what is drawn at random

    @property
    def saved_as(self) -> Dtype | None:
        """Type in which weights are saved; None keeps what they have."""
        return self.out_dtype or self.dtype


class _KeyTwice(yaml.YAMLError):
    """A mapping gives two values to one key, of which YAML would silently take the last."""


class _EveryKeyOnce(yaml.SafeLoader):
    """Plain YAML, in which no key may be given twice, and 1e-3 is a number as in YAML 1.2."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    line = key.start_mark.line + 1
                    raise _KeyTwice(f"{key.value} is given twice (line {line}); give it once")
                seen.add(key.value)
        return node


_EveryKeyOnce.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)[eE][-+]?\d+$"), "-+.0123456789"
)


def read_recipe(file: Path) -> Recipe:
    """The recipe in a YAML file.

    Raises ConfigError naming the file, the key, and what to do.
    """
    try:
        # A SafeLoader by another name.
        raw = yaml.load(file.read_text(encoding="utf-8"), _EveryKeyOnce)
    except _KeyTwice as problem:
        raise ConfigError(f"{file}: {problem}") from None
    except (OSError, UnicodeDecodeError):
        raise ConfigError(f"{file}: no readable file") from None
    except yaml.YAMLError as problem:
        mark = getattr(problem, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark else ""
        raise ConfigError(f"{file}: not valid YAML{where}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{file}: says no merge_method and models; see docs/offline-merging.md")
    for key in raw:
        if key in _UNSUPPORTED:
            raise ConfigError(f"{file}: {key} is not supported: {_UNSUPPORTED[key]}")
        if key not in Recipe.model_fields:
            known = ", ".join(Recipe.model_fields)
            raise ConfigError(f"{file}: unknown key {key}; there are: {known}")
    try:
        return validate(_without_nulls(raw), Recipe)
    except ConfigError as problem:
        raise ConfigError(f"{file}: {problem}") from None


def _without_nulls(raw: dict[str, Any]) -> dict[str, Any]:
    """``parameters:`` with nothing under it is no parameters, and so for every key."""
    kept = {key: value for key, value in raw.items() if value is not None}
    models = kept.get("models")
    if isinstance(models, list):
        kept["models"] = [
            {k: v for k, v in entry.items() if v is not None} if isinstance(entry, dict) else entry
            for entry in models
        ]
    return kept
