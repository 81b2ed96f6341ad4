"""Every strategy: exactness where declared, and the properties any merge must have."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.adapter import Adapter, AdapterSpec
from adapters.lowrank import LowRank, stack
from conf.load import ConfigError
from strategies.base import MergeError, product_means
from strategies.merging import Exact, merge
from strategies.registry import create

SPEC = AdapterSpec(rank=3, alpha=6.0, targets=("q", "v"))
NAMES = {"l0.q": (8, 7), "l0.v": (5, 7)}
ALL = ("product_mean", "fedavg", "ffa", "rolora", "fedsvd")
SHARED = ("ffa", "fedsvd")


def hospitals(count: int, seed: int, shared: bool) -> list[Adapter]:
    """Random adapters; with ``shared`` they hold one orthonormal A."""
    g = torch.Generator().manual_seed(seed)
    A = {n: torch.linalg.qr(torch.randn(w, 3, generator=g)).Q.T for n, (_, w) in NAMES.items()}
    made = []
    for _ in range(count):
        layers = {
            n: LowRank(
                torch.randn(m, 3, generator=g), A[n] if shared else torch.randn(3, w, generator=g)
            )
            for n, (m, w) in NAMES.items()
        }
        made.append(Adapter(SPEC, layers))
    return made


def dense(adapter: Adapter) -> dict[str, torch.Tensor]:
    return {n: d.to(torch.float64).dense() for n, d in adapter.deltas().items()}


def close(one: Adapter, other: dict[str, torch.Tensor], tolerance: float = 1e-5) -> bool:
    return all(
        torch.allclose(v, other[n], atol=tolerance, rtol=tolerance) for n, v in dense(one).items()
    )


def mean_of_products(adapters: list[Adapter], weights: list[float]) -> dict[str, torch.Tensor]:
    return {n: sum(w * dense(a)[n] for a, w in zip(adapters, weights, strict=True)) for n in NAMES}


weights_of = st.lists(st.floats(0.1, 1.0), min_size=2, max_size=5)


@settings(deadline=None, max_examples=25)
@given(weights_of, st.integers(0, 10**6), st.sampled_from(["product_mean", *SHARED]))
def test_exact_strategies_give_the_weighted_mean_of_products_under_a_shared_factor(
    raw: list[float], seed: int, name: str
) -> None:
    weights = [w / sum(raw) for w in raw]
    adapters = hospitals(len(weights), seed, shared=True)
    found = merge(create(name), adapters, weights)
    assert close(found.adapter, mean_of_products(adapters, weights))
    assert found.discrepancy < 1e-6
    assert found.kept_energy == pytest.approx(1.0)


@settings(deadline=None, max_examples=25)
@given(weights_of, st.integers(0, 10**6))
def test_product_mean_is_the_best_approximation_of_its_rank(raw: list[float], seed: int) -> None:
    weights = [w / sum(raw) for w in raw]
    adapters = hospitals(len(weights), seed, shared=False)
    found = merge(create("product_mean"), adapters, weights)
    exact = mean_of_products(adapters, weights)
    got = dense(found.adapter)
    kept = []
    for n, target in exact.items():
        values = torch.linalg.svdvals(target).square()
        assert float((got[n] - target).square().sum()) == pytest.approx(
            float(values[SPEC.rank :].sum()), rel=1e-3, abs=1e-6
        )
        kept.append(float(values[: SPEC.rank].sum() / values.sum()))
    assert found.kept_energy == pytest.approx(min(kept), rel=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_one_hospital_is_returned_as_it_is(name: str) -> None:
    adapters = hospitals(1, 3, shared=True)
    found = merge(create(name), adapters, [1.0])
    assert close(found.adapter, dense(adapters[0]))


@pytest.mark.parametrize("name", ALL)
def test_order_of_hospitals_does_not_matter(name: str) -> None:
    adapters, weights = hospitals(4, 5, shared=True), [0.4, 0.3, 0.2, 0.1]
    there = merge(create(name), adapters, weights).adapter
    back = merge(create(name), adapters[::-1], weights[::-1]).adapter
    assert close(there, dense(back))


@pytest.mark.parametrize("name", ALL)
def test_identical_hospitals_merge_to_themselves(name: str) -> None:
    adapter = hospitals(1, 8, shared=True)[0]
    found = merge(create(name), [adapter] * 3, [1 / 3] * 3)
    assert close(found.adapter, dense(adapter))


def test_product_mean_does_not_depend_on_the_gauge_and_fedavg_does() -> None:
    adapters, weights = hospitals(3, 11, shared=False), [1 / 3] * 3
    g = torch.Generator().manual_seed(1)
    turned = []
    for adapter in adapters:
        layers = {}
        for n, layer in adapter.layers.items():
            G = torch.eye(3) + 0.3 * torch.randn(3, 3, generator=g)
            layers[n] = LowRank(layer.B @ G, torch.linalg.inv(G) @ layer.A)
        turned.append(Adapter(SPEC, layers))
    exact = create("product_mean")
    assert close(
        merge(exact, turned, weights).adapter, dense(merge(exact, adapters, weights).adapter), 1e-4
    )
    naive = create("fedavg")
    assert not close(
        merge(naive, turned, weights).adapter, dense(merge(naive, adapters, weights).adapter), 1e-2
    )


def test_fedavg_is_off_by_exactly_the_covariance_of_the_factors() -> None:
    adapters, weights = hospitals(4, 2, shared=False), [0.1, 0.2, 0.3, 0.4]
    exact = product_means(adapters, weights)
    gap = size = 0.0
    for n in NAMES:
        B = sum(w * a.layers[n].B.double() for a, w in zip(adapters, weights, strict=True))
        A = sum(w * a.layers[n].A.double() for a, w in zip(adapters, weights, strict=True))
        covariance = sum(
            w * SPEC.scale * (a.layers[n].B.double() - B) @ (a.layers[n].A.double() - A)
            for a, w in zip(adapters, weights, strict=True)
        )
        naive = SPEC.scale * B @ A
        assert torch.allclose(exact[n].dense() - naive, covariance, atol=1e-9)
        gap, size = gap + covariance.square().sum(), size + exact[n].dense().square().sum()
    expected = float((gap / size).sqrt())
    assert merge(create("fedavg"), adapters, weights).discrepancy == pytest.approx(expected)
    assert expected > 0.1


def test_fedsvd_keeps_the_product_and_makes_the_rows_of_A_orthonormal() -> None:
    adapters = hospitals(3, 21, shared=True)
    merged = merge(create("fedsvd"), adapters, [1 / 3] * 3).adapter
    assert close(merged, dense(merge(create("ffa"), adapters, [1 / 3] * 3).adapter))
    for layer in merged.layers.values():
        assert torch.allclose(layer.A @ layer.A.T, torch.eye(3), atol=1e-6)
        gram = layer.B.T @ layer.B
        assert torch.allclose(gram, torch.diag(gram.diagonal()), atol=1e-5)


@pytest.mark.parametrize("name", ["ffa", "rolora"])
def test_the_shared_A_is_returned_bit_for_bit(name: str) -> None:
    adapters = hospitals(3, 4, shared=True)
    merged = merge(create(name), adapters, [1 / 3] * 3).adapter
    for n, layer in merged.layers.items():
        assert layer.A.equal(adapters[0].layers[n].A)


def test_rolora_means_A_exactly_where_B_is_shared() -> None:
    weights = [0.5, 0.3, 0.2]
    free = hospitals(3, 6, shared=False)
    adapters = [
        Adapter(SPEC, {n: LowRank(free[0].layers[n].B, a.layers[n].A) for n in NAMES}) for a in free
    ]
    merged = merge(create("rolora"), adapters, weights).adapter
    assert close(merged, mean_of_products(adapters, weights))
    for n, layer in merged.layers.items():
        assert layer.B.equal(free[0].layers[n].B)
    with pytest.raises(MergeError, match="same A or the same B"):
        merge(create("rolora"), free, weights)


@pytest.mark.parametrize("name", SHARED)
def test_strategies_that_need_a_shared_A_refuse_others(name: str) -> None:
    with pytest.raises(MergeError, match="same A"):
        merge(create(name), hospitals(2, 1, shared=False), [0.5, 0.5])


@pytest.mark.parametrize("weights", [[0.5, 0.6], [1.0], [1.5, -0.5]])
def test_weights_that_are_not_a_distribution_are_refused(weights: list[float]) -> None:
    with pytest.raises(MergeError, match="weights"):
        merge(create("product_mean"), hospitals(2, 1, shared=True), weights)


def test_scales_are_folded_in_where_products_are_merged() -> None:
    one = hospitals(1, 1, shared=True)[0]
    other = Adapter(AdapterSpec(3, 12.0, SPEC.targets), one.layers)
    found = merge(create("product_mean"), [one, other], [0.5, 0.5]).adapter
    assert close(found, mean_of_products([one, other], [0.5, 0.5]))
    with pytest.raises(MergeError, match="scale"):
        merge(create("fedavg"), [one, other], [0.5, 0.5])
    with pytest.raises(MergeError, match="no adapter"):
        merge(create("product_mean"), [], [])


def test_unknown_strategy_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"strategy\.name=best: choose one of .*product_mean"):
        create("best")


def test_stacking_is_the_sum() -> None:
    one, other = hospitals(2, 9, shared=False)
    for n in NAMES:
        total = stack([one.layers[n], other.layers[n]])
        assert torch.allclose(
            total.dense(), one.layers[n].dense() + other.layers[n].dense(), atol=1e-5
        )


@pytest.mark.parametrize("name", ["product_mean", "karcher", "median", "iso_c", "fedavg"])
@pytest.mark.parametrize("rank", [1, 2, 7])
def test_the_norm_ratio_is_that_of_the_adapter_that_comes_out(name: str, rank: int) -> None:
    adapters, weights = hospitals(3, 17, shared=False), [1 / 3] * 3
    found = merge(create(name), adapters, weights, rank=rank, dtype=torch.float64)
    mean = mean_of_products(adapters, weights)
    written, exact = (
        sum(float(d.square().sum()) for d in own.values()) for own in (dense(found.adapter), mean)
    )
    assert found.norm_ratio == pytest.approx((written / exact) ** 0.5, rel=1e-9)


def test_the_exact_rank_is_that_of_all_that_is_not_rounding() -> None:
    """Of one update in three factorisations its own rank, however small its second direction is."""
    g = torch.Generator().manual_seed(2)

    def orthonormal(n: int) -> torch.Tensor:
        return torch.linalg.qr(torch.randn(n, 2, generator=g, dtype=torch.float64)).Q

    values = torch.tensor([1.0, 1e-9], dtype=torch.float64)
    B, A, spec = orthonormal(9) * values, orthonormal(7).T, AdapterSpec(2, 2.0, ("q",))
    turns = [orthonormal(2) for _ in range(3)]
    equal = [Adapter(spec, {"q": LowRank(B @ turn, turn.T @ A)}) for turn in turns]
    kind = create("product_mean")
    found = merge(kind, equal, [1 / 3] * 3, rank=Exact(), dtype=torch.float64).adapter
    assert found.spec.rank == 2
    assert torch.linalg.svdvals(dense(found)["q"])[:2].tolist() == pytest.approx(values.tolist())


@pytest.mark.parametrize("apart", [0.0, 1e-13, 1e-10, 1e-7, 1e-5, 1e-3])
@pytest.mark.parametrize("name", ["product_mean", "fedavg"])
def test_the_discrepancy_of_hospitals_that_hardly_differ_is_not_rounding(
    name: str, apart: float
) -> None:
    """B + D, A + E and B - D, A - E: what averaging factors gets wrong is D E."""
    g = torch.Generator().manual_seed(3)
    B, D = (torch.randn(40, 3, generator=g, dtype=torch.float64) for _ in range(2))
    A, E = (torch.randn(3, 30, generator=g, dtype=torch.float64) for _ in range(2))
    D, E = apart * D, 1e-3 * E
    spec = AdapterSpec(3, 3.0, ("q",))
    pair = [Adapter(spec, {"q": LowRank(B + sign * D, A + sign * E)}) for sign in (1, -1)]
    expected = float((D @ E).norm() / (B @ A + D @ E).norm())
    found = merge(create(name), pair, [0.5, 0.5], rank=6).discrepancy
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-15)
