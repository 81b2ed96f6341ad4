"""A run that cannot be done ends with one line, and before the work that it would waste."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import wardround
from client.refusal import Reason, Refusal


@pytest.fixture
def command(options: tuple[str, ...], mediflow_folder: Path, tmp_path: Path) -> list[str]:
    """``wardround simulate`` with alignment and without noise."""
    wanted = [o for o in options if o != "alignment=none"]
    return [
        "simulate", *wanted, "privacy=none", "evaluation.alone=false", f"runs={tmp_path / 'runs'}",
        "alignment=mediflow", f"alignment.path={mediflow_folder}", "alignment.examples=8",
        "alignment.held_out=4", "alignment.max_tokens=96", "alignment.sft.steps=1",
        "alignment.dpo.steps=0",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("override", "code", "expected"),
    [
        ("hospitals.count=4", 2, "hospitals.count=4: notes.hospital_field=hospital has only 3"),
        ("notes.holdout=0.001", 2, "hospital east: 0 of its 20 patients are held out"),
        ("model.path=/nowhere", 1, "model.path=/nowhere: no such folder, nor a model of the hub"),
        ("notes.path=/nowhere", 1, "notes.path=/nowhere: no such file or folder"),
        ("notes.text_field=body", 1, "(120 field missing: body)"),
        ("adapter.targets=[c_attn]", 1, "no module of LlamaForCausalLM matches targets=['c_attn']"),
        ("adapter.rank=64", 1, "adapter.rank=64 exceeds the width 32"),
        ("alignment.path=/nowhere", 1, "alignment.path=/nowhere: needs files mediflow*.jsonl and"),
    ],
)
def test_a_mistake_is_told_in_one_line_and_no_hospital_has_trained(
    override: str,
    code: int,
    expected: str,
    command: list[str],
    without_ray: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert wardround.main([*command, override]) == code
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("wardround: ")
    assert expected in said.splitlines()[-1]
    assert said.count("wardround: ") == 1
    assert "Traceback" not in said
    assert not list(tmp_path.glob("runs/*/rounds.jsonl"))
    assert not list(tmp_path.glob("runs/*/release"))


def test_a_merge_by_statistics_without_privacy_is_refused_before_there_is_a_run(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert wardround.main([*command, "strategy=regmean"]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("wardround: strategy=regmean: needs gram statistics, which hospitals")
    assert not (tmp_path / "runs").exists()


def test_targets_of_the_alignment_are_told_apart_from_those_of_the_rounds_and_before_them(
    command: list[str],
    without_ray: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert wardround.main([*command, "alignment.targets=[c_attn]"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("wardround: alignment: no module of LlamaForCausalLM matches")
    assert last.endswith(
        "its linear layers are named down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    )
    assert not (tmp_path / "runs").exists()


def test_a_model_without_a_chat_template_is_told_before_the_rounds(
    command: list[str],
    without_ray: list[str],
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny_model, bare)
    tokenizer = AutoTokenizer.from_pretrained(bare)
    tokenizer.chat_template = None
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(bare)
    assert wardround.main([*command, f"model.path={bare}"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("wardround: the model's tokenizer has no chat template")
    assert not (tmp_path / "runs").exists()


def test_a_path_of_instructions_that_would_not_be_read_is_told(
    command: list[str],
    without_ray: list[str],
    mediflow_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert wardround.main([*command, "alignment.data=synthetic"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == (f"wardround: alignment.path={mediflow_folder}: is read with alignment=mediflow")
    assert not list(tmp_path.glob("runs/*/rounds.jsonl"))


def test_a_folder_that_cannot_be_written_is_told(
    command: list[str],
    without_ray: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "file"
    file.write_text("not a folder")
    assert wardround.main([*command, f"runs={file}"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("wardround: ")
    assert str(file) in said
    assert len(said.splitlines()) == 1


def test_a_bad_record_is_placed_but_never_quoted(
    command: list[str], without_ray: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "notes.jsonl"
    secret = "Jane Roe has a rare disease"
    good = {"text": f"{secret}, and came back today.", "pid": "p1", "hospital": "east"}
    file.write_text(json.dumps(good) + '\n{"text": "' + secret + "\n")
    code = wardround.main([*command, f"notes.path={file}", "notes.on_bad_record=refuse"])
    assert code == 1
    said = capsys.readouterr().err
    assert "notes.jsonl:2: " in said
    assert "rare disease" not in said


def test_every_hospital_that_refuses_is_named_when_too_few_are_left(
    command: list[str],
    without_ray: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("client.training.site_units", _unusable)
    assert wardround.main([*command, "alignment=none"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("wardround: round 1: 0 of at least 1 hospitals answered (")
    for name in ("east", "mid", "west"):
        assert f"{name}: refused: NOTES_UNUSABLE" in last
    assert "the reason stays here" not in last


def _unusable(*_: object) -> None:
    raise Refusal(Reason.NOTES_UNUSABLE, "the reason stays here")
