"""Algebra of low-rank updates: a weight change dW = B A kept as factors, never as a dense matrix.

Merging acts on products, because mean(B) mean(A) is not mean(B A). Everything here is exact up to
float64 rounding unless a rank is asked for; then it is the best approximation of that rank in
Frobenius norm (Eckart-Young-Mirsky). The SVD of a stack of K factor pairs of total rank R costs
O((m + n) R^2 + R^3): QR of the two tall factors, then an SVD of the small R x R core.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LowRank:
    """dW = B A, with B of shape (m, r) and A of shape (r, n).

    Raises ValueError when the shapes do not chain.
    """

    B: Tensor
    A: Tensor

    def __post_init__(self) -> None:
        if self.B.ndim != 2 or self.A.ndim != 2 or self.B.shape[1] != self.A.shape[0]:
            raise ValueError(
                f"factors do not chain: B {tuple(self.B.shape)}, A {tuple(self.A.shape)}"
            )

    @property
    def rank(self) -> int:
        """Number of columns of B (the rank of dW is at most this)."""
        return self.B.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (m, n) of dW."""
        return self.B.shape[0], self.A.shape[1]

    def to(self, dtype: torch.dtype) -> LowRank:
        """The same update with factors of another precision."""
        return LowRank(self.B.to(dtype), self.A.to(dtype))

    def dense(self) -> Tensor:
        """dW itself, (m, n)."""
        return self.B @ self.A

    def __mul__(self, c: float) -> LowRank:
        return LowRank(self.B * c, self.A)

    def __add__(self, other: LowRank) -> LowRank:
        return stack([self, other])

    def __sub__(self, other: LowRank) -> LowRank:
        return stack([self, other * -1.0])

    def inner(self, other: LowRank) -> float:
        """Frobenius inner product tr(dW1^T dW2) from r x r traces; no dense matrix is formed."""
        _same_shape([self, other])
        left = self.B.double().T @ other.B.double()
        right = self.A.double() @ other.A.double().T
        return float((left * right).sum())

    def norm(self) -> float:
        """Frobenius norm of dW."""
        B, A = self.B.double(), self.A.double()
        return max(float(((B.T @ B) * (A @ A.T)).sum()), 0.0) ** 0.5

    def is_finite(self) -> bool:
        """True when no factor holds NaN or infinity."""
        return _finite(self.A) and _finite(self.B)


class Dense(LowRank):
    """A matrix W (m, n) among products: W = I W or W I, the identity being made only when asked.

    So whole weight matrices are merged by what was written for updates. Sums and inner products of
    such matrices act on them directly, at the cost of m n.
    """

    def __init__(self, matrix: Tensor) -> None:
        object.__setattr__(self, "matrix", matrix)  # frozen, like every LowRank

    matrix: Tensor

    @property
    def B(self) -> Tensor:
        """(m, r), r being the smaller of m and n."""
        return self.matrix if self._tall else self._identity

    @property
    def A(self) -> Tensor:
        """(r, n)."""
        return self._identity if self._tall else self.matrix

    @property
    def rank(self) -> int:
        """See ``LowRank.rank``."""
        return min(self.shape)

    @property
    def shape(self) -> tuple[int, int]:
        """See ``LowRank.shape``."""
        return self.matrix.shape[0], self.matrix.shape[1]

    def to(self, dtype: torch.dtype) -> Dense:
        """See ``LowRank.to``."""
        return Dense(self.matrix.to(dtype))

    def dense(self) -> Tensor:
        """See ``LowRank.dense``."""
        return self.matrix

    def norm(self) -> float:
        """See ``LowRank.norm``."""
        return float(self.matrix.double().norm())

    def is_finite(self) -> bool:
        """See ``LowRank.is_finite``."""
        return _finite(self.matrix)

    def __mul__(self, c: float) -> Dense:
        return self if c == 1 else Dense(self.matrix * c)

    @property
    def _tall(self) -> bool:
        return self.shape[0] > self.shape[1]

    @property
    def _identity(self) -> Tensor:
        return torch.eye(self.rank, dtype=self.matrix.dtype)


