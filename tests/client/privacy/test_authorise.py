"""A plan passes only while every limit of the site policy holds."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest
from pydantic import ValidationError

from adapters.plan import TrainingPlan
from client.privacy.authorise import (
    authorise,
    require_layers,
    require_model,
    require_unit,
)
from client.refusal import Reason, Refusal
from conf.policy import SitePolicy

MakePlan = Callable[..., TrainingPlan]
MakePolicy = Callable[..., SitePolicy]

DEPTH = 6  # blocks of the model

NOON = datetime(2026, 11, 20, 12)  # a Friday


def verdict(
    plan: TrainingPlan,
    policy: SitePolicy,
    has_patients: bool = True,
    installed: str | None = None,
    longest: int | None = None,
    now: datetime = NOON,
) -> Reason | None:
    """The first refusal, asked in the order of a round; the plan's own model unless another is."""
    try:
        authorise(plan, policy, now)
        require_model(plan, installed or plan.base_model, longest)
        require_layers(plan, policy, DEPTH)
        require_unit(plan, has_patients)
    except Refusal as refusal:
        return refusal.reason
    return None


@pytest.mark.parametrize(
    ("layers", "most", "refused"),
    [(None, None, False), (None, 6, True), ("half", None, True), ([0], None, True)],
)
def test_a_model_that_does_not_say_its_depth_keeps_to_no_limit_of_layers(
    layers: object, most: int | None, refused: bool, plan: MakePlan, policy: MakePolicy
) -> None:
    asked, own = plan(adapter={"layers": layers}), policy(adapter={"max_layers": most})
    if not refused:
        require_layers(asked, own, 0)
        return
    with pytest.raises(Refusal, match="exceeds") as refusal:
        require_layers(asked, own, 0)
    assert refusal.value.reason is Reason.LIMIT_EXCEEDED


def test_a_plan_within_every_limit_passes(plan: MakePlan, policy: MakePolicy) -> None:
    assert verdict(plan(), policy()) is None


@pytest.mark.parametrize(
    ("planned", "allowed"),
    [
        ({"adapter": {"rank": 4}}, {"adapter": {"max_rank": 4}}),
        ({}, {"adapter": {"max_layers": 6}}),
        ({"adapter": {"layers": "half", "freeze_half": True}}, {"adapter": {"max_layers": 3}}),
        ({"adapter": {"layers": [0, 5]}}, {"adapter": {"max_layers": 2}}),
        ({"privacy": {"epsilon": 2.5}}, {"privacy": {"epsilon": 2.5}}),
        ({"privacy": {"delta": 1e-6}}, {"privacy": {"delta": 1e-6}}),
        ({"privacy": {"max_tokens": 99}}, {"privacy": {"max_tokens": 99}}),
        ({"privacy": {"clip_norm": 0.5}}, {"privacy": {"max_clip_norm": 0.5}}),
        ({"privacy": {"max_notes_per_unit": 3}}, {"privacy": {"max_notes_per_unit": 3}}),
        ({"privacy": {"sampling_rate": 0.5}}, {"privacy": {"max_sampling_rate": 0.5}}),
        ({"adapter": {"targets": ["q_proj"]}}, {"adapter": {"targets": ["q_proj"]}}),
        ({"adapter": {"train": "both"}, "upload": "both"}, {"adapter": {"train": ["both"]}}),
        ({"strategy": "fedsvd"}, {"adapter": {"strategies": ["ffa", "fedsvd"]}}),
        ({"statistics": "gram"}, {"share": {"statistics": "noised"}}),
        ({"run": "cardiology-7"}, {"coordinator": {"runs": "cardiology-*"}}),
        ({}, {"quiet_hours": ["Sat-Thu 00:00-24:00"]}),
        ({}, {"quiet_hours": ["11:00-12:00", "12:01-13:00"]}),
    ],
)
def test_a_plan_at_the_limit_passes(
    plan: MakePlan, policy: MakePolicy, planned: dict[str, Any], allowed: dict[str, Any]
) -> None:
    assert verdict(plan(**planned), policy(**allowed)) is None


