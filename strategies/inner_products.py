"""Combinations sum_k c_k dW_k whose coefficients follow from the inner products of the updates.

G_ij = <dW_i, dW_j> costs r x r traces, so nothing dense is ever formed and the result is exact at
rank sum of ranks. Interpolations on the sphere and Krum are of this kind, and with less to ask for
what ``strategies.norms`` has.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from adapters.adapter import Adapter
from adapters.lowrank import gram, weighted_sum
from strategies.base import Declaration, Draw, Strategy, Update, deltas

PARALLEL = 0.9995  # cosine beyond which an arc is taken as a line


class FromInnerProducts(Strategy):
    """A strategy that decides on coefficients, for each layer or for the whole adapter."""

    declared: ClassVar[Declaration]
    scope: Literal["layer", "model"] = "layer"  # what counts as one vector

    def combine(
        self, adapters: Sequence[Adapter], weights: Sequence[float], draw: Draw
    ) -> Mapping[str, Update]:
        """See ``Strategy.combine``."""
        updates = deltas(adapters)
        products = {name: gram(parts) for name, parts in updates.items()}
        w = torch.tensor(list(weights), dtype=torch.float64)
        if self.scope == "model":
            total = torch.stack(list(products.values())).sum(0)
            products = dict.fromkeys(products, total)
        return {
            name: weighted_sum(parts, self.coefficients(products[name], w).tolist())
            for name, parts in updates.items()
        }

    @abstractmethod
    def coefficients(self, products: Tensor, weights: Tensor) -> Tensor:
        """c (K) from the inner products (K, K) and the weights (K), all float64."""


def norms(products: Tensor) -> Tensor:
    """Norms of the updates, (K)."""
    return products.diagonal().clamp(min=0).sqrt()


def cosines(products: Tensor) -> Tensor:
    """Cosines of all pairs, (K, K) in [-1, 1]; 0 where an update is zero."""
    size = norms(products)
    scale = size[:, None] * size[None, :]
    found = torch.where(scale > 0, products / scale.clamp(min=torch.finfo(scale.dtype).tiny), 0.0)
    return found.clamp(-1, 1)
