"""Spectral merges: what is rounding decides nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from adapters.adapter import Adapter, AdapterSpec
from adapters.lowrank import Dense, LowRank
from strategies.base import Draw
from strategies.merging import merge
from strategies.registry import create

SPECTRAL = ["core_ties", "knots", "tsv_m", "iso_c"]


def near(count: int, seed: int, noise: float) -> list[Adapter]:
    """Hospitals of rank 3 that are equal but for ``noise`` in every entry of both factors."""
    g = torch.Generator().manual_seed(0)
    B = torch.randn(20, 3, generator=g, dtype=torch.float64)
    A = torch.randn(3, 30, generator=g, dtype=torch.float64)
    g.manual_seed(seed)

    def moved(factor: Tensor) -> Tensor:
        return factor + noise * torch.randn(factor.shape, generator=g, dtype=torch.float64)

    spec = AdapterSpec(3, 3.0, ("q",))
    return [Adapter(spec, {"q": LowRank(moved(B), moved(A))}) for _ in range(count)]


def merged(name: str, adapters: list[Adapter]) -> Tensor:
    weights = [1 / len(adapters)] * len(adapters)
    found = merge(create(name), adapters, weights, rank=12).adapter
    return found.deltas()["q"].to(torch.float64).dense()


def gap(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("name", SPECTRAL)
@pytest.mark.parametrize("silent", [False, True])
def test_nearly_equal_hospitals_merge_like_equal_ones(name: str, silent: bool) -> None:
    """Also beside one that has learned nothing, whose singular vectors are anybody's guess."""
    one, other, equal = (near(3, seed, noise) for seed, noise in ((1, 1e-8), (2, 1e-8), (3, 0.0)))
    if silent:
        zero = Adapter(one[0].spec, {"q": one[0].layers["q"] * 0.0})
        one, other, equal = ([zero, *own[1:]] for own in (one, other, equal))
    assert gap(merged(name, one), merged(name, other)) < 1e-6
    assert gap(merged(name, one), merged(name, equal)) < 1e-6


def test_what_tsv_m_hospitals_share_counts_once() -> None:
    """As its docstring says: 1/K of the leading R / K components."""
    equal = near(3, 1, 0.0)
    U, S, Vh = torch.linalg.svd(equal[0].layers["q"].dense())
    assert gap(merged("tsv_m", equal), S[0] / 3 * U[:, :1] @ Vh[:1]) < 1e-6


@pytest.mark.parametrize("name", SPECTRAL)
def test_moving_scale_from_one_factor_to_the_other_changes_nothing(name: str) -> None:
    own = near(3, 1, 0.5)
    layer = own[0].layers["q"]
    scaled = [Adapter(own[0].spec, {"q": LowRank(layer.B * 1e3, layer.A / 1e3)}), *own[1:]]
    assert gap(merged(name, scaled), merged(name, own)) < 1e-6


@pytest.mark.parametrize("name", ["tsv_m", "iso_c"])
def test_a_direction_that_cancels_or_is_missing_is_not_made_up_from_rounding(name: str) -> None:
    """One hospital undoes the other's third direction (iso_c), or has one only (tsv_m)."""

    def made(seed: int) -> list[Adapter]:
        first, second = near(1, 5, 1.0)[0], near(1, 6, 1.0)[0]
        B, other, A = first.layers["q"].B, second.layers["q"].B, first.layers["q"].A
        g = torch.Generator().manual_seed(seed)
        rounding = torch.randn(20, 2, generator=g, dtype=torch.float64) * 1e-8
        undone = torch.cat([other[:, :2], -B[:, 2:] + rounding[:, :1]], 1)
        pair = [B, undone] if name == "iso_c" else [torch.cat([B[:, :1], rounding], 1), other]
        return [Adapter(first.spec, {"q": LowRank(own, A)}) for own in pair]

    assert gap(merged(name, made(1)), merged(name, made(2))) < 1e-6


def test_directions_that_cancel_do_not_count_in_the_mean_size_of_iso_c() -> None:
    """One hospital undoes the other's third direction: two are left in a core of three."""
    (first,), (second,) = near(1, 5, 1.0), near(1, 6, 1.0)
    B, other, A = first.layers["q"].B, second.layers["q"].B, first.layers["q"].A
    undone = torch.cat([other[:, :2], -B[:, 2:]], 1)
    pair = [Adapter(first.spec, {"q": LowRank(own, A)}) for own in (B, undone)]
    U, S, Vh = torch.linalg.svd((B + undone) / 2 @ A)
    assert gap(merged("iso_c", pair), S[:2].mean() * U[:, :2] @ Vh[:2]) < 1e-6


@pytest.mark.parametrize("name", ["core_ties", "knots", "tsv_m", "iso_c"])
def test_of_whole_matrices_no_identity_of_their_longer_side_is_made(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An embedding has as many rows as the vocabulary, whose square fits into no machine."""
    g = torch.Generator().manual_seed(0)
    tall = [torch.randn(300, 5, generator=g) for _ in range(3)]
    spec = AdapterSpec(5, 5.0, ("embed",))
    small = [Adapter(spec, {"embed": LowRank(t, torch.eye(5))}) for t in tall]
    whole = [Adapter(spec, {"embed": Dense(t)}) for t in tall]
    expected = create(name).combine(small, [1 / 3] * 3, Draw())["embed"]

    def eye(n: int, *others: int, **options: object) -> Tensor:
        assert n <= 15
        return torch.ones(n).diag().to(options.get("dtype", torch.float32))  # type: ignore[call-overload]

    monkeypatch.setattr(torch, "eye", eye)
    found = create(name).combine(whole, [1 / 3] * 3, Draw())["embed"]
    assert isinstance(found, Dense)
    assert found.shape == (300, 5)
    if name in ("tsv_m", "iso_c"):  # entries of the core depend on its bases, which differ
        assert isinstance(expected, LowRank)
        assert gap(found.dense(), expected.dense()) < 1e-9
