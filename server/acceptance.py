"""What the coordinator accepts from a hospital: every reply is checked before it can be merged."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from flwr.app import Message, RecordDict

from adapters.adapter import Adapter
from adapters.plan import TrainingPlan
from transport.wire import size_bytes

_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$")


@dataclass(frozen=True)
class Accepted:
    """A hospital's adapter for this round, and the facts it published."""

    site: str
    adapter: Adapter
    facts: dict[str, Any]
    bytes_up: int


@dataclass(frozen=True)
class LeftOut:
    """A hospital that does not take part in this round's merge, and why."""

    site: str
    reason: str


def accept(
    reply: Message, plan: TrainingPlan, sent: Adapter, registered: str = ""
) -> Accepted | LeftOut:
    """Check one reply: names, shapes, finiteness, facts. A bad one is left out, never fatal.

    ``registered`` is the name under which the coordinator registered the node's public key, where
    keys are in use: a hospital cannot speak for another.
    """
    node = registered or f"node-{reply.metadata.src_node_id}"
    if reply.has_error():
        return LeftOut(node, f"no answer (Flower error {reply.error.code})")
    content: RecordDict = reply.content
    refusal = content.config_records.get("refusal")
    if refusal is not None:
        site = str(refusal.get("site", ""))
        # Free text from outside stays out of records: the code is enough to look the reason up.
        code = re.sub(r"[^A-Z_]", "", str(refusal.get("code", "")))[:40]
        return LeftOut(site if _NAME.match(site) else node, f"refused: {code}")
    try:
        facts = json.loads(str(content.config_records["facts"]["json"]))
        site = str(facts["site"])
        tensors = content.array_records["adapter"].to_torch_state_dict()
    except (KeyError, TypeError, ValueError):
        return LeftOut(node, "malformed reply")
    if not _NAME.match(site) or site == "global":
        return LeftOut(node, "invalid site name")
    if registered and site != registered:
        return LeftOut(registered, f"calls itself {site}")
    expected = {
        name: tensor
        for name, tensor in sent.tensors().items()
        if plan.upload == "both" or name.endswith("lora_B.weight")
    }
    if set(tensors) != set(expected):
        return LeftOut(site, "factors missing or unexpected")
    if any(tensors[name].shape != expected[name].shape for name in expected):
        return LeftOut(site, "factors of another shape")
    adapter = Adapter.from_tensors({**sent.tensors(), **tensors}, plan.spec)
    if not adapter.is_finite():
        return LeftOut(site, "factors hold NaN or infinity")
    return Accepted(site, adapter, facts, size_bytes(content))


def one_reply_each(
    outcomes: list[Accepted | LeftOut],
) -> tuple[list[Accepted], dict[str, str]]:
    """Accepted replies in site order, and who was left out; a name used twice counts for nobody."""
    sites = [o.site for o in outcomes if isinstance(o, Accepted)]
    left_out = {o.site: o.reason for o in outcomes if isinstance(o, LeftOut)}
    left_out |= {s: "two hospitals under one name" for s in sites if sites.count(s) > 1}
    accepted = [o for o in outcomes if isinstance(o, Accepted) and o.site not in left_out]
    return sorted(accepted, key=lambda o: o.site), left_out
