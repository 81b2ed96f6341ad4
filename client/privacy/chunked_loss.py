"""Note losses without the logits of a whole micro-batch.

A vocabulary of 49,152 makes the logits, not the model, the peak of memory. Here hidden states meet
the vocabulary projection a few hundred tokens at a time, and the gradient with respect to them is
formed on the spot, while the chunk's softmax is at hand:

    d nll_t / d h_t = W^T (softmax(W h_t) - onehot(y_t))

Same multiplications as the usual way, in the same precision; the projection itself must be frozen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from adapters.likelihood import note_losses

NoteLosses = Callable[[Tensor, Tensor], Tensor]  # ids (n, T), lengths (n) -> losses (n)

_CHUNK = 256  # tokens whose logits exist at a time
_SMALLEST = -80.0  # log probability, of which exp is still a normal float32
_PROBE = (3, 1, 2, 5, 4, 2)  # token ids every vocabulary has


def memory_saving_losses(model: PeftModel) -> NoteLosses:
    """``adapters.likelihood.note_losses`` of ``model``, chunked where its head allows that.

    Falls back to the plain form when the head is adapted, has a bias, or when the model does more
    to its hidden states than project them (a probe compares the two).
    """

    def plain(ids: Tensor, lengths: Tensor) -> Tensor:
        return note_losses(model, ids, lengths)

    causal = cast(PreTrainedModel, model.get_base_model())
    head = causal.get_output_embeddings()
    trunk = getattr(causal, causal.base_model_prefix, None)
    if trunk is None or type(head) is not nn.Linear or head.bias is not None:
        return plain
    if head.weight.requires_grad:
        return plain
    weight = head.weight

    def chunked(ids: Tensor, lengths: Tensor) -> Tensor:
        ids, lengths = ids.to(weight.device), lengths.to(weight.device)
        hidden = trunk(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        positions = torch.arange(1, ids.shape[1], device=ids.device)
        mask = positions[None, :] < lengths[:, None]
        nll = _ChunkedNll.apply(hidden.flatten(0, 1), weight, ids[:, 1:].flatten())
        losses = torch.where(mask, nll.view(mask.shape), 0.0)
        return losses.sum(1) / mask.sum(1).clamp(min=1)

    probe, length = torch.tensor([_PROBE]), torch.tensor([len(_PROBE)])
    with torch.no_grad():
        one, other = chunked(probe, length), plain(probe, length)
    return chunked if torch.allclose(one, other, rtol=1e-3, equal_nan=True) else plain


class _ChunkedNll(torch.autograd.Function):
    """Hidden states (N, d), weight (V, d), targets (N) -> negative log-likelihoods (N)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        needed = ctx.needs_input_grad[0]
        losses, gradients = [], []
        count = len(targets)
        if count > _CHUNK:  # every chunk of one shape: where a note lies must not change its bits
            more = -count % _CHUNK
            hidden, targets = F.pad(hidden, (0, 0, 0, more)), F.pad(targets, (0, more))
        for h, y in zip(hidden.split(_CHUNK), targets.split(_CHUNK), strict=True):
            logits = F.linear(h, weight).float()
            log_sum = logits.logsumexp(1)
            picked = logits.gather(1, y[:, None]).squeeze(1)
            losses.append(log_sum - picked)
            if needed:
                # Below, exp would be denormal, which takes ten times as long: time would tell.
                p = logits.sub_(log_sum[:, None]).clamp_(min=_SMALLEST).exp_()
                p.scatter_add_(1, y[:, None], p.new_full((len(y), 1), -1.0))
                gradients.append(p.to(weight.dtype) @ weight)
        if needed:
            ctx.save_for_backward(torch.cat(gradients)[:count])
        return torch.cat(losses)[:count]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[:, None].to(gradient.dtype), None, None
