"""Hospitals taken one at a time: the same result as all at once, in memory that does not grow."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.adapter import Adapter, AdapterSpec
from adapters.lowrank import LowRank, gram
from adapters.statistics import MeasuredAdapter
from strategies.base import Draw, MergeError, Noise, deltas, product_means
from strategies.inner_products import FromInnerProducts, cosines
from strategies.merging import merge
from strategies.norms import FromNorms
from strategies.registry import OURS, create
from strategies.streaming import Streaming
from strategies.sums import ProductSum, ProductSums
from tests.strategies.definitions import merged

SHAPES = {"layers.0.q": (24, 20), "layers.1.v": (12, 20)}
STREAMING = [kind.name for kind in OURS if kind.declared.streams]
SHARED = ("ffa", "fedsvd", "rolora", "regmean", "fisher", "noise_aware")  # one A in all


def hospital(k: int, shared: bool, rank: int = 3) -> Adapter:
    """The k-th of any number of hospitals: always the same one. They have something in common."""
    g = torch.Generator().manual_seed(k)
    common = torch.Generator().manual_seed(999)
    layers = {}
    for n, (m, w) in SHAPES.items():
        B, A = torch.randn(m, rank, generator=common), torch.randn(rank, w, generator=common)
        own = torch.randn(rank, w, generator=g)
        layers[n] = LowRank(B + torch.randn(m, rank, generator=g), A if shared else A + own)
    root = torch.randn(rank, 2 * rank, generator=g)
    measured = dict.fromkeys(SHAPES, root @ root.T)
    for n, (m, _) in SHAPES.items():
        measured[f"{n}.lora_B.weight"] = torch.rand(m, rank, generator=g)
    spec = AdapterSpec(rank, 4.2, ("q", "v"))  # a scale that float32 would round
    return MeasuredAdapter(spec, layers, measured)


def drawn(name: str, count: int) -> Draw:
    """Where it is asked for, noise of three sizes in turn on a move from no hospital's adapter."""
    if not create(name).needs_noise:
        return Draw()
    stds = [(0.3, 1.0, 2.0)[k % 3] for k in range(count)]
    return Draw(noise=Noise(hospital(10**6, True), tuple(stds)))


class Loaded(Sequence[Adapter]):
    """Hospitals that are made when they are asked for; counts how many are alive at once."""

    def __init__(self, count: int, shared: bool, ranks: tuple[int, ...] = (3,)) -> None:
        self.count, self.shared, self.ranks = count, shared, ranks
        self.alive: weakref.WeakSet[Adapter] = weakref.WeakSet()
        self.most = 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, k: Any) -> Any:
        if k >= self.count:
            raise IndexError(k)
        adapter = hospital(k, self.shared, self.ranks[k % len(self.ranks)])
        self.alive.add(adapter)
        self.most = max(self.most, len(self.alive))
        return adapter


def uneven(count: int) -> list[float]:
    raw = [1 + k % 3 for k in range(count)]
    return [w / sum(raw) for w in raw]


def dense(updates: Any) -> dict[str, Tensor]:
    return {n: u.dense() if isinstance(u, LowRank) else u for n, u in updates.items()}


