"""The round loop: open a round, wait for hospitals, check what comes back, merge, record.

Flower's own ``Strategy.start`` has no resume, no early stop and no deadline for hospitals, so the
loop over the grid is ours. A round that ends is on disk before the next begins; a run that is
started again goes on after its last finished round.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
from flwr.app import DEFAULT_TTL, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid

from adapters import lora
from adapters.adapter import Adapter, AdapterSpec
from adapters.base_model import load_base
from adapters.plan import TrainingPlan, plan_round
from conf.schema import TrainingSettings
from server.acceptance import (
    LARGEST,
    MALFORMED,
    Accepted,
    Answer,
    LeftOut,
    accept,
    node_name,
    one_reply_each,
)
from server.run_folder import RunFolder, write_atomically
from strategies.base import Draw, MergeError, Noise, Strategy
from strategies.merging import Merge, merge
from strategies.registry import create
from transport.wire import pack_task, size_bytes

log = logging.getLogger(__name__)

_POLL_S = 0.5
Report = Callable[[str, int, int], None]  # what is being done, done, total


class RoundFailed(RuntimeError):
    """A round could not be finished; the run folder allows going on later."""


def federate(
    grid: Grid, settings: TrainingSettings, folder: RunFolder, stop: threading.Event, report: Report
) -> Adapter:
    """Run all rounds that are not finished yet and return the last merged adapter.

    Raises RoundFailed when too few hospitals answer in time, when the strategy cannot merge as many
    as are connected, or when ``stop`` is set.
    """
    base_model = _starting_point(settings, folder)
    chosen = settings.strategy
    strategy = create(chosen.name, chosen.parameters, settings.adapter.train)
    for number in range(len(folder.finished_rounds()) + 1, settings.federation.rounds + 1):
        began = time.monotonic()
        plan = plan_round(settings, folder.name, number, base_model, strategy.statistics)
        sent = folder.global_adapter()
        try:
            strategy.require_layers(sent.layers)
        except MergeError as problem:
            raise RoundFailed(
                f"round {number}: {problem}; nothing was asked of hospitals"
            ) from None
        needed, said_by = hospitals_needed(settings)
        timeout_s = settings.federation.timeout_s
        nodes = _wait_for_nodes(grid, needed, said_by, began + timeout_s, stop, report)
        try:
            strategy.require_count(len(nodes))
        except MergeError as problem:
            raise RoundFailed(
                f"round {number}: {len(nodes)} hospitals are connected, and {problem}; nothing was "
                "asked of them"
            ) from None
        folder.begin_round(number)
        task = pack_task(plan, sent)
        deadline = time.monotonic() + timeout_s  # however long the first to connect have waited
        replies = _exchange(grid, plan, task, nodes, deadline, stop, report)
        heard = _heard(replies, plan, sent, nodes, folder)
        for site, reason in heard.left_out.items():
            log.warning("round %d: %s left out: %s", number, site, reason)
        _require_enough(heard, settings.federation.min_hospitals, number)
        merged = _merged(heard, strategy.after(heard.caught, len(nodes)), plan, sent, folder)
        sent.updated(merged.adapter).save(folder.adapter_folder(number))
        accepted = heard.accepted
        record: dict[str, Any] = {
            "round": number,
            "seconds": round(time.monotonic() - began, 3),
            "bytes_up": sum(a.bytes_up for a in accepted),
            "bytes_down": size_bytes(task) * len(nodes),
            "uploads": {a.site: a.bytes_up for a in accepted},
            "download": size_bytes(task),
            "rank": merged.adapter.spec.rank,
            "discrepancy": merged.discrepancy,
            "kept_energy": merged.kept_energy,
            "mean_cosine": merged.mean_cosine,
            "norm_ratio": merged.norm_ratio,
            "hospitals": [a.site for a in accepted],
            "left_out": heard.left_out,
            "facts": {a.site: a.facts for a in accepted},
        }
        folder.finish_round(record)
    return folder.global_adapter()


def hospitals_needed(settings: TrainingSettings) -> tuple[int, str]:
    """How many must be connected before a round begins, and the option that says so."""
    chosen, least = settings.strategy, settings.federation.min_hospitals
    fewest = create(chosen.name, chosen.parameters, settings.adapter.train).fewest()
    if fewest > least:
        return fewest, f"strategy={chosen.name}"
    return least, f"federation.min_hospitals={least}"


@dataclass(frozen=True)
class _Heard:
    """What came back in a round; adapters lie in the run folder."""

    accepted: list[Answer]
    left_out: dict[str, str]  # site -> reason
    caught: int  # how many of those lied


def _heard(
    replies: Iterable[tuple[int, Message | LeftOut]],
    plan: TrainingPlan,
    sent: Adapter,
    nodes: Mapping[int, str],
    folder: RunFolder,
) -> _Heard:
    """Check every reply as it comes and keep its adapter on disk."""
    outcomes: dict[int, Answer | LeftOut] = {}
    for node, reply in replies:
        outcome = (
            reply if isinstance(reply, LeftOut) else accept(reply, plan, sent, node, nodes[node])
        )
        outcomes[node] = _kept(outcome, folder, plan.round)
    accepted, left_out = one_reply_each(list(outcomes.values()))
    for site in {o.site for o in outcomes.values() if isinstance(o, Answer)} & left_out.keys():
        folder.drop_adapter(plan.round, site)
    for node in nodes.keys() - outcomes.keys():
        left_out[nodes[node] or node_name(node)] = "no answer in time"
    caught = sum(isinstance(o, LeftOut) and o.lied for o in outcomes.values())
    return _Heard(accepted, left_out, caught)


def _require_enough(heard: _Heard, needed: int, number: int) -> None:
    if len(heard.accepted) < needed:
        reasons = ", ".join(f"{site}: {reason}" for site, reason in heard.left_out.items())
        raise RoundFailed(
            f"round {number}: {len(heard.accepted)} of at least {needed} hospitals answered "
            f"({reasons})"
        )


def _merged(
    heard: _Heard, strategy: Strategy, plan: TrainingPlan, sent: Adapter, folder: RunFolder
) -> Merge:
    """The round's merge, of the layers that were trained. Raises RoundFailed."""
    sites = [a.site for a in heard.accepted]
    weights = [1 / len(sites)] * len(sites)  # equal: true sizes are private
    moved = plan.trained_layers(sent.layers)
    origin = sent.only(moved)
    draw = Draw(folder.name, plan.round, _noise(plan, origin, heard.accepted))
    own = folder.adapters(plan.round, sites, moved)
    try:
        merged = merge(strategy, own, weights, draw, origin=origin, orthonormal=plan.frozen_next)
    except MergeError as problem:
        raise RoundFailed(f"round {plan.round}: {problem}") from None
    if merged.adapter.largest() > LARGEST:
        raise RoundFailed(
            f"round {plan.round}: what {', '.join(sites)} sent merges to impossibly large factors, "
            "which were not kept; one of them lies: its adapter lies with the others in the run "
            "folder"
        )
    return merged


