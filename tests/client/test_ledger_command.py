"""``wardround ledger``: what a person sees, and what a board can check without the site."""

from __future__ import annotations

import json
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

import wardround
from client.privacy.accountant import GaussianSteps, calibrate, epsilon, epsilon_rdp
from client.privacy.audit_log import AuditLog, Line
from client.privacy.ledger import Ledger
from conf.commands import LedgerCommand, ServerCommand
from conf.load import load
from conf.policy import SitePolicy

CHARGE = GaussianSteps(1.0, 6.0, 2)


class Person:
    """Types commands and reads what comes back."""

    def __init__(self, site: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.site, self._capsys = site, capsys

    def types(self, action: str, *options: str, code: int = 0) -> str:
        assert wardround.main(["ledger", action, f"site={self.site}", *options]) == code
        captured = self._capsys.readouterr()
        assert captured.out == ""
        return captured.err


@pytest.fixture
def site(policy: Callable[..., SitePolicy], tmp_path: Path) -> SitePolicy:
    """A hospital that has been answered once, failed once and was interrupted once."""
    own = policy(anchor=tmp_path / "elsewhere" / "anchor")
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(own.model_dump(mode="json")))
    return own


@pytest.fixture
def spent(site: SitePolicy) -> SitePolicy:
    with Ledger.of(site) as ledger:
        charges = [
            ledger.reserve((CHARGE,), task=str(n), run="first", round=n, unit="patient")
            for n in (1, 2, 3)
        ]
        ledger.commit(charges[0], b"reply", result="hash")
        ledger.burn(charges[1], "TRAINING_FAILED")
    return site


