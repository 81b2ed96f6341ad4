"""The last step of an upload: what passed the gate is rounded to the plan's wire format.

    sent_t = round(change_t + left_(t-1)),    left_t = change_t + left_(t-1) - sent_t

Error feedback: over any number of rounds the sum of what was sent differs from the sum of the
changes by the last remainder alone, so rounding does not add up. Only what passed the gate goes in,
so a remainder is post-processing of a private output and costs nothing.

A remainder of B means left A as an update. Where the next round has another A' (FedSVD turns it),
it goes on as left A A'+, with A'+ the pseudo-inverse: the same update, but for what lies outside
the rows of A', which is dropped. A remainder of A likewise, B'+ B left; a core's stays as it is
under its fixed frame. Where both factors are trained no product stands still, and nothing is
carried.

Remainders of one run on one data lineage, with privacy or without, lie beside the ledger, with
those from before its last round: the same task again, after whatever crash, is rounded as it was,
and so is another task of that round. A remainder that cannot be used is dropped.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from adapters.adapter import Adapter
from adapters.plan import TrainingPlan
from client.privacy import durable
from client.privacy.gate import Outgoing
from conf.policy import SitePolicy
from transport.formats import decode, encode
from transport.wire import change

log = logging.getLogger(__name__)

Remainders = dict[str, tuple[Tensor, Tensor]]  # by trained tensor: what is left, the frozen factor


def rounded(
    released: Outgoing, plan: TrainingPlan, received: Adapter, policy: SitePolicy
) -> Outgoing:
    """What leaves in place of what the gate ``released``.

    In float32 it is that itself; in another format, the change since ``received``, rounded. Raises
    ValueError where a change is too large for the format.
    """
    if plan.wire == "float32":
        return released
    moved = change(released.tensors, received, plan)
    if plan.upload == "both" or plan.rounds == 1:
        return replace(released, tensors=encode(moved, plan.wire))
    file = remainders_file(policy)
    before = _read(file, _facts(plan, policy))
    for name, own in before.items():
        if name in moved:
            left = _carried(name, *own, received)
            if left is not None and left.shape == moved[name].shape:
                moved[name] = moved[name] + left
    tensors = encode(moved, plan.wire)
    sent = decode(tensors, plan.wire)
    after = before | {
        name: ((wanted - sent[name]).float(), _frozen(name, received))
        for name, wanted in moved.items()
    }
    _write(file, _facts(plan, policy), before, after)
    return replace(released, tensors=tensors)


def remainders_file(policy: SitePolicy) -> Path:
    """Where a site keeps the remainders of its latest run."""
    return policy.ledger.with_name(policy.ledger.name + ".rounding")


def _frozen(name: str, adapter: Adapter) -> Tensor:
    layer = adapter.layers[name.removesuffix(".weight").rpartition(".")[0]]
    return layer.B if name.endswith("lora_A.weight") else layer.A


def _carried(name: str, left: Tensor, frozen: Tensor, received: Adapter) -> Tensor | None:
    """The remainder under the factor that is frozen now; None where it does not fit."""
    now = _frozen(name, received)
    if now.shape != frozen.shape:
        return None
    try:
        if now.equal(frozen):
            return left.double()
        turn = torch.linalg.pinv(now.double())
        if name.endswith("lora_A.weight"):
            return turn @ frozen.double() @ left.double()
        return left.double() @ frozen.double() @ turn
    except RuntimeError:  # shapes that do not go together, or no pseudo-inverse
        return None


def _facts(plan: TrainingPlan, policy: SitePolicy) -> dict[str, str]:
    """What remainders belong to."""
    private = str(plan.privacy.enabled)
    run, number = plan.run, str(plan.round)
    return {"run": run, "lineage": policy.lineage, "private": private, "round": number}


def _read(file: Path, facts: dict[str, str]) -> Remainders:
    """What is left from before this round: of the same run, lineage and privacy, else nothing."""
    try:
        if not file.exists():
            return {}
        with safe_open(file, "pt") as content:
            known = content.metadata()
            if any(known[what] != facts[what] for what in ("run", "lineage", "private")):
                return {}
            ahead = int(facts["round"]) - int(known["round"])
            if ahead < 0:
                return {}
            when = "after" if ahead else "before"
            start = f"{when}/left/"
            names = [k.removeprefix(start) for k in content.keys() if k.startswith(start)]  # noqa: SIM118
            found = {
                n: (
                    content.get_tensor(f"{when}/left/{n}"),
                    content.get_tensor(f"{when}/frozen/{n}"),
                )
                for n in names
            }
    except (SafetensorError, KeyError, ValueError, TypeError, OSError) as problem:
        log.warning("%s cannot be read (%s): rounding starts anew", file, type(problem).__name__)
        return {}
    return {n: own for n, own in found.items() if all(bool(t.isfinite().all()) for t in own)}


def _write(file: Path, facts: dict[str, str], before: Remainders, after: Remainders) -> None:
    tensors = {
        f"{when}/{what}/{name}": tensor.contiguous().clone()
        for when, state in (("before", before), ("after", after))
        for name, own in state.items()
        for what, tensor in zip(("left", "frozen"), own, strict=True)
    }
    durable.replace(file, safetensors.torch.save(tensors, facts))
