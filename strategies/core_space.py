"""The core that all updates of a layer share (Core Space, arXiv 2509.17786), and merges inside it.

With U an orthonormal basis of the columns of all dW_k and V one of their rows, dW_k = U M_k V, M_k
being R x R at most (R the sum of ranks). Nothing is left out but directions of less than a
millionth of the largest: these are rounding, or what nobody has. Whatever is done to the M_k,
the result stays within what the hospitals span, and no dense update is ever formed. Spectral merges
in the full space do not: there they pick up directions that no hospital has.

Merges by entries of the core (TIES) depend on the basis, so it must follow from the products alone,
however they are factorised: U and V are the eigenvectors of sum_k dW_k dW_k^T and of
sum_k dW_k^T dW_k, with fixed signs.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from adapters.adapter import Adapter
from adapters.lowrank import Dense, LowRank, svd
from strategies.base import Declaration, Draw, Strategy, Update, deltas
from strategies.entries import elected, fused, least_kept, trimmed

_NOTHING = 1e-6  # singular value, relative to the largest, of a direction that nobody has


@dataclass(frozen=True, eq=False)
class Core:
    """dW_k = U M_k V: U (m, R1), the cores M_k (R1, R2), V (R2, n), float64; None: the identity."""

    U: Tensor | None
    cores: list[Tensor]
    V: Tensor | None

    def back(self, core: Tensor) -> LowRank:
        """The update whose core is ``core``."""
        if self.U is None or self.V is None:
            return Dense(core)
        return LowRank(self.U @ core, self.V)


def core_of(parts: Sequence[LowRank]) -> Core:
    """The shared bases of updates of one layer, and each one's core. Ranks may differ.

    Whole matrices span the whole space: they are their own cores.
    """
    if all(isinstance(part, Dense) for part in parts):
        return Core(None, [part.dense() for part in parts], None)
    right = [torch.linalg.qr(part.A.T).R for part in parts]
    left = [torch.linalg.qr(part.B).R for part in parts]
    columns = torch.cat([part.B @ R.T for part, R in zip(parts, right, strict=True)], 1)  # dW Q_A
    rows = torch.cat([R @ part.A for part, R in zip(parts, left, strict=True)])  # Q_B^T dW
    U, V = _basis(columns), _basis(rows.T).T
    return Core(U, [(U.T @ part.B) @ (part.A @ V.T) for part in parts], V)


def _basis(columns: Tensor) -> Tensor:
    """Orthonormal basis of the span of ``columns``, in the order of its singular values."""
    found = svd(LowRank(columns, torch.eye(columns.shape[1], dtype=columns.dtype)))
    real = _real(found.S)
    real[0] = True  # of nothing at all, one direction
    return found.U[:, real]


def _real(S: Tensor) -> Tensor:
    """Which singular values belong to a direction that somebody has; vectors of others are chance.

    Rules that give all directions the same size would blow up what rounding has left of them.
    """
    return _NOTHING * S.max().clamp(min=1e-300) < S


class InCore(Strategy):
    """A strategy that merges the cores of one layer at a time, to a mean times ``strength``.

    The papers of TSV-M and Iso-C sum over tasks where this takes a mean: with equal weights
    ``strength`` = K is their sum. A round wants a mean, for it repeats the step.
    """

    strength: Annotated[float, Field(gt=0, le=10)] = 1.0

    def combine(
        self, adapters: Sequence[Adapter], weights: Sequence[float], draw: Draw
    ) -> Mapping[str, Update]:
        """See ``Strategy.combine``."""
        merged = {}
        for name, parts in deltas(adapters).items():
            core = core_of(parts)
            merged[name] = core.back(self.merge_core(core, list(weights))) * self.strength
        return merged

    @abstractmethod
    def merge_core(self, core: Core, weights: list[float]) -> Tensor:
        """The merged core (R1, R2)."""


class CoreTies(InCore):
    """TIES on the entries of the core: nothing leaves the hospitals' span, and it costs R x R."""

    name: ClassVar[str] = "core_ties"
    declared: ClassVar = Declaration(
        space="core", paper="arXiv 2509.17786", keeps=frozenset({"scale", "gauge"})
    )
    density: Annotated[float, Field(gt=0, lt=1)] = 0.5
    election: Literal["weighted", "unweighted"] = "weighted"

    def merge_core(self, core: Core, weights: list[float]) -> Tensor:
        """See ``InCore.merge_core``."""
        kept = [trimmed(core, least_kept([core], self.density)) for core in core.cores]
        return fused(kept, weights, elected(kept, weights, self.election))


