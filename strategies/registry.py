"""Strategies by name, registered explicitly."""

from __future__ import annotations

from strategies.base import Strategy
from strategies.fedavg import FedAvg
from strategies.fedsvd import FedSVD
from strategies.ffa import FFA
from strategies.product_mean import ProductMean
from strategies.rolora import RoLoRA

_STRATEGIES: dict[str, Strategy] = {
    s.name: s for s in (ProductMean(), FedAvg(), FFA(), RoLoRA(), FedSVD())
}


def get_strategy(name: str) -> Strategy:
    """The strategy of that name. Raises KeyError with the names there are."""
    try:
        return _STRATEGIES[name]
    except KeyError:
        raise KeyError(f"strategy.name={name}: choose one of {sorted(_STRATEGIES)}") from None
