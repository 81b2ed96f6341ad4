"""What the coordinator accepts from a hospital: every reply is checked before it can be merged."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from flwr.app import Message, RecordDict
from torch import Tensor

from adapters.adapter import Adapter
from adapters.plan import TrainingPlan
from adapters.statistics import MeasuredAdapter, require_statistics
from transport.wire import size_bytes, unpack_upload

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
LARGEST = 1e6  # entry of what is merged: no trained one comes near, and what travels can hold it
_FARTHEST = 1e3  # an entry beyond the largest that was sent; of honest ones no step goes so far
MALFORMED = "malformed reply"
_MOST_FACTS = 20
_NOISE = 0.01, 1e4  # multipliers of a private step; beyond, a merge's squares could overflow


@dataclass(frozen=True)
class Answer:
    """What a hospital published beside its adapter, and the bytes it sent."""

    site: str
    facts: dict[str, Any]
    bytes_up: int


@dataclass(frozen=True)
class Accepted(Answer):
    """The same, with its adapter for this round, and statistics if asked for."""

    adapter: Adapter


A = TypeVar("A", bound=Answer)


@dataclass(frozen=True)
class LeftOut:
    """A hospital that does not take part in this round's merge, and why."""

    site: str
    reason: str
    lied: bool = True  # False: it refused, or did not answer


def accept(
    reply: Message, plan: TrainingPlan, sent: Adapter, node_id: int, registered: str = ""
) -> Accepted | LeftOut:
    """Check one reply: names, shapes, finiteness, facts. A bad one is left out, never fatal.

    ``node_id`` is the node whose task the reply answers, and ``registered`` the name under which
    the coordinator registered its public key, where keys are in use: a hospital cannot speak for
    another.
    """
    node = registered or node_name(node_id)
    if reply.has_error():
        return LeftOut(node, f"no answer (Flower error {reply.error.code})", lied=False)
    content = reply.content
    if not isinstance(content, RecordDict):  # Flower hands on whatever record it was sent
        return LeftOut(node, MALFORMED)
    refusal = content.config_records.get("refusal")
    if refusal is not None:
        site = registered or str(refusal.get("site", ""))
        # Free text from outside stays out of records: the code is enough to look the reason up.
        code = re.sub(r"[^A-Z_]", "", str(refusal.get("code", "")))[:40]
        return LeftOut(site if _NAME.fullmatch(site) else node, f"refused: {code}", lied=False)
    try:
        facts = json.loads(str(content.config_records["facts"]["json"]))
        site = facts["site"]
        tensors = content.array_records["adapter"].to_torch_state_dict()
        measured = content.array_records.get("statistics")
        statistics = measured.to_torch_state_dict() if measured is not None else {}
    except Exception:  # rubbish fails in many ways (memory, recursion); each costs only its sender
        return LeftOut(node, MALFORMED)
    if not _plain(facts):
        return LeftOut(node, "malformed facts")
    if not isinstance(site, str) or not _NAME.fullmatch(site) or site.casefold() == "global":
        return LeftOut(node, "invalid site name")
    if registered and site != registered:
        return LeftOut(registered, f"calls itself {site}")
    if plan.privacy.enabled and not _is_noise(facts.get("noise_multiplier")):
        return LeftOut(site, "no possible noise multiplier stated")
    try:
        factors = unpack_upload(tensors, sent, plan)
        adapter = plan.joined(sent, factors)
        require_statistics(statistics, plan.statistics, sent, plan.upload, plan.seed)
    except ValueError as problem:
        return LeftOut(site, str(problem))
    except (MemoryError, RuntimeError):  # which PyTorch raises too
        return LeftOut(site, MALFORMED)
    if not adapter.is_finite():
        return LeftOut(site, "factors hold NaN or infinity")
    if impossibly_large(factors, plan.to_travel(sent)):
        return LeftOut(site, "factors impossibly large")
    if statistics:
        adapter = MeasuredAdapter(adapter.spec, adapter.layers, statistics)
    return Accepted(site, facts, size_bytes(content), adapter)


def impossibly_large(factors: Mapping[str, Tensor], sent: Mapping[str, Tensor]) -> bool:
    """Whether an entry lies too far beyond the largest that was sent.

    A limit that did not follow what was sent would, once a liar had drawn the merge to it, leave
    out every honest hospital.
    """
    most = max(float(tensor.abs().max()) for tensor in sent.values()) + _FARTHEST
    return any(float(tensor.abs().max()) > most for tensor in factors.values())


def node_name(node_id: int) -> str:
    """What a node is called that has no registered name."""
    return f"node-{node_id}"


def _is_noise(stated: object) -> bool:
    """Every private round states it; merges may weigh by it, and the release tells of it."""
    if isinstance(stated, bool) or not isinstance(stated, int | float):
        return False
    least, most = _NOISE
    return least <= stated <= most


def _plain(facts: object) -> bool:
    """True for a few short values; they are kept with the run, so nothing else gets in."""
    return (
        isinstance(facts, dict)
        and len(facts) <= _MOST_FACTS
        and all(
            isinstance(value, str | int | float)
            and len(f"{name}{value}") <= 120
            and (not isinstance(value, float) or math.isfinite(value))
            for name, value in facts.items()
        )
    )


def one_reply_each(
    outcomes: Sequence[A | LeftOut],
) -> tuple[list[A], dict[str, str]]:
    """Accepted replies in site order, and who was left out; a name used twice counts for nobody.

    Names that differ in upper and lower case alone are one: they can be one folder on disk.
    """
    left_out = {o.site: o.reason for o in outcomes if isinstance(o, LeftOut)}
    used = Counter(o.site.casefold() for o in outcomes)
    for o in outcomes:
        if isinstance(o, Answer) and used[o.site.casefold()] > 1:
            left_out[o.site] = "two hospitals under one name"
    accepted = [o for o in outcomes if isinstance(o, Answer) and o.site not in left_out]
    return sorted(accepted, key=lambda o: o.site), left_out