def _noise(plan: TrainingPlan, sent: Adapter, accepted: Sequence[Answer]) -> Noise | None:
    """What is known of it; under another optimizer than plain SGD nothing."""
    if plan.optimizer.name != "sgd":
        return None
    if not plan.privacy.enabled:
        return Noise(sent, (0.0,) * len(accepted))
    return Noise(sent, tuple(plan.noise_std(a.facts["noise_multiplier"]) for a in accepted))


def _starting_point(settings: TrainingSettings, folder: RunFolder) -> str:
    """Make the public starting adapter once; return the fingerprint of the base model."""
    known = folder.path / "base_model.txt"
    if not known.exists():
        base = load_base(settings.model)
        fingerprint = base.fingerprint
        shape = settings.adapter
        start = lora.initial(base.model, AdapterSpec.of(shape), settings.seed, shape.train)
        start.save(folder.adapter_folder(0))
        write_atomically(known, fingerprint + "\n")
    return known.read_text().strip()


def _wait_for_nodes(
    grid: Grid, needed: int, said_by: str, deadline: float, stop: threading.Event, report: Report
) -> dict[int, str]:
    """All connected hospitals, once there are enough of them: node id -> registered name.

    The name is that of the hospital's public key; it is empty where no keys are in use.
    """
    while True:
        nodes = {node.node_id: _registered_name(node) for node in grid.get_nodes()}
        report("hospitals connected", min(len(nodes), needed), needed)
        if len(nodes) >= needed:
            return nodes
        if time.monotonic() > deadline:
            raise RoundFailed(
                f"hospitals connected in time: {len(nodes)}, needed: {needed} ({said_by})"
            )
        _pause(stop)