class IsoC(InCore):
    """Iso-C (arXiv 2502.04959): the mean, with all its singular values made equal to their mean.

    In the full space of a LoRA most directions are nobody's; in the core every one is a hospital's.
    """

    name: ClassVar[str] = "iso_c"
    declared: ClassVar = Declaration(
        space="core", paper="arXiv 2502.04959", keeps=frozenset({"scale", "gauge"})
    )

    def merge_core(self, core: Core, weights: list[float]) -> Tensor:
        """See ``InCore.merge_core``."""
        U, S, Vh = torch.linalg.svd(fused(core.cores, weights, None), full_matrices=False)
        real = _real(S)
        size = S[real].sum() / max(1, int(real.sum()))
        return size * U[:, real] @ Vh[real]


class TsvM(InCore):
    """TSV-M (arXiv 2412.00081): the leading singular vectors of every hospital, made orthogonal.

    Each hospital keeps the leading R / K components of its core; all left vectors together are
    replaced by the nearest orthogonal ones (Procrustes), the right ones likewise, and the weighted
    mean is taken; the paper's sum is ``strength`` = K. What hospitals share counts once, not K
    times: K equal ones merge to ``strength`` / K of their leading R / K components.
    """

    name: ClassVar[str] = "tsv_m"
    declared: ClassVar = Declaration(
        space="core", paper="arXiv 2412.00081", keeps=frozenset({"one", "scale", "gauge"})
    )

    def merge_core(self, core: Core, weights: list[float]) -> Tensor:
        """See ``InCore.merge_core``."""
        count = -(-min(core.cores[0].shape) // len(core.cores))
        parts = [torch.linalg.svd(own, full_matrices=False) for own in core.cores]
        left = torch.cat([(U * _real(S))[:, :count] for U, S, _ in parts], 1)
        right = torch.cat([(_real(S)[:, None] * Vh)[:count] for _, S, Vh in parts])
        values = torch.cat([w * S[:count] for (_, S, _), w in zip(parts, weights, strict=True)])
        return _nearest_orthogonal(left) * values @ _nearest_orthogonal(right.T).T


class Knots(InCore):
    """KnOTS (arXiv 2410.19735): all updates side by side have one left basis; TIES on the rest.

    [dW_1 | ... | dW_K] = U S [V_1 | ... | V_K]; the S V_k are aligned, so their entries can be
    compared. TIES on them leaves the rows that the hospitals span, which the paper lets pass: here
    the result is projected back onto these, U (TIES of S V_k) V^T V.
    """

    name: ClassVar[str] = "knots"
    declared: ClassVar = Declaration(
        space="core", paper="arXiv 2410.19735", keeps=frozenset({"scale", "gauge"})
    )
    density: Annotated[float, Field(gt=0, lt=1)] = 0.3

    def merge_core(self, core: Core, weights: list[float]) -> Tensor:
        """See ``InCore.merge_core``."""
        beside = torch.cat(core.cores, 1)
        U = svd(Dense(beside)).U
        aligned = [U.T @ own if core.V is None else U.T @ own @ core.V for own in core.cores]
        kept = [trimmed(d, least_kept([d], self.density)) for d in aligned]
        merged = U @ fused(kept, weights, elected(kept, weights, "weighted"))
        return merged if core.V is None else merged @ core.V.T


def _nearest_orthogonal(columns: Tensor) -> Tensor:
    """Nearest with orthonormal columns, or rows; on the span of ``columns`` only."""
    U, S, Vh = torch.linalg.svd(columns, full_matrices=False)
    return U[:, _real(S)] @ Vh[_real(S)]
