"""Statistics for merges that weigh by them: noised sums over patients, charged as one more step.

    fisher   sum_u  (g_u min(1, C / ||g_u||))^2, entry by entry                    S = C^2
    gram     sum_u  G_u / ||G_u|| in each of L layers,                             S = sqrt(L)
             G_u = mean over u's notes of the mean over the note's tokens of z z^T,   z = A x

    statistic = (sum + sigma S N(0, I)) / D         sigma and D as those of the round's steps

S is how far one unit, added or removed, moves the sum at most in L2 norm:

- fisher: squares of a vector of norm C sum to C^2, and no norm of them is larger than their sum;
- gram: every layer is brought to Frobenius norm 1 by itself, so all L together have norm sqrt(L). A
  common bound on all layers would be used up by the layer of the largest activations; and only how
  hospitals compare within a layer matters to the merge, not how layers compare. So no bound has to
  be chosen, and every patient counts the same. A Gram matrix is symmetric: its upper triangle is
  noised, entries off the diagonal times sqrt(2), for then the L2 norm is the Frobenius norm.

Units are a Poisson sample of their own at the rate of the steps, taken after the last of them. So
it is the mechanism of a step (Poisson-sampled Gaussian, noise multiplier sigma) once more, and the
round is charged one step more. As in a step, what a unit adds follows from that unit alone bit for
bit, is added without rounding, and is zero where it is not finite (``client.privacy.engine``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from adapters import lora
from adapters.statistics import Statistic
from client.privacy.engine import (
    clipped_gradients,
    exact_sum,
    noised_mean,
    sum_by_parameter,
    unit_means,
    units_at_a_time,
)
from client.privacy.microbatch import MicroBatch, Unit
from client.privacy.per_note import Engine, GradientError

Sums = dict[str, Tensor]


def sensitivity(kind: Statistic, clip_norm: float, layers: int) -> float:
    """S: the L2 norm by which one unit moves ``statistic_sums`` at most."""
    return clip_norm**2 if kind == "fisher" else math.sqrt(layers)


def statistic_sums(
    model: PeftModel,
    kind: Statistic,
    units: Sequence[Unit],
    clip_norm: float,
    engine: Engine = "fast",
    micro_tokens: int = 0,
) -> Sums:
    """The un-noised sums over ``units``, float64: never to leave as they are.

    "fisher": by the name under which a trained parameter travels, in its shape. "gram": by layer,
    the upper triangle (rank (rank + 1) / 2) with entries off the diagonal times sqrt(2). Raises
    GradientError where the model cannot be measured, whatever the units.
    """
    if kind == "fisher":
        squares = (
            gradient.square_()
            for gradient in clipped_gradients(model, units, clip_norm, engine, micro_tokens)
        )
        sums = sum_by_parameter(model, squares, clip_norm**2)
        return {lora.travel_name(name): total for name, total in sums.items()}
    layers = lora.projections(model)
    sizes = [_triangle(A.out_features) for A in layers.values()]
    device = next(iter(layers.values())).weight.device
    grams = _unit_grams(model, layers, units, micro_tokens)
    total = exact_sum(grams, sensitivity(kind, clip_norm, len(layers)), sum(sizes), device)
    return dict(zip(layers, total.split(sizes), strict=True))


def released_statistics(
    kind: Statistic,
    sums: Sums,
    noise_multiplier: float,
    clip_norm: float,
    denominator: int,
    normal: Callable[[int], np.ndarray] | None,
) -> dict[str, Tensor]:
    """The statistics as they leave, float32; Gram matrices symmetric bit for bit.

    ``normal`` None adds no noise, and then ``noise_multiplier`` must be 0 (see ``noised_mean``).
    """
    noise_std = noise_multiplier * sensitivity(kind, clip_norm, len(sums))
    means = noised_mean(sums, noise_std, denominator, normal)
    if kind == "gram":
        means = {name: _symmetric(triangle) for name, triangle in means.items()}
    return {name: mean.float().cpu() for name, mean in means.items()}


def _unit_grams(
    model: PeftModel, layers: dict[str, nn.Linear], units: Sequence[Unit], micro_tokens: int
) -> Iterator[Tensor]:
    """Each unit's Gram matrices as one vector of upper triangles, every layer of norm 1 (or 0)."""
    sizes = [_triangle(A.out_features) for A in layers.values()]
    with _watched(model, layers) as inner:

        def rows(batch: MicroBatch) -> Tensor:
            z = inner(batch.ids)
            return torch.cat([_grams(z[name], batch.lengths) for name in layers], 1)

        for _, vector in unit_means(units, rows, micro_tokens, units_at_a_time(model)):
            for part in vector.split(sizes):  # views: the vector itself becomes of norm sqrt(L)
                norm = float(part.norm())
                if 0 < norm < math.inf:
                    part /= norm
                else:
                    part.zero_()
            yield vector


@contextmanager
def _watched(
    model: PeftModel, layers: dict[str, nn.Linear]
) -> Iterator[Callable[[Tensor], dict[str, Tensor]]]:
    """While open, gives a function: ids (n, T) -> z (n, T, rank) of every layer."""
    causal = cast(PreTrainedModel, model.get_base_model())
    trunk = getattr(causal, causal.base_model_prefix, causal)  # no logits, where none are needed
    inside = set(trunk.modules())
    reader = trunk if all(A in inside for A in layers.values()) else causal
    found: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, __: tuple[Tensor, ...], z: Tensor) -> None:
            found[name] = z

        return hook

    hooks = [A.register_forward_hook(watch(name)) for name, A in layers.items()]

    def inner(ids: Tensor) -> dict[str, Tensor]:
        found.clear()
        with torch.no_grad():
            reader(input_ids=ids.to(next(reader.parameters()).device), use_cache=False)
        if found.keys() != layers.keys():
            raise GradientError("the model does not use every adapted layer")
        return found

    try:
        yield inner
    finally:
        for hook in hooks:
            hook.remove()


def _grams(z: Tensor, lengths: Tensor) -> Tensor:
    """z (n, T, r), lengths (n) -> upper triangles of the mean of z z^T over each note's own tokens.

    In float64 neither the squares of float32 numbers nor their squares overflow.
    """
    lengths = lengths.to(z.device)
    own = torch.arange(z.shape[1], device=z.device)[None, :] < lengths[:, None]
    z = torch.where(own[..., None], z.double(), 0.0)
    grams = torch.bmm(z.transpose(1, 2), z) / lengths.clamp(min=1)[:, None, None]
    row, column = torch.triu_indices(z.shape[2], z.shape[2], device=z.device)
    return grams[:, row, column] * torch.where(row == column, 1.0, math.sqrt(2))


def _triangle(rank: int) -> int:
    return rank * (rank + 1) // 2


def _symmetric(triangle: Tensor) -> Tensor:
    """Inverse of the upper triangle that ``_grams`` takes: (r (r + 1) / 2) -> (r, r)."""
    rank = math.isqrt(2 * len(triangle))
    row, column = torch.triu_indices(rank, rank, device=triangle.device)
    values = triangle / torch.where(row == column, 1.0, math.sqrt(2))
    whole = triangle.new_zeros(rank, rank)
    whole[row, column] = values
    whole[column, row] = values
    return whole
