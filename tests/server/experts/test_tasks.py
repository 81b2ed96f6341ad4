"""Tasks: what a file holds, how it is scored, and what is said of a bad one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from adapters.adapter import Adapter
from adapters.base_model import BaseModel
from adapters.scoring import score_texts
from conf.load import ConfigError
from server.experts.tasks import read_tasks, scores_of, task_score


def test_a_file_of_texts_is_scored_as_elsewhere(base: BaseModel, task_files: list[Path]) -> None:
    ward, _ = read_tasks("tasks", task_files, None)
    assert (ward.name, len(ward.texts)) == ("ward", 4)
    assert task_score(base, ward, 64) == score_texts(base.model, base.tokenizer, ward.texts, 64)


def test_of_an_instruction_the_answer_counts(base: BaseModel, task_files: list[Path]) -> None:
    """Against one row at a time, its loss computed token by token."""
    _, lab = read_tasks("tasks", task_files, None)
    nats, chars = 0.0, 0
    for row in lab.instructions:
        prompt = base.tokenizer.apply_chat_template(
            row.prompt, add_generation_prompt=True, tokenize=False
        )
        start = len(base.tokenizer(prompt).input_ids)
        ids = base.tokenizer(prompt + row.output + "<|im_end|>\n").input_ids
        logs = base.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        nats -= sum(float(logs[i - 1, ids[i]]) for i in range(start, len(ids)))
        chars += len(row.output)
    score = task_score(base, lab, 512)
    assert score.bits_per_char == pytest.approx(nats / math.log(2) / chars, rel=1e-5)


def test_more_is_better_and_the_model_is_left_as_it_was(
    base: BaseModel, task_files: list[Path], random_adapter: Callable[..., Adapter]
) -> None:
    tasks = read_tasks("tasks", task_files, None)
    before = base.fingerprint
    plain = scores_of(base, None, tasks, 512)
    spoiled = scores_of(base, random_adapter(1, size=5.0), tasks, 512)
    assert list(plain) == ["ward", "lab"]
    assert all(spoiled[name] < plain[name] < 0 for name in plain)
    assert base.fingerprint == before


def test_the_first_lines_are_taken(task_files: list[Path]) -> None:
    ward, lab = read_tasks("tasks", task_files, 2)
    assert (len(ward.texts), len(lab.instructions)) == (2, 2)
    assert ward.digest != read_tasks("tasks", task_files, 3)[0].digest


def test_a_task_is_another_when_anything_in_it_is(tmp_path: Path) -> None:
    row = {"instruction": "read", "input": "sodium", "output": "139"}
    rows = [row, *(row | {name: "other"} for name in row), {"text": "read sodium 139"}]
    digests = set()
    for one in rows:
        (tmp_path / "task.jsonl").write_text(json.dumps(one))
        digests.add(read_tasks("tasks", [tmp_path / "task.jsonl"], None)[0].digest)
    assert len(digests) == len(rows)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "tasks=.*bad.jsonl: empty"),
        ('{"text": "secret"}\n{"words": "secret"}\n', 'line 2 is neither {"text": ...} nor'),
        ('{"text": "secret"}\nsecret\n', "line 2 is neither"),
        ('{"instruction": "secret", "input": "", "output": null}', "line 1 is neither"),
        ("[1]", "line 1 is neither"),
        (b"\xff\xfe", "bad.jsonl: not UTF-8"),
        (None, "bad.jsonl: cannot be read"),
    ],
)
def test_a_bad_file_is_named_with_its_line_and_never_quoted(
    tmp_path: Path, content: str | bytes | None, said: str
) -> None:
    file = tmp_path / "bad.jsonl"
    if content is not None:
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ConfigError, match=said) as found:
        read_tasks("tasks", [file], None)
    assert "secret" not in str(found.value)
    assert "\n" not in str(found.value)


def test_a_line_ends_where_its_file_says(tmp_path: Path) -> None:
    """Not at the other characters that Unicode calls line ends, which JSON lets stand in a text."""
    texts = ["first\u2028second", "a\u0085b", "plain"]
    file = tmp_path / "notes.jsonl"
    rows = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    file.write_bytes("\r\n".join(rows).encode())
    assert read_tasks("tasks", [file], None)[0].texts == tuple(texts)


def test_two_tasks_of_one_name_are_refused(task_files: list[Path]) -> None:
    with pytest.raises(ConfigError, match="two files are named ward"):
        read_tasks("tasks", [task_files[0], task_files[0]], None)


def test_what_does_not_fit_is_said(base: BaseModel, tmp_path: Path) -> None:
    file = tmp_path / "long.jsonl"
    row = {"instruction": "x" * 200, "input": "secret", "output": "y"}
    file.write_text(json.dumps(row))
    with pytest.raises(ConfigError, match="long: nothing fits into max_tokens=16; raise it"):
        task_score(base, read_tasks("tasks", [file], None)[0], 16)
    file.write_text('{"text": "a"}')
    with pytest.raises(ConfigError, match="long: no text long enough"):
        task_score(base, read_tasks("tasks", [file], None)[0], 16)
