"""CMA-ES: a seeded search of the unit cube by asking for points and being told their losses.

N. Hansen, The CMA Evolution Strategy: A Tutorial (arXiv 1604.00772), with its default constants and
positive weights. A point that falls outside the cube is reflected back into it. Nothing but the
seed and the losses told enters, so telling the same losses again leads to the same points.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]


class CmaEs:
    """Covariance matrix adaptation on [0, 1]^n, one generation at a time."""

    def __init__(self, start: Vector, spread: float, seed: int) -> None:
        """``start`` (n), n >= 1, is the first mean; ``spread`` the first standard deviation."""
        n = len(start)
        self.size = 4 + math.floor(3 * math.log(n))
        self._random = np.random.Generator(np.random.PCG64(seed))
        self._mean, self._sigma = start.astype(np.float64), spread
        parents = self.size // 2
        weights = math.log((self.size + 1) / 2) - np.log(np.arange(1, parents + 1))
        self._weights = weights / weights.sum()
        self._effective = mu = float(1 / (self._weights**2).sum())
        self._c_sigma = (mu + 2) / (n + mu + 5)
        self._damping = (
            1 + 2 * max(0.0, math.sqrt((mu - 1) / (n + 1)) - 1) + self._c_sigma
        )  # of the step size
        self._c_path = (4 + mu / n) / (n + 4 + 2 * mu / n)
        self._c_one = 2 / ((n + 1.3) ** 2 + mu)
        self._c_mu = min(1 - self._c_one, 2 * (mu - 2 + 1 / mu) / ((n + 2) ** 2 + mu))
        self._expected = math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n**2))  # of a normal's norm
        self._covariance = np.eye(n)
        self._axes, self._lengths = np.eye(n), np.ones(n)
        self._path_sigma, self._path = np.zeros(n), np.zeros(n)
        self._generation = 0

    def draw(self) -> Vector:
        """One point of this generation, (n)."""
        normal = self._random.standard_normal(len(self._mean))
        return _reflected(self._mean + self._sigma * self._axes @ (self._lengths * normal))

    def tell(self, points: list[Vector], losses: list[float]) -> None:
        """End a generation of ``size`` points with their losses; infinity is worse than all."""
        best = np.argsort(np.asarray(losses), kind="stable")[: len(self._weights)]
        steps = (np.stack(points)[best] - self._mean) / self._sigma
        step = self._weights @ steps
        self._mean = self._mean + self._sigma * step
        self._generation += 1
        n, c_s, c_c = len(step), self._c_sigma, self._c_path
        whitened = self._axes @ ((self._axes.T @ step) / self._lengths)
        self._path_sigma = (1 - c_s) * self._path_sigma + math.sqrt(
            c_s * (2 - c_s) * self._effective
        ) * whitened
        norm = float(np.linalg.norm(self._path_sigma))
        warmed = math.sqrt(1 - (1 - c_s) ** (2 * self._generation))
        steady = norm / warmed < (1.4 + 2 / (n + 1)) * self._expected
        self._path = (1 - c_c) * self._path
        if steady:
            self._path = self._path + math.sqrt(c_c * (2 - c_c) * self._effective) * step
        lost = 0.0 if steady else c_c * (2 - c_c)
        self._covariance = (
            (1 - self._c_one - self._c_mu + self._c_one * lost) * self._covariance
            + self._c_one * np.outer(self._path, self._path)
            + self._c_mu * (steps.T * self._weights) @ steps
        )
        self._sigma *= math.exp(c_s / self._damping * (norm / self._expected - 1))
        values, self._axes = np.linalg.eigh(self._covariance)
        self._lengths = np.sqrt(np.clip(values, 1e-20, None))


def _reflected(point: Vector) -> Vector:
    """Into [0, 1] by mirrors at both ends."""
    return np.asarray(1 - np.abs(point % 2 - 1), dtype=np.float64)
