"""From a recipe to what is computed: a strategy, weights that sum to one, a sign for each input.

A recipe's weights w_k need not sum to one. With s = sum w_k, a strategy gets weights w_k / s and

    strength = lambda            where mergekit divides by the weights (normalize)
    strength = lambda s          where it does not

times 1/K for task arithmetic, whose strength multiplies a sum. That is the same number, because
every such strategy is linear in a common factor of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from conf.load import ConfigError
from server.offline.methods import MERGEKIT, Method, method
from server.offline.recipe import Input, Recipe
from strategies.base import Strategy
from strategies.entries import PerAdapter
from strategies.lines import Lines
from strategies.registry import create, strategies

Kind = Literal["adapter", "model"]
_MOST = 10  # the largest strength of any strategy
Inputs = Mapping[int, Input]  # in the strategy's order, by place under models, which messages name
_ONE_FOR_ALL = ("rank", "t", "normalize", "lambda", "strength")  # of the merge, not of an input


@dataclass(frozen=True)
class Plan:
    """What a merge computes. ``models``, ``weights`` (positive, of sum 1), ``signs`` go by input.

    ``base_model``: beside the inputs, or one of the two that slerp interpolates; None of adapters
    whose model is not named. ``differences``: the strategy acts on differences from the base model
    (or on adapters' updates), not on weights themselves. ``rank``: of the adapter that is written;
    None: as high as exactness needs. ``notes``: how the recipe was read.
    """

    strategy: Strategy
    models: tuple[str, ...]
    weights: tuple[float, ...]
    signs: tuple[int, ...]
    base_model: str | None
    differences: bool
    rank: int | None
    notes: tuple[str, ...]


def plan(recipe: Recipe, kind: Kind) -> Plan:
    """What ``recipe`` asks for, all its inputs being adapters or all models.

    Raises ConfigError naming the key that cannot be followed, and what to do.
    """
    how = method(recipe.merge_method)
    inputs, base, notes = _inputs(recipe, how, kind)
    inputs, silent = _counting(recipe, inputs)
    notes += silent
    own = _own_densities(recipe, how, inputs)
    parameters = _parameters(recipe, inputs, own) | own
    rank = _rank(parameters.pop("rank", None), kind, recipe)
    weights = _weights(recipe, how, inputs, parameters)
    strategy, shares, signs = _strategy(recipe.merge_method, how, weights, parameters)
    require_adapters_suffice(strategy, "merge_method")
    if not strategy.weighted and max(shares) - min(shares) > 1e-9:
        raise ConfigError(
            f"models: {recipe.merge_method} counts all of them alike; give them the same weight, "
            "or none"
        )
    differences = (
        kind == "adapter" or how.on == "differences" or (how.on == "either" and base is not None)
    )
    if kind == "model":
        _fits_models(recipe.merge_method, strategy)
        if differences and base is None:
            raise ConfigError(
                f"base_model: must be given; {recipe.merge_method} merges differences from it"
            )
    if how.differs:
        notes.append(f"{recipe.merge_method}, other than in mergekit: {how.differs}")
    if min(signs) < 0:
        notes.append("an input of negative weight counts with its sign turned, in every figure too")
    return Plan(
        strategy, tuple(i.model for i in inputs.values()), shares, signs, base, differences, rank,
        tuple(notes),
    )  # fmt: skip


def require_adapters_suffice(strategy: Strategy, key: str) -> None:
    """Return when a merge needs no more than what it merges.

    Raises ConfigError naming the option ``key`` when it needs what is known in rounds only.
    """
    wrapped = strategy
    while isinstance(wrapped, Lines):
        wrapped = create(wrapped.of, wrapped.parameters)
    needed = f"{wrapped.statistics} statistics" if wrapped.statistics else "the noise's size"
    if wrapped.statistics or wrapped.declared.noise:
        raise ConfigError(
            f"{key}={strategy.name}: needs {needed} ({wrapped.name}), which only rounds have; take "
            "another"
        )


def _inputs(recipe: Recipe, how: Method, kind: Kind) -> tuple[Inputs, str | None, list[str]]:
    """The inputs, the base model, and what to know of both."""
    inputs, base = dict(enumerate(recipe.models)), recipe.base_model
    folders = [Path(entry.model).resolve() for entry in recipe.models]
    if len(set(folders)) < len(folders):
        raise ConfigError("models: one of them is listed twice; give it the sum of the weights")
    own = folders.index(Path(base).resolve()) if base and Path(base).resolve() in folders else None
    if recipe.merge_method == "slerp" and base and (own is not None or kind == "model"):
        if own is None:
            raise ConfigError(f"base_model={base}: slerp needs one of its two models, for t = 0")
        return {own: inputs[own]} | inputs, base if kind == "model" else None, []
    if kind == "adapter" and base and (Path(base) / "adapter_config.json").exists():
        raise ConfigError(f"base_model={base}: is an adapter; name the model that they are for")
    if own is None or how.on == "weights":
        return inputs, base, []
    if inputs.pop(own).parameters:
        raise ConfigError(
            f"models.{own}.parameters: the base model does not differ from itself; give it none"
        )
    if not inputs:
        raise ConfigError("models: give at least one beside the base model")
    return inputs, base, ["the base model under models was left out: its difference is zero"]


def _counting(recipe: Recipe, inputs: Inputs) -> tuple[Inputs, list[str]]:
    """The inputs that count at all, and a note on each other: weight 0, or slerp's t at an end."""
    common = recipe.parameters.get("weight")
    t: Any = recipe.parameters.get("t")
    weights = [entry.parameters.get("weight", common) for entry in inputs.values()]
    slerp = recipe.merge_method == "slerp" and weights == [None, None]
    if slerp and _is_either(t, 0, 1):
        weights = [1 - t, t]
    kept = {n: inputs[n] for n, w in zip(inputs, weights, strict=True) if not _is_either(w, 0)}
    if not kept:
        raise ConfigError("models: all of them have weight 0; give one another, or none a weight")
    out = [entry.model for number, entry in inputs.items() if number not in kept]
    return kept, [f"{model} was left out: its weight is 0" for model in out]


def _is_either(value: Any, *numbers: int) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value in numbers


def _own_densities(recipe: Recipe, how: Method, inputs: Inputs) -> dict[str, Any]:
    """A density for each input, where they differ and the strategy takes them."""
    default = recipe.parameters.get("density", _density_default(how))
    if default is None or not any("density" in entry.parameters for entry in inputs.values()):
        return {}
    found = []
    for number, entry in inputs.items():
        own = "density" in entry.parameters
        where = f"models.{number}.parameters.density" if own else "parameters.density"
        found.append(_number(entry.parameters.get("density", default), where))
    return {"density": found[0] if len(set(found)) == 1 else tuple(found)}


def _density_default(how: Method) -> float | None:
    """Of a strategy that takes a density for each adapter; None of the others."""
    field = strategies()[how.strategy].model_fields.get("density")
    return field.default if field and field.annotation == PerAdapter else None


def _parameters(recipe: Recipe, inputs: Inputs, own: Collection[str]) -> dict[str, Any]:
    """Those of the merge as a whole, one value each, wherever it was written; none of ``own``."""
    merged = dict(recipe.parameters)
    merged.pop("weight", None)
    for number, entry in inputs.items():
        for key, value in entry.parameters.items():
            if key == "weight" or key in own:
                continue
            where = f"models.{number}.parameters.{key}"
            if key in _ONE_FOR_ALL:
                raise ConfigError(f"{where}: belongs under parameters of the whole merge")
            if any(
                other.parameters.get(key, recipe.parameters.get(key)) != value
                for other in inputs.values()
            ):
                raise ConfigError(f"{where}={value}: must be the same for all models")
            merged[key] = value
    for key, value in merged.items():
        if isinstance(value, list):
            raise ConfigError(f"parameters.{key}: must be one value; no gradients, no filters")
    return merged


def _rank(value: Any, kind: Kind, recipe: Recipe) -> int | None:
    if value is None:
        return None
    if kind == "model":
        raise ConfigError(f"parameters.rank={value}: only adapters have a rank; leave it out")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"parameters.rank={value}: must be a whole number of at least 1")
    return value


