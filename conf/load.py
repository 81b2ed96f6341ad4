"""Compose a configuration with Hydra and turn every mistake into one line a person can act on."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

FOLDER = Path(__file__).resolve().parent
T = TypeVar("T", bound=BaseModel)


class ConfigError(ValueError):
    """An option is unknown or impossible; the message names key, value and what is allowed."""


def load(command: str, overrides: Sequence[str], kind: type[T]) -> T:
    """The validated configuration of ``conf/COMMAND.yaml`` under the given overrides.

    Raises ConfigError.
    """
    return validate(_compose(command, overrides), kind)


def validate(raw: Any, kind: type[T]) -> T:
    """``raw`` as ``kind``. Raises ConfigError naming the first key that does not fit."""
    try:
        return kind.model_validate(raw)
    except ValidationError as problem:
        first = problem.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        given = (
            f"{key}={_short(first['input'])}: " if key and first["type"] != "value_error" else ""
        )
        raise ConfigError(given + message[:1].lower() + message[1:]) from None


def sweep(overrides: Sequence[str]) -> list[list[str]]:
    """Every combination of comma-separated choices: ``a=1,2 b=3`` -> ``[[a=1, b=3], [a=2, b=3]]``.

    Raises ConfigError when an override cannot be parsed.
    """
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except (HydraException, OverrideParseException) as problem:
        raise ConfigError(_first_line(problem)) from None
    choices = [
        [f"{o.get_key_element()}={value}" for value in o.sweep_string_iterator()]
        if o.is_sweep_override()
        else [str(o.input_line)]
        for o in parsed
    ]
    return [list(job) for job in itertools.product(*choices)]


def groups() -> dict[str, list[str]]:
    """Configuration groups and their choices, for help and messages."""
    return {
        folder.name: sorted(f.stem for f in folder.glob("*.yaml"))
        for folder in sorted(FOLDER.iterdir())
        if folder.is_dir() and folder.name != "__pycache__"
    }


def _compose(command: str, overrides: Sequence[str]) -> Any:
    try:
        return _raw(command, overrides)
    except (HydraException, OmegaConfBaseException) as problem:
        for override in overrides:  # find the one that is to blame
            try:
                _raw(command, [override])
            except (HydraException, OmegaConfBaseException):
                raise ConfigError(_explain(command, override)) from None
        raise ConfigError(_first_line(problem)) from None


def _raw(command: str, overrides: Sequence[str]) -> Any:
    with initialize_config_dir(version_base="1.3", config_dir=str(FOLDER)):
        composed = compose(config_name=command, overrides=list(overrides))
    return OmegaConf.to_container(composed, resolve=True)


def _explain(command: str, override: str) -> str:
    key, equals, value = override.lstrip("+~").partition("=")
    if not equals:
        return f"'{override}': write an option as key=value"
    choices = groups()
    if key in choices and value not in choices[key]:
        return f"{key}={value}: choose one of {', '.join(choices[key])}"
    node: Any = _raw(command, [])
    parent = ""
    for part in key.split("."):
        if not isinstance(node, dict) or part not in node:
            allowed = ", ".join(sorted(node)) if isinstance(node, dict) else "nothing"
            where = f"under {parent} there are" if parent else "there are"
            return f"unknown key {key} (={value}); {where}: {allowed}"
        node, parent = node[part], f"{parent}.{part}".lstrip(".")
    return f"{key}={value}: the value cannot be read"


def _short(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True).strip().removesuffix("...").strip()
    return text if len(text) <= 60 else text[:57] + "..."


def _first_line(problem: Exception) -> str:
    return str(problem).strip().splitlines()[0]
