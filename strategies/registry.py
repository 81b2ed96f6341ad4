"""Strategies by name. Ours are listed here; others register an entry point.

A package adds its own by an entry point of the group ``wardround.strategies`` that names a subclass
of ``strategies.base.Strategy``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from conf.load import ConfigError, validate
from conf.schema import RunSettings, TrainedFactors, TrainingSettings
from strategies.base import Declaration, MergeError, Strategy
from strategies.breadcrumbs import Breadcrumbs
from strategies.core_space import CoreTies, IsoC, Knots, TsvM
from strategies.dare import Dare, Della
from strategies.fedavg import FedAvg
from strategies.fedsvd import FedSVD
from strategies.ffa import FFA
from strategies.fisher import Fisher
from strategies.hetlora import HetLoRA
from strategies.karcher import Karcher
from strategies.krum import Krum
from strategies.lines import Lines
from strategies.lora_fair import LoraFair
from strategies.median import Median, TrimmedMean
from strategies.model_stock import ModelStock
from strategies.noise_aware import NoiseAware
from strategies.norm_bound import NormBound
from strategies.norm_weighted import NormWeighted
from strategies.product_mean import ProductMean
from strategies.regmean import RegMean
from strategies.rolora import RoLoRA
from strategies.slerp import Slerp
from strategies.task_arithmetic import TaskArithmetic
from strategies.ties import Ties

GROUP = "wardround.strategies"
OURS: tuple[type[Strategy], ...] = (
    ProductMean, FedAvg, FFA, RoLoRA, FedSVD, HetLoRA, LoraFair,
    TaskArithmetic, Slerp, Karcher, ModelStock, NormWeighted,
    Ties, Dare, Della, Breadcrumbs,
    CoreTies, Knots, TsvM, IsoC,
    Median, TrimmedMean, Krum, NormBound, NoiseAware,
    Fisher, RegMean,
    Lines,
)  # fmt: skip


@dataclass(frozen=True)
class Installed:
    """Strategies by name, and by name why those of other packages cannot be used."""

    usable: dict[str, type[Strategy]]
    unusable: dict[str, str]


@cache
def installed() -> Installed:
    """Ours and those of other packages. One that is no good harms only who asks for its name."""
    found = Installed({kind.name: kind for kind in OURS}, {})
    for point in entry_points(group=GROUP):
        try:
            kind, problem = point.load(), ""
        except Exception as failed:
            said = " ".join(f"{type(failed).__name__}: {failed}".split())
            kind, problem = None, f"cannot be loaded ({said})"
        problem = problem or _problem(kind)
        name = getattr(kind, "name", None)
        name = name if isinstance(name, str) else point.name
        if problem:
            found.unusable[name] = f"{point.value} {problem}; mend or uninstall its package"
        elif name in found.usable:
            other = "ours" if found.usable[name] in OURS else "another package's"
            found.unusable[name] = (
                f"there are two of this name, {other} and {point.value}; uninstall its package"
            )
        else:
            found.usable[name] = kind
    for name in found.unusable:
        found.usable.pop(name, None)
    return found


def _problem(kind: Any) -> str:
    """Why this is no strategy; empty where it is one."""
    if not (isinstance(kind, type) and issubclass(kind, Strategy)):
        return "is no subclass of strategies.base.Strategy"
    if not isinstance(getattr(kind, "name", None), str):
        return "has no name: ClassVar[str]"
    if not isinstance(getattr(kind, "declared", None), Declaration):
        return "has no declared: ClassVar[Declaration]"
    if missing := sorted(kind.__abstractmethods__):
        return f"does not define {missing[0]}"
    return ""


def strategies() -> dict[str, type[Strategy]]:
    """All that can be used, by name."""
    return installed().usable


def require_usable(name: str, key: str) -> None:
    """Return unless the strategy of that name is a package's that cannot be used.

    Raises ConfigError; ``key`` is the option that asks for it, with its value.
    """
    if name in installed().unusable:
        raise ConfigError(f"{key}: {installed().unusable[name]}")


def require_strategy(settings: TrainingSettings) -> None:
    """Return when the settings' strategy can be made, fits what is trained, and can be paid for.

    Of a simulation it must also be able to merge as many hospitals as there are. Raises
    ConfigError.
    """
    chosen = settings.strategy
    strategy = create(chosen.name, chosen.parameters, settings.adapter.train)
    require_no_order(strategy)
    if isinstance(settings, RunSettings):
        try:
            strategy.require_count(settings.sites)
        except MergeError as problem:
            pooled = settings.hospitals.layout == "pooled"
            said = "hospitals=pooled" if pooled else f"hospitals.count={settings.sites}"
            raise ConfigError(f"{said}: {problem}") from None
    if strategy.statistics and not settings.privacy.enabled:
        raise ConfigError(
            f"strategy={chosen.name}: needs {strategy.statistics} statistics, which hospitals "
            "release only noised and charged to a privacy budget; take privacy=patient_eps8, or "
            "another strategy"
        )
    if strategy.needs_noise and settings.optimizer.name != "sgd":
        raise ConfigError(
            f"strategy={chosen.name}: the noise of an adapter is known under plain SGD only; take "
            "optimizer=sgd, or another strategy"
        )
    if strategy.statistics and settings.adapter.freeze_half:
        raise ConfigError(
            f"strategy={chosen.name}: needs statistics of every layer; take "
            "adapter.freeze_half=false, or another strategy"
        )


def require_no_order(strategy: Strategy) -> None:
    """Return when no parameter goes by the order of adapters, as hospitals of a round have none.

    Raises ConfigError.
    """
    under, inner = "strategy", strategy
    while isinstance(inner, Lines):
        under, inner = f"{under}.parameters", inner.wrapped
    if isinstance(getattr(inner, "density", None), tuple):
        raise ConfigError(
            f"strategy={strategy.name}: a density for each adapter needs an order, which hospitals "
            f"do not have; give {under}.density one number"
        )


def require_adapters_suffice(strategy: Strategy, key: str) -> None:
    """Return when a merge needs no more than what it merges.

    Raises ConfigError naming the option ``key`` when it needs what is known in rounds only.
    """
    inner = innermost(strategy)
    if inner.statistics or inner.needs_noise:
        needed = "statistics of notes" if inner.statistics else "the noise's size"
        raise ConfigError(
            f"{key}={strategy.name}: {inner.name} needs {needed}, which only rounds have; take "
            "another"
        )


def innermost(strategy: Strategy) -> Strategy:
    """What acts on the adapters, where a strategy wraps another; else the strategy itself."""
    while isinstance(strategy, Lines):
        strategy = strategy.wrapped
    return strategy


def create(
    name: str, parameters: Mapping[str, Any] | None = None, train: TrainedFactors | None = None
) -> Strategy:
    """The strategy of that name with these parameters.

    With ``train`` it must also keep what such a training freezes. Raises ConfigError naming the
    parameter, its value and what is allowed.
    """
    return _created(name, dict(parameters or {}), train, "strategy.name", "strategy")


def _created(
    name: str, parameters: dict[str, Any], train: TrainedFactors | None, key: str, under: str
) -> Strategy:
    require_usable(name, f"{key}={name}")
    known, unusable = strategies(), ", ".join(sorted(installed().unusable))
    if name not in known:
        more = f"; not usable: {unusable}" if unusable else ""
        raise ConfigError(f"{key}={name}: choose one of {', '.join(sorted(known))}{more}")
    kind = known[name]
    if train is not None and train not in kind.declared.trains:
        fit = " | ".join(sorted(n for n, k in known.items() if train in k.declared.trains))
        raise ConfigError(
            f"adapter.train={train}: strategy={name} merges {' | '.join(kind.declared.trains)}; "
            f"or take strategy={fit}"
        )
    try:
        strategy = validate(parameters, kind, "strategy")
    except ConfigError as problem:
        raise ConfigError(str(problem).replace("strategy.", f"{under}.")) from None
    if isinstance(strategy, Lines):
        _created(strategy.of, strategy.parameters, train, f"{under}.of", f"{under}.parameters")
    return strategy