def _weights(
    recipe: Recipe, how: Method, inputs: Inputs, parameters: dict[str, Any]
) -> list[float]:
    """The weights as written; 1 each where none is."""
    common = recipe.parameters.get("weight")
    given = {n: entry.parameters.get("weight", common) for n, entry in inputs.items()}
    if "t" in parameters:
        if recipe.merge_method == "slerp" and len(inputs) < len(recipe.models) == 2:
            parameters.pop("t")  # at one end of the arc is one model
            return [1.0]
        if recipe.merge_method != "slerp" or len(inputs) != 2:
            raise ConfigError("parameters.t: is for slerp between two models; give weight")
        if any(w is not None for w in given.values()):
            raise ConfigError("parameters.t: is the second model's weight; give t or weight")
        t = _number(parameters.pop("t"), "parameters.t")
        if not 0 < t < 1:
            raise ConfigError(f"parameters.t={t:g}: must lie from 0 to 1")
        return [1 - t, t]
    if all(w is None for w in given.values()):
        if recipe.merge_method == "slerp":
            raise ConfigError("parameters.t: must be given for slerp, or a weight for each model")
        return [1.0] * len(inputs)
    weights = []
    for number, value in given.items():
        own = value is None or "weight" in inputs[number].parameters
        where = f"models.{number}.parameters.weight" if own else "parameters.weight"
        if value is None:
            raise ConfigError(f"{where}: is missing; others have one")
        w = _number(value, where)
        if w < 0 and not how.linear:
            raise ConfigError(
                f"{where}={w:g}: must be positive; only linear and task_arithmetic subtract"
            )
        weights.append(w)
    return weights


