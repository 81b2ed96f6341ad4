"""What leaves a hospital through Flower: a result that passed the gate, or a fixed sentence."""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message

from adapters.adapter import Adapter, AdapterSpec
from adapters.lowrank import LowRank
from adapters.plan import TrainingPlan
from client.privacy.accountant import GaussianSteps, epsilon
from client.refusal import Reason
from client.site import SITE
from transport.wire import pack_task

if TYPE_CHECKING:
    from conftest import Hospital

Make = Callable[..., TrainingPlan]
Install = Callable[..., "Hospital"]
Start = tuple[Adapter, str]

CANARY = "Zyxwvut Quibbleforth 555-0173"


def facts_of(reply: Message) -> dict[str, Any]:
    return json.loads(str(reply.content.config_records["facts"]["json"]))


def tensors_of(reply: Message) -> dict[str, torch.Tensor]:
    return dict(reply.content.array_records["adapter"].to_torch_state_dict())


def everything_in(reply: Message) -> str:
    """All that a reply carries, as text: records, names, tensors' bytes and metadata."""
    assert not reply.has_error()  # Flower would send an exception's text
    content = reply.content
    parts: list[Any] = [
        reply.metadata,
        *content.keys(),
        *map(dict, content.config_records.values()),
    ]
    for record in content.array_records.values():
        parts += [part for name, array in record.items() for part in (name, array.data)]
    return "\n".join(map(repr, parts))


def refused(reply: Message) -> Reason:
    """The reason of a refusal, which says nothing but its code and fixed sentence."""
    assert not reply.has_error()
    assert set(reply.content.keys()) == {"refusal"}
    record = dict(reply.content.config_records["refusal"])
    reason = Reason[str(record["code"])]
    assert record == {"site": record["site"], "code": reason.name, "reason": reason.value}
    assert record["site"] in ("east", "unknown")
    return reason


@pytest.fixture
def canary_notes(tmp_path: Path) -> Path:
    """Notes in which every text, every id and the path hold the canary."""
    folder = tmp_path / CANARY.replace(" ", "_")
    folder.mkdir()
    lines = [
        {"text": f"{CANARY} was seen for visit {i} and sent home.", "pid": f"{CANARY} {i // 2}"}
        for i in range(12)
    ]
    path = folder / "notes.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


# --- an honest round ---------------------------------------------------------------------------


def test_an_honest_round_sends_a_moved_B_and_public_facts_only(
    hospital: Install, plan: Make, starting_point: Start
) -> None:
    east, sent = hospital(), starting_point[0]
    reply = east.ask(plan(), sent)
    assert set(reply.content.keys()) == {"adapter", "facts"}
    tensors = tensors_of(reply)
    assert set(tensors) == {n for n in sent.tensors() if n.endswith("lora_B.weight")}
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.float32
        assert tensor.shape == sent.tensors()[name].shape
        assert torch.isfinite(tensor).all()
        assert not tensor.equal(sent.tensors()[name])
    facts = facts_of(reply)
    sigma = facts.pop("noise_multiplier")
    spent = facts.pop("epsilon_spent")
    assert facts == {"site": "east", "steps": 2, "unit": "patient", "delta": 1e-5}
    assert east.states() == ["RESERVED", "COMMITTED"]
    with east.ledger() as ledger:
        assert ledger.history() == (GaussianSteps(1.0, sigma, 2),)
        assert spent == ledger.spent() == epsilon(ledger.history(), 1e-5)
        received = {**sent.tensors(), **tensors}
        released = Adapter.from_tensors(received, sent.spec).fingerprint()
        assert ledger.entries()[-1].body["result"] == released
    assert 0 < spent < 8.0


def test_all_rounds_of_a_run_end_within_the_budget_and_use_it(
    hospital: Install, plan: Make, starting_point: Start
) -> None:
    east = hospital()
    first = facts_of(east.ask(plan(), starting_point[0]))
    last = facts_of(east.ask(plan(round=2), starting_point[0]))
    assert first["epsilon_spent"] < 6.0  # the first round does not take the second one's share
    assert last["noise_multiplier"] == pytest.approx(first["noise_multiplier"], rel=0.01)
    assert 8.0 * 0.95 < last["epsilon_spent"] <= 8.0
    assert east.states() == ["RESERVED", "COMMITTED"] * 2


