"""Multi-Krum (arXiv 1703.02757): the mean of the updates that lie closest to their neighbours.

An update's score is the sum of squared distances to its K - f - 2 nearest others, f being how many
hospitals may lie; the ``chosen`` best are averaged. chosen=1 is Krum. It needs K > 2 f + 2.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from strategies.base import Declaration, MergeError
from strategies.inner_products import FromInnerProducts


class Krum(FromInnerProducts):
    """Mean of the updates with the closest neighbours; the others are left out."""

    name: ClassVar[str] = "krum"
    declared: ClassVar = Declaration(
        space="gram", paper="arXiv 1703.02757", keeps=frozenset({"equal", "scale", "gauge"})
    )
    scope: Literal["layer", "model"] = "model"  # a hospital is chosen, or is not
    liars: Annotated[int, Field(ge=0)] = 1
    chosen: Annotated[int, Field(ge=1)] | None = None  # None: all but the liars

    @property
    def weighted(self) -> bool:
        """One that is chosen alone has no weight beside others."""
        return self.chosen != 1

    def require_count(self, count: int) -> None:
        """See ``Strategy.require_count``."""
        if count <= 2 * self.liars + 2:
            raise MergeError(
                f"krum with liars={self.liars} needs at least {2 * self.liars + 3} to merge"
            )
        if self.chosen is not None and self.chosen > count - self.liars:
            raise MergeError(
                f"krum with chosen={self.chosen}: of {count}, {self.liars} of which may lie, "
                f"at most {count - self.liars} can be chosen"
            )

    def after(self, caught: int, asked: int) -> Krum:
        """See ``Strategy.after``."""
        return self.model_copy(update={"liars": max(0, self.liars - caught)})

    def coefficients(self, products: Tensor, weights: Tensor) -> Tensor:
        """See ``FromInnerProducts.coefficients``. Raises MergeError with too few hospitals."""
        k = len(weights)
        self.require_count(k)
        size = products.diagonal()
        squared = (size[:, None] + size[None, :] - 2 * products).clamp(min=0)
        squared.fill_diagonal_(float("inf"))
        scores = squared.sort(1).values[:, : k - self.liars - 2].sum(1)
        best = torch.argsort(scores, stable=True)[: self.chosen or k - self.liars]
        kept = torch.zeros_like(weights)
        kept[best] = weights[best]
        return kept / kept.sum()