@dataclass(frozen=True, eq=False)
class Svd:
    """All singular values S of dW, and the leading k vectors: U (m, k), Vh (k, n); float64.

    With all vectors dW = U diag(S) Vh.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor

    def truncate(self, rank: int, orthonormal: Literal["A", "B"] = "A") -> LowRank:
        """Best approximation of at most the given rank, as B = U S and A = Vh (orthonormal rows).

        With ``orthonormal`` "B" as B = U (orthonormal columns) and A = S Vh. When rank exceeds the
        number of singular values the factors are padded: B with zeros and A with further
        orthonormal rows, so that every row of A can still be trained against; beyond the input
        width, where there are no more, with zeros. (Under "B" the other way round.)
        """
        if orthonormal == "B":
            turned = Svd(self.Vh.T, self.S, self.U.T).truncate(rank)
            return LowRank(turned.A.T, turned.B.T)
        k = min(rank, self.U.shape[1])
        B, A = self.U[:, :k] * self.S[:k], self.Vh[:k]
        if k < rank:
            B = torch.cat([B, B.new_zeros(B.shape[0], rank - k)], dim=1)
            free = min(rank, A.shape[1]) - k
            A = torch.cat([A, _complement(A, free), A.new_zeros(rank - k - free, A.shape[1])])
        return LowRank(B, A)

    def kept_energy(self, rank: int) -> float:
        """Share of the squared Frobenius norm in the leading singular values, in [0, 1]."""
        energy = self.S.square()
        total = float(energy.sum())
        return 1.0 if total == 0.0 else float(energy[:rank].sum()) / total


def stack(parts: Sequence[LowRank]) -> LowRank:
    """Exact sum of updates: B side by side, A one above the other; rank = sum of ranks."""
    _same_shape(parts)
    return LowRank(torch.cat([p.B for p in parts], dim=1), torch.cat([p.A for p in parts]))


def weighted_sum(parts: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """Exact sum_k w_k dW_k in float64.

    Each weight is split as sign(w) sqrt|w| on B and sqrt|w| on A, so that neither side of the QR
    that follows is badly scaled. Shapes must agree, ranks need not.
    """
    if len(parts) != len(weights):
        raise ValueError(f"{len(parts)} updates but {len(weights)} weights")
    if matrices := _matrices(parts):
        total = torch.zeros_like(matrices[0])
        for matrix, w in zip(matrices, weights, strict=True):
            total.add_(matrix, alpha=w)
        return Dense(total)
    scaled = []
    for part, w in zip(parts, weights, strict=True):
        half = abs(w) ** 0.5
        scaled.append(
            LowRank(part.B.double() * (half if w >= 0 else -half), part.A.double() * half)
        )
    return stack(scaled)


def svd(update: LowRank, vectors: int | None = None) -> Svd:
    """Exact SVD through QR of both factors and an SVD of the small core.

    All singular values, and the leading ``vectors`` (None: all) singular vectors on either side.
    Signs are fixed (the entry of largest magnitude in each left vector is positive), so equal
    inputs give equal factors. Raises ValueError on NaN or infinity.
    """
    if not update.is_finite():
        raise ValueError("update holds NaN or infinity")
    left, right = _Qr(update.B), _Qr(update.A.T)
    U, S, Vh = torch.linalg.svd(left.R @ right.R.T, full_matrices=False)
    U, Vh = left.times(U[:, :vectors]), right.times(Vh[:vectors].T).T
    sign = torch.sign(U.gather(0, U.abs().argmax(0, keepdim=True)))
    sign[sign == 0] = 1.0
    return Svd(U * sign, S, Vh * sign.T)


class _Qr:
    """QR of a matrix (m, r) in float64, with Q left as reflections: few columns of it are wanted.

    Half the time of forming Q where ``times`` is asked for an eighth of the columns.
    """

    def __init__(self, matrix: Tensor) -> None:
        self._m, self._r = matrix.shape
        self._reflections, self._tau = torch.geqrf(matrix.double())
        self.R = self._reflections[: self._r].triu()  # (min(m, r), r)

    def times(self, matrix: Tensor) -> Tensor:
        """Q times a matrix of min(m, r) rows."""
        padded = matrix.new_zeros(self._m, matrix.shape[1])
        padded[: matrix.shape[0]] = matrix
        return torch.ormqr(self._reflections, self._tau, padded)


def gram(parts: Sequence[LowRank]) -> Tensor:
    """Matrix of inner products G_ij = <dW_i, dW_j>, (K, K) float64, from two R x R products."""
    if matrices := _matrices(parts):
        flat = [matrix.flatten() for matrix in matrices]
        pairs = [[float(one @ other) for other in flat[: i + 1]] for i, one in enumerate(flat)]
        found = torch.zeros(len(flat), len(flat), dtype=torch.float64)
        for i, row in enumerate(pairs):
            found[i, : i + 1] = found[: i + 1, i] = torch.tensor(row, dtype=torch.float64)
        return found
    everything = stack(parts)
    B, A = everything.B.double(), everything.A.double()
    traces = (B.T @ B) * (A @ A.T)
    owner = torch.repeat_interleave(torch.tensor([p.rank for p in parts]))
    rows = torch.zeros(len(parts), len(owner), dtype=torch.float64).index_add_(0, owner, traces)
    out = torch.zeros(len(parts), len(parts), dtype=torch.float64)
    return out.index_add_(1, owner, rows)


def _complement(rows: Tensor, count: int) -> Tensor:
    """``count`` orthonormal rows orthogonal to the given orthonormal rows; deterministic."""
    start = torch.randn(
        rows.shape[1], count, generator=torch.Generator().manual_seed(0), dtype=rows.dtype
    )
    for _ in range(2):  # twice: one projection alone loses orthogonality to rounding
        start = start - rows.T @ (rows @ start)
    return torch.linalg.qr(start).Q.T


def _matrices(parts: Sequence[LowRank]) -> list[Tensor]:
    """The matrices, float64, if all parts are dense; else none. Shapes must agree."""
    _same_shape(parts)
    whole = [part.matrix.double() for part in parts if isinstance(part, Dense)]
    return whole if len(whole) == len(parts) else []


def _same_shape(parts: Sequence[LowRank]) -> None:
    shapes = {p.shape for p in parts}
    if len(shapes) != 1:
        raise ValueError(f"updates of different shapes cannot be combined: {sorted(shapes)}")


def _finite(tensor: Tensor) -> bool:
    """No NaN and no infinity. They survive a sum, which is much the faster look."""
    return bool(torch.isfinite(tensor.sum()) or torch.isfinite(tensor).all())
