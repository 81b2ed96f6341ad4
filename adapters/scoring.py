"""Held-out likelihood of texts: perplexity and bits per character.

Only the first ``max_tokens`` tokens of a text are scored, the same public window for every model.
Bits per character divide by the characters those tokens cover, so models with different
tokenizers can be compared; the first token has no context and is not scored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from adapters.likelihood import pad_right, token_losses

_BATCH = 8


@dataclass(frozen=True)
class TextScore:
    """Summed negative log-likelihood in nats over ``tokens`` tokens that cover ``chars``."""

    nats: float
    tokens: int
    chars: int

    @property
    def perplexity(self) -> float:
        """exp of the mean loss per token."""
        return math.exp(self.nats / self.tokens)

    @property
    def bits_per_char(self) -> float:
        """Mean loss per character in bits."""
        return self.nats / math.log(2) / self.chars

    def __add__(self, other: TextScore) -> TextScore:
        return TextScore(
            self.nats + other.nats, self.tokens + other.tokens, self.chars + other.chars
        )


@torch.no_grad()
def score_texts(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_tokens: int
) -> TextScore:
    """Total score of the texts; a text of fewer than two tokens adds nothing.

    Raises ValueError when nothing could be scored.
    """
    windows = []
    chars = 0
    for text in texts:
        window, covered = _window(tokenizer, text, max_tokens)
        if len(window) > 1 and covered:
            windows.append(window)
            chars += covered
    if not windows:
        raise ValueError("no text long enough to be scored")
    windows.sort(key=len)
    nats, tokens = 0.0, 0
    for start in range(0, len(windows), _BATCH):
        ids, lengths = pad_right(windows[start : start + _BATCH])
        losses, mask = token_losses(model, ids, lengths)
        nats += float(losses.double().sum())
        tokens += int(mask.sum())
    return TextScore(nats, tokens, chars)


def _window(
    tokenizer: PreTrainedTokenizerBase, text: str, max_tokens: int
) -> tuple[list[int], int]:
    """The first tokens of a text, and how many characters those cover that have a context.

    A tokenizer in Python (BioGPT's) does not know which they are; they are counted as what its
    tokens stand for.
    """
    if not tokenizer.is_fast:
        ids = tokenizer(text, truncation=True, max_length=max_tokens).input_ids
        read = text if len(ids) < max_tokens else tokenizer.decode(ids, skip_special_tokens=True)
        return ids, len(read) - len(tokenizer.decode(ids[:1], skip_special_tokens=True))
    coded = tokenizer(text, truncation=True, max_length=max_tokens, return_offsets_mapping=True)
    spans = coded.offset_mapping  # (0, 0) of a special token, which may be the first or the last
    return coded.input_ids, max(end for _, end in spans) - spans[0][1] if spans else 0
