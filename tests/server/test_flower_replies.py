"""Replies that are no use: each costs its sender the round, and nobody else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch
from flwr.app import ArrayRecord, Error, Message, MetricRecord, RecordDict
from torch import Tensor

from server.flower_strategy import MergeStrategy
from strategies.hetlora import HetLoRA
from tests.server.test_flower_strategy import (
    Change,
    arrays_of,
    best_of_rank,
    factors,
    gap,
    hospital,
    hospitals,
    mean,
    only_train,
    products,
    reply,
    start,
    trained,
)

if TYPE_CHECKING:
    from conftest import LocalGrid

Grids = type["LocalGrid"]


def change(alter: Callable[[dict[str, Tensor]], dict[str, Tensor]], content: RecordDict) -> None:
    content["arrays"] = ArrayRecord(alter(arrays_of(content)))


def cut(content: RecordDict) -> None:
    for array in content.array_records["arrays"].values():
        array.data = array.data[:40]


def of_rank(rank: int, content: RecordDict) -> None:
    content["arrays"] = ArrayRecord(factors(2, rank))


def second_record(content: RecordDict) -> None:
    content["more"] = ArrayRecord(factors(5))


BAD: dict[str, tuple[Change, str]] = {
    "nan": (
        partial(change, lambda t: {n: x * float("nan") for n, x in t.items()}),
        "factors hold NaN or infinity",
    ),
    "huge": (
        partial(change, lambda t: {n: x * 1e30 for n, x in t.items()}),
        "factors impossibly large",
    ),
    "integers": (
        partial(change, lambda t: {n: x.int() for n, x in t.items()}),
        "not one record of arrays",
    ),
    "a number": (
        partial(change, lambda t: {n: x[0, 0] if "_A" in n else x for n, x in t.items()}),
        "not one record of arrays",
    ),
    "names": (
        partial(change, lambda t: {f"evil.{n}": x for n, x in t.items()}),
        "factors missing or unexpected",
    ),
    "part": (
        partial(change, lambda t: dict(list(t.items())[1:])),
        "factors missing or unexpected",
    ),
    "shape": (
        partial(change, lambda t: {n: x[:, :-1] if "_A" in n else x for n, x in t.items()}),
        "factors of another shape",
    ),
    "no rank": (partial(of_rank, 0), "factors of rank 0, not 1 to 5"),
    "more rank than a layer has": (partial(of_rank, 6), "factors of rank 6, not 1 to 5"),
    "a rank that would take minutes": (
        partial(of_rank, 20_000),
        "factors of rank 20000, not 1 to 5",
    ),
    "cut": (cut, "not one record of arrays"),
    "two records": (second_record, "not one record of arrays"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_reply_costs_its_sender_the_round_and_nobody_else(
    kind: str, local_grid: Grids, caplog: pytest.LogCaptureFixture
) -> None:
    changed, reason = BAD[kind]
    strategy = only_train()
    with caplog.at_level("WARNING", "flwr"):
        own = hospitals() | {12: partial(hospital, 2, changed=changed)}
        result = start(strategy, local_grid(own))
    expected = best_of_rank(mean((1, 3), [0.5, 0.5]), 2)
    assert gap(products(result.arrays.to_torch_state_dict()), expected) < 1e-6
    assert strategy.left_out == {1: {12: reason}}


@pytest.mark.parametrize("name", ["fedavg", "lora_fair", "ffa", "fedsvd", "rolora", "lines"])
def test_another_rank_costs_its_sender_the_round_where_factors_are_averaged(
    name: str, local_grid: Grids
) -> None:
    strategy = only_train(name, {"of": "fedavg"} if name == "lines" else None)
    honest = {k: partial(trained, "B", k) for k in (1, 2)}
    result = start(strategy, local_grid({**honest, 3: partial(hospital, 3, rank=3)}))
    assert strategy.left_out == {1: {3: "factors of rank 3, not 2"}}
    assert result.arrays


def test_another_rank_is_no_fault_where_factors_are_padded(local_grid: Grids) -> None:
    strategy = only_train("hetlora")
    assert start(strategy, local_grid(hospitals() | {13: partial(hospital, 3, rank=3)})).arrays
    assert strategy.left_out == {1: {}}


@pytest.mark.parametrize("ranks", [True, False])
def test_a_strategy_of_another_package_says_itself_whether_it_pads_factors(
    ranks: bool, local_grid: Grids
) -> None:
    class Padding(HetLoRA):
        name: ClassVar[str] = "padding"
        declared: ClassVar = replace(HetLoRA.declared, ranks=ranks)

    strategy = MergeStrategy(Padding(), fraction_evaluate=0.0)
    start(strategy, local_grid(hospitals() | {13: partial(hospital, 3, rank=3)}))
    assert strategy.left_out == {1: {} if ranks else {13: "factors of rank 3, not 2"}}


@pytest.mark.parametrize("name", ["ffa", "fedsvd", "rolora"])
def test_who_moves_the_frozen_factor_is_left_out(name: str, local_grid: Grids) -> None:
    strategy = only_train(name)
    own = {k: partial(trained, "B", k) for k in (1, 2)} | {3: partial(trained, "AB", 3)}
    result = start(strategy, local_grid(own))
    assert strategy.left_out == {1: {3: "lora_A is not as it was sent"}}
    expected = {n: t + 1.5 if "lora_B" in n else t for n, t in factors(0).items()}
    assert gap(products(result.arrays.to_torch_state_dict()), products(expected)) < 1e-6


def test_under_rolora_the_factor_that_most_have_kept_is_the_frozen_one(local_grid: Grids) -> None:
    strategy = only_train("rolora")
    own = {k: partial(trained, "A", k) for k in (1, 2)} | {3: partial(trained, "B", 3)}
    result = start(strategy, local_grid(own))
    assert strategy.left_out == {1: {3: "lora_B is not as it was sent"}}
    expected = {n: t + 1.5 if "lora_A" in n else t for n, t in factors(0).items()}
    assert gap(products(result.arrays.to_torch_state_dict()), products(expected)) < 1e-6


def gone(message: Message) -> Message:
    """What the SuperLink, which is node 1, answers for a node that it has lost."""
    answer = Message(error=Error(code=5, reason="Mrs Miller, 64"), reply_to=message)
    answer.metadata.__dict__["_src_node_id"] = 1
    return answer


@pytest.mark.parametrize("name", ["median", "trimmed_mean"])
def test_a_liar_who_is_caught_need_not_be_outvoted(name: str, local_grid: Grids) -> None:
    """Of three hospitals one may lie; once it is left out nobody is left to bear."""
    bad, _ = BAD["nan"]
    strategy = only_train(name)
    own = {k: partial(trained, "B", k) for k in (1, 2)} | {3: partial(hospital, 3, changed=bad)}
    result = start(strategy, local_grid(own))
    expected = {n: t + 1.5 if "lora_B" in n else t for n, t in factors(0).items()}
    assert gap(products(result.arrays.to_torch_state_dict()), products(expected)) < 1e-6


@pytest.mark.parametrize("answer", [gone, lambda _: None])
@pytest.mark.parametrize("name", ["median", "trimmed_mean"])
def test_a_hospital_that_does_not_answer_may_not_have_been_the_liar(
    name: str, answer: Callable[[Message], Message | None], local_grid: Grids
) -> None:
    own = {k: partial(trained, "B", k) for k in (1, 2)} | {3: answer}
    result = start(only_train(name), local_grid(own))
    assert result.arrays == ArrayRecord(factors(0))
    assert result.train_metrics_clientapp == {}


def test_nobody_makes_the_arrays_more_than_their_type_can_hold(local_grid: Grids) -> None:
    def large(message: Message) -> Message:
        return reply(message, {n: t * 400 for n, t in factors(3).items()})

    strategy = only_train()
    own = {k: partial(hospital, k) for k in (1, 2)} | {3: large}
    sent = ArrayRecord({n: t.half() for n, t in factors(0).items()})
    arrays = strategy.start(local_grid(own), sent, num_rounds=1).arrays.to_torch_state_dict()
    assert strategy.left_out == {1: {3: "updates too large for the type that was sent"}}
    assert all(torch.isfinite(t).all() for t in arrays.values())


def test_too_few_answers_cost_one_round_and_not_the_run(local_grid: Grids) -> None:
    """Krum needs five here; one is silent in the first round only."""
    silent: list[int] = [1]

    def late(message: Message) -> Message | None:
        return None if silent and silent.pop() else hospital(5, message)

    strategy = only_train("krum")
    own: dict[int, Callable[[Message], Message | None]] = {
        k: partial(hospital, k) for k in range(1, 5)
    }
    result = start(strategy, local_grid(own | {5: late}), 2)
    assert strategy.left_out == {1: {5: "no answer in time"}, 2: {}}
    assert set(result.train_metrics_clientapp) == {2}


@pytest.mark.parametrize(
    "weight", [0, -1, 5e-324, 1e-7, 1e13, 1.7e308, float("nan"), float("inf"), [1, 2], None]
)
def test_a_weight_that_is_out_of_bounds_leaves_its_sender_out(
    weight: Any, local_grid: Grids
) -> None:
    def lies(content: RecordDict) -> None:
        if weight is None:
            del content["metrics"]
        else:
            content.metric_records["metrics"]["num-examples"] = weight

    strategy = only_train(weighted_by_key="num-examples")
    start(strategy, local_grid(hospitals() | {13: partial(hospital, 3, changed=lies)}))
    assert strategy.left_out == {1: {13: "metric num-examples is no number from 1e-06 to 1e+12"}}


def test_errors_and_silence_are_left_out_under_the_node_that_was_asked(local_grid: Grids) -> None:
    strategy = only_train()
    result = start(strategy, local_grid(hospitals() | {11: gone, 12: lambda _: None}))
    assert strategy.left_out == {1: {11: "Flower error 5", 12: "no answer in time"}}
    expected = products(factors(3))
    assert gap(products(result.arrays.to_torch_state_dict()), expected) < 1e-6


def test_without_a_usable_reply_the_arrays_stay_as_they_were(local_grid: Grids) -> None:
    bad, _ = BAD["nan"]
    grid = local_grid(hospitals(changed=bad))
    strategy = only_train()
    assert start(strategy, grid, 2).arrays == ArrayRecord(factors(0))
    assert set(strategy.left_out) == {1, 2}


def test_metrics_that_differ_are_not_averaged_and_stop_nothing(local_grid: Grids) -> None:
    def other(content: RecordDict) -> None:
        content["metrics"] = MetricRecord({"accuracy": 1.0})

    result = start(
        only_train(), local_grid(hospitals() | {11: partial(hospital, 1, changed=other)})
    )
    metrics = result.train_metrics_clientapp[1]
    assert "loss" not in metrics
    assert metrics["merge-hospitals"] == 3


def test_evaluation_metrics_are_averaged(local_grid: Grids) -> None:
    result = start(MergeStrategy(min_evaluate_nodes=3), local_grid(hospitals()))
    assert dict(result.evaluate_metrics_clientapp[1]) == pytest.approx(
        {"num-examples": 2.0, "loss": 2.0}
    )


def test_an_evaluation_that_counts_nothing_is_left_out(local_grid: Grids) -> None:
    def nothing(content: RecordDict) -> None:
        content.metric_records["metrics"]["num-examples"] = 0

    strategy = MergeStrategy(weighted_by_key="num-examples")
    none = {k: partial(hospital, k, changed=nothing) for k in (1, 2)}
    assert not start(strategy, local_grid(none)).evaluate_metrics_clientapp
    result = start(strategy, local_grid({**none, 2: partial(hospital, 2)}))
    assert result.evaluate_metrics_clientapp[1]["loss"] == 2.0
