"""Intruder dimensions: directions of a tuned weight that its base does not have.

Of the ``vectors`` leading left singular vectors u_j of W = W0 + a dW, those are intruders whose
cosine to every left singular vector of W0 is small, max_i |u_j . u0_i| < ``below`` (arXiv
2410.21228: 10 and 0.5). LoRA makes them, and forgetting sits in them.

In the basis of W0 = U0 S0 V0 nothing dense is left to decompose. With P = U0^T B and B = U0 P + N T
(N orthonormal to U0, no rows where W0 has at least as many columns as rows),

    U0^T W W^T U0 = S0^2 + a (C P^T + P C^T) + a^2 P G P^T,   C = S0 V0 A^T,  G = A A^T,

and the eigenvectors of this matrix, bordered by the few rows of N, are the u_j in that basis: their
largest entry within U0 is the cosine. A diagonal plus a low-rank matrix multiplies a vector in
O(m r), so after one SVD of W0 every a costs a few Lanczos steps, exact to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import eigh
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor

from adapters.lowrank import LowRank

_SMALL = 64  # rows up to which the matrix is simply formed

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class _Basis:
    """W W^T = diag(s2) + a (C P^T + P C^T) + a^2 P G P^T; the first ``own`` rows are W0's."""

    s2: Array
    P: Array
    C: Array
    G: Array
    own: int

    def product(self, at: float, x: Array) -> Array:
        """The matrix at ``at`` times ``x`` (rows, k)."""
        Px, Cx = self.P.T @ x, self.C.T @ x
        diagonal = self.s2[:, None] * x
        return diagonal + at * (self.C @ Px + self.P @ Cx) + at**2 * (self.P @ (self.G @ Px))


def count_intruders(
    weight: Tensor, delta: LowRank, points: Sequence[float], vectors: int = 10, below: float = 0.5
) -> list[int]:
    """How many intruders ``weight`` + a ``delta`` has, for every a of ``points``.

    ``weight`` (m, n). Fewer vectors are looked at where the weight has no more.
    """
    basis = _basis(weight.double(), delta.to(torch.float64))
    return [int((closeness(basis, at, vectors) < below).sum()) for at in points]


def closeness(basis: _Basis, at: float, vectors: int) -> Array:
    """Largest cosine of each leading left singular vector to any of the base's, (k) in [0, 1]."""
    leading = _leading(basis, at, min(vectors, basis.own))
    return np.asarray(np.abs(leading[: basis.own]).max(axis=0))


def _basis(weight: Tensor, delta: LowRank) -> _Basis:
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    P = U.T @ delta.B
    C = S[:, None] * (Vh @ delta.A.T)
    own, s2 = len(S), S.square()
    if weight.shape[0] > own:  # columns of B that leave the span of U0
        outside = delta.B - U @ P
        outside = outside - U @ (U.T @ outside)  # once more, against rounding
        rows = torch.linalg.qr(outside).R
        P, C = torch.cat([P, rows]), torch.cat([C, torch.zeros(len(rows), C.shape[1])])
        s2 = torch.cat([s2, torch.zeros(len(rows))])
    return _Basis(s2.numpy(), P.numpy(), C.numpy(), (delta.A @ delta.A.T).numpy(), own)


def _leading(basis: _Basis, at: float, count: int) -> Array:
    """Eigenvectors (rows, count) of the largest eigenvalues."""
    rows = len(basis.s2)
    if rows > max(_SMALL, 3 * count):
        operator = LinearOperator(
            (rows, rows),
            matvec=lambda x: basis.product(at, x.reshape(-1, 1)).ravel(),
            dtype=np.float64,
        )
        start = np.ones(rows)  # the same on every call
        try:
            found: Array = eigsh(operator, k=count, which="LA", v0=start, tol=0)[1]
            return found
        except ArpackNoConvergence:
            pass  # values too close for Lanczos: decompose the matrix
    dense = basis.product(at, np.eye(rows))
    vectors: Array = eigh(dense, subset_by_index=[rows - count, rows - 1])[1]
    return vectors
