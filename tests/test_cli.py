"""The command line: help for a person, one line for a mistake, an exit code for a script."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

import wardround
from conf.load import command_help, groups
from server.run_folder import RunFolder

BY_USER = {
    "a researcher": ["simulate", "experts", "tradeoff"],
    "a hospital": ["client", "ledger", "audit", "evaluate"],
    "a coordinator": ["server", "align", "merge", "transfer"],
}
ALL = [name for names in BY_USER.values() for name in names]


def start(arguments: Sequence[str], cwd: Path) -> subprocess.Popen[str]:
    """``wardround`` as a person starts it: in a process group of its own, which hears Ctrl-C.

    What a shell has put into the background ignores it, and so does what that starts.
    """
    return subprocess.Popen(
        [sys.executable, "-m", "wardround", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What ``--help`` prints on standard output."""
    with pytest.raises(SystemExit) as end:
        wardround.main([*arguments, "--help"])
    assert end.value.code == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


@pytest.mark.parametrize("command", [None, *ALL])
def test_help_is_readable(command: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, *filter(None, [command]))
    lines = text.splitlines()
    takes = "FILE.yaml OUT_DIR" if command == "merge" else "[key=value ...]"
    assert text.startswith(f"usage: wardround {command or 'COMMAND'} {takes}")
    assert max(map(len, lines)) <= 100
    assert len(lines) <= 40  # one screen
    assert not re.search(r"\[-\w|\{\w+,|None|<|Namespace", text)  # what argparse says by itself


def test_the_first_help_lists_every_command_with_what_it_does(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = shown(capsys)
    assert list(wardround.COMMANDS) == ALL
    for user, names in BY_USER.items():
        lines = [f"  {name:10} {command_help(name)[0]}" for name in names]
        assert "\n".join([f"for {user}:", *lines]) in text


@pytest.mark.parametrize("command", ALL)
def test_each_help_shows_how_to_call_it(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, command)
    examples = [line for line in text.splitlines() if line.startswith(f"  wardround {command}")]
    assert examples
    assert ("docs/offline-merging.md" if command == "merge" else "conf/") in text
    assert ("--multirun" in text) == (command == "simulate")


def test_the_examples_in_the_help_are_valid(tmp_path: Path) -> None:
    """Every example composes; what stands for a file of the person's own is replaced by one."""
    from conf.commands import (
        AlignCommand,
        AuditCommand,
        ClientCommand,
        EvaluateCommand,
        LedgerCommand,
        ServerCommand,
    )
    from conf.experts import ExpertsCommand, TradeoffCommand, TransferCommand
    from conf.load import load, sweep
    from conf.schema import RunSettings

    kinds = {
        "simulate": RunSettings, "server": ServerCommand, "client": ClientCommand,
        "align": AlignCommand, "evaluate": EvaluateCommand,
        "experts": ExpertsCommand, "tradeoff": TradeoffCommand, "transfer": TransferCommand,
        "ledger": LedgerCommand, "audit": AuditCommand,
    }  # fmt: skip
    checked = 0
    for name in ALL:
        for line in command_help(name)[1].splitlines():
            if not line.startswith(f"  wardround {name}"):
                continue
            words = re.split(r" {3,}", line.strip())[0].split()[2:]
            if name == "merge":  # no options; its example of a recipe is checked with recipes
                continue
            options = [w.replace("HOST:PORT", "host:1") for w in words if "=" in w]
            for job in sweep(options) if "--multirun" in words else [options]:
                load(name, job, kinds[name])  # type: ignore[arg-type]
                checked += 1
    assert checked >= 18


def test_the_help_of_simulate_lists_every_choice(capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(shown(capsys, "simulate").split())
    for group, choices in groups().items():
        assert f"{group}= {' | '.join(choices)}" in text


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on standard error that comes with exit code 2."""
    try:
        code = wardround.main(arguments)
    except SystemExit as end:
        code = end.code  # type: ignore[assignment]
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert captured.err.startswith("wardround: ")
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("wardround: ").strip()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "the following arguments are required: COMMAND; see wardround --help"),
        (["simualte"], "invalid choice: 'simualte' (choose from 'simulate', "),
        (["--version", "simulate"], "unknown option --version; see wardround simulate --help"),
        (["simulate", "--fast"], "unknown option --fast; see wardround simulate --help"),
        (["simulate", "seed=1", "-v"], "unknown option -v; see wardround simulate --help"),
        (["server", "--multirun"], "unknown option --multirun; see wardround server --help"),
        (["simulate", "demo"], "'demo': write an option as key=value"),
        (["simulate", "privcy=none"], "unknown key privcy (=none); there are: adapter, "),
        (["simulate", "privacy.epsilom=3"], "unknown key privacy.epsilom (=3); under privacy "),
        (
            ["simulate", "strategy=fedsdv"],
            "strategy=fedsdv: choose one of breadcrumbs, core_ties, ",
        ),
        (["simulate", "privacy.epsilon=-1"], "privacy.epsilon=-1: input should be greater than 0"),
        (["simulate", "notes=csv"], "notes.path must name the file or folder of notes"),
        (["simulate", "notes=csv", "notes.path=p"], "notes.hospital_field must name the field"),
        (["simulate", "hospitals=by_field"], "notes.hospital_field must name the field that says"),
        (["simulate", "--multirun", "seed=1,x"], "seed=x: input should be a valid integer"),
        (["simulate", "--multirun", "resume=runs/x"], "resume: a single run is gone on with"),
        (["simulate", "resume=nowhere"], "resume=nowhere: no run folder (config.yaml is missing)"),
        (["simulate", "notes=[/]"], "notes=[/]: choose one of clinosim, csv, "),  # no markup
        (["server", "server.port=0"], "server.port=0: input should be greater than or equal to 1"),
        (["client", "client.server=here"], "client.server=here: must be HOST:PORT"),
        (["align"], "adapter must be given; see wardround align --help"),
        (["align", "adapter=a"], "out must be given; see wardround align --help"),
        (["align", "adapter=nowhere", "out=o", "alignment.path=p"], "adapter=nowhere: not a LoRA"),
        (["align", "adapter=a", "out=o", "alignment=synthetic"], "alignment.path must name a fold"),
        (["ledger"], "say what to do: wardround ledger show | verify | plan | export | check"),
        (["ledger", "site=site.yaml"], "say what to do: wardround ledger show | verify | "),
        (["ledger", "check"], "file must be given: the statement to check"),
        (["ledger", "check", "file=nowhere"], "file=nowhere: not a readable statement"),
        (["ledger", "export"], "out must be given: the file for the statement"),
        (["ledger", "show", "figure=a.gif"], "figure=a.gif: must end in .svg, .png or .pdf"),
        (["evaluate"], "adapter must be given; see wardround evaluate --help"),
        (["evaluate", "adapter=nowhere", "notes.path=p"], "adapter=nowhere: not a LoRA folder"),
    ],
)
def test_a_mistake_gives_one_line_and_code_2(
    arguments: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert refused(capsys, *arguments).startswith(expected)
    assert not list(tmp_path.iterdir())  # nothing was begun


def test_a_site_policy_that_is_absent_ends_the_client_with_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert wardround.main(["client", f"site={tmp_path / 'site.yaml'}"]) == 1
    assert capsys.readouterr().err == f"wardround: {tmp_path / 'site.yaml'}: no such site policy\n"


def test_what_the_disk_refuses_is_told_without_a_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (file := tmp_path / "run").touch()
    assert wardround.main(["server", f"run_dir={file}"]) == 1
    assert capsys.readouterr().err == f"wardround: {file}: file exists\n"


def test_another_configuration_is_not_mixed_into_a_federation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from conf.commands import ServerCommand
    from conf.load import load

    run = f"run_dir={tmp_path / 'run'}"
    RunFolder(tmp_path / "run").create(load("server", [run], ServerCommand))
    message = refused(capsys, "server", run, "privacy.epsilon=1")
    assert message.startswith(f"{run}: holds a run with another configuration")
    assert "(privacy.epsilon=8.0)" in message


def test_the_process_ends_with_the_code_and_without_a_traceback(tmp_path: Path) -> None:
    began = time.monotonic()
    process = start(["simulate", "privacy.epsilon=0", "nothing=1"], tmp_path)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert out == ""
    assert err.startswith("wardround: unknown key nothing (=1); there are: ")
    assert err.count("\n") == 1
    assert time.monotonic() - began < 30
    assert not list(tmp_path.iterdir())


def opened_by_a_reader(fifo: Path) -> int:
    """The fifo's writing end, once somebody reads the other: opening it fails until then."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_an_interrupt_ends_the_process_with_code_130_and_one_line(tmp_path: Path) -> None:
    fifo = tmp_path / "notes.jsonl"
    os.mkfifo(fifo)  # reading it waits for ever
    options = [f"notes.path={fifo}", "notes.hospital_field=hospital", "runs=runs"]
    process = start(["simulate", "notes=jsonl", *options], tmp_path)
    assert process.stderr
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(process.stderr or []))
    reader.start()
    writer = opened_by_a_reader(fifo)
    for _ in range(4):  # one that another thread is given does not wake the reader: press again
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=30)
            break
    assert process.returncode == 130
    os.close(writer)
    reader.join(timeout=10)
    assert said[-1] == "wardround: stopped; nothing that was finished is lost\n"
    assert "Traceback" not in "".join(said)


