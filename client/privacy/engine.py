"""The private gradient of one step: a sum over patients in which no patient counts for more than C.

    S = sum_u  g_u min(1, C / ||g_u||)          g_u = mean over the unit's notes of grad(note loss)
    gradient = (S + sigma C N(0, I)) / D        D a public constant

Adding or removing one unit moves S by at most C in L2 norm, whatever else is in the batch: the
loss of a note is the mean over its own tokens, a unit's notes are averaged before they are clipped,
and clipping is per unit over all trained parameters together.

Units go through the model one at a time, so that what a unit adds is a function of that unit alone,
bit for bit. In a shared batch float32 rounding depends on the mates, and a hostile adapter (factors
that cancel but for rounding) can amplify that beyond C. A unit whose gradient is not finite adds
zero: to refuse instead would tell the coordinator who was in the batch. Per-note gradients come
from Opacus hooks in non-wrapping mode, so the model stays a plain PEFT model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from opacus.grad_sample import GradSampleHooks
from peft import PeftModel
from torch import Tensor, nn

from adapters.likelihood import note_losses, pad_right

Tokens = Sequence[int]
Unit = Sequence[Tokens]  # a patient: token rows of the notes chosen for this step


class GradientError(RuntimeError):
    """A per-unit gradient was missing or misshapen; the step must not be released."""


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that a step moves, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@contextmanager
def per_note_gradients(model: PeftModel) -> Iterator[None]:
    """While open, a backward pass leaves ``grad_sample`` (notes, *shape) on trained parameters."""
    modules = {
        module
        for module in model.modules()
        if any(p.requires_grad for p in module.parameters(recurse=False))
    }
    for module in modules:
        module.training = True  # Opacus records only training modules; dropout elsewhere stays off
    hooks = GradSampleHooks(model, loss_reduction="sum")
    try:
        yield
    finally:
        hooks.cleanup()
        for module in modules:
            module.training = False
        model.zero_grad(set_to_none=True)


def unit_gradients(model: PeftModel, units: Sequence[Unit]) -> dict[str, Tensor]:
    """Gradient of each unit's mean note loss, (units, *shape) by parameter name.

    Must run inside ``per_note_gradients``. Raises GradientError when a gradient is missing or has
    the wrong shape: no data can cause that, only a model that Opacus cannot handle.
    """
    rows = [tokens for unit in units for tokens in unit]
    owner = torch.tensor([i for i, unit in enumerate(units) for _ in unit])
    ids, lengths = pad_right(rows)
    note_losses(model, ids, lengths).sum().backward()

    counts = torch.bincount(owner, minlength=len(units)).float()
    gradients = {}
    for name, p in trained_parameters(model).items():
        per_note = getattr(p, "grad_sample", None)
        if not isinstance(per_note, Tensor) or per_note.shape != (len(rows), *p.shape):
            raise GradientError(f"no per-note gradient for {name}")
        total = torch.zeros(len(units), *p.shape, device=p.device)
        total.index_add_(0, owner.to(p.device), per_note.float())
        gradients[name] = total / counts.to(p.device).view(-1, *[1] * p.ndim)
        p.grad_sample = None  # type: ignore[attr-defined]
        p.grad = None
    return gradients


def clip_factors(gradients: dict[str, Tensor], clip_norm: float) -> Tensor:
    """min(1, C / ||g_u||) for each unit, (units) float64, norms over all parameters together."""
    squares = sum(g.double().flatten(1).square().sum(1) for g in gradients.values())
    norms = torch.as_tensor(squares).sqrt()
    return clip_norm / norms.clamp(min=clip_norm)


def clipped_sum(model: PeftModel, units: Sequence[Unit], clip_norm: float) -> dict[str, Tensor]:
    """Sum of clipped unit gradients in float64, by parameter name; zeros for an empty batch."""
    total = {
        name: torch.zeros(p.shape, dtype=torch.float64, device=p.device)
        for name, p in trained_parameters(model).items()
    }
    with per_note_gradients(model):
        for unit in units:
            gradients = unit_gradients(model, [unit])
            if not all(torch.isfinite(g).all() for g in gradients.values()):
                continue  # not a factor of zero: 0 * NaN is NaN
            factor = clip_factors(gradients, clip_norm)[0]
            for name, g in gradients.items():
                total[name] += factor.to(g.device) * g[0].double()
    return total


def noised_mean(
    total: dict[str, Tensor],
    noise_std: float,
    denominator: int,
    normal: Callable[[int], np.ndarray] | None,
) -> dict[str, Tensor]:
    """(S + noise_std N(0, I)) / denominator, float64; ``normal`` None adds no noise.

    Raises ValueError when noise is asked for and there is nothing to draw it from, or the reverse.
    """
    if (noise_std > 0) != (normal is not None):
        raise ValueError("noise_std and a source of noise go together")
    released = {}
    for name, s in total.items():
        if normal is not None:
            noise = torch.from_numpy(normal(s.numel()).reshape(tuple(s.shape)))
            s = s + noise_std * noise.to(s.device)
        released[name] = s / denominator
    return released