def test_both_factors_leave_when_the_plan_trains_both(
    hospital: Install, plan: Make, starting_point: Start
) -> None:
    sent = starting_point[0]
    both = plan(adapter={"train": "both"}, upload="both", strategy="product_mean")
    tensors = tensors_of(hospital().ask(both, sent))
    assert set(tensors) == set(sent.tensors())
    assert all(not tensors[name].equal(t) for name, t in sent.tensors().items())


def test_alternating_rounds_send_B_then_A_and_a_core_travels_alone(
    hospital: Install, plan: Make, starting_point: Start
) -> None:
    east, sent = hospital(), starting_point[0]
    for number, part in ((1, "B"), (2, "A")):
        asked = plan(
            round=number, upload=part, adapter={"train": "alternate"}, strategy="rolora", run="turn"
        )
        tensors = tensors_of(east.ask(asked, sent))
        assert set(tensors) == {n for n in sent.tensors() if f"lora_{part}." in n}
    core = plan(run="core", adapter={"train": "core"}, upload="core")
    tensors = tensors_of(east.ask(core, sent))
    assert {tuple(t.shape) for t in tensors.values()} == {(2, 2)}
    assert all(t.abs().max() > 0 for t in tensors.values())


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("planned", "allowed", "reason"),
    [
        ({"base_model": "0" * 64}, {}, Reason.MODEL_MISMATCH),
        ({}, {"adapter": {"base_models": ["0" * 64]}}, Reason.MODEL_MISMATCH),
        ({}, {"model": {"path": "/nowhere/model"}}, Reason.MODEL_MISMATCH),
        ({"privacy": {"enabled": False}}, {}, Reason.PRIVACY_REQUIRED),
        ({"privacy": {"unit": "note"}}, {}, Reason.UNIT_TOO_WEAK),
        ({}, {"notes": {"patient_field": None}}, Reason.UNIT_TOO_WEAK),
        ({}, {"adapter": {"max_rank": 1}}, Reason.LIMIT_EXCEEDED),
        ({}, {"adapter": {"targets": ["q_proj"]}}, Reason.LIMIT_EXCEEDED),
        ({"adapter": {"targets": ["embed_tokens"]}}, {}, Reason.LIMIT_EXCEEDED),
        ({"privacy": {"delta": 1e-4}}, {}, Reason.LIMIT_EXCEEDED),
        ({"privacy": {"clip_norm": 11.0}}, {}, Reason.LIMIT_EXCEEDED),
        ({"privacy": {"max_notes_per_unit": 9}}, {}, Reason.LIMIT_EXCEEDED),
        ({"privacy": {"max_tokens": 3000}}, {}, Reason.LIMIT_EXCEEDED),
        ({"privacy": {"max_tokens": 513}}, {}, Reason.LIMIT_EXCEEDED),  # the model reads 512
        ({"privacy": {"epsilon": 8.1}}, {}, Reason.BUDGET_EXHAUSTED),
        ({}, {"notes": {"path": "/nowhere/notes.jsonl"}}, Reason.NOTES_UNUSABLE),
        ({"adapter": {"rank": 3}}, {}, Reason.PLAN_INVALID),  # the adapter sent has rank 2
    ],
)
def test_a_plan_that_is_not_allowed_is_refused_and_costs_nothing(
    hospital: Install,
    plan: Make,
    starting_point: Start,
    planned: dict[str, Any],
    allowed: dict[str, Any],
    reason: Reason,
) -> None:
    east = hospital(**allowed)
    assert refused(east.ask(plan(**planned), starting_point[0])) is reason
    assert east.states() == []


