"""Strategies against independent implementations: PEFT and mergekit, on dense updates.

Where theirs differ on purpose, or are wrong for LoRA, the difference is part of the test.
"""

from __future__ import annotations

import pytest
import torch
from mergekit.merge_methods import merge_tensors
from peft.utils import merge_utils
from torch import Tensor

from adapters.adapter import Adapter, AdapterSpec
from adapters.lowrank import LowRank
from strategies.base import Draw, MergeError
from strategies.core_space import core_of
from strategies.merging import merge
from strategies.registry import create

WEIGHTS = [0.5, 0.3, 0.2]


def hospitals(count: int = 3, seed: int = 0, size: float = 1.0) -> list[Adapter]:
    """One layer of 12 x 10, rank 2, around a common update."""
    g = torch.Generator().manual_seed(seed)
    common = torch.randn(12, 2, generator=g), torch.randn(2, 10, generator=g)
    made = []
    for _ in range(count):
        B = common[0] + 0.7 * torch.randn(12, 2, generator=g)
        A = common[1] + 0.7 * torch.randn(2, 10, generator=g)
        made.append(Adapter(AdapterSpec(2, 2.0, ("q",)), {"q": LowRank(B * size, A)}))
    return made


def dense(adapter: Adapter) -> Tensor:
    return adapter.deltas()["q"].to(torch.float64).dense()


def ours(name: str, adapters: list[Adapter], weights: list[float], **parameters: object) -> Tensor:
    found = create(name, parameters).combine(adapters, weights, Draw())["q"]
    return found.dense() if isinstance(found, LowRank) else found


def theirs(method: str, adapters: list[Adapter], base: bool = True, **parameters: object) -> Tensor:
    """mergekit on the dense updates, with a base model of zeros where the method needs one."""
    tensors = [dense(a) for a in adapters]
    if base:
        tensors = [torch.zeros_like(tensors[0]), *tensors]
    return merge_tensors(
        tensors, method, parameters=parameters, base_index=0 if base else None
    ).double()


