"""What a search may change about a merge: the experts' weights, and the strategy's own parameters.

The ranges are those that the strategy's fields declare (``gt``, ``ge``, ``lt``, ``le``); numbers
without both bounds, and whatever is no number, flag or choice, stay as configured. A positive
range of more than two orders of magnitude is searched by its logarithm, a bound at an open zero
being a thousandth of the upper one. A density that is configured as one number for each expert is
searched for each. Every point of the unit cube is one candidate.
"""

from __future__ import annotations

import json
import math
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic.fields import FieldInfo

from conf.load import ConfigError
from strategies.base import Strategy
from strategies.entries import PerAdapter
from strategies.lines import Lines
from strategies.registry import create

_SMALLEST = 1e-3  # of the upper bound, where the lower one is an open zero
_WIDE = 100.0  # ratio of bounds from which the logarithm is searched
_LIGHTEST = 0.01  # relative weight of an expert; none may be zero


@dataclass(frozen=True)
class Dimension:
    """One parameter: its name, and a number's range or a list of ``choices``.

    Of a parameter with one value for each expert, ``NAME k`` is the k-th.
    """

    name: str
    low: float = 0.0
    high: float = 1.0
    whole: bool = False
    choices: tuple[Any, ...] = ()

    @property
    def parameter(self) -> str:
        """The name without its number."""
        return self.name.partition(" ")[0]

    @property
    def _logarithmic(self) -> bool:
        return self.low > 0 and self.high / self.low >= _WIDE

    def value(self, at: float) -> Any:
        """The parameter at a place in [0, 1]; numbers have four significant digits."""
        if self.choices:
            return self.choices[min(int(at * len(self.choices)), len(self.choices) - 1)]
        if self._logarithmic:
            found = self.low * (self.high / self.low) ** at
        else:
            found = self.low + (self.high - self.low) * at
        if self.whole:
            return round(found)
        return min(max(float(f"{found:.4g}"), self.low), self.high)

    def place(self, value: Any) -> float:
        """Where ``value`` is in [0, 1]: inverse of ``value`` up to its rounding."""
        if self.choices:
            return (self.choices.index(value) + 0.5) / len(self.choices)
        if self._logarithmic:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return float((value - self.low) / (self.high - self.low))


@dataclass(frozen=True)
class Candidate:
    """One merge to be tried: positive weights that sum to one, and parameters of the strategy."""

    weights: tuple[float, ...]
    parameters: Mapping[str, Any]

    @property
    def key(self) -> str:
        """The same for equal candidates, and for no others."""
        return json.dumps([self.weights, self.parameters], sort_keys=True)


@dataclass(frozen=True)
class Space:
    """The candidates for ``experts`` experts under a strategy."""

    strategy: Strategy
    experts: int
    dimensions: tuple[Dimension, ...]

    @classmethod
    def of(cls, strategy: Strategy, experts: int, keep: Collection[str] = ()) -> Space:
        """All that can be searched but the parameters in ``keep``.

        ``keep`` may name ``weights``, which are searched where they have an effect. Raises
        ConfigError where it names what is not searched.
        """
        found = parameters_of(strategy)
        known = {d.parameter for d in found} | ({"weights"} if strategy.weighted else set())
        if unknown := sorted(set(keep) - known):
            raise ConfigError(
                f"search.keep: {unknown[0]} is not searched; choose of {', '.join(sorted(known))}"
            )
        weights = []
        if experts > 1 and strategy.weighted and "weights" not in keep:
            weights = [Dimension(f"weight {k}", _LIGHTEST, 1.0) for k in range(experts)]
        return cls(
            strategy, experts, (*weights, *(dim for dim in found if dim.parameter not in keep))
        )

    @property
    def start(self) -> NDArray[np.float64]:
        """The point of equal weights and the parameters as configured."""
        configured = _nested(self.strategy)
        return np.array(
            [
                dim.place((_LIGHTEST + 1) / 2 if dim.name.startswith("weight ")
                          else configured[dim.name])
                for dim in self.dimensions
            ]
        )  # fmt: skip

    @property
    def configured(self) -> Candidate:
        """Equal weights, and the parameters exactly as configured."""
        weights = (1 / self.experts,) * self.experts
        return Candidate(weights, self.strategy.model_dump(mode="json"))

    def candidate(self, point: NDArray[np.float64]) -> Candidate | None:
        """What is at a point of the unit cube; None where the strategy refuses the combination."""
        values = {d.name: d.value(float(at)) for d, at in zip(self.dimensions, point, strict=True)}
        relative = [values.pop(f"weight {k}", 1.0) for k in range(self.experts)]
        parameters = self.strategy.model_dump(mode="json")
        for name, value in values.items():
            outer, _, inner = name.rpartition(".")
            own = parameters
            for part in outer.split(".") if outer else ():
                own = own.setdefault(part, {})
            key, _, number = inner.partition(" ")
            if number:
                own[key][int(number)] = value
            else:
                own[key] = value
        try:
            create(self.strategy.name, parameters)
        except ConfigError:
            return None
        return Candidate(tuple(w / sum(relative) for w in relative), parameters)


def parameters_of(strategy: Strategy) -> tuple[Dimension, ...]:
    """The searchable parameters of a strategy; those of a wrapped one are ``parameters.NAME``."""
    configured = strategy.model_dump()
    found = [
        dimension
        for name, field in type(strategy).model_fields.items()
        for own, value in _each(name, configured[name]).items()
        if (dimension := _dimension(own, field, value))
    ]
    if isinstance(strategy, Lines):
        inner = strategy.wrapped
        found += [
            Dimension(f"parameters.{d.name}", d.low, d.high, d.whole, d.choices)
            for d in parameters_of(inner)
        ]
    return tuple(found)


def _each(name: str, value: Any) -> dict[str, Any]:
    """The values of one parameter by the names of their dimensions."""
    if isinstance(value, tuple):
        return {f"{name} {k}": one for k, one in enumerate(value)}
    return {name: value}


def _dimension(name: str, field: FieldInfo, configured: Any) -> Dimension | None:
    kind = float if field.annotation == PerAdapter else field.annotation
    if kind is bool:
        return Dimension(name, choices=(False, True))
    if typing.get_origin(kind) is Literal:
        return Dimension(name, choices=typing.get_args(kind))
    if kind not in (int, float) or configured is None:
        return None
    bounds = {
        name: bound
        for metadata in field.metadata
        for name in ("gt", "ge", "lt", "le")
        if (bound := getattr(metadata, name, None)) is not None
    }
    low, high = bounds.get("ge", bounds.get("gt")), bounds.get("le", bounds.get("lt"))
    if low is None or high is None:
        return None
    open_low, open_high = "gt" in bounds, "lt" in bounds
    if kind is int:
        return Dimension(name, low + open_low, high - open_high, whole=True)
    inside = _SMALLEST * (high - low)
    return Dimension(
        name,
        min(low + inside, configured) if open_low else low,
        max(high - inside, configured) if open_high else high,
    )


def _nested(strategy: Strategy) -> dict[str, Any]:
    """Configured values by name, as ``parameters_of`` names them."""
    values = {
        own: one
        for name, value in strategy.model_dump().items()
        for own, one in _each(name, value).items()
    }
    if isinstance(strategy, Lines):
        inner = strategy.wrapped
        values |= {f"parameters.{name}": value for name, value in _nested(inner).items()}
    return values
