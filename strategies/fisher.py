"""Fisher merging (arXiv 2111.09832): a mean that trusts each hospital where it is sure.

    theta = sum_k w_k F_k theta_k / sum_k w_k F_k     entry by entry of the factor that was trained

F_k is the diagonal Fisher information, the mean of squared per-patient gradients. It comes noised,
with as many entries as the adapter, and of a gradient of norm C one entry holds C^2 / entries on
average: far below noise of C^2. So entries are raised to ``floor`` times the mean magnitude of all
hospitals' entries in the layer. What noise there is decides the rest: this is the plain mean with
weights that are partly random, and worth its budget only where the budget is very large.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from adapters.adapter import Adapter
from adapters.lowrank import LowRank
from adapters.statistics import MeasuredAdapter
from strategies.base import Declaration, Draw, MergeError, Strategy, Update, statistics_of
from strategies.sums import FactorSums, accumulate

Factor = Literal["A", "B"]


class Fisher(Strategy):
    """Mean of the trained factor weighted by its Fisher information, the other factor shared."""

    name: ClassVar[str] = "fisher"
    declared: ClassVar = Declaration(
        space="factors",
        paper="arXiv 2111.09832",
        streams=True,
        keeps=frozenset({"one", "equal", "scale"}),
        trains=("B", "A", "alternate"),
        statistics="fisher",
    )
    floor: Annotated[float, Field(gt=0, le=1000)] = 1.0  # times the mean magnitude in the layer

    def combine(
        self, adapters: Sequence[Adapter], weights: Sequence[float], draw: Draw
    ) -> Mapping[str, Update]:
        """See ``Strategy.combine``. Raises MergeError when no factor is shared, or without F."""
        trained, shared = _factors(adapters[0])
        factors, magnitudes = FactorSums(), dict.fromkeys(adapters[0].layers, 0.0)
        for adapter, w in zip(adapters, weights, strict=True):
            factors.add(adapter, w)
            for name, own in _information(adapter, trained).items():
                magnitudes[name] += float(own.abs().mean()) / len(adapters)
        means = factors.under_shared(shared)
        if means is None:
            raise MergeError(f"fisher needs the same {shared} in all")
        totals: dict[str, Tensor] = {}  # sum_k w_k F_k
        pulls: dict[str, Tensor] = {}  # sum_k w_k F_k theta_k
        for adapter, w in zip(adapters, weights, strict=True):
            F = {
                # Where nothing was measured, the plain mean.
                name: own.clamp(min=self.floor * magnitudes[name] or 1.0)
                for name, own in _information(adapter, trained).items()
            }
            accumulate(totals, F, w)
            pull = {n: F[n] * getattr(x, trained).double() for n, x in adapter.layers.items()}
            accumulate(pulls, pull, w)
        scale, merged = adapters[0].spec.scale, {}
        for name, mean in means.items():
            value = pulls[name] / totals[name]
            merged[name] = (
                LowRank(value * scale, mean.A) if trained == "B" else LowRank(mean.B, value)
            )
        return merged


def _information(adapter: Adapter, trained: Factor) -> dict[str, Tensor]:
    """F of the trained factor by layer, float64. Raises MergeError where one is missing."""
    keys = {name: f"{name}.lora_{trained}.weight" for name in adapter.layers}
    found = statistics_of(adapter, keys.values())
    return {name: found[key] for name, key in keys.items()}


def _factors(adapter: Adapter) -> tuple[Factor, Factor]:
    """Which factor was trained, as its statistics say, and which is shared."""
    own = adapter.statistics if isinstance(adapter, MeasuredAdapter) else {}
    return ("A", "B") if any(n.endswith("lora_A.weight") for n in own) else ("B", "A")