def gap(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def test_mean_of_products_and_task_arithmetic_agree_with_mergekit() -> None:
    own = hospitals()
    assert (
        gap(ours("product_mean", own, WEIGHTS), theirs("linear", own, False, weight=WEIGHTS)) < 1e-6
    )
    summed = theirs("task_arithmetic", own, weight=[0.4] * 3)
    assert gap(ours("task_arithmetic", own, [1 / 3] * 3), summed) < 1e-6


def test_slerp_agrees_with_mergekit() -> None:
    own = hospitals(2)
    expected = merge_tensors(
        [dense(a) for a in own], "slerp", parameters={"t": 0.3}, base_index=0
    ).double()
    assert gap(ours("slerp", own, [0.7, 0.3]), expected) < 1e-6


def test_karcher_agrees_with_mergekit_for_equal_weights() -> None:
    own = hospitals()
    expected = theirs("karcher", own, False, max_iter=200, tol=1e-12)
    assert gap(ours("karcher", own, [1 / 3] * 3), expected) < 1e-6


def test_norm_weighted_is_what_mergekit_calls_multislerp() -> None:
    own = hospitals()
    expected = theirs("multislerp", own, False, weight=WEIGHTS)
    assert gap(ours("norm_weighted", own, WEIGHTS), expected) < 1e-6


def test_model_stock_agrees_with_mergekit_for_large_updates_and_is_right_for_small_ones() -> None:
    own = hospitals()
    assert gap(ours("model_stock", own, [1 / 3] * 3), theirs("model_stock", own)) < 1e-6
    small = hospitals(size=1e-5)
    expected = 1e-5 * ours("model_stock", own, [1 / 3] * 3)
    assert gap(ours("model_stock", small, [1 / 3] * 3), expected) < 1e-5
    assert gap(theirs("model_stock", small), expected) > 0.5  # clamps products of norms at 1e-6


@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
def test_ties_agrees_with_mergekit_and_with_peft_where_weights_are_equal(density: float) -> None:
    own = hospitals()
    mine = ours("ties", own, WEIGHTS, density=density, scope="layer")
    assert gap(mine, theirs("ties", own, weight=WEIGHTS, density=density)) < 1e-6
    equal = ours("ties", own, [1 / 3] * 3, density=density, scope="layer")
    peft = merge_utils.ties([dense(a) for a in own], torch.ones(3, dtype=torch.float64), density)
    assert gap(equal, peft.double()) < 1e-6


def test_peft_divides_by_how_many_agree_so_weights_that_sum_to_one_shrink_its_ties() -> None:
    own = hospitals()
    mine = ours("ties", own, [1 / 3] * 3, density=0.5, scope="layer")
    peft = merge_utils.ties([dense(a) for a in own], torch.full((3,), 1 / 3), 0.5).double()
    assert gap(peft * 3, mine) < 1e-6


def test_dare_divides_by_the_probability_and_mergekit_keeps_the_sum_of_magnitudes() -> None:
    own = hospitals(1)
    update = dense(own[0])
    kind = create("dare", {"density": 0.3, "elect": False})
    drawn = [kind.combine(own, [1.0], Draw("r", i))["q"] for i in range(4000)]
    assert gap(sum(drawn) / 4000, update) < 0.05
    kept = drawn[0] != 0
    assert torch.allclose(drawn[0][kept], update[kept] / 0.3)
    assert float(torch.stack([d != 0 for d in drawn]).double().mean()) == pytest.approx(
        0.3, rel=0.01
    )
    torch.manual_seed(0)
    other = theirs("dare_linear", own, weight=[1.0], density=0.3)
    kept = other != 0
    ratio = float(update.abs().sum() / update[kept].abs().sum())
    assert abs(ratio - 1 / 0.3) > 0.1
    assert torch.allclose(other[kept], update[kept] * ratio)


def test_della_keeps_the_largest_of_a_row_most_often_and_divides_by_how_often() -> None:
    own = hospitals(1)
    update = dense(own[0])
    kind = create("della", {"density": 0.5, "window": 0.4, "elect": False})
    drawn = [kind.combine(own, [1.0], Draw("r", i))["q"] for i in range(4000)]
    probability = 0.1 + 0.8 * update.abs().argsort(1).argsort(1) / 9
    often = torch.stack([d != 0 for d in drawn]).double().mean(0)
    assert float((often - probability).abs().max()) < 0.04
    kept = drawn[0] != 0
    assert torch.allclose(drawn[0][kept], (update / probability)[kept])
    assert gap(sum(drawn) / 4000, update) < 0.06
    torch.manual_seed(0)
    other = theirs("della_linear", own, weight=[1.0], density=0.5, epsilon=0.4)
    kept = other != 0
    ratio = update.abs().sum() / update[kept].abs().sum()  # one for all that is kept
    assert torch.allclose(other[kept], update[kept] * ratio)


def test_breadcrumbs_keeps_the_middle_of_every_row_and_mergekit_that_of_the_tensor() -> None:
    """Where one row is a thousand times as long, its largest entries are all of mergekit's."""
    one = hospitals(1)[0]
    B = one.layers["q"].B.clone()
    B[0] *= 1000
    own = [Adapter(one.spec, {"q": LowRank(B, one.layers["q"].A)})]
    mine = ours("breadcrumbs", own, [1.0], density=0.4, outliers=0.1)
    other = theirs("breadcrumbs", own, weight=[1.0], density=0.4, gamma=0.1)
    order = dense(own[0]).abs().argsort(1, descending=True)
    for row in range(12):
        assert set(order[row, 1:5].tolist()) == set(mine[row].nonzero().flatten().tolist())
    assert not other[0].any()
    order = dense(own[0]).abs().flatten().argsort(descending=True)
    assert set(order[12:60].tolist()) == set(other.flatten().nonzero().flatten().tolist())


def test_ties_rounds_how_many_entries_it_keeps_and_mergekit_cuts() -> None:
    own = hospitals(1)  # 0.499 of 120 entries are 59.88
    assert int((ours("ties", own, [1.0], density=0.499, scope="layer") != 0).sum()) == 60
    assert int((theirs("ties", own, weight=[1.0], density=0.499) != 0).sum()) == 59


def test_peft_adds_cross_terms_where_it_merges_factors() -> None:
    """PEFT's ``linear`` acts on A and B; its own dense sum is what ours is."""
    own = hospitals()
    A = sum(w**0.5 * a.layers["q"].A.double() for a, w in zip(own, WEIGHTS, strict=True))
    B = sum(w**0.5 * a.layers["q"].B.double() for a, w in zip(own, WEIGHTS, strict=True))
    exact = merge_utils.task_arithmetic([dense(a) for a in own], torch.tensor(WEIGHTS).double())
    assert gap(ours("product_mean", own, WEIGHTS), exact) < 1e-6
    assert gap(B @ A, exact) > 0.3


# --- means of factors ---------------------------------------------------------------------------


def test_hetlora_is_the_mean_of_padded_factors_by_norm() -> None:
    g = torch.Generator().manual_seed(4)
    own = [
        Adapter(
            AdapterSpec(r, 3.0, ("q",)),
            {"q": LowRank(torch.randn(12, r, generator=g), torch.randn(r, 10, generator=g))},
        )
        for r in (1, 3, 2)
    ]
    sizes = torch.tensor(WEIGHTS) * torch.stack([dense(a).norm() for a in own])
    shares = sizes / sizes.sum()
    B, A = torch.zeros(12, 3, dtype=torch.float64), torch.zeros(3, 10, dtype=torch.float64)
    for share, one in zip(shares, own, strict=True):
        r = one.spec.rank
        for column in range(r):
            B[:, column] += share * one.spec.scale * one.layers["q"].B[:, column]
            A[column] += share * one.layers["q"].A[column]
    assert gap(ours("hetlora", own, WEIGHTS), B @ A) < 1e-6
    exact = ours("product_mean", own, WEIGHTS)
    assert gap(ours("hetlora", own, WEIGHTS), exact) > 0.1  # the bias that it declares
    assert not create("hetlora").declared.exact


@pytest.mark.parametrize("ridge", [0.001, 0.3])
def test_lora_fair_solves_its_least_squares_problem_and_keeps_the_mean_of_a(ridge: float) -> None:
    own = hospitals()
    exact = ours("product_mean", own, WEIGHTS)
    mean = create("fedavg").combine(own, WEIGHTS, Draw())["q"]
    found = create("lora_fair", {"ridge": ridge}).combine(own, WEIGHTS, Draw())["q"]
    assert isinstance(mean, LowRank)
    assert isinstance(found, LowRank)
    assert found.A.equal(mean.A)
    c = ridge * float(mean.A.square().sum(1).mean())
    # Least squares over the stack of the gap and the penalty, column by column of dB^T.
    left = torch.cat([mean.A.T, c**0.5 * torch.eye(2, dtype=torch.float64)])
    right = torch.cat([(exact - mean.dense()).T, torch.zeros(2, 12, dtype=torch.float64)])
    expected = mean.B + torch.linalg.lstsq(left, right).solution.T
    assert gap(found.B, expected) < 1e-9
    assert gap(found.dense(), exact) < gap(mean.dense(), exact)


@pytest.mark.parametrize("ridge", [0.001, 10.0])
def test_lora_fair_is_the_exact_mean_under_a_shared_a(ridge: float) -> None:
    own = hospitals()
    shared = [Adapter(a.spec, {"q": LowRank(a.layers["q"].B, own[0].layers["q"].A)}) for a in own]
    exact = ours("product_mean", shared, WEIGHTS)
    assert gap(ours("lora_fair", shared, WEIGHTS, ridge=ridge), exact) < 1e-12


def test_what_flora_and_fedex_compute_is_the_mean_of_products_at_full_rank() -> None:
    own = hospitals()
    s = own[0].spec.scale
    stacked = torch.cat([s * a.layers["q"].B for a in own], 1) @ torch.cat(
        [w * a.layers["q"].A for a, w in zip(own, WEIGHTS, strict=True)]
    )
    B = sum(w * a.layers["q"].B.double() for a, w in zip(own, WEIGHTS, strict=True))
    A = sum(w * a.layers["q"].A.double() for a, w in zip(own, WEIGHTS, strict=True))
    residual = sum(
        w * s * (a.layers["q"].B - B) @ (a.layers["q"].A - A)
        for a, w in zip(own, WEIGHTS, strict=True)
    )
    found = dense(merge(create("product_mean"), own, WEIGHTS, rank=6).adapter)
    assert gap(found, stacked.double()) < 1e-6
    assert gap(found, s * B @ A + residual) < 1e-6


# --- spectral ----------------------------------------------------------------------------------


def test_the_core_is_lossless_and_small() -> None:
    own = hospitals()
    parts = [a.deltas()["q"].to(torch.float64) for a in own]
    core = core_of(parts)
    assert core.U.shape == (12, 6)
    assert core.V.shape == (6, 10)
    for part, small in zip(parts, core.cores, strict=True):
        assert gap(core.back(small).dense(), part.dense()) < 1e-12


@pytest.mark.parametrize("name", ["core_ties", "knots", "tsv_m", "iso_c"])
def test_spectral_merges_stay_within_what_the_hospitals_span(name: str) -> None:
    own = hospitals()
    core = core_of([a.deltas()["q"].to(torch.float64) for a in own])
    found = ours(name, own, WEIGHTS)
    inside = core.U @ core.U.T @ found
    assert gap(inside, found) < 1e-10
    assert gap(found @ core.V.T @ core.V, found) < 1e-10


def test_iso_c_makes_all_singular_values_equal_to_their_mean() -> None:
    own = hospitals()
    mean = torch.linalg.svdvals(ours("product_mean", own, WEIGHTS))[:6]
    found = torch.linalg.svdvals(ours("iso_c", own, WEIGHTS))[:6]
    assert torch.allclose(found, mean.mean().expand(6))


def test_tsv_m_uses_orthogonal_directions_and_keeps_the_values() -> None:
    own = hospitals()
    found = torch.linalg.svdvals(ours("tsv_m", own, WEIGHTS))[:6]
    kept = torch.cat(
        [w * torch.linalg.svdvals(dense(a))[:2] for a, w in zip(own, WEIGHTS, strict=True)]
    )
    assert torch.allclose(found, kept.sort(descending=True).values, atol=1e-9)


# --- hospitals that lie ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["median", "trimmed_mean", "krum", "norm_bound"])
@pytest.mark.parametrize("lie", [1e4, -1e4])
def test_one_liar_does_not_spoil_the_merge(name: str, lie: float) -> None:
    honest = hospitals(6)
    liar = Adapter(honest[0].spec, {"q": honest[0].layers["q"] * lie})
    w = [1 / 6] * 6
    expected = ours("product_mean", honest, w)
    spoiled = ours("product_mean", [liar, *honest[1:]], w)
    assert gap(spoiled, expected) > 100
    assert gap(ours(name, [liar, *honest[1:]], w), expected) < 1.0


def test_krum_leaves_the_liar_out_and_chooses_a_hospital_of_its_own() -> None:
    honest = hospitals(6)
    liar = Adapter(honest[0].spec, {"q": honest[0].layers["q"] * -5})
    others = [1 / 5] * 5
    found = ours("krum", [liar, *honest[1:]], [1 / 6] * 6)
    assert gap(found, ours("product_mean", honest[1:], others)) < 1e-6
    one = ours("krum", honest, [1 / 6] * 6, chosen=1)
    assert min(gap(one, dense(a)) for a in honest) < 1e-6


@pytest.mark.parametrize(
    ("lengths", "bound"),
    [([1, 2], 1), ([1, 2, 3], 2), ([1, 2, 3, 4], 2), ([0, 1, 2], 1), ([0, 1, 2, 3], 1)],
)
def test_the_bound_is_the_middle_norm_of_all(lengths: list[float], bound: float) -> None:
    one = hospitals(1)[0]
    grown = [Adapter(one.spec, {"q": one.layers["q"] * float(k)}) for k in lengths]
    expected = sum(min(k, bound) for k in lengths) / len(lengths)
    found = ours("norm_bound", grown, [1 / len(lengths)] * len(lengths))
    assert gap(found, dense(one) * expected) < 1e-6


@pytest.mark.parametrize("honest", [1, 2, 3, 4])
@pytest.mark.parametrize("silent", [False, True])
def test_the_bound_holds_beside_one_hospital_and_beside_silent_ones(
    honest: int, silent: bool
) -> None:
    own = [Adapter(a.spec, {"q": a.layers["q"] * (not silent)}) for a in hospitals(honest)]
    longest = max(float(dense(a).norm()) for a in own)
    liar = Adapter(own[0].spec, {"q": hospitals(1, seed=9)[0].layers["q"] * 1e9})
    found = ours("norm_bound", [liar, *own], [1 / (honest + 1)] * (honest + 1), multiple=2.0)
    assert float(found.norm()) <= 2.0 * longest + 1e-9


@pytest.mark.parametrize("name", ["median", "trimmed_mean"])
def test_of_two_hospitals_nobody_can_say_who_lies(name: str) -> None:
    for count in (1, 2):
        with pytest.raises(MergeError, match=f"{name} .*needs at least 3 to merge"):
            ours(name, hospitals(count), [1 / count] * count)


def test_krum_cannot_choose_those_that_may_lie() -> None:
    honest, w = hospitals(5), [0.2] * 5
    assert ours("krum", honest, w, chosen=4).any()
    with pytest.raises(MergeError, match="chosen=5: of 5, 1 of which may lie, at most 4"):
        ours("krum", honest, w, chosen=5)


def test_median_and_trimmed_mean_are_those_of_every_entry() -> None:
    own = hospitals(5)
    stacked = torch.stack([dense(a) for a in own])
    assert gap(ours("median", own, [0.2] * 5), stacked.median(0).values) < 1e-12
    assert gap(ours("trimmed_mean", own, [0.2] * 5), stacked.sort(0).values[1:4].mean(0)) < 1e-12


# --- by depth ----------------------------------------------------------------------------------


def test_lines_scales_by_depth() -> None:
    g = torch.Generator().manual_seed(0)
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(5)]
    one = Adapter(
        AdapterSpec(2, 2.0, ("q_proj",)),
        {n: LowRank(torch.randn(4, 2, generator=g), torch.randn(2, 4, generator=g)) for n in names},
    )
    found = merge(create("lines", {"first": 0.2, "last": 1.0}), [one], [1.0]).adapter
    for name, factor in zip(names, (0.2, 0.4, 0.6, 0.8, 1.0), strict=True):
        assert gap(found.deltas()[name].dense(), one.deltas()[name].dense() * factor) < 1e-6


def test_lines_counts_the_blocks_of_the_model_where_it_is_told_how_many() -> None:
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(3)]
    for blocks, expected in (
        (None, (0.5, 0.75, 1.0)),
        (3, (0.5, 0.75, 1.0)),
        (9, (0.5, 0.5625, 0.625)),
    ):
        found = create("lines", {"blocks": blocks}).factors(names)  # type: ignore[attr-defined]
        assert tuple(found.values()) == expected
    with pytest.raises(MergeError, match=r"block 2 is adapted, strategy\.blocks=2"):
        create("lines", {"blocks": 2}).factors(names)  # type: ignore[attr-defined]
