"""What a recipe means as a whole: its inputs and base model, what the merge acts on, and the rank.

How its parameters become weights and a strategy is in ``server.offline.parameters``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from conf.load import ConfigError
from server.offline.methods import Method, method
from server.offline.parameters import strategy_of, weights_of
from server.offline.recipe import Recipe
from strategies.base import Strategy
from strategies.registry import innermost, require_adapters_suffice

Kind = Literal["adapter", "model"]


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
    places, base, notes = _inputs(recipe, how, kind)
    weights = weights_of(recipe, how, places)
    notes += [
        f"{recipe.models[n].model} was left out: its weight is 0"
        for n in places
        if n not in weights
    ]
    rank = _rank(recipe, kind)
    strategy = strategy_of(recipe, how, weights)
    require_adapters_suffice(strategy, "merge_method")
    size = sum(map(abs, weights.values()))
    shares = tuple(abs(w) / size for w in weights.values())
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
    if min(weights.values()) < 0:
        notes.append("an input of negative weight counts with its sign turned, in every figure too")
    return Plan(
        strategy,
        models=tuple(recipe.models[n].model for n in weights),
        weights=shares,
        signs=tuple(1 if w > 0 else -1 for w in weights.values()),
        base_model=base,
        differences=differences,
        rank=rank,
        notes=tuple(notes),
    )


def _inputs(recipe: Recipe, how: Method, kind: Kind) -> tuple[list[int], str | None, list[str]]:
    """Places of the inputs in the strategy's order, the base model, and what to know of both."""
    places, base = list(range(len(recipe.models))), recipe.base_model
    folders = [Path(entry.model).resolve() for entry in recipe.models]
    if len(set(folders)) < len(folders):
        raise ConfigError("models: one of them is listed twice; give it the sum of the weights")
    own = folders.index(Path(base).resolve()) if base and Path(base).resolve() in folders else None
    if recipe.merge_method == "slerp" and base and (own is not None or kind == "model"):
        if own is None:
            raise ConfigError(f"base_model={base}: slerp needs one of its two models, for t = 0")
        places.remove(own)
        return [own, *places], base if kind == "model" else None, []
    if kind == "adapter" and base and (Path(base) / "adapter_config.json").exists():
        raise ConfigError(f"base_model={base}: is an adapter; name the model that they are for")
    if own is None or how.on == "weights":
        return places, base, []
    if recipe.models[own].parameters:
        raise ConfigError(
            f"models.{own}.parameters: the base model does not differ from itself; give it none"
        )
    places.remove(own)
    if not places:
        raise ConfigError("models: give at least one beside the base model")
    return places, base, ["the base model under models was left out: its difference is zero"]


def _rank(recipe: Recipe, kind: Kind) -> int | None:
    value = recipe.parameters.get("rank")
    if value is None:
        return None
    if kind == "model":
        raise ConfigError(f"parameters.rank={value}: only adapters have a rank; leave it out")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"parameters.rank={value}: must be a whole number of at least 1")
    return value


def _fits_models(name: str, strategy: Strategy) -> None:
    """Whole models have no factors, and are merged tensor by tensor. Raises ConfigError."""
    inner = innermost(strategy)
    if inner.declared.space == "factors":
        raise ConfigError(f"merge_method={name}: acts on factors of adapters; take product_mean")
    if inner.declared.space == "entries" and getattr(inner, "scope", "layer") == "model":
        under = "parameters" if inner is strategy else "parameters.parameters"
        raise ConfigError(
            f"{under}.scope=model: the entries of a whole model are not held at once; "
            "take scope: layer"
        )
