"""A hospital's process to be killed, for ``test_crash``: imports once, forks a child an order.

Orders come as JSON lines on standard input; each is answered by one line, ``[status, seconds]``.
A child answers the task through the ClientApp, as Flower would have it, and *sends* by writing the
reply to a file. It is killed with SIGKILL after a delay, or exactly where a point says.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, Message, RecordDict
from flwr.common.serde import recorddict_to_proto
from flwr.supercore.task_identity import TaskIdentity

from adapters.adapter import Adapter
from adapters.plan import TrainingPlan
from client import training
from client.app import app
from client.privacy import durable
from client.privacy.anchor import Anchor
from client.privacy.ledger import Ledger
from client.privacy.ledger_file import LedgerFile
from client.privacy.randomness import SecureRandomness
from client.site import SITE, read_policy
from client.workbench import workbench
from conf.policy import SitePolicy
from transport.wire import pack_task

PLACES = {"Anchor": Anchor, "LedgerFile": LedgerFile, "durable": durable, "Ledger": Ledger}


def packed(content: RecordDict) -> bytes:
    """A reply as it goes over the wire."""
    return bytes(recorddict_to_proto(content).SerializeToString(deterministic=True))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(place: str, name: str, call: int, when: str) -> None:
    """Die before or after the ``call``-th call of a function."""
    real: Callable[..., Any] = getattr(PLACES[place], name)
    calls = 0

    def deadly(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and when == "before":
            die()
        result = real(*arguments, **named)
        if calls == call and when == "after":
            die()
        return result

    setattr(PLACES[place], name, deadly)


def mark_draws(file: Path) -> None:
    """Leave ``file`` as soon as a sample or noise is drawn."""
    real = SecureRandomness._bytes

    def watched(self: SecureRandomness, n: int) -> bytes:
        file.touch()
        return real(self, n)

    SecureRandomness._bytes = watched  # type: ignore[method-assign]


def answer(order: dict[str, Any], plan: TrainingPlan, adapter: Adapter) -> None:
    """What the child does: one message in, one reply out."""
    sent = Path(order["sent"])
    mark_draws(sent.with_suffix(".drawn"))
    if order["point"]:
        arm(*order["point"])
    message = Message(pack_task(plan, adapter), dst_node_id=7, message_type="train", group_id="1")
    reply = packed(app(message, Context(1, 7, {}, RecordDict(), {})).content)
    with sent.open("wb", buffering=0) as wire:
        for half in (reply[: len(reply) // 2], reply[len(reply) // 2 :]):
            wire.write(half)


def obey(
    order: dict[str, Any], plan: TrainingPlan, adapter: Adapter
) -> tuple[int, dict[str, float]]:
    """Fork and kill after the delay; the child's exit status, and how long it lived since when."""
    os.environ[SITE] = order["site"]
    drawn = Path(order["sent"]).with_suffix(".drawn")
    event, seconds = order["delay"] or ("start", math.inf)
    since = {"start": time.monotonic()}
    child = os.fork()
    if child == 0:
        answer(order, plan, adapter)
        os._exit(0)
    killed = False
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        now = time.monotonic()
        if "draw" not in since and drawn.exists():
            since["draw"] = now
        lived = {event: now - then for event, then in since.items()}
        if ended:
            return os.waitstatus_to_exitcode(status), lived
        if not killed and lived.get(event, -1.0) >= seconds:
            os.kill(child, signal.SIGKILL)  # not yet waited for, so the number is still its own
            killed = True
        time.sleep(0.0005)


def warm(policy: SitePolicy, plan: TrainingPlan, adapter: Adapter, most: int) -> None:
    """Load the model, and have the accountants know every history of up to ``most`` attempts."""
    bench = workbench(policy.model, policy.compute, plan.spec)
    bench.rehearse(plan, policy)
    with Ledger.of(policy) as ledger:
        for _ in range(most):
            training._reserve(ledger, plan, adapter, policy, None, SecureRandomness.name)
            ledger.spent()


def main() -> None:
    torch.set_num_threads(1)
    for name in ("_task_id", "_run_id", "_node_id"):
        setattr(TaskIdentity, name, 1)
    plan = TrainingPlan.model_validate_json(Path(sys.argv[1]).read_text())
    adapter = Adapter.load(Path(sys.argv[2]))
    warm(read_policy(Path(sys.argv[3])), plan, adapter, int(sys.argv[4]))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        sys.stdout.write(json.dumps(obey(json.loads(line), plan, adapter)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
