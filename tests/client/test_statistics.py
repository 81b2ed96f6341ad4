"""A round that sends statistics: what it is charged, what leaves, and what a policy forbids."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters import lora
from adapters.adapter import Adapter
from adapters.base_model import load_base
from adapters.plan import TrainingPlan
from adapters.statistics import Statistic
from client import local_steps, workbench
from client.privacy.accountant import GaussianSteps, epsilon
from client.privacy.ledger import Ledger
from client.refusal import Reason, Refusal
from client.training import train_round
from conf.policy import SitePolicy
from conf.schema import ModelSettings

MakePlan = Callable[..., TrainingPlan]
MakePolicy = Callable[..., SitePolicy]
Start = tuple[Adapter, str]

SHARED = {"statistics": "noised"}
ASKED: list[tuple[Statistic, str]] = [("gram", "regmean"), ("fisher", "fisher")]


@pytest.mark.parametrize(("kind", "strategy"), ASKED)
def test_statistics_are_charged_with_the_round_before_anybody_is_sampled(
    kind: Statistic,
    strategy: str,
    policy: MakePolicy,
    plan: MakePlan,
    starting_point: Start,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own, seen = policy(share=SHARED), []
    real = local_steps.poisson_sample

    def watched(*arguments: Any) -> Any:
        with Ledger.of(own) as other:  # as another process would read it
            seen.append(other.history())
        return real(*arguments)

    monkeypatch.setattr(local_steps, "poisson_sample", watched)
    spent: list[float] = []
    charges: tuple[GaussianSteps, ...] = ()
    for number in (1, 2):
        asked = plan(round=number, strategy=strategy, statistics=kind)
        outgoing = train_round(asked, starting_point[0], own)
        sigma = float(outgoing.facts["noise_multiplier"])
        charges += (GaussianSteps(1.0, sigma, 3),)  # two steps and the statistics
        assert seen == [charges] * 3
        seen.clear()
        spent.append(float(outgoing.facts["epsilon_spent"]))
        assert spent[-1] == epsilon(charges, 1e-5)
        names = outgoing.tensors if kind == "fisher" else starting_point[0].layers
        assert outgoing.statistics.keys() == set(names)
    assert 7.9 < spent[1] <= 8.0  # both rounds with all they release, and nothing left unplanned
    with Ledger.of(own) as ledger:
        body = ledger.entries()[0].body
    assert body["released"] == ["gradient", "statistics"]
    assert body["share"]["statistics"] == "noised"


def test_a_task_that_comes_again_gets_the_same_statistics_at_no_charge(
    policy: MakePolicy, plan: MakePlan, starting_point: Start
) -> None:
    own, asked = policy(share=SHARED), plan(strategy="regmean", statistics="gram")
    one, two = (train_round(asked, starting_point[0], own) for _ in range(2))
    assert one.to_bytes() == two.to_bytes()
    assert one.statistics
    with Ledger.of(own) as ledger:
        assert len(ledger.history()) == 1


@pytest.mark.parametrize(("kind", "strategy"), ASKED)
def test_two_releases_differ_by_exactly_the_noise_that_was_charged(
    kind: Statistic,
    strategy: str,
    policy: MakePolicy,
    plan: MakePlan,
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    """At full sampling, from a model that hardly moves, their sums are the same and cancel."""
    wide = {"rank": 16, "targets": ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")}
    asked = plan(
        rounds=1, local_steps=1, strategy=strategy, statistics=kind, adapter=wide,
        privacy={"clip_norm": 0.5}, optimizer={"learning_rate": 1e-9},
    )  # fmt: skip
    base = load_base(ModelSettings(source="path", path=str(tiny_model)))
    start = lora.initial(base.model, asked.spec, seed=5)

    def released(number: int) -> tuple[Tensor, float]:
        own = policy(share=SHARED, ledger=tmp_path / f"{number}.sqlite")
        outgoing = train_round(asked, start, own)
        parts = [t.double() for t in outgoing.statistics.values()]
        if kind == "gram":  # entries off the diagonal times sqrt(2), one of each pair
            row, column = torch.triu_indices(16, 16)
            parts = [t[row, column] * torch.where(row == column, 1.0, 2**0.5) for t in parts]
        sigma = float(outgoing.facts["noise_multiplier"])
        return torch.cat([t.flatten() for t in parts]), sigma

    (one, sigma), (two, _) = released(1), released(2)
    bound = math.sqrt(len(start.layers)) if kind == "gram" else 0.5**2
    expected = sigma * bound / 20 * 2**0.5  # denominator, two draws
    n = one.numel()
    assert n > 1600
    assert float((one - two).std()) == pytest.approx(expected, rel=5 / (2 * n) ** 0.5)
    assert abs(float((one - two).mean())) < 5 * expected / n**0.5


@pytest.mark.parametrize(("kind", "strategy"), ASKED)
def test_a_policy_that_says_nothing_of_statistics_refuses_before_it_opens_anything(
    kind: Statistic, strategy: str, policy: MakePolicy, plan: MakePlan, starting_point: Start
) -> None:
    own = policy(notes={"path": Path("/nowhere")})
    with pytest.raises(Refusal) as refusal:
        train_round(plan(strategy=strategy, statistics=kind), starting_point[0], own)
    assert refusal.value.reason is Reason.STATISTICS_NOT_SHARED
    assert not own.ledger.exists()


def test_a_budget_too_small_for_the_statistics_is_refused(
    policy: MakePolicy, plan: MakePlan, starting_point: Start
) -> None:
    """Two steps still fit at the most noise there is; with the statistics they do not."""
    tight = epsilon((GaussianSteps(1.0, 1000.0, 4),), 1e-5) * 1.02
    privacy = {"epsilon": tight}
    own = policy(privacy=privacy, share=SHARED)
    asked = plan(privacy=privacy, strategy="regmean", statistics="gram")
    with pytest.raises(Refusal) as refusal:
        train_round(asked, starting_point[0], own)
    assert refusal.value.reason is Reason.BUDGET_EXHAUSTED
    with Ledger.of(own) as ledger:
        assert ledger.history() == ()
    assert train_round(plan(privacy=privacy), starting_point[0], own).tensors


def test_statistics_are_rehearsed_on_nobody_before_anything_is_charged(
    policy: MakePolicy, plan: MakePlan, starting_point: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(*_: object) -> None:
        raise RuntimeError("not enough memory: you tried to allocate 9 GB")

    workbench.workbench.cache_clear()
    monkeypatch.setattr(workbench, "statistic_sums", short)
    own = policy(share=SHARED)
    with pytest.raises(Refusal) as refusal:
        train_round(plan(strategy="regmean", statistics="gram"), starting_point[0], own)
    assert refusal.value.reason is Reason.LIMIT_EXCEEDED
    with Ledger.of(own) as ledger:
        assert ledger.history() == ()
    workbench.workbench.cache_clear()


def test_the_audit_log_says_that_statistics_left(
    hospital: Callable[..., Any], plan: MakePlan, starting_point: Start
) -> None:
    site = hospital(share=SHARED)
    reply = site.ask(plan(strategy="regmean", statistics="gram"), starting_point[0])
    assert set(reply.content.array_records) == {"adapter", "statistics"}
    lines = [json.loads(x) for x in site.policy.audit_file.read_text().splitlines()]
    assert "statistics" in json.dumps(lines[-1])
    site.ask(plan(round=2), starting_point[0])
    lines = [json.loads(x) for x in site.policy.audit_file.read_text().splitlines()]
    assert "statistics" not in json.dumps(lines[-1])
