"""Does the site policy allow this plan? The coordinator may only ask for less than is allowed."""

from __future__ import annotations

from adapters.plan import TrainingPlan
from client.refusal import Reason, Refusal
from conf.policy import SitePolicy


def authorise(plan: TrainingPlan, policy: SitePolicy, base_model: str, has_patients: bool) -> None:
    """Return when every limit of the policy holds.

    ``base_model`` is the fingerprint of the model installed here; ``has_patients`` says whether
    notes carry patient ids. Raises Refusal with the first limit that does not hold.
    """
    if plan.base_model != base_model:
        raise Refusal(Reason.MODEL_MISMATCH, f"plan {plan.base_model[:12]}, here {base_model[:12]}")
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
    by_patient = "patient" in (policy.privacy.unit, plan.privacy.unit)
    if by_patient and (plan.privacy.unit != "patient" or not has_patients):
        raise Refusal(Reason.UNIT_TOO_WEAK, f"unit {plan.privacy.unit}, ids {has_patients}")
    if plan.privacy.epsilon > policy.privacy.epsilon:
        raise Refusal(Reason.BUDGET_EXHAUSTED, f"plan asks for epsilon {plan.privacy.epsilon:g}")
    if plan.privacy.delta > policy.privacy.delta:
        raise Refusal(Reason.LIMIT_EXCEEDED, f"delta {plan.privacy.delta:g}")
    if plan.privacy.clip_norm > policy.privacy.max_clip_norm:
        raise Refusal(Reason.LIMIT_EXCEEDED, f"clip norm {plan.privacy.clip_norm:g}")
    if plan.privacy.max_notes_per_unit > policy.privacy.max_notes_per_unit:
        raise Refusal(Reason.LIMIT_EXCEEDED, f"{plan.privacy.max_notes_per_unit} notes a unit")
