"""Weighted Karcher mean: the point of the sphere nearest to all directions, at the mean norm.

    T = sum_k w_k (theta_k / sin theta_k)(d_k - cos theta_k u);   u <- cos|T| u + sin|T| T / |T|

over unit directions d_k (Grove and Karcher 1973). u is a combination of the d_k throughout, so
their cosines are all that is needed. Zero updates have no direction, and count in the mean norm; so
does one that points away from u, to which no shortest way leads. Directions that balance each other
out have no mean, and give the plain mean instead.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from strategies.base import Declaration
from strategies.inner_products import FromInnerProducts, cosines, norms

_BALANCED = 1e-6  # norm of the mean direction below which there is none
_OPPOSITE = 1e-6  # cosine + 1 below which theta / sin theta is mostly rounding


class Karcher(FromInnerProducts):
    """Mean on the sphere of any number of updates."""

    name: ClassVar[str] = "karcher"
    declared: ClassVar = Declaration(space="gram", paper="Grove and Karcher 1973")
    steps: Annotated[int, Field(ge=1, le=1000)] = 50
    tolerance: Annotated[float, Field(gt=0, lt=1)] = 1e-9  # of the last step, in radians

    def coefficients(self, products: Tensor, weights: Tensor) -> Tensor:
        """See ``FromInnerProducts.coefficients``."""
        size, cosine = norms(products), cosines(products)
        w = torch.where(size > 0, weights, 0.0)
        if not w.any():
            return weights
        w = w / w.sum()
        length = float((w @ cosine @ w).clamp(min=0).sqrt())
        if length < _BALANCED:
            return weights
        u = w / length
        for _ in range(self.steps):
            along = (cosine @ u).clamp(-1, 1)
            theta = torch.arccos(along)
            arc = torch.where(theta > 1e-8, theta / torch.sin(theta).clamp(min=1e-12), 1.0)
            pull = w * torch.where(along > _OPPOSITE - 1, arc, 0.0)
            tangent = pull - (pull @ along) * u
            step = float((tangent @ cosine @ tangent).clamp(min=0).sqrt())
            if step < self.tolerance:
                break
            u = torch.cos(torch.tensor(step)) * u + torch.sin(torch.tensor(step)) / step * tangent
            u = u / (u @ cosine @ u).clamp(min=1e-30).sqrt()
        directions = torch.where(size > 0, 1 / size.clamp(min=1e-300), 0.0)
        return float(weights @ size) * u * directions