def _registered_name(node: NodeInfo) -> str:
    """Flower names a node when its key is registered; a node without a key stays nameless here."""
    return node.name if node.public_key else ""


def _exchange(
    grid: Grid,
    plan: TrainingPlan,
    task: RecordDict,
    nodes: Mapping[int, str],
    deadline: float,
    stop: threading.Event,
    report: Report,
) -> Iterator[tuple[int, Message | LeftOut]]:
    """Send the task to every node; each reply before the deadline, with its node, as it comes.

    They are fetched one at a time, so that one that cannot be read takes no other with it, and none
    is kept. A reply belongs to the node whose task it was fetched for, whatever it says itself: its
    sender may be the SuperLink, which answers for a node that is gone.
    """
    ttl = max(DEFAULT_TTL, 2 * (deadline - time.monotonic()))  # Flower forgets what is older
    messages = [
        Message(
            content=task, dst_node_id=node, message_type="train", group_id=str(plan.round), ttl=ttl
        )
        for node in sorted(nodes)
    ]
    sent_ids = set(grid.push_messages(messages))
    asked = {m.metadata.message_id: m.metadata.dst_node_id for m in messages}
    waiting = sent_ids & asked.keys()  # Flower gives None for what it could not send
    answered = 0
    what = f"round {plan.round} of {plan.rounds}: hospitals answered"
    while waiting:
        last = time.monotonic() > deadline  # a fetch may take long: who answered meanwhile is heard
        report(what, answered, len(messages))
        for message_id in sorted(waiting):
            node = asked[message_id]
            reply = _fetched(grid, message_id, nodes[node] or node_name(node))
            if reply is not None:
                waiting.remove(message_id)
                answered += 1
                yield node, reply
        if not waiting or last:
            break
        _pause(stop)
    report(what, answered, len(messages))


def _fetched(grid: Grid, message_id: str, site: str) -> Message | LeftOut | None:
    """The reply to one message; None where there is none yet.

    Flower takes a reply off its list before it decodes it, so one that cannot be decoded does not
    come again. Raises what the connection to Flower raises.
    """
    try:
        return next(iter(grid.pull_messages([message_id])), None)
    except (httpx.HTTPError, OSError):
        raise
    except Exception as problem:  # rubbish fails in many ways; each costs only its sender
        log.warning("the reply of %s cannot be decoded (%s)", site, type(problem).__name__)
        return LeftOut(site, MALFORMED)


def _kept(outcome: Accepted | LeftOut, folder: RunFolder, number: int) -> Answer | LeftOut:
    """The outcome without its adapter, which is on disk."""
    if isinstance(outcome, LeftOut):
        return outcome
    outcome.adapter.save(folder.adapter_folder(number, outcome.site))
    return Answer(outcome.site, outcome.facts, outcome.bytes_up)


def _pause(stop: threading.Event) -> None:
    if stop.wait(_POLL_S):
        raise RoundFailed("stopped on request")
