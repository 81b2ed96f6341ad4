"""What one process keeps between rounds: the base model, loaded once, with the adapter attached."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

from peft import PeftModel

from adapters import lora
from adapters.adapter import AdapterSpec
from adapters.base_model import BaseModel, ModelError, load_base
from adapters.plan import TrainingPlan
from adapters.statistics import Statistic
from client.privacy.engine import rehearse
from client.privacy.metadata import unit_losses
from client.privacy.per_note import trained_parameters
from client.privacy.statistics import statistic_sums
from client.refusal import Reason, Refusal
from conf.policy import SitePolicy
from conf.schema import ComputeSettings, ModelSettings


@dataclass(frozen=True)
class Workbench:
    """The base model, its fingerprint, and the model that is trained."""

    base: BaseModel
    fingerprint: str
    model: PeftModel
    _rehearsed: set[tuple[frozenset[str], int, Statistic | None, int]] = field(default_factory=set)

    def rehearse(self, plan: TrainingPlan, policy: SitePolicy) -> None:
        """Find out once whether there is memory for such a plan. Raises Refusal.

        How much it takes depends on which layers are trained, not only on how many.
        """
        longest, kind = plan.privacy.max_tokens, plan.statistics
        shares_losses = {policy.share.losses, policy.share.scores} != {"never"}
        scored = plan.privacy.max_notes_per_unit if shares_losses else 0  # notes of a unit
        what = frozenset(trained_parameters(self.model)), longest, kind, scored
        if what in self._rehearsed:
            return
        how = policy.compute.engine, policy.compute.micro_tokens
        try:
            rehearse(self.model, longest, *how)
            if kind:
                statistic_sums(self.model, kind, [[[0] * longest], [[0]]], 1.0, *how)
            if scored:
                unit_losses(self.model, [[[0] * longest] * scored])
        except (MemoryError, RuntimeError):  # which PyTorch raises too
            raise Refusal(Reason.LIMIT_EXCEEDED, "the plan cannot be computed here") from None
        self._rehearsed.add(what)


@lru_cache(maxsize=1)
def workbench(settings: ModelSettings, compute: ComputeSettings, spec: AdapterSpec) -> Workbench:
    """The workbench of this process; a new one only when the settings change. Raises Refusal."""
    try:
        base = load_base(settings)
        if compute.gradient_checkpointing:
            base.model.gradient_checkpointing_enable({"use_reentrant": False})
        return Workbench(base, base.fingerprint, lora.attach(base.model, spec))
    except ModelError as problem:
        raise Refusal(Reason.MODEL_MISMATCH, str(problem)) from None
    except lora.UnsupportedAdapter as problem:
        raise Refusal(Reason.LIMIT_EXCEEDED, str(problem)) from None
