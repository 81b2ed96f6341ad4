"""Numbers beside the adapter, and the audit log, through the ClientApp of a hospital."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from adapters.adapter import Adapter
from adapters.plan import TrainingPlan
from client.app import app
from client.privacy.accountant import GaussianSteps, epsilon
from client.privacy.audit_log import AuditLogError, verify
from client.privacy.metadata import step_noise
from client.refusal import Reason
from transport.wire import digest, pack_task

if TYPE_CHECKING:
    from conftest import Hospital

Make = Callable[..., TrainingPlan]
Install = Callable[..., "Hospital"]
Start = tuple[Adapter, str]

BESIDE = {"patients", "notes", "loss", "score"}
OFF = {"enabled": False}
OPEN = {"required": False}


def facts_of(reply: Message) -> dict[str, Any]:
    return json.loads(str(reply.content.config_records["facts"]["json"]))


def code_of(reply: Message) -> str:
    assert set(reply.content.keys()) == {"refusal"}
    return str(reply.content.config_records["refusal"]["code"])


def lines_of(hospital: Hospital) -> list[dict[str, Any]]:
    file = hospital.policy.audit_file
    assert verify(file) > 0
    return [json.loads(line) for line in file.read_text().splitlines()]


def beside(facts: dict[str, Any]) -> set[str]:
    return {name for name in facts if name.removeprefix("noised_").removesuffix("_std") in BESIDE}


# --- numbers beside the adapter ----------------------------------------------------------------


def test_by_default_no_number_of_patients_notes_or_losses_leaves(
    hospital: Install, plan: Make, starting_point: Start, tmp_path: Path
) -> None:
    assert beside(facts_of(hospital().ask(plan(), starting_point[0]))) == set()
    lax = hospital(privacy=OPEN, ledger=tmp_path / "lax.sqlite")
    assert beside(facts_of(lax.ask(plan(privacy=OFF), starting_point[0]))) == set()


def test_public_numbers_leave_exact_and_uncharged(
    hospital: Install, plan: Make, starting_point: Start, tmp_path: Path
) -> None:
    open_books = {"counts": "public", "losses": "public", "scores": "public"}
    for name, own, asked in (("a", OPEN, OFF), ("b", {}, {})):
        east = hospital(share=open_books, privacy=own, ledger=tmp_path / f"{name}.sqlite")
        facts = facts_of(east.ask(plan(privacy=asked), starting_point[0]))
        assert beside(facts) == BESIDE
        assert 5 < facts["patients"] < 15  # of 15, a fifth held out
        assert facts["notes"] == 2 * facts["patients"]
        assert 4.0 < facts["loss"] < 7.0  # a random model of 300 words: log 300 is 5.7
        assert 4.0 < facts["score"] < 7.0
    with east.ledger() as ledger:
        assert len(ledger.history()) == 1  # the steps


@pytest.mark.parametrize("number", ["counts", "losses", "scores"])
def test_in_a_run_without_privacy_what_should_be_noised_stays_here(
    number: str, hospital: Install, plan: Make, starting_point: Start
) -> None:
    east = hospital(share={number: "noised"}, privacy=OPEN)
    assert beside(facts_of(east.ask(plan(privacy=OFF), starting_point[0]))) == set()


def test_noised_numbers_leave_noised_and_are_charged_with_the_steps(
    hospital: Install, plan: Make, starting_point: Start
) -> None:
    share = {"counts": "noised", "losses": "noised", "scores": "noised", "noise": 20.0}
    east = hospital(share=share)
    first = facts_of(east.ask(plan(), starting_point[0]))
    names = {f"noised_{name}" for name in BESIDE}
    assert beside(first) == names | {f"{name}_std" for name in names}
    assert first["noised_patients_std"] == 20.0
    assert first["noised_notes_std"] == 20.0 * 8  # the policy's cap on a patient's notes
    assert first["noised_score_std"] == pytest.approx(20.0 * 8.0 / (20 * 0.2 / 0.8))
    assert first["noised_loss_std"] == pytest.approx(20.0 * 8.0 / 20 / 2**0.5)  # of two steps
    assert all(type(first[name]) is float for name in beside(first))
    sigma = first["noise_multiplier"]
    with east.ledger() as ledger:
        (entry,) = (e for e in ledger.entries() if e.state == "RESERVED")
        charged = ledger.history()
        assert entry.body["released"] == ["gradient", "loss", "notes", "patients", "score"]
        assert charged == (
            GaussianSteps(1.0, sigma, 2),  # gradients and losses, one mechanism
            GaussianSteps(1.0, 20.0, 2),  # patients and notes
            GaussianSteps(1.0, 20.0, 1),  # score; the plan samples everyone
        )
        assert first["epsilon_spent"] == ledger.spent() == epsilon(charged, 1e-5)
    second = facts_of(east.ask(plan(round=2), starting_point[0]))
    assert beside(second) == {n for n in beside(first) if "score" in n or "loss" in n}
    assert second["epsilon_spent"] <= 8.0
    assert second["noise_multiplier"] == pytest.approx(sigma, rel=0.01)  # room was left for it


def test_the_gradient_carries_the_noise_that_sharing_the_loss_leaves_it(
    hospital: Install, plan: Make, starting_point: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    from client import local_steps

    used: list[float] = []
    real = local_steps.noised_mean

    def watched(total: Any, std: float, *others: Any) -> Any:
        used.append(std)
        return real(total, std, *others)

    monkeypatch.setattr(local_steps, "noised_mean", watched)
    east = hospital(share={"losses": "noised"})
    facts = facts_of(east.ask(plan(privacy={"clip_norm": 0.5}), starting_point[0]))
    charged = facts["noise_multiplier"]
    assert used == [0.5 * step_noise(charged, east.policy.share).gradient] * 2
    assert used[0] > 0.5 * charged


def test_two_hospitals_that_hold_the_same_send_different_noise(
    hospital: Install, plan: Make, starting_point: Start, tmp_path: Path
) -> None:
    share = {"counts": "noised", "losses": "noised", "scores": "noised"}
    one, two = (
        facts_of(
            hospital(share=share, ledger=tmp_path / f"{i}.sqlite").ask(plan(), starting_point[0])
        )
        for i in range(2)
    )
    assert all(one[f"noised_{name}"] != two[f"noised_{name}"] for name in ("loss", "score"))


def test_numbers_that_cost_more_than_is_left_are_refused_before_anything_is_drawn(
    hospital: Install, plan: Make, starting_point: Start
) -> None:
    east = hospital(share={"counts": "noised", "noise": 1.0}, privacy={"epsilon": 1.0})
    reply = east.ask(plan(privacy={"epsilon": 1.0}), starting_point[0])
    assert code_of(reply) == "BUDGET_EXHAUSTED"
    assert east.states() == []


def test_the_site_never_adds_less_noise_than_its_floor(
    hospital: Install, plan: Make, starting_point: Start
) -> None:
    facts = facts_of(hospital(privacy={"min_noise_multiplier": 5.5}).ask(plan(), starting_point[0]))
    assert facts["noise_multiplier"] == 5.5
    assert facts["epsilon_spent"] < 2.0


# --- the audit log -----------------------------------------------------------------------------


def test_a_result_has_one_line_in_and_one_out(
    hospital: Install, plan: Make, starting_point: Start
) -> None:
    east, asked = hospital(share={"counts": "noised"}), plan()
    reply = east.ask(asked, starting_point[0])
    came, left = lines_of(east)
    sent = digest(pack_task(asked, starting_point[0]))
    assert (came["direction"], came["code"], came["run"], came["round"]) == (
        "in", "TASK", "first", 1,
    )  # fmt: skip
    assert (came["digest"], came["bytes"]) == sent
    assert (left["direction"], left["code"], left["run"], left["round"]) == (
        "out", "RESULT", "first", 1,
    )  # fmt: skip
    assert (left["digest"], left["bytes"]) == digest(reply.content)
    assert left["facts"] == list(facts_of(reply))
    text = east.policy.audit_file.read_text()
    for value in (facts_of(reply)["noised_patients"], facts_of(reply)["epsilon_spent"]):
        assert str(value) not in text  # names of facts, no values
    with east.ledger() as ledger:  # and the ledger knows the line
        heads = [e.body["audit_head"] for e in ledger.entries() if e.state == "RESERVED"]
    assert heads == [came["hash"]]
    verify(east.policy.audit_file, heads)
    east.policy.audit_file.write_text("")
    with pytest.raises(AuditLogError, match="1 of them known to the ledger"):
        verify(east.policy.audit_file, heads)


def test_a_refusal_has_one_line_in_and_one_out(
    hospital: Install, plan: Make, starting_point: Start
) -> None:
    east = hospital(coordinator={"runs": "cardiology-*"})
    reply = east.ask(plan(), starting_point[0])
    came, left = lines_of(east)
    assert (came["direction"], came["code"]) == ("in", "TASK")
    assert (left["direction"], left["code"]) == ("out", "RUN_NOT_ALLOWED")
    assert left["reason"] == Reason.RUN_NOT_ALLOWED.value
    assert left["digest"] == digest(reply.content)[0]
    assert left["facts"] == []


@pytest.mark.parametrize("kind", ["train", "evaluate", "query", "train.anything", "query.secrets"])
def test_a_message_that_is_no_task_is_refused_and_has_its_lines_whatever_its_kind(
    kind: str, hospital: Install, plan: Make, starting_point: Start
) -> None:
    east = hospital()
    whole = pack_task(plan(), starting_point[0])
    odd = RecordDict({"plan": ConfigRecord({"json": "{"}), "more": ConfigRecord({"x": [1.5]})})
    contents = [odd, RecordDict()] if kind == "train" else [whole]
    for content in contents:
        message = Message(content, dst_node_id=7, message_type=kind, group_id="1")
        reply = app(message, Context(1, 7, {}, RecordDict(), {}))
        assert code_of(reply) == "PLAN_INVALID"
        came, left = lines_of(east)[-2:]
        assert (came["code"], came["run"], came["digest"]) == (
            "MALFORMED", None, digest(content)[0],
        )  # fmt: skip
        assert left["code"] == "PLAN_INVALID"
    assert len(lines_of(east)) == 2 * len(contents)
    assert east.states() == []


def test_a_bare_record_is_no_task_either(hospital: Install) -> None:
    """Flower delivers what a coordinator's program puts in place of a message's records."""
    east = hospital()
    message = Message(RecordDict(), dst_node_id=7, message_type="train", group_id="1")
    message.__dict__["_content"] = ConfigRecord({"json": "{}"})
    assert code_of(app(message, Context(1, 7, {}, RecordDict(), {}))) == "PLAN_INVALID"
    assert [line["code"] for line in lines_of(east)] == ["MALFORMED", "PLAN_INVALID"]


def test_what_was_shared_once_does_not_leave_when_the_policy_has_changed(
    hospital: Install, plan: Make, starting_point: Start
) -> None:
    """The answer was stored, and lost on its way; meanwhile the hospital shares nothing more."""
    lax = hospital(share={"counts": "public"}, privacy={"epsilon": 20.0})
    told = facts_of(lax.ask(plan(), starting_point[0]))
    assert "patients" in told
    east = hospital(privacy={"epsilon": 20.0})
    again = east.ask(plan(), starting_point[0])
    assert beside(facts_of(again)) == set()  # trained anew, and charged anew
    assert east.states() == ["RESERVED", "COMMITTED"] * 2
    assert facts_of(east.ask(plan(), starting_point[0])) == facts_of(again)
    lax = hospital(share={"counts": "public"}, privacy={"epsilon": 20.0})
    assert facts_of(lax.ask(plan(), starting_point[0])) == told
    assert len(east.states()) == 4


def test_an_internal_error_has_its_line_and_quotes_nothing(
    hospital: Install, plan: Make, starting_point: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    def quote(*_: object, **__: object) -> None:
        raise ValueError("Zyxwvut Quibbleforth")

    monkeypatch.setattr("client.site_units.load_notes", quote)
    east = hospital()
    assert code_of(east.ask(plan(), starting_point[0])) == "INTERNAL"
    assert [line["code"] for line in lines_of(east)] == ["TASK", "INTERNAL"]
    assert "Zyxwvut" not in east.policy.audit_file.read_text()


def test_where_the_log_cannot_be_written_nothing_is_done(
    hospital: Install, plan: Make, starting_point: Start, tmp_path: Path
) -> None:
    folder = tmp_path / "audit"
    folder.mkdir()
    (folder / "file").write_text("")
    for broken in (folder, folder / "file" / "log.jsonl"):  # a folder; a folder that is a file
        east = hospital(audit_log=broken)
        assert code_of(east.ask(plan(), starting_point[0])) == "AUDIT_FAILED"
        assert east.states() == []


def test_a_result_whose_line_cannot_be_written_does_not_leave(
    hospital: Install, plan: Make, starting_point: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    east = hospital()
    real, calls = os.fsync, []

    def full(descriptor: int) -> None:
        """The disk fills up between the line in and the line out."""
        if os.path.realpath(f"/proc/self/fd/{descriptor}") == str(east.policy.audit_file):
            calls.append(descriptor)
            if len(calls) > 1:
                raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    assert code_of(east.ask(plan(), starting_point[0])) == "AUDIT_FAILED"
    assert east.states() == ["RESERVED", "COMMITTED"]  # paid
    assert [line["code"] for line in lines_of(east)] == ["TASK"]
    monkeypatch.setattr(os, "fsync", real)
    tensors = east.ask(plan(), starting_point[0]).content.array_records["adapter"]
    assert len(tensors) > 0  # asked again, the hospital sends what it has paid for
    assert [line["code"] for line in lines_of(east)] == ["TASK", "TASK", "RESULT"]


def test_a_log_that_ends_in_half_a_line_is_not_written_on(
    hospital: Install, plan: Make, starting_point: Start
) -> None:
    east = hospital(coordinator={"runs": "other"})
    east.ask(plan(), starting_point[0])
    log = east.policy.audit_file
    log.write_bytes(log.read_bytes()[:-9])
    assert code_of(east.ask(plan(), starting_point[0])) == "AUDIT_FAILED"
    assert log.read_bytes().count(b"\n") == 1
