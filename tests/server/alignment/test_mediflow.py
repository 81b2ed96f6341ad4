"""MediFlow-schema files: what is read, what is held out, and what is said of a broken one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from server.alignment.mediflow import (
    Instruction,
    InstructionsError,
    load_instructions,
    require_chat,
)
from tests.conftest import make_tokenizer

Row = dict[str, Any]
Write = Callable[..., Path]


def rows(start: int, end: int, rejected: bool = False) -> list[Row]:
    """Rows with the columns of the data set, of which some are not relied upon."""
    made: list[Row] = []
    for i in range(start, end):
        row = {"instruction": f"Task {i}", "input": f"Note {i}", "output": f"Answer {i}"}
        made.append(row | {"task_type": "summarization", "difficulty_level": "college"})
        if rejected:
            made[-1] |= {"rejected_output": f"Flawed answer {i}", "error_type": "omission"}
    return made


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a folder of JSONL files; keywords are file names without suffix."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def make(**files: list[Row | str]) -> Path:
        folder = tmp_path / "data"
        folder.mkdir(exist_ok=True)
        for name, lines in files.items():
            texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
            (folder / f"{name}.jsonl").write_text("".join(f"{text}\n" for text in texts))
        return folder

    return make


def names(found: tuple[Instruction, ...]) -> list[str]:
    return [row.instruction for row in found]


def test_rows_become_instructions_and_the_last_pairs_are_held_out(write: Write) -> None:
    folder = write(mediflow=rows(0, 20), mediflow_dpo=rows(30, 45, rejected=True))
    found = load_instructions(folder, examples=100, held_out=4)
    assert found.sft[0] == Instruction("Task 0", "Note 0", "Answer 0")
    assert found.dpo[0] == Instruction("Task 30", "Note 30", "Answer 30", "Flawed answer 30")
    assert names(found.held_out) == [f"Task {i}" for i in range(41, 45)]
    assert names(found.dpo) == [f"Task {i}" for i in range(30, 41)]
    assert len(found.sft) == 20
    assert found.source == "data"


def test_an_instruction_is_the_system_turn_and_its_input_the_users() -> None:
    row = Instruction("Summarise.", "Seen today.", "Well.", "Ill.")
    assert row.prompt == [
        {"role": "system", "content": "Summarise."},
        {"role": "user", "content": "Seen today."},
    ]
    assert row.answer("Well.") == [{"role": "assistant", "content": "Well."}]


def test_what_is_held_out_is_in_neither_training_split(write: Write) -> None:
    """The two splits of the data set share their questions."""
    folder = write(mediflow=rows(0, 20), mediflow_dpo=rows(0, 20, rejected=True))
    for own in ([], rows(3, 6, rejected=True)):
        if own:
            write(held_out=own)
        found = load_instructions(folder, examples=100, held_out=3)
        assert len(found.held_out) == 3
        held_out = set(names(found.held_out))
        assert not held_out & set(names(found.sft))
        assert not held_out & set(names(found.dpo))
        assert len(found.sft) == len(found.dpo) == 17
    assert held_out == {"Task 3", "Task 4", "Task 5"}


def test_no_more_is_taken_than_asked_for_and_files_are_read_in_name_order(write: Write) -> None:
    folder = write(
        mediflow_b=rows(10, 20),
        mediflow_a=rows(0, 10),
        mediflow_dpo_a=rows(30, 40, rejected=True),
        held_out=rows(50, 60, rejected=True),
        other=["not even JSON"],
    )
    found = load_instructions(folder, examples=12, held_out=4)
    assert names(found.sft) == [f"Task {i}" for i in range(12)]
    assert len(found.dpo) == 10
    assert names(found.held_out) == [f"Task {i}" for i in range(50, 54)]


def test_a_pair_without_a_flawed_answer_of_its_own_teaches_nothing(write: Write) -> None:
    pairs = rows(0, 12, rejected=True)
    pairs[0]["rejected_output"] = pairs[0]["output"]
    pairs[1]["rejected_output"] = ""
    pairs[2]["rejected_output"] = None
    folder = write(mediflow=rows(20, 30), mediflow_dpo=pairs)
    found = load_instructions(folder, examples=100, held_out=4)
    assert names(found.dpo) == [f"Task {i}" for i in range(3, 8)]


SECRET = "Jane Roe has gout"


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([*rows(0, 9), {"instruction": SECRET, "input": "x"}], "row 10: output missing or no text"),
        ([*rows(0, 9), {"instruction": SECRET, "input": "x", "output": 3}], "row 10: output"),
        ([*rows(0, 9), {"instruction": SECRET, "input": None, "output": "x"}], "row 10: input"),
        ([{"instruction": {"text": SECRET}, "input": "x", "output": "x"}], "row 1: instruction"),
        ([f'{{"instruction": "{SECRET}', *rows(0, 9)], "not one JSON object a line"),
        ([], "not one JSON object a line"),
        ([[SECRET]], "row 1: instruction missing"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_but_not_quoted(
    write: Write, lines: list[Row | str], expected: str
) -> None:
    folder = write(mediflow=lines, mediflow_dpo=rows(30, 45, rejected=True))
    with pytest.raises(InstructionsError, match=expected) as error:
        load_instructions(folder, examples=100, held_out=4)
    assert str(error.value).startswith("mediflow.jsonl")
    assert "\n" not in str(error.value)
    assert SECRET not in str(error.value)


def test_another_encoding_is_said_to_be_one(write: Write) -> None:
    folder = write(mediflow_dpo=rows(30, 45, rejected=True))
    line = json.dumps(rows(0, 1)[0], ensure_ascii=False).replace("Note", "Caf\u00e9")
    (folder / "mediflow.jsonl").write_bytes(line.encode("latin-1") + b"\n")
    with pytest.raises(InstructionsError, match=r"mediflow.jsonl.*not"):
        load_instructions(folder, examples=100, held_out=4)


def test_a_folder_without_both_splits_is_refused(write: Write, tmp_path: Path) -> None:
    for folder in (tmp_path / "nowhere", write(mediflow=rows(0, 9))):
        with pytest.raises(InstructionsError, match=r"needs files mediflow\*.jsonl and"):
            load_instructions(folder, examples=9, held_out=4)


def test_too_few_rows_to_hold_any_out_are_refused(write: Write) -> None:
    folder = write(mediflow=rows(0, 9), mediflow_dpo=rows(30, 34, rejected=True))
    with pytest.raises(InstructionsError, match="too few rows"):
        load_instructions(folder, examples=9, held_out=4)


def test_a_hub_that_cannot_be_reached_is_said_to_be_so() -> None:
    """HF_HUB_OFFLINE is set for all tests."""
    with pytest.raises(InstructionsError, match=r"use alignment.path=FOLDER"):
        load_instructions(None, examples=9, held_out=4)


@pytest.mark.parametrize(
    ("template", "line"),
    [
        (None, "the model's tokenizer has no chat template"),
        (
            "{{ raise_exception('no system role') }}",
            r"does not take a system, a user and an assistant turn \(no system role\)",
        ),
    ],
)
def test_a_model_that_takes_no_instructions_is_told(template: str | None, line: str) -> None:
    tokenizer = make_tokenizer()
    require_chat(tokenizer)
    tokenizer.chat_template = template
    with pytest.raises(InstructionsError, match=line):
        require_chat(tokenizer)
