"""What every strategy must keep, where its declaration says that it does; and refuse, always."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.adapter import Adapter, AdapterSpec
from adapters.lowrank import LowRank
from strategies.base import Draw, MergeError, Noise
from strategies.merging import Merge, merge
from strategies.registry import OURS, create
from tests.strategies.examples import (
    NAMES,
    SHAPES,
    SHARED,
    TARGETS,
    dense,
    distance,
    equal_weights,
    hospitals,
    measured,
    strategy,
)

ONE_RANK = {"fedavg", "lora_fair"}  # average factors
RANDOM = {"dare", "della"}  # masks follow from the content


def fitting(name: str, count: int, seed: int = 1) -> list[Adapter]:
    """As many hospitals as the strategy takes, at most ``count``; measured where it needs that."""
    made = hospitals(2 if name == "slerp" else count, seed, name in SHARED)
    kind = strategy(name).statistics
    return measured(made, kind) if kind else made


def whole(name: str, adapters: list[Adapter], weights: list[float] | None = None) -> Merge:
    """Merged at full rank, so that nothing is lost on the way back to factors."""
    return merge(strategy(name), adapters, weights or equal_weights(adapters), draw(adapters), 7)


def draw(adapters: list[Adapter]) -> Draw:
    """A round that began with B = 0 and in which every hospital added as much noise."""
    first = adapters[0]
    layers = {n: LowRank(torch.zeros_like(x.B), x.A) for n, x in first.layers.items()}
    return Draw(noise=Noise(Adapter(first.spec, layers), (0.1,) * len(adapters)))


def gauge(g: torch.Generator) -> torch.Tensor:
    """An invertible G (3, 3), float64, that stretches directions up to ninefold."""
    rotations = torch.linalg.qr(torch.randn(2, 3, 3, generator=g, dtype=torch.float64)).Q
    stretch = 3 ** (2 * torch.rand(3, generator=g, dtype=torch.float64) - 1)
    return rotations[0] * stretch @ rotations[1]


def keeping(what: str) -> list[str]:
    return [kind.name for kind in OURS if what in kind.declared.keeps]


@pytest.mark.parametrize("name", keeping("one"))
def test_one_hospital_merges_to_itself(name: str) -> None:
    one = fitting(name, 1)[:1]
    assert distance(dense(whole(name, one).adapter), dense(one[0])) < 1e-6


@pytest.mark.parametrize("name", keeping("equal"))
def test_equal_hospitals_merge_to_themselves(name: str) -> None:
    same = fitting(name, 1)[:1] * (2 if name == "slerp" else 5)
    assert distance(dense(whole(name, same).adapter), dense(same[0])) < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_hospitals_does_not_matter(name: str) -> None:
    adapters = fitting(name, 5)
    raw = [0.3, 0.25, 0.2, 0.15, 0.1] if strategy(name).weighted else [0.2] * 5
    raw = raw[: len(adapters)]
    weights = [w / sum(raw) for w in raw]
    there = whole(name, adapters, weights).adapter
    back = whole(name, adapters[::-1], weights[::-1]).adapter
    assert distance(dense(there), dense(back)) < 1e-6


@pytest.mark.parametrize("name", keeping("scale"))
@settings(deadline=None, max_examples=8)
@given(factor=st.floats(1e-6, 1e4))
def test_scaling_every_hospital_scales_the_result(name: str, factor: float) -> None:
    adapters = fitting(name, 5)
    scaled = [
        replace(
            a,
            layers={n: LowRank((x.B.double() * factor).float(), x.A) for n, x in a.layers.items()},
        )
        for a in adapters
    ]
    expected = {n: d * factor for n, d in dense(whole(name, adapters).adapter).items()}
    assert distance(dense(whole(name, scaled).adapter), expected) < 1e-4


@pytest.mark.parametrize("name", keeping("gauge"))
def test_only_products_matter_not_how_they_are_factorised(name: str) -> None:
    """B G and G^-1 A are the same update; where one factor must be shared, one G for all."""
    adapters = fitting(name, 5)
    g = torch.Generator().manual_seed(5)
    common = gauge(g)
    turned = []
    for adapter in adapters:
        G = common if name in SHARED else gauge(g)
        back = torch.linalg.inv(G)
        layers = {
            n: LowRank(x.B.double() @ G, back @ x.A.double()) for n, x in adapter.layers.items()
        }
        turned.append(replace(adapter, layers=layers))
    require_alike(name, adapters, turned)


def require_alike(name: str, adapters: list[Adapter], others: list[Adapter]) -> None:
    """Fail unless both merge to the same; where masks follow from bits, over many rounds."""
    if name not in RANDOM:
        one, other = (dense(whole(name, own).adapter) for own in (adapters, others))
        assert distance(one, other) < 1e-4
        return
    many = range(300)
    w = equal_weights(adapters)
    kind = create(name, {"elect": False})
    means = []
    for own in (adapters, others):
        total = [dense(merge(kind, own, w, Draw("r", i), rank=7).adapter) for i in many]
        means.append({n: sum(t[n] for t in total) / len(total) for n in SHAPES})
    assert distance(*means) < 0.15


@pytest.mark.parametrize("name", NAMES)
def test_weights_have_an_effect_or_are_refused(name: str) -> None:
    adapters = fitting(name, 5)
    weights = [w / sum(range(1, len(adapters) + 1)) for w in range(1, len(adapters) + 1)]
    if not strategy(name).weighted:
        with pytest.raises(MergeError, match=f"{name} counts all adapters alike"):
            whole(name, adapters, weights)
        return
    equal, unequal = (dense(whole(name, adapters, own).adapter) for own in (None, weights))
    assert distance(equal, unequal) > 0.01


@pytest.mark.parametrize(
    ("name", "parameters"), [("krum", {"chosen": 1}), ("lines", {"of": "median"})]
)
def test_parameters_may_decide_that_all_count_alike(name: str, parameters: dict[str, Any]) -> None:
    assert strategy(name).weighted
    with pytest.raises(MergeError, match="weights must be equal"):
        merge(create(name, parameters), fitting(name, 5), [0.3, 0.25, 0.2, 0.15, 0.1])


UNAIDED = [k.name for k in OURS if not (k.declared.statistics or k.declared.noise)]


@pytest.mark.parametrize("name", [n for n in UNAIDED if strategy(n).declared.streams])
def test_only_what_sums_the_factors_that_travel_is_declared_so(name: str) -> None:
    """Two hospitals that trade a piece leave sums of factors as they were, sums of products not."""
    adapters = hospitals(5, 6, name in SHARED)
    g = torch.Generator().manual_seed(7)
    one, other = dict(adapters[0].layers), dict(adapters[1].layers)
    for n in SHAPES:
        dB = torch.randn(one[n].B.shape, generator=g)
        dA = 0.0 if name in SHARED else torch.randn(one[n].A.shape, generator=g)
        one[n] = LowRank(one[n].B + dB, one[n].A + dA)
        other[n] = LowRank(other[n].B - dB, other[n].A - dA)
    traded = [replace(adapters[0], layers=one), replace(adapters[1], layers=other), *adapters[2:]]
    gap = distance(*(dense(whole(name, own).adapter) for own in (adapters, traded)))
    assert (gap < 1e-5) == strategy(name).declared.sums


@pytest.mark.parametrize("name", [k.name for k in OURS if k.declared.exact])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_what_is_declared_exact_is_the_mean_of_the_products(name: str, count: int) -> None:
    adapters = hospitals(count, 4, name in SHARED)
    weights = [w / sum(range(1, count + 1)) for w in range(1, count + 1)]
    expected = {
        n: sum(w * dense(a)[n] for a, w in zip(adapters, weights, strict=True)) for n in SHAPES
    }
    found = merge(strategy(name), adapters, weights, rank=7)
    assert distance(dense(found.adapter), expected) < 1e-6
    assert found.norm_ratio == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_a_hospital_that_learned_nothing_is_no_mistake(name: str) -> None:
    """What the others agree on is there; how a hospital says nothing does not matter."""
    adapters = [
        replace(
            a,
            layers={
                n: LowRank(x.B + 2, x.A if name in SHARED else x.A + 2) for n, x in a.layers.items()
            },
        )
        for a in fitting(name, 5)
    ]
    nothing = {n: LowRank(torch.zeros_like(x.B), x.A) for n, x in adapters[0].layers.items()}
    silent = [replace(adapters[0], layers=nothing), *adapters[1:]]
    found, declared = whole(name, silent), strategy(name).declared
    assert found.adapter.is_finite()
    assert 0.1 < found.norm_ratio < 10
    if declared.exact:
        rest = {n: sum(dense(a)[n] for a in adapters[1:]) / len(adapters) for n in SHAPES}
        assert distance(dense(found.adapter), rest) < 1e-6
    if "gauge" in declared.keeps and name not in SHARED:
        nothing = {n: LowRank(x.B, torch.zeros_like(x.A)) for n, x in adapters[0].layers.items()}
        otherwise = [replace(adapters[0], layers=nothing), *adapters[1:]]
        assert distance(dense(whole(name, otherwise).adapter), dense(found.adapter)) < 1e-6
    zeros = [
        replace(a, layers={n: LowRank(torch.zeros_like(x.B), x.A) for n, x in a.layers.items()})
        for a in adapters
    ]
    found = whole(name, zeros)
    assert all(not d.any() for d in dense(found.adapter).values())
    assert found.norm_ratio == 1.0


@pytest.mark.parametrize("name", [n for n in NAMES if n not in SHARED | ONE_RANK])
def test_mixed_ranks_merge_like_one_rank_filled_up_with_zeros(name: str) -> None:
    adapters = hospitals(2 if name == "slerp" else 5, 3, False, ranks=(1, 4, 2))
    found = whole(name, adapters)
    assert found.discrepancy is None
    assert {layer.rank for layer in found.adapter.layers.values()} == {7}
    filled = []
    for adapter in adapters:
        more = 4 - adapter.spec.rank
        layers = {
            n: LowRank(
                torch.nn.functional.pad(x.B, (0, more)),
                torch.nn.functional.pad(x.A, (0, 0, 0, more)),
            )
            for n, x in adapter.layers.items()
        }
        filled.append(Adapter(AdapterSpec(4, 4 * adapter.spec.scale, TARGETS), layers))
    require_alike(name, adapters, filled)


@pytest.mark.parametrize("name", sorted(SHARED | ONE_RANK))
def test_factors_of_different_rank_have_no_mean(name: str) -> None:
    adapters, kind = hospitals(3, 3, False, ranks=(1, 2)), strategy(name).statistics
    if kind:
        adapters = measured(adapters, kind)
    with pytest.raises(MergeError, match="rank"):
        whole(name, adapters)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(name: str, value: float) -> None:
    adapters = fitting(name, 5)
    layer = adapters[0].layers["layers.0.q"]
    layer.B[0, 0] = value
    with pytest.raises(MergeError, match="NaN or infinity"):
        whole(name, adapters)


@pytest.mark.parametrize("name", NAMES)
def test_other_shapes_and_other_layers_are_refused(name: str) -> None:
    adapters = fitting(name, 5)
    layers = dict(adapters[1].layers)
    other = layers.pop("layers.1.v")
    with pytest.raises(MergeError, match="differ"):
        whole(name, [adapters[0], replace(adapters[1], layers=layers), *adapters[2:]])
    wider = {**layers, "layers.1.v": LowRank(other.B[:-1], other.A)}
    with pytest.raises(MergeError, match="differ"):
        whole(name, [adapters[0], replace(adapters[1], layers=wider), *adapters[2:]])


@pytest.mark.parametrize("name", NAMES)
def test_the_inputs_are_left_as_they_are_and_the_result_repeats(name: str) -> None:
    adapters = fitting(name, 5)
    before = [a.fingerprint() for a in adapters]
    one, two = (whole(name, adapters).adapter.fingerprint() for _ in range(2))
    assert one == two
    assert [a.fingerprint() for a in adapters] == before


def test_masks_follow_from_run_round_and_tensor() -> None:
    adapters = fitting("dare", 3)
    w = equal_weights(adapters)

    def merged(draw: Draw) -> dict[str, torch.Tensor]:
        return dense(merge(create("dare"), adapters, w, draw, rank=7).adapter)

    one = merged(Draw("run", 1))
    assert distance(one, merged(Draw("run", 1))) == 0
    assert distance(one, merged(Draw("run", 2))) > 0.1
    assert distance(one, merged(Draw("other", 1))) > 0.1


@pytest.mark.parametrize(("name", "parameters"), [("dare", {}), ("della", {"window": 1e-9})])
def test_masks_of_tensors_and_hospitals_have_nothing_in_common(
    name: str, parameters: dict[str, Any]
) -> None:
    """Layers are equal; at density 1/2 one hospital adds 0 or 1 everywhere, the other 0 or 2."""
    row, spec = torch.ones(1, 40), AdapterSpec(1, 1.0, TARGETS)
    pair = [Adapter(spec, dict.fromkeys(SHAPES, LowRank(size * row.T, row))) for size in (1.0, 2.0)]
    kind = create(name, {"density": 0.5, "elect": False, **parameters})
    sums = [kind.combine(pair, [0.5, 0.5], Draw("run", 1))[n].round() for n in SHAPES]
    masks = [mask for total in sums for mask in (total % 2 == 1, total >= 2)]
    for one, other in combinations(masks, 2):
        assert float((one == other).double().mean()) == pytest.approx(0.5, abs=0.06)