@pytest.mark.parametrize(
    ("planned", "allowed", "reason"),
    [
        ({"adapter": {"rank": 5}}, {"adapter": {"max_rank": 4}}, Reason.LIMIT_EXCEEDED),
        ({}, {"adapter": {"max_layers": 5}}, Reason.LIMIT_EXCEEDED),
        ({"adapter": {"layers": "last:3"}}, {"adapter": {"max_layers": 2}}, Reason.LIMIT_EXCEEDED),
        ({"adapter": {"layers": "last:7"}}, {}, Reason.LIMIT_EXCEEDED),
        ({"privacy": {"epsilon": 2.6}}, {"privacy": {"epsilon": 2.5}}, Reason.BUDGET_EXHAUSTED),
        ({"privacy": {"delta": 2e-6}}, {"privacy": {"delta": 1e-6}}, Reason.LIMIT_EXCEEDED),
        ({"privacy": {"max_tokens": 99}}, {"privacy": {"max_tokens": 98}}, Reason.LIMIT_EXCEEDED),
        (
            {"privacy": {"clip_norm": 0.6}},
            {"privacy": {"max_clip_norm": 0.5}},
            Reason.LIMIT_EXCEEDED,
        ),
        (
            {"privacy": {"max_notes_per_unit": 4}},
            {"privacy": {"max_notes_per_unit": 3}},
            Reason.LIMIT_EXCEEDED,
        ),
        (
            {"privacy": {"sampling_rate": 0.51}},
            {"privacy": {"max_sampling_rate": 0.5}},
            Reason.LIMIT_EXCEEDED,
        ),
        (
            {"adapter": {"train": "both"}, "upload": "both"},
            {"adapter": {"train": ["B"]}},
            Reason.LIMIT_EXCEEDED,
        ),
        (
            {"strategy": "fedavg"},
            {"adapter": {"strategies": ["ffa", "fedsvd"]}},
            Reason.STRATEGY_NOT_ALLOWED,
        ),
        ({"statistics": "gram"}, {}, Reason.STATISTICS_NOT_SHARED),
        ({"statistics": "fisher"}, {"share": {"scores": "noised"}}, Reason.STATISTICS_NOT_SHARED),
        (
            {"run": "Cardiology-7"},
            {"coordinator": {"runs": "cardiology-*"}},
            Reason.RUN_NOT_ALLOWED,
        ),
        ({}, {"quiet_hours": ["Fri 12:00-12:01"]}, Reason.QUIET_HOURS),
        ({}, {"quiet_hours": ["Thu 13:00-12:30"]}, Reason.QUIET_HOURS),
        (
            {"adapter": {"targets": ["q_proj", "lm_head"]}},
            {"adapter": {"targets": ["q_proj", "v_proj"]}},
            Reason.LIMIT_EXCEEDED,
        ),
    ],
)
def test_a_plan_beyond_one_limit_is_refused(
    plan: MakePlan,
    policy: MakePolicy,
    planned: dict[str, Any],
    allowed: dict[str, Any],
    reason: Reason,
) -> None:
    assert verdict(plan(**planned), policy(**allowed)) is reason


def test_only_the_installed_model_is_trained_and_only_if_allowed(
    plan: MakePlan, policy: MakePolicy
) -> None:
    installed, other = "1" * 64, "2" * 64
    for planned, here, allowed, reason in (
        (installed, installed, (), None),
        (installed, installed, (other, installed), None),
        (installed, installed, (other,), Reason.MODEL_MISMATCH),
        (other, installed, (), Reason.MODEL_MISMATCH),
        (other, installed, (other,), Reason.MODEL_MISMATCH),
    ):
        own = policy(adapter={"base_models": allowed})
        assert verdict(plan(base_model=planned), own, installed=here) is reason


@pytest.mark.parametrize(("longest", "passes"), [(None, True), (32, True), (31, False)])
def test_a_window_longer_than_the_model_reads_is_refused(
    plan: MakePlan, policy: MakePolicy, longest: int | None, passes: bool
) -> None:
    found = verdict(plan(privacy={"max_tokens": 32}), policy(), longest=longest)
    assert found is (None if passes else Reason.LIMIT_EXCEEDED)


@pytest.mark.parametrize(
    ("own_unit", "planned_unit", "has_patients", "passes"),
    [
        ("patient", "patient", True, True),
        ("patient", "patient", False, False),  # without ids a "patient" is a note
        ("patient", "note", True, False),
        ("note", "note", True, True),
        ("note", "note", False, True),
        ("note", "patient", True, True),  # stronger than asked for
        ("note", "patient", False, False),
    ],
)
def test_a_unit_weaker_than_the_policys_is_refused(
    plan: MakePlan,
    policy: MakePolicy,
    own_unit: str,
    planned_unit: str,
    has_patients: bool,
    passes: bool,
) -> None:
    own = policy(privacy={"unit": own_unit})
    found = verdict(plan(privacy={"unit": planned_unit}), own, has_patients)
    assert found is (None if passes else Reason.UNIT_TOO_WEAK)


def test_privacy_can_be_off_only_where_the_policy_does_not_require_it(
    plan: MakePlan, policy: MakePolicy
) -> None:
    off = plan(privacy={"enabled": False, "unit": "note", "epsilon": 999.0, "clip_norm": 1e6})
    assert verdict(off, policy()) is Reason.PRIVACY_REQUIRED
    assert verdict(off, policy(privacy={"required": False})) is None
    # Not required is not forbidden, and the limits of private training hold where it is on.
    lax = policy(privacy={"required": False})
    assert verdict(plan(), lax) is None
    assert verdict(plan(privacy={"epsilon": 9.0}), lax) is Reason.BUDGET_EXHAUSTED


def test_what_a_plan_says_cannot_write_lines_into_the_sites_log(
    plan: MakePlan, policy: MakePolicy
) -> None:
    with pytest.raises(Refusal) as refusal:
        authorise(plan(adapter={"targets": ["x\n\x1b[31m"]}), policy(), NOON)
    assert refusal.value.detail.isprintable()
    with pytest.raises(ValidationError, match="strategy"):
        plan(strategy="x\n\x1b[31mRECORD")


def test_shape_limits_hold_without_privacy_too(plan: MakePlan, policy: MakePolicy) -> None:
    off = plan(privacy={"enabled": False})
    for limit in ({"adapter": {"max_rank": 1}}, {"privacy": {"max_tokens": 16}}):
        limit["privacy"] = {"required": False, **limit.get("privacy", {})}
        assert verdict(off, policy(**limit)) is Reason.LIMIT_EXCEEDED
