"""Does the site policy allow this plan? The coordinator may only ask for less than is allowed.

What needs neither model nor notes is decided first, so that a plan beyond a limit touches neither.
"""

from __future__ import annotations

from datetime import datetime
from fnmatch import fnmatchcase

from adapters.chosen_layers import chosen_layers
from adapters.plan import TrainingPlan
from client.privacy.microbatch import bucket
from client.refusal import Reason, Refusal
from conf.policy import AdapterLimits, PrivacyLimits, SitePolicy
from conf.quiet_hours import is_quiet


def authorise(plan: TrainingPlan, policy: SitePolicy, now: datetime) -> None:
    """Return when every limit holds that can be checked without model and notes.

    ``now`` is the site's local time. Raises Refusal with the first limit that does not hold.
    """
    if not fnmatchcase(plan.run, policy.coordinator.runs):
        raise Refusal(Reason.RUN_NOT_ALLOWED, "not in coordinator.runs")
    if is_quiet(now, policy.quiet_hours):
        raise Refusal(Reason.QUIET_HOURS, f"{now:%a %H:%M} is in quiet_hours")
    allowed = policy.adapter.base_models
    if allowed and plan.base_model not in allowed:
        raise Refusal(Reason.MODEL_MISMATCH, "not in adapter.base_models")
    _within(_adapter(plan, policy.adapter))
    if not any(fnmatchcase(plan.strategy, pattern) for pattern in policy.adapter.strategies):
        raise Refusal(Reason.STRATEGY_NOT_ALLOWED, plan.strategy)
    if plan.statistics and policy.share.statistics == "never":
        raise Refusal(Reason.STATISTICS_NOT_SHARED, f"{plan.statistics}, for {plan.strategy}")
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
    _within(_privacy(plan, policy.privacy))


def require_model(plan: TrainingPlan, installed: str, longest: int | None) -> None:
    """Return when the installed model is the plan's and can read its windows.

    ``installed`` is the fingerprint of the model; ``longest`` how many tokens it can read
    (None sets no limit): a longer note would fail, and the failure would tell of that note.
    Raises Refusal.
    """
    if plan.base_model != installed:
        raise Refusal(Reason.MODEL_MISMATCH, f"plan {plan.base_model[:12]}, here {installed[:12]}")
    if longest and bucket(plan.privacy.max_tokens) > longest:  # what a long note is padded to
        raise Refusal(
            Reason.LIMIT_EXCEEDED,
            f"max_tokens {plan.privacy.max_tokens}: padded to {bucket(plan.privacy.max_tokens)}, "
            f"the model reads {longest}",
        )


def require_layers(plan: TrainingPlan, policy: SitePolicy, depth: int) -> None:
    """Return when the plan adapts no more of the model's ``depth`` blocks than is allowed.

    Raises Refusal, also when the plan names blocks that the model does not have, and when the model
    does not say how many it has (``depth`` 0) and there is a limit.
    """
    most = policy.adapter.max_layers
    if depth < 1 and (most is not None or plan.adapter.layers is not None):
        raise Refusal(Reason.LIMIT_EXCEEDED, "the model does not say how many layers it has")
    try:
        count = len(chosen_layers(plan.adapter.layers, depth))
    except ValueError as problem:
        raise Refusal(Reason.LIMIT_EXCEEDED, str(problem)) from None
    if most is not None and count > most:
        raise Refusal(Reason.LIMIT_EXCEEDED, f"{count} layers")


def require_unit(plan: TrainingPlan, has_patients: bool) -> None:
    """Return when the notes can be told apart by the plan's privacy unit. Raises Refusal."""
    if plan.privacy.enabled and plan.privacy.unit == "patient" and not has_patients:
        raise Refusal(Reason.UNIT_TOO_WEAK, "the notes carry no patient ids")


def _adapter(plan: TrainingPlan, limits: AdapterLimits) -> dict[str, bool]:
    """What is asked for, and whether it is allowed."""
    asked = plan.adapter
    return {
        f"rank {asked.rank}": asked.rank <= limits.max_rank,
        f"targets {asked.targets}": set(asked.targets) <= set(limits.targets),
        f"training of {asked.train}": asked.train in limits.train,
    }


def _privacy(plan: TrainingPlan, limits: PrivacyLimits) -> dict[str, bool]:
    asked = plan.privacy
    return {
        f"delta {asked.delta:g}": asked.delta <= limits.delta,
        f"sampling rate {asked.sampling_rate:g}": asked.sampling_rate <= limits.max_sampling_rate,
        f"clip norm {asked.clip_norm:g}": asked.clip_norm <= limits.max_clip_norm,
        f"{asked.max_notes_per_unit} notes a unit": asked.max_notes_per_unit
        <= limits.max_notes_per_unit,
    }


def _within(limits: dict[str, bool]) -> None:
    for asked, allowed in limits.items():
        if not allowed:
            raise Refusal(Reason.LIMIT_EXCEEDED, asked)