def _strategy(
    name: str, how: Method, weights: Sequence[float], parameters: dict[str, Any]
) -> tuple[Strategy, tuple[float, ...], tuple[int, ...]]:
    """The strategy, its weights, the signs of its inputs."""
    normalize = how.normalize
    if "normalize" in parameters and how.normalize is not None:
        normalize = parameters.pop("normalize")
        if not isinstance(normalize, bool):
            raise ConfigError(f"parameters.normalize={normalize}: must be true or false")
    total = sum(abs(w) for w in weights)
    shares = tuple(abs(w) / total for w in weights)
    signs = tuple(1 if w > 0 else -1 for w in weights)
    size = total  # of the sum, if the weights given are to be divided by theirs
    if normalize is not False:
        if sum(weights) < 1e-8 * total:
            raise ConfigError("models: weights that are divided by their sum must have one above 0")
        size = total / sum(weights)
    own = _translated(name, how, parameters)
    if how.linear:
        strength = size * _factor(own.pop("strength", 1.0), parameters)
        if how.strategy == "product_mean" and abs(strength - 1) < 1e-12 and min(signs) > 0:
            return _created(name, how, "product_mean", own), shares, signs
        own["strength"] = strength / len(weights)
        if own["strength"] > _MOST:
            raise ConfigError(
                f"models: weights times lambda, divided by the weights' sum {sum(weights):g} where "
                f"normalized, come to {strength:g}, more than {_MOST} for each model; give weights "
                "that cancel less, or smaller ones"
            )
        return _created(name, how, "task_arithmetic", own), shares, signs
    if name in MERGEKIT and how.normalize is not None:
        own["strength"] = size * _factor(own.get("strength", 1.0), parameters)
        if own["strength"] > _MOST:
            raise ConfigError(
                f"models: weights times lambda come to {own['strength']:g}, more than {_MOST}; "
                "give smaller ones, or normalize: true"
            )
        if {**own, **how.fixed}.get("elect", True):
            own["agreeing"] = "mean" if normalize else "sum"
    return _created(name, how, how.strategy, own), shares, signs


def _translated(name: str, how: Method, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters by our names, with mergekit's defaults. Raises ConfigError on one there is not."""
    ours = set(strategies()[how.strategy].model_fields) - set(how.fixed)
    if how.strategy == "product_mean":
        ours -= {"strength"}
    if name in MERGEKIT:
        ours -= {"agreeing"}  # normalize says it
    own: dict[str, Any] = {}
    for key, value in parameters.items():
        if key == "int8_mask" and how.normalize is not None and isinstance(value, bool):
            continue  # of mergekit's memory; it changes no result
        if key in how.only:
            allowed, reason = how.only[key]
            if value is not allowed:
                raise ConfigError(f"parameters.{key}={value}: not supported here; {reason}")
            continue
        target = how.keys.get(key, key)
        if target not in ours:
            known = ["weight", "rank", *(["normalize"] if how.normalize is not None else [])]
            known += ["t"] if name == "slerp" else []
            known += sorted({*how.keys, *how.only, *(ours - set(how.keys.values()))})
            raise ConfigError(
                f"parameters.{key}: {name} has no such parameter; there are: {', '.join(known)}"
            )
        if target in own:
            raise ConfigError(f"parameters.{key}: is there by another name; give one of them")
        own[target] = value
    if how.needs_density and "density" not in own:
        raise ConfigError(
            f"parameters.density: must be given for {name}; 1, which mergekit takes, drops nothing"
        )
    return {**how.defaults, **own}


def _created(name: str, how: Method, strategy: str, own: Mapping[str, Any]) -> Strategy:
    try:
        return create(strategy, {**own, **how.fixed})
    except ConfigError as problem:
        said = str(problem).replace("strategy.", "parameters.")
        raise ConfigError(f"{name}: {said}") from None


def _fits_models(name: str, strategy: Strategy, under: str = "parameters") -> None:
    """Whole models have no factors, and are merged tensor by tensor. Raises ConfigError."""
    if isinstance(strategy, Lines):
        _fits_models(strategy.of, create(strategy.of, strategy.parameters), "parameters.parameters")
    if strategy.declared.space == "factors":
        raise ConfigError(f"merge_method={name}: acts on factors of adapters; take product_mean")
    if getattr(strategy, "scope", "layer") == "model" and strategy.declared.space == "entries":
        raise ConfigError(
            f"{under}.scope=model: the entries of a whole model are not held at once; "
            "take scope: layer"
        )


def _factor(value: Any, parameters: Mapping[str, Any]) -> float:
    """Above 0 and finite, named as the recipe names it."""
    where = f"parameters.{'strength' if 'strength' in parameters else 'lambda'}"
    factor = _number(value, where)
    if factor <= 0:
        raise ConfigError(
            f"{where}={factor:g}: must be above 0; to subtract, give negative weights"
        )
    return factor


def _number(value: Any, where: str) -> float:
    if isinstance(value, list | dict):
        raise ConfigError(f"{where}: must be one number; no gradients, no filters")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{where}={value}: must be a number")
    return float(value)
