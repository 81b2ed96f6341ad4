"""The core that all updates of a layer share (Core Space, arXiv 2509.17786), and merges inside it.

With U an orthonormal basis of all columns of the B_k and V one of all rows of the A_k,
dW_k = U M_k V exactly, M_k being R x R at most (R the sum of ranks). Whatever is done to the M_k,
the result stays within what the hospitals span, and no dense update is ever formed. Spectral merges
in the full space do not: there they pick up directions that no hospital has.

Bases come from the SVD of the stacked factors with fixed signs: merges by entries of the core
(TIES) depend on the basis, so it must be the same each time.
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
from strategies.entries import elected, fused, trimmed

_NOTHING = 1e-12  # singular value, relative to the largest, of a direction that nobody has


@dataclass(frozen=True, eq=False)
class Core:
    """dW_k = U M_k V: U (m, R1), the cores M_k (R1, R2), V (R2, n), float64."""

    U: Tensor
    cores: list[Tensor]
    V: Tensor

    def back(self, core: Tensor) -> LowRank:
        """The update whose core is ``core``."""
        return LowRank(self.U @ core, self.V)


def core_of(parts: Sequence[LowRank]) -> Core:
    """The shared bases of updates of one layer, and each one's core. Ranks may differ.

    Whole matrices span the whole space: they are their own cores.
    """
    if all(isinstance(part, Dense) for part in parts):
        m, n = parts[0].shape
        whole = [part.dense() for part in parts]
        return Core(torch.eye(m, dtype=whole[0].dtype), whole, torch.eye(n, dtype=whole[0].dtype))
    columns = torch.cat([part.B for part in parts], 1)
    rows = torch.cat([part.A for part in parts])
    U, V = _basis(columns), _basis(rows.T).T
    return Core(U, [(U.T @ part.B) @ (part.A @ V.T) for part in parts], V)


def _basis(columns: Tensor) -> Tensor:
    """Orthonormal basis of the span of ``columns``, in the order of its singular values."""
    found = svd(LowRank(columns, torch.eye(columns.shape[1], dtype=columns.dtype)))
    real = _NOTHING * found.S.max().clamp(min=1e-300) < found.S
    real[0] = True  # of nothing at all, one direction
    return found.U[:, real]


class InCore(Strategy):
    """A strategy that merges the cores of one layer at a time."""

    def combine(
        self, adapters: Sequence[Adapter], weights: Sequence[float], draw: Draw
    ) -> Mapping[str, Update]:
        """See ``Strategy.combine``."""
        merged = {}
        for name, parts in deltas(adapters).items():
            core = core_of(parts)
            merged[name] = core.back(self.merge_cores(core.cores, list(weights)))
        return merged

    @abstractmethod
    def merge_cores(self, cores: list[Tensor], weights: list[float]) -> Tensor:
        """The merged core (R1, R2) of the hospitals' cores."""


class CoreTies(InCore):
    """TIES on the entries of the core: nothing leaves the hospitals' span, and it costs R x R."""

    name: ClassVar[str] = "core_ties"
    declared: ClassVar = Declaration(
        space="core", paper="arXiv 2509.17786", keeps=frozenset({"scale", "gauge"})
    )
    density: Annotated[float, Field(gt=0, lt=1)] = 0.5
    election: Literal["weighted", "unweighted"] = "weighted"

    def merge_cores(self, cores: list[Tensor], weights: list[float]) -> Tensor:
        """See ``InCore.merge_cores``."""
        kept = trimmed({"": cores}, self.density, "layer")[""]
        return fused(kept, weights, elected(kept, weights, self.election))


class IsoC(InCore):
    """Iso-C (arXiv 2502.04959): the mean, with all its singular values made equal to their mean.

    In the full space of a LoRA most directions are nobody's; in the core every one is a hospital's.
    """

    name: ClassVar[str] = "iso_c"
    declared: ClassVar = Declaration(
        space="core", paper="arXiv 2502.04959", keeps=frozenset({"scale", "gauge"})
    )
    strength: Annotated[float, Field(gt=0, le=10)] = 1.0

    def merge_cores(self, cores: list[Tensor], weights: list[float]) -> Tensor:
        """See ``InCore.merge_cores``."""
        U, S, Vh = torch.linalg.svd(fused(cores, weights, None), full_matrices=False)
        return self.strength * S.mean() * U @ Vh


class TsvM(InCore):
    """TSV-M (arXiv 2412.00081): the leading singular vectors of every hospital, made orthogonal.

    Each hospital keeps the leading R / K components of its core; all left vectors together are
    replaced by the nearest orthogonal ones (Procrustes), the right ones likewise. The sum is
    divided by K, so that equal hospitals of full core rank merge to about themselves.
    """

    name: ClassVar[str] = "tsv_m"
    declared: ClassVar = Declaration(
        space="core", paper="arXiv 2412.00081", keeps=frozenset({"one", "scale", "gauge"})
    )

    def merge_cores(self, cores: list[Tensor], weights: list[float]) -> Tensor:
        """See ``InCore.merge_cores``."""
        count = -(-min(cores[0].shape) // len(cores))
        parts = [torch.linalg.svd(core, full_matrices=False) for core in cores]
        left = torch.cat([U[:, :count] for U, _, _ in parts], 1)
        right = torch.cat([Vh[:count] for _, _, Vh in parts])
        values = torch.cat([w * S[:count] for (_, S, _), w in zip(parts, weights, strict=True)])
        return _nearest_orthogonal(left) * values @ _nearest_orthogonal(right.T).T


class Knots(Strategy):
    """KnOTS (arXiv 2410.19735): all updates side by side have one left basis; TIES on the rest.

    [dW_1 | ... | dW_K] = U S [V_1 | ... | V_K]; the S V_k are aligned, so their entries can be
    compared.
    """

    name: ClassVar[str] = "knots"
    declared: ClassVar = Declaration(
        space="core", paper="arXiv 2410.19735", keeps=frozenset({"scale", "gauge"})
    )
    density: Annotated[float, Field(gt=0, lt=1)] = 0.3

    def combine(
        self, adapters: Sequence[Adapter], weights: Sequence[float], draw: Draw
    ) -> Mapping[str, Update]:
        """See ``Strategy.combine``."""
        merged = {}
        for name, parts in deltas(adapters).items():
            core = core_of(parts)
            beside = torch.cat(core.cores, 1)
            U = svd(LowRank(torch.eye(len(beside), dtype=beside.dtype), beside)).U
            aligned = [U.T @ own @ core.V for own in core.cores]
            kept = trimmed({"": aligned}, self.density, "layer")[""]
            right = fused(kept, weights, elected(kept, weights, "weighted"))
            merged[name] = LowRank(core.U @ U, right)
        return merged


def _nearest_orthogonal(columns: Tensor) -> Tensor:
    U, _, Vh = torch.linalg.svd(columns, full_matrices=False)
    return U @ Vh
