"""Compose a configuration with Hydra and turn every mistake into one line a person can act on.

A group choice (``privacy=none``) goes to Hydra. A value (``privacy.epsilon=3``) follows Hydra's
grammar too, so that lists, numbers and null can be written; what that grammar does not know, such
as a path with a comma, is taken as the plain text it is. In the files ``${choose:KEY,{A:1,B:2}}``
is the value that goes with the choice made at KEY.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

FOLDER = Path(__file__).resolve().parent
T = TypeVar("T", bound=BaseModel)

_OPTION = re.compile(r"([A-Za-z_][A-Za-z0-9_.]*)=(.*)", re.DOTALL)
_SWEEPS = (ValueType.SIMPLE_CHOICE_SWEEP, ValueType.CHOICE_SWEEP, ValueType.RANGE_SWEEP)
_OPEN = ("strategy", "strategy.parameters")  # whose keys are known to code that is found only later
_CLEARER = {  # what pydantic says in the words of a programmer
    "path_type": "must be a path (write ./NAME where NAME would read as a number)",
    "tuple_type": "must be a list, such as [a,b]",
    "too_short": "must not be empty",
    "model_type": "must be keys with values",
}
OmegaConf.register_new_resolver("choose", lambda choice, values: values.get(choice), replace=True)


class ConfigError(ValueError):
    """An option is unknown or impossible; the message names key, value and what is allowed."""


def load(command: str, overrides: Sequence[str], kind: type[T]) -> T:
    """The validated configuration of ``conf/COMMAND.yaml`` under the given overrides.

    Raises ConfigError.
    """
    defaults = _defaults(command)
    chosen = [o for o in overrides if o.partition("=")[0] in groups(defaults)]
    for override in chosen:
        _checked(override, defaults)
    config = _compose(command, chosen)
    _leave_to_named_strategy(config, overrides)
    known = OmegaConf.to_container(config)
    assert isinstance(known, dict)
    for override in overrides:  # which keys there are depends on the choices
        _checked(override, known)
    try:
        for override in (o for o in overrides if o not in chosen):
            key, _, value = override.partition("=")
            OmegaConf.update(config, key, _value(override, value), force_add=True)
        if missing := sorted(OmegaConf.missing_keys(config)):
            raise ConfigError(f"{missing[0]} must be given; see wardround {command} --help")
        return validate(OmegaConf.to_container(config, resolve=True), kind)
    except OmegaConfBaseException as problem:
        reason = str(problem).strip().splitlines()[0]
        raise ConfigError(f"{problem.full_key}: {reason}") from None


def validate(raw: Any, kind: type[T], under: str = "") -> T:
    """``raw``, found ``under`` a key, as ``kind``. Raises ConfigError naming what does not fit."""
    try:
        return kind.model_validate(raw)
    except ValidationError as problem:
        errors = problem.errors(include_url=False)
        # A misspelt key that is required is missing too; what is wrong is the spelling.
        first = min(errors, key=lambda error: error["type"] != "extra_forbidden")
        key = ".".join(str(part) for part in (under, *first["loc"]) if part != "")
        message = _CLEARER.get(first["type"], first["msg"].removeprefix("Value error, "))
        if first["type"] == "extra_forbidden":
            message = f"unknown key; there are: {_keys(kind, first['loc'][:-1])}"
        value = "" if first["type"] == "missing" else f"={_short(first['input'])}"
        given = f"{key}{value}: " if key and first["type"] != "value_error" else ""
        raise ConfigError(given + message[:1].lower() + message[1:]) from None


def _keys(kind: Any, path: Sequence[int | str]) -> str:
    """The keys that settings of this kind have at ``path``."""
    for part in path:
        if isinstance(part, str):  # a number is a place in a list, whose items are settings
            own = kind.model_fields[part].annotation
            kind = next(k for k in (own, *get_args(own)) if hasattr(k, "model_fields"))
    return ", ".join(sorted(kind.model_fields)) or "none"


def sweep(overrides: Sequence[str]) -> list[list[str]]:
    """Every combination of comma-separated choices: ``a=1,2 b=3`` -> ``[[a=1, b=3], [a=2, b=3]]``.

    A value in quotes is one choice, whatever is in it.
    """
    return [list(job) for job in itertools.product(*map(_choices, overrides))]


def groups(config: Mapping[Any, Any] | None = None) -> dict[str, list[str]]:
    """Configuration groups and their choices; with ``config``, those that it is composed of."""
    return {
        folder.name: sorted(f.stem for f in folder.glob("*.yaml"))
        for folder in sorted(FOLDER.iterdir())
        if any(folder.glob("*.yaml"))
        and (config is None or isinstance(config.get(folder.name), dict))
    }


def command_help(command: str) -> tuple[str, str]:
    """What a command does, in one line and in full: the first line of its file, and the rest."""
    line, _, text = (FOLDER / "help" / f"{command}.txt").read_text(encoding="utf-8").partition("\n")
    return line, text.strip()


@cache
def _defaults(command: str) -> dict[Any, Any]:
    """The configuration without any override; not to be changed."""
    plain = OmegaConf.to_container(_compose(command, []))
    assert isinstance(plain, dict)
    return plain


def _compose(command: str, chosen: list[str]) -> DictConfig:
    with initialize_config_dir(version_base="1.3", config_dir=str(FOLDER)):
        return compose(config_name=command, overrides=chosen)


def _leave_to_named_strategy(config: DictConfig, overrides: Sequence[str]) -> None:
    """Drop the chosen group's parameters where ``strategy.name`` names another strategy."""
    names = [_value(o, o.partition("=")[2]) for o in overrides if o.startswith("strategy.name=")]
    if names and "strategy" in config and names[-1] != config.strategy.name:
        config.strategy = {"name": config.strategy.name}


