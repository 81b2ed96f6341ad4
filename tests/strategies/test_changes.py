"""Rounds merge what they have changed: nothing that earlier rounds merged is merged once more."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from adapters.adapter import Adapter, AdapterSpec
from adapters.lowrank import LowRank
from strategies.base import Draw, MergeError, Noise
from strategies.changes import Changes
from strategies.merging import merge
from strategies.registry import create
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


def origin_of(name: str, shared: bool) -> Adapter:
    return hospitals(1, 11, shared)[0]


def moved(origin: Adapter, count: int, shared: bool, far: float = 0.1) -> list[Adapter]:
    """Hospitals that began with ``origin`` and went ``far`` from it."""
    g = torch.Generator().manual_seed(5)
    made = []
    for _ in range(count):
        layers = {}
        for n, x in origin.layers.items():
            dB, dA = torch.randn(x.B.shape, generator=g), torch.randn(x.A.shape, generator=g)
            layers[n] = LowRank(x.B + far * dB, x.A if shared else x.A + far * dA)
        made.append(replace(origin, layers=layers))
    return made


def count_for(name: str) -> int:
    return 2 if name == "slerp" else 5


@pytest.mark.parametrize(
    ("name", "shared"),
    [(name, shared) for name in NAMES for shared in (True, False) if shared or name not in SHARED],
)
def test_a_round_in_which_nobody_moved_changes_nothing(name: str, shared: bool) -> None:
    kind = strategy(name)
    origin = origin_of(name, shared)
    same = [origin] * count_for(name)
    if kind.statistics:
        same = measured(same, kind.statistics)
    noise = Draw("run", 3, Noise(origin, (0.1,) * len(same)))
    found = merge(kind, same, equal_weights(same), noise, rank=7, origin=origin).adapter
    assert distance(dense(found), dense(origin)) < 1e-6


@pytest.mark.parametrize("name", [n for n in NAMES if strategy(n).declared.of_changes])
@pytest.mark.parametrize("shared", [True, False])
def test_what_is_merged_is_added_to_what_the_round_began_with(name: str, shared: bool) -> None:
    origin = origin_of(name, shared)
    sent = moved(origin, count_for(name), shared)
    own = Changes(sent, origin)
    assert own[0].spec.rank == (3 if shared else 6)
    weights, draw = equal_weights(sent), Draw("run", 3)
    found = merge(strategy(name), sent, weights, draw, rank=7, origin=origin).adapter
    alone = merge(strategy(name), list(own), weights, draw, rank=7).adapter
    expected = {n: dense(origin)[n] + d for n, d in dense(alone).items()}
    assert distance(dense(found), expected) < 1e-5


@pytest.mark.parametrize("name", [n for n in NAMES if not strategy(n).declared.of_changes])
def test_where_the_whole_is_merged_the_origin_does_not_matter(name: str) -> None:
    origin = origin_of(name, True)
    sent = moved(origin, 5, True)
    kind = strategy(name)
    if kind.statistics:
        sent = measured(sent, kind.statistics)
    draw = Draw("run", 3, Noise(origin, (0.1,) * 5))
    weights = equal_weights(sent)
    one, other = (merge(kind, sent, weights, draw, origin=o).adapter for o in (None, origin))
    assert distance(dense(one), dense(other)) == 0


@pytest.mark.parametrize("name", ["median", "trimmed_mean", "krum"])
def test_what_moves_along_with_its_inputs_is_the_same_either_way(name: str) -> None:
    origin = origin_of(name, False)
    sent = moved(origin, 5, False)
    weights = equal_weights(sent)
    one, other = (merge(strategy(name), sent, weights, rank=7, origin=o) for o in (None, origin))
    assert distance(dense(one.adapter), dense(other.adapter)) < 1e-5


def test_a_liar_moves_a_bounded_merge_no_farther_than_an_honest_one() -> None:
    """The bound is on the step: the adapter itself may be longer than any step."""
    origin = origin_of("norm_bound", True)
    sent = moved(origin, 5, True, far=0.01)
    minus = {n: LowRank(-x.B, x.A) for n, x in origin.layers.items()}
    liars = [*sent[:4], replace(origin, layers=minus)]
    weights = equal_weights(liars)
    plain, bounded = (
        merge(strategy(name), liars, weights, rank=7, origin=origin).adapter
        for name in ("product_mean", "norm_bound")
    )
    assert distance(dense(plain), dense(origin)) > 0.3
    assert distance(dense(bounded), dense(origin)) < 0.02


@pytest.mark.parametrize(
    ("of", "parameters"), [("noise_aware", {"shrink": "stein"}), ("fedavg", {}), ("ties", {})]
)
def test_a_wrapped_strategy_acts_on_changes_too(of: str, parameters: dict[str, Any]) -> None:
    """Scaled by 1 everywhere it gives what it gives alone."""
    origin = origin_of(of, True)
    sent = moved(origin, 5, True)
    kind = create("lines", {"of": of, "parameters": parameters, "first": 1.0, "last": 1.0})
    draw = Draw("run", 3, Noise(origin, (0.1, 0.1, 0.5, 0.5, 0.5)))
    weights = equal_weights(sent)
    wrapped = merge(kind, sent, weights, draw, origin=origin).adapter
    alone = merge(create(of, parameters), sent, weights, draw, origin=origin).adapter
    assert distance(dense(wrapped), dense(alone)) < 1e-5


def test_a_wrapped_average_of_factors_averages_the_same_columns_everywhere() -> None:
    """Also of a hospital that sends back what it was sent."""
    origin = origin_of("fedavg", False)
    sent = [origin, *moved(origin, 4, False)]
    kind = create("lines", {"of": "fedavg", "first": 1.0, "last": 1.0})
    wrapped = merge(kind, sent, [0.2] * 5, origin=origin).adapter
    alone = merge(create("fedavg"), sent, [0.2] * 5, origin=origin).adapter
    assert distance(dense(wrapped), dense(alone)) < 1e-5


def test_ranks_and_scales_of_hospitals_may_differ_from_the_origins() -> None:
    origin = origin_of("lines", False)
    others = hospitals(3, 2, False, ranks=(1, 2, 4))
    scaled = [replace(a, spec=replace(a.spec, alpha=a.spec.alpha * 3)) for a in others]
    for adapter, change in zip(scaled, Changes(scaled, origin), strict=True):
        expected = {n: dense(adapter)[n] - dense(origin)[n] for n in SHAPES}
        assert distance(dense(change), expected) < 1e-6


def test_padding_of_lower_ranks_does_not_shift_what_is_subtracted() -> None:
    """One update in factors of three ranks, as HetLoRA pads them, stays that update."""
    origin, one = origin_of("lines", False), hospitals(1, 2, False, ranks=(2,))[0]
    same = []
    for rank in (2, 3, 4):
        zeros = {
            n: LowRank(
                torch.cat([x.B, torch.zeros(len(x.B), rank - 2)], 1),
                torch.cat([x.A, torch.zeros(rank - 2, x.A.shape[1])]),
            )
            for n, x in one.layers.items()
        }
        spec = AdapterSpec(rank, one.spec.scale * rank, TARGETS)
        same.append(Adapter(spec, zeros))
    kind = create("lines", {"of": "hetlora", "first": 1.0, "last": 1.0})
    found = merge(kind, same, equal_weights(same), rank=7, origin=origin).adapter
    assert distance(dense(found), dense(one)) < 1e-5


def test_who_learned_nothing_has_changed_nothing_at_all() -> None:
    """Not rounding, which a rule that goes by directions would take for one."""
    for seed in range(20):
        origin = hospitals(1, seed, False)[0]
        changes = Changes([origin, *moved(origin, 2, False)], origin)
        assert [layer.norm() for layer in changes[0].layers.values()] == [0.0, 0.0]
        assert all(layer.norm() > 0 for layer in changes[1].layers.values())


@pytest.mark.parametrize("name", ["product_mean", "median", "fedavg"])
def test_other_layers_than_the_round_began_with_are_refused(name: str) -> None:
    origin = origin_of(name, False)
    sent = moved(origin, 5, False)
    fewer = replace(sent[2], layers=dict(list(sent[2].layers.items())[1:]))
    for wrong in (
        fewer,
        replace(sent[2], layers={**sent[2].layers, "x": sent[2].layers["layers.0.q"]}),
    ):
        with pytest.raises(MergeError, match="from what the round began with"):
            merge(strategy(name), [*sent[:2], wrong, *sent[3:]], equal_weights(sent), origin=origin)
