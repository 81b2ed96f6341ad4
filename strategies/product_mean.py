"""Exact weighted mean in product space: dW = sum_k w_k scale_k B_k A_k.

The mean of K products has rank up to K r; it is re-factorised to the rank asked for by an exact
SVD, which is the best approximation in Frobenius norm. When all hospitals share A nothing is lost.

FLoRA (arXiv 2409.05976) stacks the factors, FedEx-LoRA (arXiv 2410.09432) adds the residual of the
factor means, FlexLoRA (arXiv 2402.11505) truncates for every hospital's own rank: all of them are
this product, kept at another rank. Ranks may differ.
"""

from __future__ import annotations

from typing import ClassVar

from strategies.base import Declaration
from strategies.streaming import Stream, Streaming
from strategies.sums import ProductMeans


class ProductMean(Streaming):
    """Mean of the products, then the best approximation of the rank asked for."""

    name: ClassVar[str] = "product_mean"
    declared: ClassVar = Declaration(
        space="gram", paper="arXiv 2402.11505", exact=True, streams=True
    )

    def stream(self) -> Stream:
        """See ``Streaming.stream``."""
        means = ProductMeans()
        return Stream(means.add, means.take)
