"""The only way out of a hospital: what leaves is exactly what the plan and the policy name.

Allowed are the factors that the plan says are uploaded (names, shapes, float32, finite), and facts
from a fixed list of which each is public by construction or released by the policy.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from adapters.adapter import Adapter
from adapters.plan import TrainingPlan
from client.refusal import Reason, Refusal
from conf.policy import SitePolicy

Fact = str | int | float

_PUBLIC = {
    "site": str,  # name in the federation
    "noise_multiplier": float,  # from the plan and the ledger, never from a note
    "steps": int,
    "unit": str,
    "epsilon_spent": float,  # of the ledger, after this round
    "delta": float,
}
_COUNTS = {"patients": int, "notes": int}


def outgoing_tensors(adapter: Adapter, received: Adapter, plan: TrainingPlan) -> dict[str, Tensor]:
    """The factors that leave, float32.

    Raises Refusal when a factor is not finite, or when a factor that the plan keeps frozen differs
    from what was received (it would carry un-noised information).
    """
    out = {}
    before = received.tensors()
    for name, tensor in adapter.tensors().items():
        if name not in before or tensor.shape != before[name].shape:
            raise Refusal(Reason.OUTBOUND_REFUSED, f"unexpected factor {name}")
        if not torch.isfinite(tensor).all():
            raise Refusal(Reason.OUTBOUND_REFUSED, f"{name} is not finite")
        frozen = plan.upload == "B" and name.endswith("lora_A.weight")
        if frozen:
            if not tensor.equal(before[name]):
                raise Refusal(Reason.OUTBOUND_REFUSED, f"frozen factor {name} moved")
            continue
        out[name] = tensor.float()
    return out


def outgoing_facts(facts: Mapping[str, Fact], policy: SitePolicy) -> dict[str, Fact]:
    """The facts that leave. Counts are dropped unless the policy makes them public.

    Raises Refusal on a fact that is not on the list or of another type: a new kind of metadata must
    be decided on, not slip through.
    """
    out = {}
    for name, value in facts.items():
        kind = _PUBLIC.get(name) or _COUNTS.get(name)
        if kind is None or type(value) is not kind:
            raise Refusal(Reason.OUTBOUND_REFUSED, f"fact {name} is not on the list")
        if name in _PUBLIC or policy.share_counts == "public":
            out[name] = value
    return out
