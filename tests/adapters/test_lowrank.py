"""The low-rank algebra against dense linear algebra."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.lowrank import LowRank, gram, stack, svd, weighted_sum

shapes = st.tuples(st.integers(1, 12), st.integers(1, 12))


def draw_update(m: int, n: int, r: int, seed: int, scale: float = 1.0) -> LowRank:
    g = torch.Generator().manual_seed(seed)
    return LowRank(
        torch.randn(m, r, generator=g, dtype=torch.float64) * scale,
        torch.randn(r, n, generator=g, dtype=torch.float64),
    )


@st.composite
def families(draw: st.DrawFn) -> tuple[list[LowRank], list[float]]:
    """Updates of one shape with mixed ranks, and weights of either sign."""
    m, n = draw(shapes)
    count = draw(st.integers(1, 5))
    parts = [
        draw_update(
            m,
            n,
            draw(st.integers(1, 6)),
            draw(st.integers(0, 10**6)),
            draw(st.sampled_from([0.0, 1e-6, 1.0, 1e4])),
        )
        for _ in range(count)
    ]
    weights = draw(st.lists(st.floats(-2, 2), min_size=count, max_size=count))
    return parts, weights


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-9, atol=1e-9 * (1 + float(b.abs().max())))


@settings(deadline=None, max_examples=60)
@given(families())
def test_weighted_sum_equals_the_dense_sum(family: tuple[list[LowRank], list[float]]) -> None:
    parts, weights = family
    dense = sum(w * p.dense() for w, p in zip(weights, parts, strict=True))
    assert close(weighted_sum(parts, weights).dense(), dense)


@settings(deadline=None, max_examples=60)
@given(families())
def test_svd_is_exact_orthonormal_and_matches_dense_singular_values(
    family: tuple[list[LowRank], list[float]],
) -> None:
    total = stack(family[0])
    parts = svd(total)
    assert close(parts.U @ torch.diag(parts.S) @ parts.Vh, total.dense())
    eye = torch.eye(parts.S.numel(), dtype=torch.float64)
    assert close(parts.U.T @ parts.U, eye)
    assert close(parts.Vh @ parts.Vh.T, eye)
    exact = torch.linalg.svdvals(total.dense())
    k = min(exact.numel(), parts.S.numel())
    assert close(parts.S[:k], exact[:k])


@settings(deadline=None, max_examples=40)
@given(families(), st.integers(1, 8))
def test_truncation_is_the_best_approximation_of_its_rank(
    family: tuple[list[LowRank], list[float]], rank: int
) -> None:
    total = stack(family[0])
    rank = min(rank, total.shape[1])
    parts = svd(total)
    cut = parts.truncate(rank)
    assert cut.rank == rank
    tail = torch.linalg.svdvals(total.dense())[rank:].square().sum()
    error = (cut.dense() - total.dense()).square().sum()
    assert float(error) <= float(tail) * (1 + 1e-9) + 1e-12 * (1 + total.norm() ** 2)
    assert close(cut.A @ cut.A.T, torch.eye(rank, dtype=torch.float64))


@settings(deadline=None, max_examples=40)
@given(families())
def test_inner_products_and_gram_matrix_equal_dense_ones(
    family: tuple[list[LowRank], list[float]],
) -> None:
    parts, _ = family
    dense = torch.stack([p.dense().flatten() for p in parts])
    expected = dense @ dense.T
    assert close(gram(parts), expected)
    assert abs(parts[0].norm() - float(dense[0].norm())) <= 1e-9 * (1 + float(dense[0].norm()))


def test_a_zero_update_has_zero_values_and_full_kept_energy() -> None:
    parts = svd(LowRank(torch.zeros(5, 2), torch.randn(2, 7)))
    assert float(parts.S.abs().max()) == 0.0
    assert parts.kept_energy(1) == 1.0


def test_kept_energy_is_the_share_of_squared_singular_values() -> None:
    parts = svd(LowRank(torch.diag(torch.tensor([2.0, 1.0])), torch.eye(2)))
    assert parts.kept_energy(1) == pytest.approx(0.8)


def test_signs_are_fixed_so_equal_inputs_give_equal_factors() -> None:
    update = draw_update(6, 5, 3, seed=1)
    flipped = LowRank(-update.B, -update.A)
    one, other = svd(update), svd(flipped)
    assert close(one.U, other.U)
    assert close(one.Vh, other.Vh)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused(bad: float) -> None:
    B = torch.ones(3, 2)
    B[1, 1] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        svd(LowRank(B, torch.ones(2, 3)))


def test_numbers_whose_sum_overflows_are_finite_all_the_same() -> None:
    assert LowRank(torch.full((4, 1), 3e38), torch.ones(1, 2)).is_finite()
    assert not LowRank(
        torch.tensor([[float("inf")], [-float("inf")]]), torch.ones(1, 2)
    ).is_finite()


def test_factors_that_do_not_chain_are_refused() -> None:
    with pytest.raises(ValueError, match="do not chain"):
        LowRank(torch.ones(3, 2), torch.ones(3, 4))


def test_updates_of_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="different shapes"):
        stack([draw_update(3, 4, 2, 0), draw_update(4, 3, 2, 0)])


def test_rank_beyond_the_input_width_is_filled_with_zeros() -> None:
    update = draw_update(9, 3, 2, 0)
    cut = svd(update).truncate(5)
    assert cut.rank == 5
    assert torch.allclose(cut.dense(), update.to(torch.float64).dense())
    assert torch.allclose(cut.A[:3] @ cut.A[:3].T, torch.eye(3, dtype=torch.float64))
    assert not cut.A[3:].any()
    assert not cut.B[:, 2:].any()
