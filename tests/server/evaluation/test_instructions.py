"""Held-out instructions, against the definition: one answer at a time, no padding, no batches."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from adapters.base_model import BaseModel, load_base
from conf.schema import ModelSettings
from server.alignment.mediflow import Instruction, InstructionsError
from server.evaluation.instructions import score_instructions

ROWS = tuple(
    Instruction(f"Task {i}: what was given?", note, answer, rejected)
    for i, (note, answer, rejected) in enumerate(
        [
            ("Given aspirin for pain.", "aspirin", "nothing was given to the patient"),
            ("Seen today.", "The patient was seen today and given aspirin for pain.", "No."),
            ("Aspirin 100 mg.", "100 mg of aspirin.", "200 mg of aspirin."),
            ("No complaint, no drug; review in nine weeks.", "None.", "None at all, I think."),
            ("Ibuprofen.", "x", "y"),
        ]
    )
)


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> BaseModel:
    return load_base(ModelSettings(source="path", path=str(tiny_model)))


def answer_loss(
    base: BaseModel, row: Instruction, answer: str, window: int | None = None
) -> tuple[float, int]:
    """Nats of the answer's tokens given all before them, and how many they are: the definition."""
    head = f"<|im_start|>system\n{row.instruction}<|im_end|>\n"
    head += f"<|im_start|>user\n{row.input}<|im_end|>\n<|im_start|>assistant\n"
    prompt = base.tokenizer(head).input_ids
    ids = (prompt + base.tokenizer(f"{answer}<|im_end|>\n").input_ids)[:window]
    with torch.no_grad():
        logs = base.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    nats = -sum(float(logs[t - 1, ids[t]]) for t in range(len(prompt), len(ids)))
    return nats, len(ids) - len(prompt)


def test_one_example_is_scored_on_its_answer_alone(base: BaseModel) -> None:
    for row in ROWS:
        nats, tokens = answer_loss(base, row, row.output)
        found = score_instructions(base.model, base.tokenizer, [row], 400)
        assert found["loss"] == pytest.approx(nats / tokens, rel=1e-5)
        assert found["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
        flawed, length = answer_loss(base, row, row.rejected)
        assert found["preference_accuracy"] == (nats / tokens < flawed / length)
        assert found["examples"] == 1


def test_all_examples_are_scored_per_token_whatever_the_batches(base: BaseModel) -> None:
    good = [answer_loss(base, row, row.output) for row in ROWS]
    bad = [answer_loss(base, row, row.rejected) for row in ROWS]
    found = score_instructions(base.model, base.tokenizer, ROWS, 400)
    assert found["loss"] == pytest.approx(
        sum(n for n, _ in good) / sum(t for _, t in good), rel=1e-5
    )
    right = sum(g / n < b / m for (g, n), (b, m) in zip(good, bad, strict=True))
    assert 0 < right < len(ROWS)  # the test can tell right from wrong
    assert found["preference_accuracy"] == right / len(ROWS)
    assert found["examples"] == len(ROWS)
    again = score_instructions(base.model, base.tokenizer, ROWS[::-1], 400)
    assert again["loss"] == pytest.approx(found["loss"], rel=1e-5)


def test_a_long_answer_counts_as_far_as_it_fits_and_one_without_room_not_at_all(
    base: BaseModel,
) -> None:
    row = ROWS[1]
    nats, tokens = answer_loss(base, row, row.output)
    turns = row.prompt + row.answer(row.output)
    text = base.tokenizer.apply_chat_template(turns, tokenize=False)
    whole = len(base.tokenizer(text).input_ids)
    part, fewer = answer_loss(base, row, row.output, whole - 5)
    assert fewer == tokens - 5
    cut = score_instructions(base.model, base.tokenizer, [row], whole - 5)
    assert cut["loss"] == pytest.approx(part / fewer, rel=1e-5)
    long_prompt = Instruction("Task: " + "what was given? " * 30, "Note.", "aspirin", "nothing")
    found = score_instructions(base.model, base.tokenizer, [long_prompt, row], whole)
    assert found["examples"] == 1
    assert found["loss"] == pytest.approx(nats / tokens, rel=1e-5)


def test_no_example_with_room_for_an_answer_is_said_to_be_so(base: BaseModel) -> None:
    with pytest.raises(InstructionsError, match=r"max_tokens=12: no held-out instruction"):
        score_instructions(base.model, base.tokenizer, ROWS, 12)
