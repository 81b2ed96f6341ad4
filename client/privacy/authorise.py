"""Does the site policy allow this plan? The coordinator may only ask for less than is allowed."""

from __future__ import annotations

from adapters.plan import TrainingPlan
from client.refusal import Reason, Refusal
from conf.policy import SitePolicy


def authorise(plan: TrainingPlan, policy: SitePolicy) -> None:
    """Return when every limit holds that can be checked without model and notes.

    Raises Refusal with the first limit that does not hold.
    """
    allowed = policy.adapter.base_models
    if allowed and plan.base_model not in allowed:
        raise Refusal(Reason.MODEL_MISMATCH, "not in adapter.base_models")
    if plan.adapter.rank > policy.adapter.max_rank:
        raise Refusal(Reason.LIMIT_EXCEEDED, f"rank {plan.adapter.rank}")
    if not set(plan.adapter.targets) <= set(policy.adapter.targets):
        raise Refusal(Reason.LIMIT_EXCEEDED, f"targets {plan.adapter.targets}")
    if plan.privacy.max_tokens > policy.privacy.max_tokens:
        raise Refusal(Reason.LIMIT_EXCEEDED, f"{plan.privacy.max_tokens} tokens a note")
    if not plan.privacy.enabled:
        if policy.privacy.required:
            raise Refusal(Reason.PRIVACY_REQUIRED)
        return
    if policy.privacy.unit == "patient" and plan.privacy.unit != "patient":
        raise Refusal(Reason.UNIT_TOO_WEAK, f"unit {plan.privacy.unit}")
    if plan.privacy.epsilon > policy.privacy.epsilon:
        raise Refusal(Reason.BUDGET_EXHAUSTED, f"plan asks for epsilon {plan.privacy.epsilon:g}")
    if plan.privacy.delta > policy.privacy.delta:
        raise Refusal(Reason.LIMIT_EXCEEDED, f"delta {plan.privacy.delta:g}")
    if plan.privacy.clip_norm > policy.privacy.max_clip_norm:
        raise Refusal(Reason.LIMIT_EXCEEDED, f"clip norm {plan.privacy.clip_norm:g}")
    if plan.privacy.max_notes_per_unit > policy.privacy.max_notes_per_unit:
        raise Refusal(Reason.LIMIT_EXCEEDED, f"{plan.privacy.max_notes_per_unit} notes a unit")


def require_model(plan: TrainingPlan, installed: str, longest: int | None) -> None:
    """Return when the installed model is the plan's and can read its windows.

    ``installed`` is the fingerprint of the model; ``longest`` how many tokens it can read
    (None sets no limit): a longer note would fail, and the failure would tell of that note.
    Raises Refusal.
    """
    if plan.base_model != installed:
        raise Refusal(Reason.MODEL_MISMATCH, f"plan {plan.base_model[:12]}, here {installed[:12]}")
    if longest and plan.privacy.max_tokens > longest:
        raise Refusal(Reason.LIMIT_EXCEEDED, f"max_tokens {plan.privacy.max_tokens}")


def require_unit(plan: TrainingPlan, has_patients: bool) -> None:
    """Return when the notes can be told apart by the plan's privacy unit. Raises Refusal."""
    if plan.privacy.enabled and plan.privacy.unit == "patient" and not has_patients:
        raise Refusal(Reason.UNIT_TOO_WEAK, "the notes carry no patient ids")