def test_an_unreadable_plan_is_refused_and_the_hospital_learns_what_is_wrong_with_it(
    hospital: Install, plan: Make, starting_point: Start, caplog: pytest.LogCaptureFixture
) -> None:
    east = hospital()
    task = pack_task(plan(), starting_point[0])
    wished = json.loads(str(task.config_records["plan"]["json"]))
    for text in (
        "{",
        "[" * 100_000,
        json.dumps(wished | {"ledger": "/tmp/another"}),  # no permission travels in a plan
        json.dumps(wished | {"round": 3}),  # of 2
        json.dumps(wished | {"upload": "both"}),  # A is not trained
        json.dumps({k: v for k, v in wished.items() if k != "privacy"}),
    ):
        task["plan"] = ConfigRecord({"json": text})
        reply = east.send(task)
        assert refused(reply) is Reason.PLAN_INVALID, text[:40]
        assert "permitted" not in everything_in(reply)
    told = [r.getMessage() for r in caplog.records if "refused" in r.getMessage()]
    assert "plan.ledger: Extra inputs are not permitted" in told[2]  # at the hospital only
    assert all("\n" not in line and len(line) < 400 for line in told)
    for missing in ("plan", "adapter"):
        task = pack_task(plan(), starting_point[0])
        del task[missing]
        assert refused(east.send(task)) is Reason.PLAN_INVALID
    task = pack_task(plan(), starting_point[0])
    tensors = starting_point[0].tensors()
    first = next(iter(tensors))
    task["adapter"] = ArrayRecord({**tensors, first: torch.full((2, 32), float("nan"))})
    assert refused(east.send(task)) is Reason.PLAN_INVALID
    assert east.states() == []


def test_an_adapter_that_does_not_fit_the_model_is_refused(
    hospital: Install, plan: Make, starting_point: Start
) -> None:
    layers = dict(starting_point[0].layers)
    name, first = layers.popitem()
    east, spec = hospital(), starting_point[0].spec
    wide = LowRank(first.B, torch.zeros(2, first.A.shape[1] + 1))
    for wrong in (layers, {**layers, name: wide}, {**layers, name: first, "lm_head": first}):
        assert refused(east.ask(plan(), Adapter(spec, wrong))) is Reason.ADAPTER_INVALID
    assert east.states() == []


def test_a_spent_lineage_refuses_another_run_and_another_coordinator(
    hospital: Install, plan: Make, starting_point: Start
) -> None:
    charge = GaussianSteps(1.0, 1.5, 2)
    budget = epsilon((charge,), 1e-5) + 1e-6
    east = hospital(privacy={"epsilon": budget, "delta": 1e-5})
    with east.ledger() as ledger:
        ledger.reserve((charge,), task="another", run="someone else's")
    reply = east.ask(plan(run="another", privacy={"epsilon": budget / 2}), starting_point[0])
    assert refused(reply) is Reason.BUDGET_EXHAUSTED
    assert east.states() == ["RESERVED"]


def test_training_that_fails_is_burned_and_stays_charged(
    hospital: Install, plan: Make, starting_point: Start
) -> None:
    east = hospital()
    absurd = plan(optimizer={"learning_rate": 1e39})  # no float32 number is as large
    assert refused(east.ask(absurd, starting_point[0])) is Reason.TRAINING_FAILED
    assert east.states() == ["RESERVED", "BURNED"]
    with east.ledger() as ledger:
        assert ledger.spent() > 0
        assert ledger.entries()[-1].body["reason"] == "TRAINING_FAILED"


def test_what_the_gate_refuses_stays_here_and_stays_charged(
    hospital: Install, plan: Make, starting_point: Start
) -> None:
    east = hospital()
    overflowing = plan(optimizer={"learning_rate": 3e38}, privacy={"denominator": 1})
    assert refused(east.ask(overflowing, starting_point[0])) is Reason.OUTBOUND_REFUSED
    assert east.states() == ["RESERVED", "BURNED"]
    with east.ledger() as ledger:
        assert ledger.spent() > 0


def test_what_is_wrong_at_the_site_itself_is_called_internal(
    hospital: Install,
    plan: Make,
    starting_point: Start,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "not-a-ledger").write_text("some text that is no database at all, and long enough")
    east = hospital(ledger=tmp_path / "not-a-ledger")
    assert refused(east.ask(plan(), starting_point[0])) is Reason.INTERNAL

    east = hospital()
    with east.ledger() as ledger:
        ledger.reserve((GaussianSteps(1.0, 5.0, 1),), task="t")
    with sqlite3.connect(east.policy.ledger) as db:
        db.execute("DROP TRIGGER no_update")
        db.execute("UPDATE entry SET body = replace(body, '5.0', '9.0')")
    assert refused(east.ask(plan(), starting_point[0])) is Reason.INTERNAL

    monkeypatch.setenv(SITE, str(tmp_path / "absent.yaml"))
    assert refused(east.ask(plan(), starting_point[0])) is Reason.INTERNAL
    monkeypatch.delenv(SITE)
    assert refused(east.ask(plan(), starting_point[0])) is Reason.INTERNAL


