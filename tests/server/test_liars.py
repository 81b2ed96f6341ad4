"""Hospitals that send what is formally sound and meant to spoil the run, or nothing at all."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from flwr.app import ArrayRecord, Error, Message
from torch import Tensor

from conf.schema import TrainingSettings
from server.rounds import RoundFailed, federate
from server.run_folder import RunFolder
from tests.server.test_rounds import go
from transport.wire import pack_refusal, pack_result, unpack_task

if TYPE_CHECKING:
    from conftest import LocalGrid

Answer = Callable[[Message], Message | None]
Settings = Callable[..., TrainingSettings]
Grids = type["LocalGrid"]
Alter = Callable[[Tensor], Tensor]


def altered(honest: Answer, alter: Alter, message: Message) -> Message:
    """The reply of an honest hospital with its tensors replaced."""
    reply = honest(message)
    assert reply is not None
    sent = reply.content.array_records["adapter"].to_torch_state_dict()
    reply.content["adapter"] = ArrayRecord({n: alter(t) for n, t in sent.items()})
    return reply


def idle(site: str, far: float, message: Message) -> Message:
    """A hospital that sends back what it was sent, every entry ``far`` from it."""
    plan, adapter = unpack_task(message.content)
    own = {name: tensor + far for name, tensor in plan.to_travel(adapter).items()}
    return Message(content=pack_result(own, {"site": site}), reply_to=message)


def gone(message: Message) -> Message:
    """What the SuperLink answers for a node that it has lost."""
    return Message(error=Error(code=5, reason="node unavailable"), reply_to=message)


def refusing(message: Message) -> Message:
    return Message(content=pack_refusal("west", "QUIET_HOURS", ""), reply_to=message)


IDLE: dict[int, Answer] = {
    node: partial(idle, site, 0.0) for node, site in ((11, "east"), (12, "mid"), (13, "west"))
}


def trained(name: str, **others: Any) -> dict[str, Any]:
    return {"strategy": {"name": name}, "adapter": {"train": "B"}, **others}


@pytest.mark.parametrize("name", ["fedsvd", "product_mean", "norm_bound", "median"])
def test_a_liar_who_is_let_in_has_no_honest_hospital_left_out(
    name: str,
    local_grid: Grids,
    honest: dict[int, Answer],
    settings: Settings,
    folder: RunFolder,
) -> None:
    """What is too large is judged by what was sent, which a liar may have made large."""
    asked = settings(**trained(name, federation={"rounds": 6}))
    go(local_grid(honest | {13: partial(idle, "west", 900.0)}), asked, folder)
    for record in folder.finished_rounds():
        assert record["left_out"] == {}


def test_what_merges_to_impossibly_large_factors_is_not_kept_and_the_run_can_go_on(
    local_grid: Grids, honest: dict[int, Answer], settings: Settings, folder: RunFolder
) -> None:
    asked = settings(strategy={"name": "product_mean"}, adapter={"train": "both"})
    loud = partial(altered, honest[13], lambda t: torch.full_like(t, 900.0))
    with pytest.raises(RoundFailed, match=r"east, mid, west sent merges to impossibly large"):
        go(local_grid(honest | {13: loud}), asked, folder)
    assert folder.finished_rounds() == []
    go(local_grid({node: honest[node] for node in (11, 12)}), asked, folder)
    assert [record["left_out"] for record in folder.finished_rounds()] == [{}, {}]


@pytest.mark.parametrize("name", ["median", "trimmed_mean"])
def test_a_liar_who_is_caught_need_not_be_outvoted(
    name: str,
    local_grid: Grids,
    honest: dict[int, Answer],
    settings: Settings,
    folder: RunFolder,
) -> None:
    broken = partial(altered, honest[13], lambda t: t * float("nan"))
    go(local_grid(honest | {13: broken}), settings(**trained(name)), folder)
    for record in folder.finished_rounds():
        assert record["hospitals"] == ["east", "mid"]


@pytest.mark.parametrize("answer", [lambda _: None, gone, refusing])
@pytest.mark.parametrize("name", ["median", "trimmed_mean"])
def test_a_hospital_that_does_not_take_part_may_not_have_been_the_liar(
    name: str,
    answer: Answer,
    local_grid: Grids,
    honest: dict[int, Answer],
    settings: Settings,
    folder: RunFolder,
) -> None:
    federation = {"rounds": 1, "timeout_s": 5.0}
    with pytest.raises(RoundFailed, match="needs at least 3 to merge"):
        go(
            local_grid(honest | {13: answer}),
            settings(**trained(name, federation=federation)),
            folder,
        )


@pytest.mark.parametrize(
    "name",
    ["task_arithmetic", "lines", "ties", "dare", "breadcrumbs", "tsv_m", "norm_bound", "knots"],
)
def test_rounds_in_which_nobody_learns_leave_what_was_learned(
    name: str,
    local_grid: Grids,
    honest: dict[int, Answer],
    settings: Settings,
    folder: RunFolder,
) -> None:
    """A rule that shortens or lengthens acts on a round's change, not on the adapter again."""
    one = {"rounds": 1}
    go(local_grid(honest), settings(**trained("product_mean", federation=one)), folder)
    learned = folder.global_adapter()
    config = settings(**trained(name, federation={"rounds": 4}))
    federate(local_grid(IDLE), config, folder, threading.Event(), lambda *_: None)
    assert len(folder.finished_rounds()) == 4
    for layer, after in folder.global_adapter().deltas().items():
        before = learned.deltas()[layer].dense()
        assert torch.allclose(after.dense(), before, rtol=1e-3, atol=1e-4 * float(before.norm()))