@pytest.fixture
def person(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> Person:
    monkeypatch.setenv("COLUMNS", "200")
    return Person(tmp_path / "site.yaml", capsys)


def tamper(site: SitePolicy) -> None:
    with sqlite3.connect(site.ledger) as db:
        db.execute("DROP TRIGGER no_update")
        db.execute("UPDATE entry SET mac = 'none' WHERE seq = 1")


def test_show_lists_every_charge_and_the_totals(spent: SitePolicy, person: Person) -> None:
    text = person.types("show")
    rows = [
        re.split(r" *│ *", line)[1:-1] for line in text.splitlines() if line.startswith("│ ")
    ]  # fmt: skip
    charges, (total,) = rows[:3], rows[3:]
    assert [row[5] for row in charges] == ["COMMITTED", "BURNED", "RESERVED"]
    assert {(row[2], row[3], row[6]) for row in charges} == {("invented", "first", "1, 6, 2")}
    after = [epsilon((CHARGE,) * n, 1e-5) for n in (1, 2, 3)]
    assert [row[7] for row in charges] == [f"{e:.3f}" for e in after]
    assert total[:4] == ["invented", "3", "8", f"{after[-1]:.3f}"]
    assert after[-1] < float(total[4]) < after[-1] * 1.4  # RDP is looser


def test_show_draws_a_picture(spent: SitePolicy, person: Person, tmp_path: Path) -> None:
    for name, magic in (("spent.png", b"\x89PNG"), ("spent.svg", b"<?xml")):
        assert str(tmp_path / name) in person.types("show", f"figure={tmp_path / name}")
        assert (tmp_path / name).read_bytes().startswith(magic)


def test_show_and_verify_of_a_ledger_that_does_not_verify(
    spent: SitePolicy, person: Person
) -> None:
    said = person.types("verify").splitlines()
    assert said[0] == "5 entries: chain, MACs and anchor agree"
    assert said[1].startswith("0 lines of the audit log: chain holds")
    tamper(spent)
    problem = "entry 1 was not written with this site key"
    assert person.types("verify", code=1).startswith(f"wardround: {problem}")
    text = person.types("show", code=1)  # what was spent stays visible
    assert text.count("first") == 3
    assert f"shown as it was found, but it does not verify: {problem}" in text


def test_verify_finds_what_is_missing_in_the_audit_log(site: SitePolicy, person: Person) -> None:
    line = Line("in", "TASK", "d" * 64, 1)
    head = AuditLog(site.audit_file).append(line)
    with Ledger.of(site) as ledger:
        ledger.reserve((CHARGE,), task="1", run="first", round=1, unit="patient", audit_head=head)
    assert "\n1 lines of the audit log: chain holds" in person.types("verify")
    site.audit_file.unlink()
    AuditLog(site.audit_file).append(line)  # begun anew
    assert "lines are missing, 1 of them known to the ledger" in person.types("verify", code=1)


def test_show_of_a_ledger_without_its_key(spent: SitePolicy, person: Person) -> None:
    spent.ledger.with_name(spent.ledger.name + ".key").unlink()
    text = person.types("show", code=1)
    assert text.count("first") == 3
    assert "the site key of this ledger is missing: put it back from your backup" in text


@pytest.mark.parametrize("action", ["show", "verify", "export"])
def test_looking_at_a_ledger_that_is_not_there_does_not_make_one(
    action: str, site: SitePolicy, person: Person, tmp_path: Path
) -> None:
    text = person.types(action, f"out={tmp_path / 'out'}", code=1)
    assert "no ledger yet; the first private round makes it" in text
    assert "spent so far: epsilon 0.000 of 8" in person.types("plan", "plan.sampling_rate=1")
    assert not list(tmp_path.glob("*.sqlite*"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("action", ["show", "verify", "export", "plan"])
def test_a_ledger_that_has_vanished_is_missed_and_not_made_again(
    action: str, spent: SitePolicy, person: Person, tmp_path: Path
) -> None:
    """Its key is still there. An empty one in its place would hide the loss."""
    spent.ledger.unlink()
    assert spent.anchor
    spent.anchor.unlink()
    for _ in range(2):
        text = person.types(action, f"out={tmp_path / 'out'}", code=1)
        assert text.startswith(f"wardround: {spent.ledger}: ")
        assert "no ledger yet" not in text
    assert not spent.ledger.exists()


# --- plan --------------------------------------------------------------------------------------


def test_a_plan_is_priced_with_what_the_policy_adds_to_it(
    policy: Callable[..., SitePolicy], person: Person
) -> None:
    """As its rounds would be charged: numbers that leave noised, and the floor of noise."""
    own = policy(
        share={"counts": "noised", "scores": "noised"}, privacy={"min_noise_multiplier": 7.0}
    )
    person.site.write_text(yaml.safe_dump(own.model_dump(mode="json")))
    text = person.types("plan", "plan.rounds=3", "plan.local_steps=2", "plan.sampling_rate=1")
    beside = (GaussianSteps(1.0, 10.0, 2), GaussianSteps(1.0, 10.0, 3))
    after = epsilon((*beside, GaussianSteps(1.0, 7.0, 6)), 1e-5)
    assert f"noise 7: epsilon {after:.3f} after it" in text
    assert "noise is raised to 7, privacy.min_noise_multiplier" in text
    assert "shares noised are counted in" in text


def test_statistics_are_priced_as_one_more_step_a_round(
    policy: Callable[..., SitePolicy], person: Person
) -> None:
    size = ("plan.rounds=3", "plan.local_steps=2", "plan.sampling_rate=1", "plan.statistics=true")
    person.site.write_text(yaml.safe_dump(policy().model_dump(mode="json")))
    refused = person.types("plan", *size, code=2)
    assert "plan.statistics=true: share.statistics of " in refused
    assert "is never, so such a plan is refused" in refused
    own = policy(share={"statistics": "noised"})
    person.site.write_text(yaml.safe_dump(own.model_dump(mode="json")))
    text = person.types("plan", *size, "plan.noise_multiplier=9")
    after = epsilon((GaussianSteps(1.0, 9.0, 9),), 1e-5)
    assert f"3 x 3 steps at q=1 (statistics are one of them), noise 9: epsilon {after:.3f}" in text


def test_what_a_server_asks_by_default_is_priced_by_default() -> None:
    server = load("server", [], ServerCommand)
    plan = load("ledger", [], LedgerCommand).plan
    federation, privacy = server.federation, server.privacy
    assert (plan.rounds, plan.local_steps) == (federation.rounds, federation.local_steps)
    assert (plan.sampling_rate, plan.epsilon) == (privacy.sampling_rate, privacy.epsilon)
    assert plan.delta == privacy.delta


@pytest.mark.parametrize(
    ("limits", "asked"),
    [
        ({"epsilon": 3.0}, "plan.epsilon=8: privacy.epsilon of {site} is 3"),
        ({"delta": 1e-6}, "plan.delta=1e-05: privacy.delta of {site} is 1e-06"),
        ({"max_sampling_rate": 0.1}, "plan.sampling_rate=0.25: privacy.max_sampling_rate of"),
    ],
)
def test_a_plan_that_the_policy_refuses_is_not_said_to_fit(
    limits: dict[str, float], asked: str, policy: Callable[..., SitePolicy], person: Person
) -> None:
    person.site.write_text(yaml.safe_dump(policy(privacy=limits).model_dump(mode="json")))
    said = person.types("plan", code=2)
    assert asked.format(site=person.site) in said
    assert "so such a plan is refused" in said
    (within,) = (f"plan.{k.removeprefix('max_')}={v}" for k, v in limits.items())
    assert "epsilon" in person.types("plan", within)


def test_a_plan_is_priced_at_its_own_delta(
    policy: Callable[..., SitePolicy], person: Person
) -> None:
    """As a round does it (``client.training``): the policy's may be larger."""
    own = policy(privacy={"epsilon": 20.0, "delta": 1e-4})
    person.site.write_text(yaml.safe_dump(own.model_dump(mode="json")))
    sigma = calibrate((), 0.25, 4, 8.0, 1e-5)
    assert sigma > calibrate((), 0.25, 4, 8.0, 1e-4)
    assert f"noise {sigma:g}: epsilon " in person.types("plan")


def test_a_plan_of_known_noise_asks_for_no_epsilon(
    policy: Callable[..., SitePolicy], person: Person
) -> None:
    own = policy(privacy={"epsilon": 3.0})
    person.site.write_text(yaml.safe_dump(own.model_dump(mode="json")))
    assert "noise 9: epsilon " in person.types("plan", "plan.noise_multiplier=9")


def test_a_plan_is_priced_on_top_of_what_was_spent(spent: SitePolicy, person: Person) -> None:
    size = ("plan.rounds=3", "plan.local_steps=2", "plan.sampling_rate=1")
    history = (CHARGE,) * 3

    text = person.types("plan", *size, "plan.noise_multiplier=9")
    after = epsilon((*history, GaussianSteps(1.0, 9.0, 6)), 1e-5)
    assert f"noise 9: epsilon {after:.3f} after it" in text

    text = person.types("plan", *size)
    sigma = calibrate(history, 1.0, 6, 8.0, 1e-5)
    assert f"noise {sigma:g}: epsilon " in text

    text = person.types("plan", *size, "plan.epsilon=1")
    assert f"noise {calibrate((), 1.0, 6, 1.0, 1e-5):g}: epsilon " in text


def test_what_does_not_fit_is_told_with_what_would(spent: SitePolicy, person: Person) -> None:
    size = ("plan.rounds=30", "plan.local_steps=10", "plan.sampling_rate=1")
    text = person.types("plan", *size, "plan.noise_multiplier=6", code=1)
    found = re.search(r"(\d+) of its 300 steps fit", text)
    assert found
    fit = int(found[1])
    history = (CHARGE,) * 3
    after = epsilon_rdp((*history, GaussianSteps(1.0, 6.0, 300)), 1e-5)
    assert f"would lead to epsilon {after:.3f} (by RDP)" in text
    assert epsilon((*history, GaussianSteps(1.0, 6.0, fit)), 1e-5) <= 8
    assert epsilon((*history, GaussianSteps(1.0, 6.0, fit + 1)), 1e-5) > 8
    with Ledger.of(spent) as ledger:
        assert ledger.history() == history  # asking is free


def test_a_plan_far_beyond_the_budget_is_not_composed(
    site: SitePolicy, person: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its exact figure would take more than 6 GB."""
    composed: list[int] = []

    def counted(self: Any, times: int) -> Any:
        composed.append(times)
        return compose(self, times)

    compose = PrivacyLossDistribution.self_compose
    monkeypatch.setattr(PrivacyLossDistribution, "self_compose", counted)
    size = ("plan.rounds=500", "plan.local_steps=10", "plan.sampling_rate=0.1")
    text = person.types("plan", *size, "plan.noise_multiplier=0.5", code=1)
    assert " of its 5000 steps fit" in text
    assert max(composed) < 100


# --- the statement -----------------------------------------------------------------------------


@pytest.fixture
def exported(spent: SitePolicy, person: Person, tmp_path: Path) -> Path:
    person.types("export", f"out={tmp_path / 'statement.json'}")
    return tmp_path / "statement.json"


def test_nothing_is_stated_from_a_ledger_beside_which_something_left(
    spent: SitePolicy, person: Person, tmp_path: Path
) -> None:
    spent.ledger.with_name(spent.ledger.name + ".unprotected").write_text("")
    out = tmp_path / "statement.json"
    for words in (("export", f"out={out}"), ("verify",), ("show",)):
        assert "trained on without privacy: this ledger does not hold" in person.types(
            *words, code=1
        )
    assert not out.exists()


def test_a_statement_is_checked_without_the_site(exported: Path, tmp_path: Path) -> None:
    board = tmp_path / "board"
    board.mkdir()
    exported.rename(board / "statement.json")
    for file in (*tmp_path.glob("ledger*"), tmp_path / "site.yaml"):
        file.unlink()
    key = json.loads((board / "statement.json").read_text())["public_key"]
    ended = subprocess.run(
        [sys.executable, "-m", "wardround", "ledger", "check", "file=statement.json",
         f"public_key={key}"],
        cwd=board, capture_output=True, text=True, check=False,
    )  # fmt: skip
    after = epsilon((CHARGE,) * 3, 1e-5)
    assert (ended.returncode, ended.stdout) == (0, "")
    assert ended.stderr.startswith("The signature holds. east, invented, on 2")
    assert f"epsilon {after:.3f} at delta 1e-05 (one unit added or removed)" in ended.stderr


def test_a_statement_has_all_that_an_accountant_needs_and_no_path(
    exported: Path, tmp_path: Path
) -> None:
    text = exported.read_text()
    said = json.loads(text)["statement"]
    charges = [GaussianSteps(**m) for r in said["reservations"] for m in r["mechanisms"]]
    assert epsilon(tuple(charges), said["delta"]) == said["epsilon"]
    assert said["epsilon_rdp"] > said["epsilon"]
    assert [r["state"] for r in said["reservations"]] == ["COMMITTED", "BURNED", "RESERVED"]
    assert {r["unit"] for r in said["reservations"]} == {"patient"}
    assert str(tmp_path) not in text
    assert '"task"' not in text


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda s: s["statement"].update(epsilon=0.1), "the signature does not hold"),
        (lambda s: s["statement"]["reservations"].pop(), "the signature does not hold"),
        (lambda s: s.update(signature="00" * 64), "the signature does not hold"),
        (lambda s: s.update(public_key="11" * 32), "the signature does not hold"),
        (lambda s: s.pop("signature"), "not a statement"),
        (lambda s: s["statement"].update(format="another"), "not a statement"),
    ],
)
def test_a_statement_that_was_changed_does_not_pass(
    exported: Path, person: Person, change: Callable[[dict[str, Any]], object], line: str
) -> None:
    content = json.loads(exported.read_text())
    change(content)
    exported.write_text(json.dumps(content))
    assert person.types("check", f"file={exported}", code=1).startswith(f"wardround: {line}")


def test_a_statement_of_another_hospitals_key_does_not_pass(exported: Path, person: Person) -> None:
    text = person.types("check", f"file={exported}", f"public_key={'0' * 64}", code=1)
    assert text.startswith("wardround: signed with another key: ")


def test_a_site_that_signs_less_than_it_spent_is_found_out(
    spent: SitePolicy, person: Person, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from client.privacy import statement

    with monkeypatch.context() as patch:
        patch.setattr(statement, "epsilon", lambda history, delta: 0.5)
        person.types("export", f"out={tmp_path / 'low.json'}")
    text = person.types("check", f"file={tmp_path / 'low.json'}", code=1)
    assert "it says epsilon 0.500, but its mechanisms cost " in text