def _checked(override: str, defaults: Mapping[Any, Any]) -> str:
    """The override's key, once it and its choice are known to exist. Raises ConfigError."""
    option = _OPTION.fullmatch(override)
    if option is None:
        raise ConfigError(f"'{override}': write an option as key=value")
    key, value = option.groups()
    node: Any = defaults
    parent = ""
    for part in key.split("."):
        if parent in _OPEN and isinstance(node, dict) and part not in node:
            return key
        if not isinstance(node, dict) or part not in node:
            allowed = ", ".join(sorted(node)) if isinstance(node, dict) else "no keys"
            where = f"under {parent} there are" if parent else "there are"
            raise ConfigError(f"unknown key {key} (={value}); {where}: {allowed}")
        node, parent = node[part], f"{parent}.{part}".lstrip(".")
    if isinstance(node, dict):
        choices = groups(defaults).get(key)
        if choices is None:
            keys = ", ".join(f"{key}.{name}" for name in node)
            raise ConfigError(f"{key}={value}: set one of its keys: {keys}")
        if value not in choices:
            several = " (for several, one after the other: --multirun)" if "," in value else ""
            packages = f"; one of an installed package is chosen by strategy.name={value}"
            more = several or (packages if key == "strategy" else "")
            raise ConfigError(f"{key}={value}: choose one of {', '.join(choices)}{more}")
    return key


def _value(override: str, text: str) -> Any:
    """The value of ``key=text`` as Hydra reads it, else the text itself (``~/`` is the home)."""
    parsed = _parse(override)
    if parsed is None or parsed.is_sweep_override():
        return os.path.expanduser(text)
    return parsed.value()


def _choices(override: str) -> list[str]:
    parsed = _parse(override)
    if parsed is None or parsed.value_type not in _SWEEPS:
        return [override]
    return [f"{parsed.get_key_element()}={choice}" for choice in parsed.sweep_string_iterator()]


def _parse(override: str) -> Override | None:
    """The override as Hydra's grammar reads it; None where it does not."""
    try:
        return OverridesParser.create().parse_override(override)
    except (HydraException, OverrideParseException):
        return None


def _short(value: Any) -> str:
    dumped = yaml.safe_dump(value, default_flow_style=True).strip().removesuffix("...")
    text = " ".join(dumped.split())  # one line
    return text if len(text) <= 60 else text[:57] + "..."
