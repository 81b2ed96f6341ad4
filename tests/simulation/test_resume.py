"""A run that ends early, wherever it does, goes on from there to the same end."""

from __future__ import annotations

import io
import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

import wardround
from conf.load import load
from conf.schema import RunSettings
from server import rounds
from server.run_folder import RunFolder
from simulation import run as simulation_run
from simulation.run import new_run_folder, open_run, simulate

Main = Callable[..., int]


@pytest.fixture
def command(
    without_ray: list[str], options: tuple[str, ...], mediflow_folder: Path, tmp_path: Path
) -> list[str]:
    """``wardround simulate`` with alignment and without noise."""
    wanted = [o for o in options if o != "alignment=none"]
    return [
        "simulate", *wanted, "privacy=none", f"runs={tmp_path / 'runs'}",
        "alignment=mediflow", f"alignment.path={mediflow_folder}", "alignment.examples=8",
        "alignment.held_out=4", "alignment.max_tokens=96", "alignment.rank=2",
        "alignment.sft.steps=1", "alignment.dpo.steps=1", "alignment.dpo.batch=2",
    ]  # fmt: skip


def only_run(tmp_path: Path) -> RunFolder:
    """The run folder that the command made."""
    (folder,) = (tmp_path / "runs").iterdir()
    return RunFolder(folder)


def interrupted(*_: Any, **__: Any) -> Any:
    """What Ctrl-C does at any point."""
    raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["train_alone", "align", "score_instructions", "write_report"])
def test_what_was_finished_is_not_done_again(
    where: str,
    command: list[str],
    without_ray: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(simulation_run, where, interrupted)
        assert wardround.main(command) == 130
    assert "wardround: stopped; nothing that was finished is lost" in capsys.readouterr().err
    folder = only_run(tmp_path)
    assert not (folder.path / "report.html").exists()
    before = {f: f.stat().st_mtime_ns for f in (folder.path / "adapters").rglob("*") if f.is_file()}
    assert wardround.main(["simulate", f"resume={folder.path}"]) == 0
    assert without_ray == [folder.name]  # the rounds were run once
    assert {file: file.stat().st_mtime_ns for file in before} == before
    summary = json.loads((folder.path / "summary.json").read_text())
    assert summary["alignment"]["dpo"]["steps"] == 1
    assert all(set(h["perplexity"]) == {"base", "local", "merged", "aligned"}
               for h in summary["hospitals"].values())  # fmt: skip
    assert (folder.path / "release" / "README.md").exists()
    assert (folder.path / "report.html").exists()


def test_rounds_that_were_cut_short_go_on_and_give_the_same(
    without_ray: list[str],
    options: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = [*options, "privacy=none", "evaluation.alone=false", "federation.rounds=3"]
    settings = load("simulate", wanted, RunSettings)
    quiet = Console(file=io.StringIO())
    whole = simulate(settings, RunFolder(tmp_path / "whole"), quiet)

    finish, done = RunFolder.finish_round, threading.Event()

    def once(self: RunFolder, record: dict[str, Any]) -> None:
        if record["round"] == 2 and not done.is_set():
            done.set()
            raise rounds.RoundFailed("stopped on request")
        finish(self, record)

    monkeypatch.setattr(RunFolder, "finish_round", once)
    folder = RunFolder(tmp_path / "parts")
    with pytest.raises(rounds.RoundFailed):
        simulate(settings, folder, quiet)
    assert len(folder.finished_rounds()) == 1
    resumed = simulate(folder.settings(), folder, quiet)
    assert without_ray == ["whole", "parts", "parts"]
    assert resumed["hospitals"] == whole["hospitals"]
    assert RunFolder(tmp_path / "whole").global_adapter().fingerprint() == (
        folder.global_adapter().fingerprint()
    )


def test_rounds_that_end_early_are_no_success(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("simulation.flower.run_rounds", lambda *_: None)
    assert wardround.main(command) == 1
    assert re.search(
        r"wardround: rounds ended early, see \S+flower\.log\n", capsys.readouterr().err
    )


def test_resume_takes_no_other_option(options: tuple[str, ...], tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run").create(load("simulate", options, RunSettings))
    assert _refusal(folder, "seed=3") == (
        "seed=3: resume takes its configuration from the run folder, alone"
    )


def test_resume_brings_back_the_configuration_of_the_run(
    options: tuple[str, ...], tmp_path: Path
) -> None:
    started = load("simulate", [*options, "seed=77", "privacy.epsilon=2"], RunSettings)
    folder = RunFolder(tmp_path / "run").create(started)
    overrides = [f"resume={folder.path}"]
    assert open_run(load("simulate", overrides, RunSettings), overrides) == (started, folder)


def test_resume_needs_a_run_folder(tmp_path: Path) -> None:
    assert _refusal(RunFolder(tmp_path)) == (
        f"resume={tmp_path}: no run folder (config.yaml is missing)"
    )


def test_a_configuration_that_is_not_valid_any_more_is_named(
    options: tuple[str, ...], tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path / "run").create(load("simulate", options, RunSettings))
    file = folder.path / "config.yaml"
    config = yaml.safe_load(file.read_text())
    config["privacy"]["epsilon"] = -8
    file.write_text(yaml.safe_dump(config))
    assert _refusal(folder) == f"{file}: privacy.epsilon=-8: input should be greater than 0"


def _refusal(folder: RunFolder, *more: str) -> str:
    overrides = [f"resume={folder.path}", *more]
    with pytest.raises(wardround.ConfigError) as caught:
        open_run(load("simulate", overrides, RunSettings), overrides)
    return str(caught.value)


def test_a_new_run_never_takes_a_folder_that_is_there(tmp_path: Path) -> None:
    paths = []
    for _ in range(3):  # within one second, most likely
        folder = new_run_folder(tmp_path, "sweep")
        folder.path.mkdir()
        paths.append(folder.path)
    assert len(set(paths)) == 3
    assert all(re.fullmatch(r"\d{8}-\d{6}-sweep(-\d)?", path.name) for path in paths)
