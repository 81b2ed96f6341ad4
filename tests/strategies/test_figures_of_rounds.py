"""A round's figures are of what it has changed, however much was learned before it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from adapters.adapter import Adapter
from adapters.lowrank import LowRank, svd
from strategies.base import Declaration, Draw, MergeError, Strategy, Update
from strategies.merging import Exact, Merge, merge
from tests.strategies.examples import dense, equal_weights, hospitals, strategy

OTHER = ["fedavg", "median", "ties", "tsv_m", "iso_c", "norm_bound", "task_arithmetic", "karcher"]


def after_many_rounds(shared: bool, count: int = 5) -> tuple[Adapter, list[Adapter]]:
    """What a round began with, and hospitals whose steps are a hundredth as long."""
    origin = hospitals(1, 11, shared)[0]
    g = torch.Generator().manual_seed(5)
    made = []
    for _ in range(count):
        layers = {}
        for n, x in origin.layers.items():
            dB, dA = (0.01 * torch.randn(f.shape, generator=g) for f in (x.B, x.A))
            layers[n] = LowRank(x.B + dB, x.A if shared else x.A + dA)
        made.append(replace(origin, layers=layers))
    return origin, made


def flat(layers: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([layers[n].flatten() for n in sorted(layers)])


def merged(name: str, shared: bool) -> tuple[Merge, Tensor, list[Tensor]]:
    """The round's merge; what it changed, and what each hospital changed."""
    origin, sent = after_many_rounds(shared)
    found = merge(strategy(name), sent, equal_weights(sent), origin=origin, dtype=torch.float64)
    before = flat(dense(origin))
    steps = [flat(dense(adapter)) - before for adapter in sent]
    return found, flat(dense(found.adapter)) - before, steps


@pytest.mark.parametrize(
    ("name", "shared"),
    [
        ("fedsvd", True),
        ("product_mean", False),
        *((name, s) for name in OTHER for s in (True, False)),
    ],
)
def test_length_and_agreement_are_those_of_steps(name: str, shared: bool) -> None:
    found, step, steps = merged(name, shared)
    mean = torch.stack(steps).mean(0)
    assert found.norm_ratio == pytest.approx(float(step.norm() / mean.norm()), rel=1e-5)
    units = torch.stack([s / s.norm() for s in steps])
    pairs = (units @ units.T)[torch.ones(5, 5).triu(1) > 0]
    assert found.mean_cosine == pytest.approx(float(pairs.mean()), abs=1e-6)


@pytest.mark.parametrize("name", ["product_mean", "fedavg", "median"])
def test_the_discrepancy_is_relative_to_the_step(name: str) -> None:
    found, _, steps = merged(name, False)
    _, naive, _ = merged("fedavg", False)
    mean = torch.stack(steps).mean(0)
    assert found.discrepancy == pytest.approx(float((naive - mean).norm() / mean.norm()), rel=1e-4)


@pytest.mark.parametrize("name", ["product_mean", "median", "ties"])
def test_kept_energy_is_the_share_of_the_step_that_the_rank_keeps(name: str) -> None:
    origin, sent = after_many_rounds(False)
    weights = equal_weights(sent)
    cut = merge(strategy(name), sent, weights, origin=origin)
    whole = merge(strategy(name), sent, weights, rank=7, origin=origin, dtype=torch.float64).adapter
    for layer, update in dense(whole).items():
        lost = svd(LowRank(update, torch.eye(update.shape[1], dtype=update.dtype))).S[3:].norm()
        step = (update - dense(origin)[layer]).norm()
        kept = 1 - float(lost / step) ** 2
        assert cut.kept_by_layer[layer] == pytest.approx(kept, abs=1e-6)
        assert 0 < kept < 1
    assert cut.kept_energy == min(cut.kept_by_layer.values())


class Odd(Strategy):
    """Another package's, which gives what the test wants."""

    name: ClassVar[str] = "odd"
    declared: ClassVar = Declaration(space="gram", paper="none")
    what: str

    def combine(
        self, adapters: Sequence[Adapter], weights: Sequence[float], draw: Draw
    ) -> Mapping[str, Update]:
        shapes = {n: x.shape for n, x in adapters[0].layers.items()}
        found = {n: torch.zeros(shape, dtype=torch.float64) for n, shape in shapes.items()}
        first = sorted(found)[0]
        if self.what == "too few":
            del found[first]
        elif self.what == "too many":
            found["more"] = found[first]
        elif self.what == "turned":
            found = {n: x.T for n, x in found.items()}
        elif self.what == "arrays":
            return {n: x.numpy() for n, x in found.items()}  # type: ignore[misc]
        elif self.what == "no number":
            found[first][0, 0] = torch.nan
        return found


def test_a_round_that_merges_nothing_says_so() -> None:
    origin, sent = after_many_rounds(True)
    found = merge(Odd(what="nothing"), sent, equal_weights(sent), origin=origin)
    assert found.norm_ratio == pytest.approx(0, abs=1e-9)
    assert found.kept_energy == 1
    nobody = merge(strategy("fedsvd"), [origin] * 3, [1 / 3] * 3, origin=origin)
    assert (nobody.norm_ratio, nobody.mean_cosine) == (1, None)


@pytest.mark.parametrize("what", ["too few", "too many", "turned", "arrays"])
@pytest.mark.parametrize("in_a_round", [True, False])
def test_a_strategy_that_gives_other_layers_or_shapes_is_named(what: str, in_a_round: bool) -> None:
    origin, sent = after_many_rounds(True)
    with pytest.raises(MergeError, match=r"^odd gave .* for .*, where the adapters have"):
        merge(Odd(what=what), sent, equal_weights(sent), origin=origin if in_a_round else None)


@pytest.mark.parametrize("rank", [None, Exact()])
def test_a_strategy_that_gives_no_number_is_named_with_the_layer(rank: Exact | None) -> None:
    _, sent = after_many_rounds(True)
    with pytest.raises(MergeError, match=r"^odd gave NaN or infinity for \S+$"):
        merge(Odd(what="no number"), sent, equal_weights(sent), rank=rank)


def test_exact_with_a_limit_is_the_best_approximation_and_tells_the_rank_that_loses_nothing() -> (
    None
):
    _, sent = after_many_rounds(False)
    weights = equal_weights(sent)
    whole = merge(strategy("ties"), sent, weights, rank=Exact(), dtype=torch.float64)
    cut = merge(strategy("ties"), sent, weights, rank=Exact(2), dtype=torch.float64)
    assert whole.exact_rank == whole.adapter.spec.rank == cut.exact_rank
    assert cut.adapter.spec.rank == 2
    squared = 0.0
    for layer, update in dense(whole.adapter).items():
        S = torch.linalg.svdvals(update)
        assert cut.kept_by_layer[layer] == pytest.approx(
            float(S[:2].square().sum() / S.square().sum()), rel=1e-12
        )
        gap = (update - dense(cut.adapter)[layer]).norm()
        assert float(gap) == pytest.approx(float(S[2:].norm()), rel=1e-9)
        squared += float(S[:2].square().sum())
    mean = torch.stack([flat(dense(a)) for a in sent]).mean(0)
    assert cut.norm_ratio == pytest.approx(math.sqrt(squared) / float(mean.norm()), rel=1e-9)
    more = merge(strategy("ties"), sent, weights, rank=Exact(99))
    assert more.adapter.spec.rank == whole.exact_rank
