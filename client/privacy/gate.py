"""The only way out of a hospital: what leaves is exactly what the plan and the policy name.

Every value must come as ``Released``, with a provenance that its name calls for and that is checked
against the plan, the policy and the reservation of this round. What has no provenance, another one,
another type, or is not finite, stops the whole message: a new kind of value must be decided on
here, it cannot slip through. No text leaves but the site's name and words of the plan.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import safetensors.torch
import torch
from torch import Tensor

from adapters.adapter import Adapter
from adapters.plan import TrainingPlan
from adapters.statistics import Statistics, require_statistics
from adapters.trained_part import frozen_suffix
from client.privacy.released import (
    COUNT_GRID,
    LOSS_GRID,
    Charge,
    Fact,
    Mechanism,
    Released,
    Source,
)
from client.refusal import Reason, Refusal
from conf.policy import Share, SitePolicy

_Kind = Literal["counts", "losses", "scores"]


@dataclass(frozen=True)
class _Rule:
    """What a fact must be: its type, its origin, and the part of ``share`` that decides on it."""

    type: type
    origin: Source | str  # a name stands for the mechanism of that name
    share: _Kind | None = None
    grid: float | None = None  # a noised number is a multiple of it


_RULES = {
    "site": _Rule(str, Source.POLICY_PUBLIC),
    "steps": _Rule(int, Source.PLAN),
    "unit": _Rule(str, Source.PLAN),
    "noise_multiplier": _Rule(float, Source.LEDGER),
    "epsilon_spent": _Rule(float, Source.LEDGER),  # after this round
    "delta": _Rule(float, Source.LEDGER),
    "patients": _Rule(int, Source.POLICY_PUBLIC, "counts"),
    "notes": _Rule(int, Source.POLICY_PUBLIC, "counts"),
    "loss": _Rule(float, Source.POLICY_PUBLIC, "losses"),
    "score": _Rule(float, Source.POLICY_PUBLIC, "scores"),
    "noised_patients": _Rule(float, "patients", "counts", COUNT_GRID),
    "noised_notes": _Rule(float, "notes", "counts", COUNT_GRID),
    "noised_loss": _Rule(float, "loss", "losses", LOSS_GRID),
    "noised_score": _Rule(float, "score", "scores", LOSS_GRID),
    "noised_patients_std": _Rule(float, Source.LEDGER, "counts"),
    "noised_notes_std": _Rule(float, Source.LEDGER, "counts"),
    "noised_loss_std": _Rule(float, Source.LEDGER, "losses"),
    "noised_score_std": _Rule(float, Source.LEDGER, "scores"),
}


_STATISTICS = "statistics:"  # before their names in a stored reply; no factor's begins with it


@dataclass(frozen=True)
class Outgoing:
    """What passed the gate: factors to upload, facts beside them, statistics where asked for."""

    tensors: dict[str, Tensor]
    facts: dict[str, Fact]
    statistics: dict[str, Tensor] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """Safetensors, with the facts as metadata."""
        statistics = {_STATISTICS + name: tensor for name, tensor in self.statistics.items()}
        return safetensors.torch.save(
            {**self.tensors, **statistics}, {"facts": json.dumps(self.facts)}
        )

    @classmethod
    def from_bytes(cls, content: bytes) -> Outgoing:
        """Inverse of ``to_bytes``."""
        length = int.from_bytes(content[:8], "little")  # of the header, which is JSON
        facts = json.loads(content[8 : 8 + length])["__metadata__"]["facts"]
        loaded = sorted(safetensors.torch.load(content).items())  # which come in any order
        return cls(
            {name: tensor for name, tensor in loaded if not name.startswith(_STATISTICS)},
            json.loads(facts),
            {n.removeprefix(_STATISTICS): t for n, t in loaded if n.startswith(_STATISTICS)},
        )


@dataclass(frozen=True)
class Gate:
    """The gate of one round. ``charge`` is the round's reservation; None without privacy."""

    plan: TrainingPlan
    policy: SitePolicy
    received: Adapter
    charge: Charge | None

    def release(
        self,
        trained: Released[Adapter],
        facts: Mapping[str, Released[Fact]],
        statistics: Released[Statistics] | None = None,
    ) -> Outgoing:
        """What leaves. Raises Refusal, and lets nothing out, when any value is not allowed to."""
        return Outgoing(self._tensors(trained), self._facts(facts), self._statistics(statistics))

    def _statistics(self, statistics: Released[Statistics] | None) -> dict[str, Tensor]:
        """Those that the plan asks for, and no others; noised and paid for, without exception."""
        if statistics is None:
            _require(self.plan.statistics is None, "statistics are missing")
            return {}
        _require(isinstance(statistics, Released), "statistics without provenance")
        _require(self.policy.share.statistics == "noised", "statistics are not shared")
        self._require_origin("statistics", statistics.provenance, "statistics")
        plan, found = self.plan, statistics.value
        try:
            require_statistics(found, plan.statistics, self.received, plan.upload, plan.seed)
        except ValueError as problem:
            raise Refusal(Reason.OUTBOUND_REFUSED, str(problem)) from None
        return dict(found)

    def _tensors(self, trained: Released[Adapter]) -> dict[str, Tensor]:
        """The trained part, float32.

        A factor that the plan keeps frozen must be what was received, or it would carry un-noised
        information; the others must come from the gradient's mechanism.
        """
        _require(isinstance(trained, Released), "an adapter without provenance")
        origin: Source | str = "gradient"
        if not self.plan.privacy.enabled and not self.policy.privacy.required:
            origin = Source.POLICY_PUBLIC
        self._require_origin("the adapter", trained.provenance, origin)
        plan = self.plan
        before = self.received.tensors()
        tensors = trained.value.tensors()
        frozen = frozen_suffix(plan.upload)
        trained_layers = plan.trained_layers(self.received.layers)
        _require(set(tensors) == set(before), "factors missing or unexpected")
        for name, tensor in tensors.items():
            _require(tensor.shape == before[name].shape, f"shape of {name}")
            _require(tensor.dtype == torch.float32, f"{name} is {tensor.dtype}")
            _require(bool(torch.isfinite(tensor).all()), f"{name} is not finite")
            layer = name.rpartition(".lora_")[0]
            if layer not in trained_layers or (frozen and name.endswith(frozen)):
                _require(tensor.equal(before[name]), f"frozen factor {name} moved")
        return plan.to_travel(trained.value)

    def _facts(self, facts: Mapping[str, Released[Fact]]) -> dict[str, Fact]:
        out = {}
        for name, fact in facts.items():
            rule = _RULES.get(name)
            _require(rule is not None, "a fact that is not on the list")
            _require(isinstance(fact, Released), f"fact {name} without provenance")
            assert rule is not None
            _require(type(fact.value) is rule.type, f"fact {name} is of another type")
            self._require_origin(f"fact {name}", fact.provenance, rule.origin)
            _require(self._shared(name, rule), f"fact {name} is not shared")
            _require(self._sound(name, fact.value, rule), f"fact {name} has an impossible value")
            out[name] = fact.value
        return out

    def _require_origin(
        self, what: str, declared: Source | Mechanism, needed: Source | str
    ) -> None:
        """The declared origin is the needed one, and what it claims to be paid was paid."""
        charge = self.charge
        if isinstance(needed, str):
            paid = charge is not None and needed in charge.mechanisms
            ok = paid and charge is not None and declared == Mechanism(needed, charge.seq)
        else:
            ok = declared is needed and (needed is not Source.LEDGER or charge is not None)
        _require(ok, f"{what} has no sufficient provenance")

    def _shared(self, name: str, rule: _Rule) -> bool:
        if rule.share is None:
            return True
        wanted: Share = "noised" if name.startswith("noised_") else "public"
        return getattr(self.policy.share, rule.share) == wanted

    def _sound(self, name: str, value: Fact, rule: _Rule) -> bool:
        """Words and constants are the plan's, the policy's and the ledger's; numbers are finite."""
        expected: dict[str, Fact] = {
            "site": self.policy.site,
            "steps": self.plan.local_steps,
            "unit": self.plan.privacy.unit,
            "delta": self.policy.privacy.delta,
        }
        if self.charge is not None:
            expected["noise_multiplier"] = self.charge.noise_multiplier
        if name in expected:
            return value == expected[name]
        assert not isinstance(value, str), "the only words are the site's name and the unit"
        if not math.isfinite(value):
            return False
        return rule.grid is None or (value / rule.grid).is_integer()


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Refusal(Reason.OUTBOUND_REFUSED, otherwise)
