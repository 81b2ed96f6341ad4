"""RegMean (arXiv 2212.09849) in its rank x rank form: least squares over what each B sees.

Under a shared A, B multiplies z = A x only, so the B that best keeps every hospital's outputs,
argmin_B sum_k w_k E ||(B - B_k) z||^2, needs of each no more than G_k = E z z^T, (rank, rank):

    B = mean + (sum_k w_k (B_k - mean) G_k) (T + ridge tr(T)/rank I)^-1     T = sum_k w_k G_k

mean = sum_k w_k B_k. Without ridge this is (sum w_k B_k G_k) T^-1, the least squares of all
hospitals' data together where G_k is that of the data and B_k its solution. The paper's form needs
G of x, (width, width): hundreds of times the adapter, and that much more noise. A ridge draws the
result to the plain mean, which is all that is left where nothing is known of z.

Each G_k comes noised, so it is projected to positive semidefinite matrices first; both that and the
ridge are post-processing. A hospital that lies about G_k may outweigh the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from adapters.adapter import Adapter
from adapters.lowrank import LowRank
from strategies.base import Declaration, Draw, MergeError, Strategy, Update, statistics_of
from strategies.sums import FactorSums, accumulate


class RegMean(Strategy):
    """Least squares under a shared A, from the Gram matrices of A x."""

    name: ClassVar[str] = "regmean"
    declared: ClassVar = Declaration(
        space="factors",
        paper="arXiv 2212.09849",
        streams=True,
        keeps=frozenset({"one", "equal", "scale"}),  # the ridge is on the scale of A
        trains=("B", "core"),
        statistics="gram",
    )
    ridge: Annotated[float, Field(ge=0, le=1000)] = 1.0  # times the mean eigenvalue of T

    def combine(
        self, adapters: Sequence[Adapter], weights: Sequence[float], draw: Draw
    ) -> Mapping[str, Update]:
        """See ``Strategy.combine``. Raises MergeError when the A differ, or without G."""
        factors = FactorSums()
        # Factors are taken relative to the first hospital's: where all are alike nothing is left
        # that T, which may be nearly singular, could blow up.
        origin = {n: x.B.double() * adapters[0].spec.scale for n, x in adapters[0].layers.items()}
        totals: dict[str, Tensor] = {}  # T
        pulls: dict[str, Tensor] = {}  # sum_k w_k (B_k - B_1) G_k
        for adapter, w in zip(adapters, weights, strict=True):
            factors.add(adapter, w)
            grams = statistics_of(adapter, adapter.layers)
            grams = {name: semidefinite(gram) for name, gram in grams.items()}
            accumulate(totals, grams, w)
            pull = {
                name: (layer.B.double() * adapter.spec.scale - origin[name]) @ grams[name]
                for name, layer in adapter.layers.items()
            }
            accumulate(pulls, pull, w)
        means = factors.under_shared("A")
        if means is None:
            raise MergeError("regmean needs the same A in all")
        merged = {}
        for name, mean in means.items():
            pull_of_mean = pulls[name] - (mean.B - origin[name]) @ totals[name]
            B = mean.B + pull_of_mean @ self._inverse(totals[name])
            merged[name] = LowRank(B, mean.A)
        return merged

    def _inverse(self, total: Tensor) -> Tensor:
        """(T + ridge)^-1, zero in directions of z that nobody has seen: there the mean is kept."""
        ridge = self.ridge * total.trace() / len(total) * torch.eye(len(total), dtype=total.dtype)
        return torch.linalg.pinv(total + ridge, hermitian=True)


def semidefinite(gram: Tensor) -> Tensor:
    """The nearest positive semidefinite matrix in Frobenius norm: negative eigenvalues become 0."""
    values, vectors = torch.linalg.eigh(gram)
    return (vectors * values.clamp(min=0)) @ vectors.T
