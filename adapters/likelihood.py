"""Likelihood of a text under a model: the loss that training and evaluation share.

The loss of a note is the mean over its OWN tokens. The loss that Transformers returns averages
over all tokens of the batch; with it one note's gradient depends on the lengths of the others, so
clipping no longer bounds anyone's influence. Padding is on the right and masked by length, never
by pad id (the pad token may be the end-of-turn token), and no attention mask is passed: with
causal attention a right pad cannot reach an earlier token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_CHUNK = 2048  # tokens whose logits exist at a time


def pad_right(rows: Sequence[Sequence[int]], fill: int = 0) -> tuple[Tensor, Tensor]:
    """Token rows -> ids (n, T) and lengths (n); ``fill`` is never read by the loss."""
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.long)
    ids = torch.full((len(rows), max(1, int(lengths.max()))), fill, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
    return ids, lengths


def token_losses(model: nn.Module, ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood in nats of tokens 1..T-1 given their past, and the mask of real ones.

    ``ids`` (n, T), ``lengths`` (n) -> losses (n, T-1), zero where masked, and mask (n, T-1).
    Logits are formed for at most 2,048 tokens at a time when no gradient is needed.
    """
    ids = ids.to(next(model.parameters()).device)
    positions = torch.arange(1, ids.shape[1], device=ids.device)
    mask = positions[None, :] < lengths.to(ids.device)[:, None]
    rows = max(1, _CHUNK // ids.shape[1]) if not torch.is_grad_enabled() else len(ids)
    parts = []
    for chunk in ids.split(rows):
        logits = model(input_ids=chunk, use_cache=False).logits[:, :-1].float()
        # Not cross_entropy: on the CPU its sum over 49,152 classes is naive where they are strided
        # (a token's loss off by 2e-4), and its gradient is 13 times less accurate where not.
        picked = logits.gather(2, chunk[:, 1:, None]).squeeze(2)
        parts.append(logits.logsumexp(2) - picked)
    return torch.cat(parts) * mask, mask


def note_losses(model: nn.Module, ids: Tensor, lengths: Tensor) -> Tensor:
    """Mean loss in nats per token of each row, (n); a row of fewer than two tokens gives 0."""
    losses, mask = token_losses(model, ids, lengths)
    return losses.sum(1) / mask.sum(1).clamp(min=1)