@pytest.mark.slow
def test_an_interrupted_run_stops_within_seconds_leaves_nobody_behind_and_goes_on(
    tiny_model: Path, notes_file: Path, tmp_path: Path
) -> None:
    process = start(
        [
            "simulate", "model=path", f"model.path={tiny_model}", "notes=jsonl",
            f"notes.path={notes_file}", "notes.patient_field=pid", "hospitals=by_field",
            "notes.hospital_field=hospital", "alignment=none", "evaluation=brief", "runs=runs",
            "privacy.max_tokens=24", "privacy.sampling_rate=1", "federation.rounds=4",
        ],
        tmp_path,
    )  # fmt: skip
    deadline = time.monotonic() + 400
    while not (finished := list(tmp_path.glob("runs/*/rounds.jsonl"))):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    family = psutil.Process(process.pid).children(recursive=True)
    assert any("ray" in child.name() for child in family)

    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all in the foreground
    began = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert time.monotonic() - began < 30
    assert err.splitlines()[-1].endswith("wardround: stopped; nothing that was finished is lost")
    assert "Traceback" not in err
    _, alive = psutil.wait_procs(family, timeout=15)
    assert not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]

    folder = RunFolder(finished[0].parent)
    before = folder.finished_rounds()
    assert 1 <= len(before) < 4
    again = start(["simulate", f"resume={folder.path}"], tmp_path)
    _, err = again.communicate(timeout=600)
    assert again.returncode == 0, err
    assert folder.finished_rounds()[: len(before)] == before
    assert len(folder.finished_rounds()) == 4
    assert (folder.path / "report.html").exists()
