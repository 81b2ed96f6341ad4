"""Losses and scores do not depend on batch mates, padding or batch size."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tokenizers import processors
from transformers import ByT5Tokenizer

from adapters.base_model import load_base
from adapters.likelihood import note_losses, pad_right
from adapters.scoring import TextScore, score_texts
from conf.schema import ModelSettings
from tests.conftest import make_tokenizer

ROWS = [[4, 8, 15, 16, 23, 42], [7, 7, 3], [9, 1], [5]]


@pytest.fixture(scope="module")
def base(tiny_model: Path):
    return load_base(ModelSettings(source="path", path=str(tiny_model)))


def test_note_loss_is_the_mean_over_its_own_tokens(base) -> None:
    batched = note_losses(base.model, *pad_right(ROWS))
    for row, loss in zip(ROWS, batched, strict=True):
        if len(row) < 2:
            assert float(loss) == 0.0
            continue
        ids = torch.tensor([row])
        alone = F.cross_entropy(base.model(input_ids=ids).logits[0, :-1], ids[0, 1:])
        assert float(loss) == pytest.approx(float(alone), abs=1e-5)


@pytest.mark.parametrize("fill", [0, 1, 250])
def test_the_padding_token_is_never_read(base, fill: int) -> None:
    assert torch.allclose(
        note_losses(base.model, *pad_right(ROWS, fill)),
        note_losses(base.model, *pad_right(ROWS)),
        atol=1e-6,
    )


def test_score_is_the_sum_over_texts_and_counts_their_characters(base) -> None:
    texts = ["the patient was seen today", "given aspirin", "x" * 400]
    together = score_texts(base.model, base.tokenizer, texts, 32)
    apart = sum(
        (score_texts(base.model, base.tokenizer, [t], 32) for t in texts), TextScore(0.0, 0, 0)
    )
    assert together.tokens == apart.tokens
    assert together.chars == apart.chars
    assert together.nats == pytest.approx(apart.nats, rel=1e-5)
    assert together.perplexity == pytest.approx(math.exp(together.nats / together.tokens))
    assert together.bits_per_char == pytest.approx(together.nats / math.log(2) / together.chars)
    assert together.chars < sum(map(len, texts))  # the window, not the whole text


def test_nothing_to_score_is_an_error(base) -> None:
    with pytest.raises(ValueError, match="long enough"):
        score_texts(base.model, base.tokenizer, [""], 32)


def test_special_tokens_at_either_end_cover_no_characters(base) -> None:
    text = "the patient was seen today"
    plain = score_texts(base.model, base.tokenizer, [text], 512)
    ends = make_tokenizer()
    core = ends.backend_tokenizer
    core.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>",
        special_tokens=[(t, core.token_to_id(t)) for t in ("<|im_start|>", "<|im_end|>")],
    )
    framed = score_texts(base.model, ends, [text], 512)
    first = base.tokenizer.decode(base.tokenizer(text).input_ids[:1])
    assert plain.chars == len(text) - len(first)  # it has no context, and is not scored
    assert (framed.chars, framed.tokens) == (len(text), plain.tokens + 2)
    with pytest.raises(ValueError, match="no text long enough"):
        score_texts(base.model, ends, [""], 512)


def test_a_tokenizer_in_python_is_scored_too(base) -> None:
    slow = ByT5Tokenizer()
    assert not slow.is_fast
    whole = score_texts(base.model, slow, ["aspirin 100 mg"], 512)
    assert (whole.chars, whole.tokens) == (13, 14)  # a token for each byte and one for the end
    cut = score_texts(base.model, slow, ["aspirin 100 mg"], 8)
    assert (cut.chars, cut.tokens) == (6, 7)
