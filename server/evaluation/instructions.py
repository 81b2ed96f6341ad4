"""Held-out instructions: likelihood of the right answer, and whether it beats the flawed one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from adapters.likelihood import pad_right, token_losses
from server.alignment.mediflow import Instruction, InstructionsError

_BATCH = 4


@torch.no_grad()
def score_instructions(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Instruction],
    max_tokens: int,
) -> dict[str, Any]:
    """Loss in nats per answer token, its perplexity, and the share of pairs ranked right.

    A pair is ranked right when the answer is likelier per token than the rejected one; answers of
    different lengths would otherwise be compared by length. Rows whose prompt leaves no room for
    an answer are skipped; InstructionsError where that leaves none.
    """
    nats, tokens, right, pairs = 0.0, 0, 0, 0
    for start in range(0, len(rows), _BATCH):
        part = rows[start : start + _BATCH]
        chosen = answer_losses(model, tokenizer, [(r, r.output) for r in part], max_tokens)
        rejected = answer_losses(model, tokenizer, [(r, r.rejected) for r in part], max_tokens)
        for (good, n), (bad, m) in zip(chosen, rejected, strict=True):
            if n == 0 or m == 0:
                continue
            nats, tokens = nats + good, tokens + n
            right, pairs = right + (good / n < bad / m), pairs + 1
    if pairs == 0:
        raise InstructionsError(
            f"alignment.max_tokens={max_tokens}: no held-out instruction leaves room for an answer"
        )
    loss = nats / tokens
    return {
        "loss": loss,
        "perplexity": math.exp(loss),
        "preference_accuracy": right / pairs,
        "examples": pairs,
    }


def answer_losses(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[tuple[Instruction, str]],
    max_tokens: int,
) -> list[tuple[float, int]]:
    """Summed loss in nats and number of answer tokens for each (instruction, answer)."""
    coded, starts = [], []
    for row, answer in rows:
        prompt = tokenizer.apply_chat_template(
            row.prompt, add_generation_prompt=True, tokenize=False
        )
        whole = tokenizer.apply_chat_template(
            row.prompt + Instruction.answer(answer), tokenize=False
        )
        starts.append(len(tokenizer(prompt, add_special_tokens=False).input_ids))
        coded.append(tokenizer(whole, add_special_tokens=False).input_ids[:max_tokens])
    ids, lengths = pad_right(coded)
    losses, mask = token_losses(model, ids, lengths)
    out = []
    for i, start in enumerate(starts):
        answer_part = mask[i].clone()
        answer_part[: start - 1] = False  # losses[t] predicts token t + 1
        out.append((float(losses[i][answer_part].sum()), int(answer_part.sum())))
    return out
