"""What a recipe's parameters are in our words: a weight for each input, and a strategy.

A recipe's weights w_k need not sum to one. With s = sum w_k, a strategy gets weights w_k / s and

    strength = lambda            where mergekit divides by the weights (normalize)
    strength = lambda s          where it does not

times 1/K for task arithmetic, whose strength multiplies a sum. That is the same number, because
every such strategy is linear in a common factor of the weights. Where some w_k are negative, sizes
|w_k| take their place and the inputs the signs.

Inputs go by their places under ``models``, so that messages name them as they are written.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from conf.load import ConfigError
from server.offline.methods import MERGEKIT, Method
from server.offline.recipe import Recipe
from strategies.base import Strategy
from strategies.entries import PerAdapter
from strategies.registry import create, strategies

_MOST = 10  # the largest strength of any strategy
_ONE_FOR_ALL = ("rank", "t", "normalize", "lambda", "strength")  # of the merge, not of an input


def weights_of(recipe: Recipe, how: Method, places: Collection[int]) -> dict[int, float]:
    """By place, the weights as written, or 1 each where none is; inputs of weight 0 left out.

    Raises ConfigError.
    """
    slerp = recipe.merge_method == "slerp"
    common = recipe.parameters.get("weight")
    given = {n: recipe.models[n].parameters.get("weight", common) for n in places}
    given = {n: w for n, w in given.items() if w is False or w != 0}
    if not given:
        raise ConfigError("models: all of them have weight 0; give one another, or none a weight")
    if slerp and len(given) > 2:
        raise ConfigError(f"merge_method=slerp: merges two models, not {len(given)}; take karcher")
    if "t" in recipe.parameters:
        if not slerp or len(given) != 2:
            raise ConfigError("parameters.t: is for slerp between two models; give weight")
        if any(w is not None for w in given.values()):
            raise ConfigError("parameters.t: is the second model's weight; give t or weight")
        t = _number(recipe.parameters["t"], "parameters.t")
        if not 0 <= t <= 1:
            raise ConfigError(f"parameters.t={t:g}: must lie from 0 to 1")
        return {n: w for n, w in zip(given, (1 - t, t), strict=True) if w}
    if all(w is None for w in given.values()):
        if slerp:
            raise ConfigError("parameters.t: must be given for slerp, or a weight for each model")
        return dict.fromkeys(given, 1.0)
    weights = {}
    for n, value in given.items():
        where = _where(recipe, n, "weight")
        if value is None:
            raise ConfigError(f"models.{n}.parameters.weight: is missing; others have one")
        weights[n] = w = _number(value, where)
        if w < 0 and not how.linear:
            raise ConfigError(
                f"{where}={w:g}: must be positive; only linear and task_arithmetic subtract"
            )
    return weights


def strategy_of(recipe: Recipe, how: Method, weights: Mapping[int, float]) -> Strategy:
    """What does as the recipe says of inputs with these weights, once |w_k| / sum |w| are given it.

    Raises ConfigError.
    """
    name, kind = recipe.merge_method, how.strategy
    given = _given(recipe, how, weights)
    normalize = how.normalize
    if normalize is not None:
        normalize = given.pop("normalize", normalize)
        if not isinstance(normalize, bool):
            raise ConfigError(f"parameters.normalize={normalize}: must be true or false")
    own = _translated(name, how, given)
    if normalize is None and not how.linear:
        return _created(name, how, kind, own)
    factor = _factor(own.pop("strength", 1.0), given)
    strength = _strength(how, factor, weights.values(), divided=normalize is not False)
    if how.linear:
        if kind == "product_mean" and abs(strength - 1) < 1e-12 and min(weights.values()) > 0:
            return _created(name, how, kind, own)
        each = {"strength": strength / len(weights)}
        return _created(name, how, "task_arithmetic", own | each)
    own["strength"] = strength
    if {**own, **how.fixed}.get("elect", True):
        own["agreeing"] = "mean" if normalize else "sum"
    return _created(name, how, kind, own)


def _strength(how: Method, factor: float, weights: Collection[float], *, divided: bool) -> float:
    """``factor`` sum |w|, divided by sum w or not. Raises ConfigError when it is too large."""
    size, total = sum(map(abs, weights)), sum(weights)
    by, advice = "", "smaller ones, or normalize: true"
    if divided:
        if total < 1e-8 * size:
            raise ConfigError("models: weights that are divided by their sum must have one above 0")
        size /= total
        by = f", divided by the weights' sum {total:g},"
        advice = "weights that cancel less, or a smaller lambda"
    strength, most = size * factor, _MOST * (len(weights) if how.linear else 1)
    if strength > most:
        raise ConfigError(
            f"models: weights times lambda{by} come to {strength:g}, more than {most}; give "
            f"{advice}"
        )
    return strength


def _given(recipe: Recipe, how: Method, places: Collection[int]) -> dict[str, Any]:
    """The strategy's parameters by the recipe's names: one value each, wherever it was written."""
    found = {k: v for k, v in recipe.parameters.items() if k not in ("weight", "t", "rank")}
    entries = {n: recipe.models[n].parameters for n in places}
    densities = _densities(recipe, how, places)
    for n, parameters in entries.items():
        for key, value in parameters.items():
            if key == "weight" or key in densities:
                continue
            where = f"models.{n}.parameters.{key}"
            if key in _ONE_FOR_ALL:
                raise ConfigError(f"{where}: belongs under parameters of the whole merge")
            if any(p.get(key, recipe.parameters.get(key)) != value for p in entries.values()):
                raise ConfigError(f"{where}={value}: must be the same for all models")
            found[key] = value
    for key, value in found.items():
        if isinstance(value, list):
            raise ConfigError(f"parameters.{key}: must be one value; no gradients, no filters")
    return found | densities


def _densities(recipe: Recipe, how: Method, places: Collection[int]) -> dict[str, Any]:
    """A density for each input, where an input has its own and the strategy takes that."""
    field = strategies()[how.strategy].model_fields.get("density")
    if field is None or field.annotation != PerAdapter:
        return {}
    if not any("density" in recipe.models[n].parameters for n in places):
        return {}
    default = recipe.parameters.get("density", field.default)
    found = []
    for n in places:
        where = _where(recipe, n, "density")
        found.append(_number(recipe.models[n].parameters.get("density", default), where))
        if not 0 < found[-1] < 1:
            raise ConfigError(f"{where}={found[-1]:g}: must lie above 0 and below 1")
    return {"density": found[0] if len(set(found)) == 1 else tuple(found)}


def _translated(name: str, how: Method, given: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters by our names, with mergekit's defaults. Raises ConfigError on one there is not."""
    ours = set(strategies()[how.strategy].model_fields) - set(how.fixed)
    if name in MERGEKIT:
        ours -= {"agreeing"}  # normalize says it
    own: dict[str, Any] = {}
    for key, value in given.items():
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


def _created(name: str, how: Method, kind: str, own: Mapping[str, Any]) -> Strategy:
    try:
        return create(kind, {**own, **how.fixed})
    except ConfigError as problem:
        said = str(problem).replace("strategy.", "parameters.")
        raise ConfigError(f"{name}: {said}") from None


def _factor(value: Any, given: Mapping[str, Any]) -> float:
    """Above 0 and finite, named as the recipe names it."""
    where = f"parameters.{'strength' if 'strength' in given else 'lambda'}"
    factor = _number(value, where)
    if factor <= 0:
        raise ConfigError(
            f"{where}={factor:g}: must be above 0; to subtract, give negative weights"
        )
    return factor


def _where(recipe: Recipe, place: int, key: str) -> str:
    """Where a parameter of the input at ``place`` is written: with it, or once for all."""
    own = key in recipe.models[place].parameters
    return f"models.{place}.parameters.{key}" if own else f"parameters.{key}"


def _number(value: Any, where: str) -> float:
    if isinstance(value, list | dict):
        raise ConfigError(f"{where}: must be one number; no gradients, no filters")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{where}={value}: must be a number")
    return float(value)
