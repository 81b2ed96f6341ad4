"""Combinations whose coefficients follow from norms, so that hospitals stream through.

The norm of each update, and the length of one sum of their unit directions, say all that such a
strategy asks of the inner products; both take hospitals one at a time, in as many passes. What
grows with their number is one float a layer.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from adapters.adapter import Adapter
from strategies.base import Draw, Update
from strategies.inner_products import FromInnerProducts, cosines, norms
from strategies.sums import ProductSums, Updates, norm


class FromNorms(FromInnerProducts):
    """A strategy that decides on coefficients by norms, for each layer or for the whole adapter."""

    @abstractmethod
    def from_norms(self, sizes: Tensor, length: float, weights: Tensor) -> Tensor:
        """c (K) from the norms of the updates (K), ``length`` and the weights (K), all float64.

        ``length`` is ||sum_k a_k u_k|| with the a_k of ``directions`` and the unit directions u_k,
        which are zero for an update of zero; 0 where there are no a_k.
        """

    def directions(self, weights: Tensor) -> Tensor | None:
        """a (K) of the sum whose length is asked for; None: of none."""
        return None

    def coefficients(self, products: Tensor, weights: Tensor) -> Tensor:
        """See ``FromInnerProducts.coefficients``."""
        a, cosine = self.directions(weights), cosines(products)
        length = 0.0 if a is None else float((a @ cosine @ a).clamp(min=0).sqrt())
        return self.from_norms(norms(products), length, weights)

    def combine(
        self, adapters: Sequence[Adapter], weights: Sequence[float], draw: Draw
    ) -> Mapping[str, Update]:
        """See ``Strategy.combine``: two or three passes, one hospital at a time."""
        w = torch.tensor(list(weights), dtype=torch.float64)
        sizes = self._sizes(adapters)
        found = dict.fromkeys(sizes, 0.0)
        if (a := self.directions(w)) is not None:
            units = {
                name: a * torch.where(size > 0, 1 / size.clamp(min=1e-300), 0.0)
                for name, size in sizes.items()
            }
            found = self._lengths(_combination(adapters, units))
        return _combination(
            adapters, {name: self.from_norms(sizes[name], found[name], w) for name in sizes}
        )

    def _sizes(self, adapters: Sequence[Adapter]) -> dict[str, Tensor]:
        """By layer, the norms of all updates (K); under ``scope`` "model" the same for all."""
        found: dict[str, list[float]] = {}
        for adapter in adapters:
            for name, layer in adapter.layers.items():
                found.setdefault(name, []).append(layer.norm() * abs(adapter.spec.scale))
        sizes = {name: torch.tensor(own, dtype=torch.float64) for name, own in found.items()}
        if self.scope == "layer":
            return sizes
        return dict.fromkeys(sizes, torch.stack(list(sizes.values())).square().sum(0).sqrt())

    def _lengths(self, sums: Updates) -> dict[str, float]:
        """By layer, the norm of the sum; under ``scope`` "model" that of all layers together."""
        found = {name: norm(update) for name, update in sums.items()}
        return found if self.scope == "layer" else dict.fromkeys(found, math.hypot(*found.values()))


def _combination(adapters: Sequence[Adapter], coefficients: Mapping[str, Tensor]) -> Updates:
    """sum_k c_k dW_k by layer, which has coefficients (K) of its own."""
    sums = ProductSums()
    for k, adapter in enumerate(adapters):
        sums.add(adapter, {name: float(c[k]) for name, c in coefficients.items()})
    return sums.take()
