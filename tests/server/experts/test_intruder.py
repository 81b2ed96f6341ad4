"""Intruder dimensions: the same count as two dense SVDs, and what is known of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adapters.lowrank import LowRank
from server.experts import intruder
from server.experts.intruder import count_intruders

POINTS = (0.0, 0.1, 0.5, 1.0)


def naive(weight: Tensor, delta: LowRank, at: float, vectors: int = 10) -> Tensor:
    """Largest cosine of each leading left singular vector: two dense SVDs, as in the paper."""
    W0 = weight.double()
    U0 = torch.linalg.svd(W0, full_matrices=False).U
    U = torch.linalg.svd(W0 + at * delta.to(torch.float64).dense(), full_matrices=False).U
    return (U[:, :vectors].T @ U0).abs().amax(1)


def layer(m: int, n: int, rank: int, size: float, seed: int) -> tuple[Tensor, LowRank]:
    """A weight with falling singular values, as trained ones have, and an update."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, n, generator=g) * torch.linspace(2, 0.1, n)
    delta = LowRank(torch.randn(m, rank, generator=g), torch.randn(rank, n, generator=g))
    return weight, delta * (size * float(torch.linalg.matrix_norm(weight, 2)) / delta.norm())


@pytest.mark.parametrize("shape", [(20, 20), (30, 12), (12, 30), (90, 90), (160, 80), (80, 160)])
@pytest.mark.parametrize("size", [0.2, 1.0, 4.0])
def test_cosines_are_those_of_two_dense_svds(shape: tuple[int, int], size: float) -> None:
    weight, delta = layer(*shape, rank=4, size=size, seed=1)
    basis = intruder._basis(weight.double(), delta.to(torch.float64))
    for at in POINTS:
        ours = torch.as_tensor(sorted(intruder.closeness(basis, at, 10)))
        theirs = naive(weight, delta, at).sort().values
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-8)
    expected = [int((naive(weight, delta, at) < 0.5).sum()) for at in POINTS]
    assert count_intruders(weight, delta, POINTS) == expected


@given(
    m=st.integers(2, 40), n=st.integers(2, 40), rank=st.integers(1, 6), size=st.floats(0.01, 5),
    seed=st.integers(0, 999),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_the_count_is_that_of_dense_svds(m: int, n: int, rank: int, size: float, seed: int) -> None:
    weight, delta = layer(m, n, min(rank, m, n), size, seed)
    for at, count in zip(POINTS, count_intruders(weight, delta, POINTS), strict=True):
        closest = naive(weight, delta, at)
        if (closest - 0.5).abs().min() > 1e-6:
            assert count == int((closest < 0.5).sum())


def test_a_new_strong_direction_is_one_intruder() -> None:
    weight = torch.diag(torch.linspace(1, 0.1, 100))
    new = torch.ones(100, 1) / 10  # equally far from all that is there: cosine 0.1
    delta = LowRank(5 * new, torch.ones(1, 100) / 10)
    assert count_intruders(weight, delta, [0.0, 1.0]) == [0, 1]
    assert count_intruders(weight, delta * 0.001, [1.0]) == [0]


def test_a_direction_outside_the_base_s_columns_is_seen() -> None:
    weight = torch.zeros(100, 20)
    weight[:20] = torch.diag(torch.linspace(1, 0.1, 20))
    column = torch.zeros(100, 1)
    column[50] = 3.0
    delta = LowRank(column, torch.eye(20)[:1])
    assert count_intruders(weight, delta, [1.0]) == [1]


def test_strengthening_what_is_there_is_none() -> None:
    weight = torch.diag(torch.linspace(1, 0.1, 100))
    delta = LowRank(torch.eye(100)[:, 5:6], 7 * torch.eye(100)[5:6])
    assert count_intruders(weight, delta, POINTS) == [0, 0, 0, 0]


def test_where_lanczos_gives_up_the_matrix_is_decomposed(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, delta = layer(90, 90, 4, 1.0, 1)
    before = count_intruders(weight, delta, POINTS)

    def gives_up(*_: object, **__: object) -> None:
        raise intruder.ArpackNoConvergence("no", torch.zeros(0).numpy(), torch.zeros(0).numpy())

    monkeypatch.setattr(intruder, "eigsh", gives_up)
    assert count_intruders(weight, delta, POINTS) == before