# --- nothing else leaves -----------------------------------------------------------------------


def test_no_note_is_in_the_reply_or_the_log_of_an_honest_round(
    hospital: Install,
    plan: Make,
    starting_point: Start,
    canary_notes: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    reply = hospital(notes={"path": canary_notes}).ask(plan(), starting_point[0])
    said = capfd.readouterr()
    for text in (everything_in(reply), caplog.text, said.out, said.err):
        for word in (*CANARY.split(), str(canary_notes.parent)):
            assert word not in text


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("client.site_units.load_notes", Reason.INTERNAL),
        ("client.training.authorise", Reason.INTERNAL),
        ("client.training.calibrate", Reason.INTERNAL),
        ("client.local_steps.poisson_sample", Reason.TRAINING_FAILED),
        ("client.privacy.per_note.memory_saving_losses", Reason.TRAINING_FAILED),
        ("client.local_steps.noised_mean", Reason.TRAINING_FAILED),
        ("client.training.Gate.release", Reason.TRAINING_FAILED),
        ("client.local_steps.SharedNumbers.counts", Reason.TRAINING_FAILED),
        ("client.app.pack_result", Reason.INTERNAL),
    ],
)
def test_an_exception_that_quotes_a_note_is_not_heard_outside(
    place: str,
    reason: Reason,
    hospital: Install,
    plan: Make,
    starting_point: Start,
    canary_notes: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def quote(*_: object, **__: object) -> None:
        try:
            raise KeyError(CANARY)
        except KeyError as cause:
            raise ValueError(f"cannot handle {CANARY!r} of {canary_notes}") from cause

    monkeypatch.setattr(place, quote)
    caplog.set_level(logging.DEBUG)
    reply = hospital(notes={"path": canary_notes}).ask(plan(), starting_point[0])
    assert refused(reply) is reason
    said = capfd.readouterr()
    for text in (everything_in(reply), caplog.text, said.out, said.err):
        for word in (*CANARY.split(), str(canary_notes.parent), "cannot handle"):
            assert word not in text
    assert (
        f"ValueError at {Path(__file__).name}:" in caplog.text
    )  # the site can find the place all the same


def test_the_reason_for_unusable_notes_stays_in_the_sites_own_log(
    hospital: Install,
    plan: Make,
    starting_point: Start,
    canary_notes: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    canary_notes.write_text(canary_notes.read_text() + f'{{"text": "{CANARY}\n')
    east = hospital(notes={"path": canary_notes, "on_bad_record": "refuse"})
    reply = east.ask(plan(), starting_point[0])
    assert refused(reply) is Reason.NOTES_UNUSABLE
    assert "notes.jsonl:13: broken JSON" in caplog.text
    assert CANARY not in caplog.text
    assert "notes.jsonl" not in everything_in(reply)


def test_a_plan_of_another_rank_leaves_nothing_behind_for_the_next(
    hospital: Install, plan: Make, starting_point: Start
) -> None:
    """The model stays loaded between messages; the adapter of one plan must not reach another."""
    east = hospital(privacy={"required": False})
    off = {"enabled": False, "clip_norm": 5.0}
    before = tensors_of(east.ask(plan(privacy=off), starting_point[0]))
    spec = AdapterSpec(3, 4.0, starting_point[0].spec.targets)
    larger = {
        n: LowRank(torch.zeros(layer.shape[0], 3), torch.eye(3, layer.shape[1]))
        for n, layer in starting_point[0].layers.items()
    }
    other = plan(privacy=off, adapter={"rank": 3})
    assert {t.shape[1] for t in tensors_of(east.ask(other, Adapter(spec, larger))).values()} == {3}
    after = tensors_of(east.ask(plan(privacy=off), starting_point[0]))
    assert all(after[name].equal(before[name]) for name in before)
