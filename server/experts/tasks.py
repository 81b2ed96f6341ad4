"""Tasks: files of held-out texts or instructions, and the score of a model on them.

A line is ``{"text": ...}``, of which all tokens count, or a MediFlow-schema instruction
``{"instruction": ..., "input": ..., "output": ...}``, of which the answer counts, given the rest.
The score is minus bits per character, so that more is better and tokenizers can differ.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adapters import lora
from adapters.adapter import Adapter
from adapters.base_model import BaseModel
from adapters.scoring import TextScore, score_texts
from conf.load import ConfigError
from server.alignment.mediflow import Instruction, require_chat
from server.evaluation.instructions import answer_losses

_BATCH = 4


@dataclass(frozen=True)
class Task:
    """The name of a file without its suffix, and what is in it."""

    name: str
    texts: tuple[str, ...]
    instructions: tuple[Instruction, ...]

    @property
    def digest(self) -> str:
        """SHA-256 of the content, by which the same task is known again."""
        rows = [self.texts, [(i.instruction, i.input, i.output) for i in self.instructions]]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def read_tasks(key: str, paths: Sequence[Path], most: int | None) -> tuple[Task, ...]:
    """One task for each file, of at most its first ``most`` lines.

    Raises ConfigError naming option ``key``, file and line, never quoting the text.
    """
    tasks = tuple(_read(key, path, most) for path in paths)
    names = [task.name for task in tasks]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"{key}: two files are named {min(twice)}; tasks are told apart by name")
    return tasks


def task_score(base: BaseModel, task: Task, max_tokens: int) -> TextScore:
    """Score of the task under the model as it is now.

    Of a text the first ``max_tokens`` tokens count; an instruction that is longer is left out.
    Raises ConfigError when nothing is left, InstructionsError where the model takes none.
    """
    total = TextScore(0.0, 0, 0)
    if task.instructions:
        require_chat(base.tokenizer)
    fitting = [row for row in task.instructions if _fits(base, row, max_tokens)]
    try:
        if task.texts:
            total += score_texts(base.model, base.tokenizer, task.texts, max_tokens)
        for start in range(0, len(fitting), _BATCH):
            part = fitting[start : start + _BATCH]
            with torch.no_grad():
                losses = answer_losses(
                    base.model, base.tokenizer, [(row, row.output) for row in part], max_tokens
                )
            for row, (nats, tokens) in zip(part, losses, strict=True):
                total += TextScore(nats, tokens, len(row.output))
    except ValueError as problem:
        raise ConfigError(f"{task.name}: {problem}") from None
    if total.chars == 0:
        raise ConfigError(f"{task.name}: nothing fits into max_tokens={max_tokens}; raise it")
    return total


def scores_of(
    base: BaseModel, adapter: Adapter | None, tasks: Sequence[Task], max_tokens: int
) -> dict[str, float]:
    """Minus bits per character by task, under base plus adapter (None: the base alone)."""
    with ExitStack() as stack:
        if adapter is not None:
            stack.enter_context(lora.applied(base.model, adapter))
        return {task.name: -task_score(base, task, max_tokens).bits_per_char for task in tasks}


def tokens_digest(base: BaseModel, tasks: Sequence[Task]) -> str:
    """SHA-256 over the token ids that the model is shown of the tasks.

    Another tokenizer or chat template scores otherwise, and so does a template with today's date.
    """
    digest = hashlib.sha256()
    for task in tasks:
        if task.instructions:
            require_chat(base.tokenizer)
        for text in (*task.texts, *(_whole(base, row) for row in task.instructions)):
            digest.update(json.dumps(base.tokenizer(text).input_ids).encode())
    return digest.hexdigest()


def _read(key: str, path: Path, most: int | None) -> Task:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not at U+2028 within a text
    except UnicodeDecodeError:
        raise ConfigError(f"{key}={path}: not UTF-8") from None
    except OSError as problem:
        raise ConfigError(f"{key}={path}: cannot be read ({problem.strerror})") from None
    texts, instructions = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row = _row(line)
        if isinstance(row, str):
            texts.append(row)
        elif row is not None:
            instructions.append(row)
        else:
            raise ConfigError(
                f'{key}={path}: line {number} is neither {{"text": ...}} nor '
                '{"instruction": ..., "input": ..., "output": ...}'
            )
        if len(texts) + len(instructions) == most:
            break
    if not texts and not instructions:
        raise ConfigError(f"{key}={path}: empty")
    return Task(path.stem, tuple(texts), tuple(instructions))


def _row(line: str) -> str | Instruction | None:
    try:
        row: Any = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict):
        return None
    text = row.get("text")
    if isinstance(text, str):
        return text
    parts = [row.get(name) for name in ("instruction", "input", "output")]
    strings = [part for part in parts if isinstance(part, str)]
    return Instruction(*strings) if len(strings) == len(parts) else None


def _fits(base: BaseModel, row: Instruction, max_tokens: int) -> bool:
    length = len(base.tokenizer(_whole(base, row), add_special_tokens=False).input_ids)
    return bool(row.output) and length <= max_tokens


def _whole(base: BaseModel, row: Instruction) -> str:
    turns = row.prompt + Instruction.answer(row.output)
    return str(base.tokenizer.apply_chat_template(turns, tokenize=False))
