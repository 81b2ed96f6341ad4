"""What is measured while whole models are merged, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from server.model_folder import Fingerprint
from strategies.merging import mean_cosine


class Figures:
    """Sums over tensors: agreement of the inputs, size of the result, rounding, fingerprints.

    What is compared is what the strategy acted on: differences from the base model, or weights.
    """

    def __init__(self, inputs: int, weights: Sequence[float]) -> None:
        self._weights = torch.tensor(list(weights), dtype=torch.float64)
        self._products = torch.zeros(inputs, inputs, dtype=torch.float64)
        self._squared = self._error = self._saved = 0.0
        self._read = [Fingerprint() for _ in range(inputs)]
        self._base: Fingerprint | None = None
        self._written = Fingerprint()
        self.layers: dict[str, dict[str, Any]] = {}

    def see(self, name: str, stored: Sequence[Tensor], base: Tensor | None) -> None:
        """A tensor as every model has it."""
        for fingerprint, tensor in zip(self._read, stored, strict=True):
            fingerprint.add(name, tensor)
        if base is not None:
            self._base = self._base or Fingerprint()
            self._base.add(name, base)

    def merged(self, name: str, products: Tensor, norm: float) -> None:
        """Inner products (K, K) of what was merged, and the norm of what came of it."""
        self._products += products
        self._squared += norm**2
        self.layers[name] = {
            "mean_cosine": mean_cosine(products),
            "norm_ratio": self._ratio(products, norm),
        }

    def rounded(self, error: float, result: Tensor) -> None:
        """The norm of what the type that is saved has lost of a merged tensor."""
        self._error += error**2
        self._saved += float(result.norm()) ** 2

    def out(self, name: str, saved: Tensor) -> None:
        """A tensor as it is written."""
        self._written.add(name, saved)

    @property
    def fingerprints(self) -> list[str]:
        """Of the inputs, in their order."""
        return [fingerprint.hex() for fingerprint in self._read]

    @property
    def base_fingerprint(self) -> str | None:
        """Of the base model, where differences from it were merged."""
        return self._base.hex() if self._base else None

    @property
    def fingerprint(self) -> str:
        """Of the result."""
        return self._written.hex()

    def totals(self) -> dict[str, Any]:
        """Over all tensors, each model taken as one vector."""
        return {
            "mean_cosine": mean_cosine(self._products),
            "norm_ratio": self._ratio(self._products, math.sqrt(self._squared)),
            "rounding": math.sqrt(self._error / self._saved) if self._saved else 0.0,
        }

    def _ratio(self, products: Tensor, norm: float) -> float:
        mean = math.sqrt(max(0.0, float(self._weights @ products @ self._weights)))
        return norm / mean if mean else 1.0