def gap(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    size = math.sqrt(sum(float(d.square().sum()) for d in other.values()))
    return math.sqrt(sum(float((one[n] - other[n]).square().sum()) for n in other)) / size


def test_which_strategies_stream() -> None:
    assert set(STREAMING) == {
        "product_mean", "fedavg", "ffa", "rolora", "fedsvd", "hetlora", "lora_fair", "noise_aware",
        "task_arithmetic", "norm_weighted", "model_stock", "norm_bound", "fisher", "regmean",
    }  # fmt: skip
    assert all(kind.declared.streams for kind in OURS if issubclass(kind, Streaming))


@pytest.mark.parametrize("name", STREAMING)
@pytest.mark.parametrize("count", [2, 5, 40])  # as factors, mixed, dense
def test_one_at_a_time_is_all_at_once(name: str, count: int) -> None:
    shared = name in SHARED
    adapters = [hospital(k, shared) for k in range(count)]
    w, draw = uneven(count), drawn(name, count)
    found = dense(create(name).combine(adapters, w, draw))
    assert gap(found, merged(name, adapters, w, draw)) < 1e-12


@pytest.mark.parametrize(
    "name", [n for n in STREAMING if n not in (*SHARED, "fedavg", "lora_fair")]
)
def test_ranks_may_differ_from_hospital_to_hospital(name: str) -> None:
    adapters = list(Loaded(30, False, ranks=(1, 4, 2)))
    w = uneven(30)
    found = dense(create(name).combine(adapters, w, Draw()))
    assert gap(found, merged(name, adapters, w, Draw())) < 1e-12
    assert merge(create(name), adapters, w, rank=5).discrepancy is None


@pytest.mark.parametrize("name", STREAMING)
def test_no_more_than_two_hospitals_are_held_at_once(name: str) -> None:
    loaded = Loaded(25, name in SHARED)
    merge(create(name), loaded, [1 / 25] * 25, drawn(name, 25))
    assert loaded.most <= 2


FROM_NORMS = [kind.name for kind in OURS if issubclass(kind, FromNorms)]


@pytest.mark.parametrize("name", FROM_NORMS)
@pytest.mark.parametrize("scope", ["layer", "model"])
def test_norms_say_what_all_inner_products_do(name: str, scope: str) -> None:
    adapters, w = [hospital(k, False) for k in range(6)], uneven(6)
    for zeros in (0, 2, 5):
        for k in range(zeros):
            none = {n: LowRank(x.B * 0, x.A) for n, x in adapters[k].layers.items()}
            adapters[k] = replace(adapters[k], layers=none)
        strategy = create(name, {"scope": scope})
        one, other = (
            dense(kind.combine(strategy, adapters, w, Draw()))
            for kind in (FromNorms, FromInnerProducts)
        )
        assert all(torch.allclose(one[n], other[n], rtol=1e-10, atol=1e-13) for n in SHAPES)


def test_model_stock_of_one_that_learned_is_nothing_at_all() -> None:
    adapters = [hospital(k, False) for k in range(3)]
    for k in (0, 2):
        none = {n: LowRank(x.B * 0, x.A) for n, x in adapters[k].layers.items()}
        adapters[k] = replace(adapters[k], layers=none)
    for found in dense(create("model_stock").combine(adapters, [1 / 3] * 3, Draw())).values():
        assert not found.any()


def numbers(held: Any) -> int:
    """How many numbers an object holds in tensors, however deep."""
    if isinstance(held, Tensor):
        return held.numel()
    if isinstance(held, dict):
        return sum(map(numbers, held.values()))
    if isinstance(held, list | tuple | set):
        return sum(map(numbers, held))
    return sum(map(numbers, vars(held).values())) if hasattr(held, "__dict__") else 0


@pytest.mark.parametrize("name", [k.name for k in OURS if issubclass(k, Streaming)])
def test_what_a_stream_holds_does_not_grow(name: str) -> None:
    def most(count: int) -> int:
        stream, found = create(name).stream(), []  # type: ignore[attr-defined]
        sums = stream.add.__self__
        for k in range(count):
            stream.add(hospital(k, name in SHARED), 1.0)
            found.append(numbers(sums))
        return max(found)

    # Where sums go dense: never more than twice the dense updates in each sum kept.
    limit = 2 * sum(m * n for m, n in SHAPES.values())
    assert most(60) == most(240) <= 2 * limit


def test_weights_need_not_sum_to_one_where_hospitals_drop_out() -> None:
    for name in ("product_mean", "ffa", "task_arithmetic"):
        once, twice = (create(name).stream() for _ in range(2))  # type: ignore[attr-defined]
        for k in range(4):
            once.add(hospital(k, True), 0.25)
            twice.add(hospital(k, True), 3.0)
        assert gap(dense(twice.result()), dense(once.result())) < 1e-13, name


def test_updates_that_share_a_factor_are_summed_at_their_rank() -> None:
    for shared in ("A", "B"):
        total, parts = ProductSum(), []
        for k in range(50):
            one, first = hospital(k, False).layers, hospital(0, False).layers
            mine, common = one["layers.0.q"], first["layers.0.q"]
            part = LowRank(mine.B, common.A) if shared == "A" else LowRank(common.B, mine.A)
            parts.append(part)
            total.add(part, -0.5 + k / 10)
        found = total.take()
        assert isinstance(found, LowRank)
        assert found.rank == 3
        exact = sum((-0.5 + k / 10) * p.to(torch.float64).dense() for k, p in enumerate(parts))
        assert gap({"": found.dense()}, {"": exact}) < 1e-14


def test_a_sum_is_given_away_once_and_begins_anew() -> None:
    sums = ProductSums()
    for _ in range(2):
        for k in range(30):
            sums.add(hospital(k, False), 1.0)
        found = dense(sums.take(0.5))
        exact = dense(product_means([hospital(k, False) for k in range(30)], [0.5] * 30))
        assert gap(found, exact) < 1e-13


@pytest.mark.parametrize("count", [2, 3, 60])
def test_the_figures_are_those_of_all_pairs(count: int) -> None:
    adapters = [hospital(k, False) for k in range(count)]
    zero = {n: LowRank(x.B * 0, x.A) for n, x in adapters[0].layers.items()}
    adapters.append(replace(adapters[0], layers=zero))  # which has no direction
    w = uneven(count + 1)
    total = torch.stack([gram(parts) for parts in deltas(adapters).values()]).sum(0)
    cosine = cosines(total)[:count, :count]
    pairs = torch.ones_like(cosine).triu(1) > 0
    mean, naive = (merged(name, adapters, w, Draw()) for name in ("product_mean", "fedavg"))
    for name in ("product_mean", "fedavg"):  # one is the exact mean, the other is not
        found = merge(create(name), adapters, w, rank=12)
        assert found.mean_cosine == pytest.approx(float(cosine[pairs].mean()), abs=1e-12)
        assert found.discrepancy == pytest.approx(gap(naive, mean), rel=1e-9)
    size = math.sqrt(sum(float(d.square().sum()) for d in mean.values()))
    ratio = math.sqrt(sum(float(d.square().sum()) for d in naive.values())) / size
    assert found.norm_ratio == pytest.approx(ratio, rel=1e-9)


def test_one_hospital_has_no_cosine() -> None:
    assert merge(create("ffa"), [hospital(0, True)], [1.0]).mean_cosine is None


def test_a_merge_reads_any_sequence_that_loads_again() -> None:
    class Names(Loaded):
        def __iter__(self) -> Iterator[Adapter]:
            return (self[k] for k in range(len(self)))

    one = merge(create("median"), Names(5, False), [0.2] * 5).adapter
    two = merge(create("median"), [hospital(k, False) for k in range(5)], [0.2] * 5).adapter
    assert one.fingerprint() == two.fingerprint()


@pytest.mark.parametrize("name", ["fedavg", "ffa", "rolora", "fedsvd", "lora_fair"])
def test_of_factors_of_different_ranks_it_is_said_what_merges_them(name: str) -> None:
    unlike = [hospital(1, False), hospital(2, False, rank=2)]
    with pytest.raises(MergeError, match="no mean of factors; take product_mean or hetlora"):
        create(name).combine(unlike, [0.5, 0.5], Draw())
