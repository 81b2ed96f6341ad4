"""The whole audit of a tiny model: the attack sees what is there, and says so in files and code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import simulation.audit.run as run
import wardround
from conf.commands import AuditCommand
from conf.schema import ComputeSettings
from simulation.audit.engine import Engine
from simulation.audit.record import as_record, write_record
from simulation.audit.report import print_audit, write_report
from simulation.audit.run import Audit, audit
from simulation.audit.sabotage import SABOTAGED


@pytest.fixture(scope="module")
def done(tiny_audit: AuditCommand) -> Audit:
    return audit(tiny_audit, Console(quiet=True))


def test_the_installed_code_passes_and_the_attack_works_without_privacy(done: Audit) -> None:
    assert done.problems == ()
    assert [v.as_it_should_be for v in done.verdicts] == [True] * 6
    assert done.without.auc.low > 0.6
    assert done.without.claimed is None
    assert done.private.claimed is not None
    assert 2.5 < done.private.claimed <= 3.0  # what the ledger says, not what was asked for
    assert done.private.auc.low < 0.6 < done.private.auc.high + 0.3
    assert done.private.members + done.private.others == 40 + 100
    assert done.private.members == done.without.members


def test_the_files_hold_numbers_and_nothing_of_a_note(done: Audit, tmp_path: Path) -> None:
    record = json.loads(write_record(done, tmp_path / "audit").read_text())
    assert record["passed"] is True
    assert [e["engine"] for e in record["engines"]] == ["honest", *(e.name for e in SABOTAGED)]
    assert record["engines"][1]["caught_by"] == ["canaries", "noise"]
    assert record["black_box"]["with_privacy"]["claimed"] == done.private.claimed
    page = write_report(done, tmp_path / "audit").read_text()
    assert page.count("<svg") == 2
    assert "<script" not in page
    assert "http" not in page.replace("http://www.w3.org", "")
    for text in ("Visit", "aspirin", "canary-", str(tmp_path)):
        assert text not in page
        assert text not in json.dumps(record)


def test_the_table_fits_a_terminal(done: Audit) -> None:
    console = Console(width=80, record=True, quiet=True)
    console.quiet = False
    with console.capture() as capture:
        print_audit(done, console)
    text = capture.get()
    assert "batch-averaged loss" in text
    assert "passed" in text
    assert max(map(len, text.splitlines())) <= 80


def test_engines_are_tried_as_the_site_computes(
    tiny_audit: AuditCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = ComputeSettings(engine="opacus", micro_tokens=64)
    settings, tried = tiny_audit.model_copy(update={"compute": compute}), []
    monkeypatch.setattr(run, "examine", lambda engine, bench: tried.append(engine))
    ordinary = {"p": ["The patient was seen today and is well, said the nurse on the ward."]}
    run._white_box(settings, ordinary, 1, lambda *_: None)
    assert tried == [engine.under(compute) for engine in (run.HONEST, *run.SABOTAGED)]
    assert tried[0].gradient_sum.keywords == {"engine": "opacus", "micro_tokens": 64}


def test_a_broken_engine_and_a_blind_check_are_problems(
    done: Audit, tiny_audit: AuditCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the engines exchanged, the installed one fails and the sabotaged one is not caught."""
    quarter = Engine("installed", noised=SABOTAGED[0].noised)
    monkeypatch.setattr(run, "HONEST", quarter)
    monkeypatch.setattr(run, "SABOTAGED", (Engine("sound", "none"),))
    ordinary = {"p": ["The patient was seen today and is well, said the nurse on the ward."]}
    verdicts = run._white_box(tiny_audit, ordinary, 1, lambda *_: None)
    told = Audit(**{**vars(done), "verdicts": verdicts}).problems
    assert [line.split(":")[0] for line in told] == [
        "canaries", "noise", "no check caught the sabotaged engine",
    ]  # fmt: skip


@pytest.mark.parametrize("problems", [(), ("noise: 0.75, must be at most 0.01",)])
def test_the_exit_code_says_whether_it_passed(
    done: Audit, problems: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "audit", lambda *_: done)
    monkeypatch.setattr(Audit, "problems", property(lambda _: problems))
    code = wardround.main(["audit", f"out={tmp_path / 'out'}"])
    assert code == (1 if problems else 0)
    assert json.loads((tmp_path / "out" / "audit.json").read_text())["problems"] == list(problems)
    assert (tmp_path / "out" / "audit.html").exists()


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("privacy=none", "privacy=none: there is no promise to audit"),
        ("white_box.canaries=3", "white_box.canaries=3: input should be greater than or equal"),
        ("black_box.controls=5", "black_box.controls=5: input should be greater than or equal"),
    ],
)
def test_a_mistake_is_one_line(option: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert wardround.main(["audit", option]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"wardround: {said}")
    assert err.count("\n") == 1


def test_the_record_is_plain_json(done: Audit) -> None:
    def plain(value: Any) -> bool:
        if isinstance(value, dict):
            return all(isinstance(k, str) and plain(v) for k, v in value.items())
        if isinstance(value, list | tuple):
            return all(map(plain, value))
        return value is None or type(value) in (str, int, float, bool)

    assert plain(as_record(done))
