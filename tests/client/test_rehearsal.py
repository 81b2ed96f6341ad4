"""What there is no memory for is refused before anything is sampled or charged."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from peft import PeftModel

from adapters.adapter import Adapter
from adapters.plan import TrainingPlan
from client import workbench
from client.privacy.ledger import Ledger
from client.privacy.per_note import trained_parameters
from client.refusal import Reason, Refusal
from client.training import train_round
from conf.policy import SitePolicy

MakePlan = Callable[..., TrainingPlan]
MakePolicy = Callable[..., SitePolicy]
Start = tuple[Adapter, str]


def ledger_of(policy: SitePolicy) -> Ledger:
    return Ledger.of(policy)


def test_a_plan_that_does_not_fit_into_memory_is_refused_before_anything_is_sampled(
    policy: MakePolicy, plan: MakePlan, starting_point: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(*_: object) -> None:
        raise RuntimeError("not enough memory: you tried to allocate 9 GB")

    workbench.workbench.cache_clear()
    monkeypatch.setattr(workbench, "rehearse", short)
    own = policy()
    with pytest.raises(Refusal) as refusal:
        train_round(plan(), starting_point[0], own)
    assert refusal.value.reason is Reason.LIMIT_EXCEEDED
    with ledger_of(own) as ledger:
        assert ledger.history() == ()


@pytest.mark.parametrize("shared", ["losses", "scores"])
@pytest.mark.parametrize("mode", ["noised", "public"])
def test_a_loss_that_does_not_fit_into_memory_is_refused_before_anything_is_sampled(
    shared: str,
    mode: str,
    policy: MakePolicy,
    plan: MakePlan,
    starting_point: Start,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []

    def short(_: object, units: list[list[list[int]]]) -> None:
        seen.append([[len(row) for row in unit] for unit in units])
        raise RuntimeError("not enough memory: you tried to allocate 9 GB")

    workbench.workbench.cache_clear()
    monkeypatch.setattr(workbench, "unit_losses", short)
    own = policy()
    train_round(plan(run="other"), starting_point[0], own)  # shares no loss
    own = policy(share={shared: mode})
    asked = plan(privacy={"max_notes_per_unit": 3, "max_tokens": 40})
    with pytest.raises(Refusal) as refusal:
        train_round(asked, starting_point[0], own)
    assert refusal.value.reason is Reason.LIMIT_EXCEEDED
    assert seen == [[[40, 40, 40]]]
    with ledger_of(own) as ledger:
        assert len(ledger.history()) == 1  # the other run's


def test_every_half_of_the_layers_is_rehearsed_once(
    policy: MakePolicy, plan: MakePlan, starting_point: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    halves: list[frozenset[str]] = []

    def note(model: PeftModel, *_: object) -> None:
        halves.append(frozenset(trained_parameters(model)))

    workbench.workbench.cache_clear()
    monkeypatch.setattr(workbench, "rehearse", note)
    own, rounds = policy(), range(1, 7)
    for number in rounds:
        asked = plan(round=number, rounds=6, local_steps=1, adapter={"freeze_half": True})
        train_round(asked, starting_point[0], own)
    chosen = {plan(round=n, rounds=6, adapter={"freeze_half": True}).trained_layers(
        starting_point[0].layers) for n in rounds}  # fmt: skip
    assert len(halves) == len(set(halves)) == len(chosen) > 1
