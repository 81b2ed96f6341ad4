"""MediFlow-schema instructions: the real data set, or any JSONL files of the same columns.

Two splits: ``mediflow`` for SFT (instruction, input, output) and ``mediflow_dpo`` for DPO, where
the chosen answer is ``output`` and the rejected one ``rejected_output``. The literal values of the
other columns are not relied upon. Schema: the card of microsoft/mediflow (CDLA-Permissive-2.0).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from adapters.base_model import cache_folder

_HUB = "microsoft/mediflow"


class InstructionsError(ValueError):
    """The instruction data cannot be found or read; one line that says what to do."""


@dataclass(frozen=True)
class Instruction:
    """One example; ``rejected`` is empty outside the DPO split."""

    instruction: str
    input: str
    output: str
    rejected: str = ""

    @property
    def prompt(self) -> list[dict[str, str]]:
        """Chat turns before the answer: instruction as system, input as user (MediPhi's layout)."""
        return [
            {"role": "system", "content": self.instruction},
            {"role": "user", "content": self.input},
        ]

    @staticmethod
    def answer(text: str) -> list[dict[str, str]]:
        """The assistant turn with the given text."""
        return [{"role": "assistant", "content": text}]


def require_chat(tokenizer: PreTrainedTokenizerBase) -> None:
    """Return when the model's chat template takes instructions. Raises InstructionsError."""
    if tokenizer.chat_template is None:
        raise InstructionsError(
            "the model's tokenizer has no chat template, in which instructions are put to it: give "
            "it one, or do without instructions"
        )
    row = Instruction("instruction", "input", "output")
    try:
        tokenizer.apply_chat_template(row.prompt + Instruction.answer(row.output), tokenize=False)
    except TemplateError as problem:
        said = " ".join(str(problem).split())[:200]
        raise InstructionsError(
            f"the model's chat template does not take a system, a user and an assistant turn "
            f"({said}): change it, or do without instructions"
        ) from None


@dataclass(frozen=True)
class InstructionSet:
    """Training splits, and held-out pairs that neither stage sees."""

    source: str
    sft: tuple[Instruction, ...]
    dpo: tuple[Instruction, ...]
    held_out: tuple[Instruction, ...]


def load_instructions(path: Path | None, examples: int, held_out: int) -> InstructionSet:
    """Read at most ``examples`` rows a split and ``held_out`` pairs.

    ``path`` is a folder with ``mediflow*.jsonl`` and ``mediflow_dpo*.jsonl`` (and, where there is
    one, ``held_out*.jsonl``; else the last pairs of the DPO split are held out); None asks the hub.
    Raises InstructionsError.
    """
    if path is None:
        sft, dpo = _from_hub("mediflow", examples), _from_hub("mediflow_dpo", examples + held_out)
        return _assemble(_HUB, sft, dpo, [], examples, held_out)
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else []
    dpo_files = [f for f in files if f.name.startswith("mediflow_dpo")]
    sft_files = [f for f in files if f.name.startswith("mediflow") and f not in dpo_files]
    if not sft_files or not dpo_files:
        raise InstructionsError(
            f"alignment.path={path}: needs files mediflow*.jsonl and mediflow_dpo*.jsonl"
        )
    own = [f for f in files if f.name.startswith("held_out")]
    return _assemble(
        path.name,
        _from_files(sft_files),
        _from_files(dpo_files),
        _from_files(own),
        examples,
        held_out,
    )


def _assemble(
    source: str,
    sft: Iterable[Instruction],
    dpo: Iterable[Instruction],
    own: Iterable[Instruction],
    examples: int,
    held_out: int,
) -> InstructionSet:
    pairs = [row for row in dpo if row.rejected and row.rejected != row.output]
    kept_apart = [row for row in own if row.rejected and row.rejected != row.output][:held_out]
    if not kept_apart:
        kept_apart, pairs = pairs[-held_out:], pairs[:-held_out]
    seen = {(row.instruction, row.input) for row in kept_apart}
    training = [row for row in sft if (row.instruction, row.input) not in seen][:examples]
    pairs = [row for row in pairs if (row.instruction, row.input) not in seen][:examples]
    if not training or not pairs or not kept_apart:
        raise InstructionsError(f"{source}: too few rows for training and held-out instructions")
    return InstructionSet(source, tuple(training), tuple(pairs), tuple(kept_apart))


def _from_files(files: list[Path]) -> list[Instruction]:
    if not files:
        return []
    try:
        rows = load_dataset(
            "json",
            data_files=[str(f) for f in files],
            split="train",
            cache_dir=str(cache_folder() / "datasets"),
        )
    except (DatasetGenerationError, ValueError, StopIteration):  # the last: an empty file
        names = ", ".join(f.name for f in files)
        raise InstructionsError(f"{names}: not one JSON object a line") from None
    return _rows(rows, files[0].name)


def _from_hub(split: str, limit: int) -> list[Instruction]:
    try:
        stream = load_dataset(_HUB, split=split, streaming=True)
        return _rows(stream.take(limit), split)
    except InstructionsError:
        raise
    except (OSError, ValueError, ConnectionError):
        raise InstructionsError(
            f"{_HUB} cannot be reached; use alignment.path=FOLDER with its JSONL files"
        ) from None


def _rows(rows: Dataset | Iterable[dict[str, Any]], name: str) -> list[Instruction]:
    out: list[Instruction] = []
    try:
        for row in rows:
            values: dict[str, Any] = {k: row.get(k) for k in ("instruction", "input", "output")}
            values["rejected"] = row.get("rejected_output") or ""
            for key, value in values.items():
                if not isinstance(value, str):
                    raise InstructionsError(f"{name}, row {len(out) + 1}: {key} missing or no text")
            out.append(Instruction(**values))
    except UnicodeDecodeError:
        raise InstructionsError(f"{name}, row {len(out) + 1}: not UTF-8") from None
    return out
