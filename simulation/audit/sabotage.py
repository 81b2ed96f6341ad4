"""Engines that are wrong on purpose, one mistake each: all of them have been made in the field.

They exist to show that the checks see what they are there for. Nothing but the audit uses them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor

from adapters.likelihood import pad_right, token_losses
from client.privacy.engine import Unit, noised_mean, trained_parameters
from simulation.audit.engine import Engine, Gradient, Normal

_MICRO_BATCH = 4  # units
_RATE = 0.25  # the sampling rate from which the last one derives its batch size


def _norm(gradient: Gradient) -> float:
    return float(sum(g.double().square().sum() for g in gradient.values())) ** 0.5


def _gradient(model: PeftModel, loss: Tensor) -> Gradient:
    named = trained_parameters(model)
    found = torch.autograd.grad(loss, list(named.values()))
    return {name: g.double() for name, g in zip(named, found, strict=True)}


def _zeros(model: PeftModel) -> Gradient:
    return {name: torch.zeros_like(p).double() for name, p in trained_parameters(model).items()}


def _add_clipped(total: Gradient, gradient: Gradient, clip_norm: float) -> None:
    factor = min(1.0, clip_norm / max(_norm(gradient), clip_norm))
    for name, g in gradient.items():
        total[name] += factor * g


def _micro_batches(units: Sequence[Unit]) -> list[Sequence[Unit]]:
    return [units[i : i + _MICRO_BATCH] for i in range(0, len(units), _MICRO_BATCH)]


def _losses(model: PeftModel, units: Sequence[Unit]) -> tuple[Tensor, Tensor, Tensor]:
    """Summed loss and number of predicted tokens of every note, and whose note it is."""
    ids, lengths = pad_right([row for unit in units for row in unit])
    losses, mask = token_losses(model, ids, lengths)
    owner = torch.tensor([i for i, unit in enumerate(units) for _ in unit])
    return losses.sum(1), mask.sum(1).clamp(min=1), owner


def clipped_by_micro_batch(model: PeftModel, units: Sequence[Unit], clip_norm: float) -> Gradient:
    """Clips the gradient of a whole micro-batch: cheap, and it bounds nobody in particular."""
    total = _zeros(model)
    for batch in _micro_batches(units):
        sums, tokens, owner = _losses(model, batch)
        notes = torch.bincount(owner)[owner]
        _add_clipped(total, _gradient(model, (sums / tokens / notes).sum()), clip_norm)
    return total


def batch_averaged_loss(model: PeftModel, units: Sequence[Unit], clip_norm: float) -> Gradient:
    """Clips per unit, but the loss is the mean over the tokens of the batch, as Transformers has
    it: how much a unit counts depends on how long its mates are."""
    total = _zeros(model)
    for batch in _micro_batches(units):
        predicted = sum(max(1, len(row) - 1) for unit in batch for row in unit)
        for unit in batch:
            sums, _, _ = _losses(model, [unit])
            loss = sums.sum() / predicted * len(batch)
            _add_clipped(total, _gradient(model, loss), clip_norm)
    return total


def _quarter(total: Gradient, std: float, denominator: int, normal: Normal | None) -> Gradient:
    return noised_mean(total, std / 4, denominator, normal)


def _seeded() -> Normal:
    generator = np.random.default_rng(42)
    return lambda n: generator.standard_normal(n)


def _expected_batch(public: int, units: int) -> int:
    return max(1, int(units * _RATE))


SABOTAGED = (
    Engine("a quarter of the noise", "noise is drawn with sigma C / 4", noised=_quarter),
    Engine(
        "clips per micro-batch",
        "the gradient of several units together is clipped to C",
        gradient_sum=clipped_by_micro_batch,
    ),
    Engine(
        "batch-averaged loss",
        "the loss averages over the tokens of the batch",
        gradient_sum=batch_averaged_loss,
    ),
    Engine("seeded noise", "every round starts the noise from the same seed", noise=_seeded),
    Engine(
        "denominator follows N",
        "the sum is divided by q N, N being the hospital's number of units",
        denominator=_expected_batch,
    ),
)
