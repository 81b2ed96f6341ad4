"""The private gradient of one step: a sum over patients in which no patient counts for more than C.

    S = sum_u  g_u min(1, C / ||g_u||)          g_u = mean over the unit's notes of grad(note loss)
    gradient = (S + sigma C N(0, I)) / D        D a public constant

Adding or removing one unit moves S by at most C in L2 norm, whatever else is in the batch, and not
only in exact arithmetic:

- the loss of a note is the mean over its own tokens, a unit's notes are averaged before they are
  clipped, and clipping is per unit over all trained parameters together;
- a note's gradient is computed in a shape that depends on that note alone (``microbatch``), so it
  is the same bit for bit whatever else is in the batch and however the batch is cut;
- a clipped gradient is truncated to multiples of a grid so fine that nothing is lost and so coarse
  that float64 adds them without rounding: the sum does not depend on the order of its terms;
- a unit whose gradient is not finite adds zero. To refuse instead would tell the coordinator, who
  chose the adapter, who was in the batch.

What is released is rounded to a coarser public grid after the noise is in, so that its low bits
hold nothing of how it was computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor

from client.privacy.microbatch import MicroBatch, Unit, cut
from client.privacy.per_note import Engine, per_note_gradients, trained_parameters
from conf.schema import MAX_CLIP_NORM

# Binary digits of C that are kept: each unit is at most 2^41 grid steps, so float64 (2^53) adds
# 4,096 units exactly. Above the largest C of private runs the grid stays as it is, or small
# gradients would be lost in it.
_SUM_GRID = 40
_RELEASE_GRID = 2.0**-20  # of the noise's standard deviation
_HELD = 2**25  # numbers of the gradients that exist at a time: 256 MB in float64

Gradient = dict[str, Tensor]


def unit_gradients(
    model: PeftModel, units: Sequence[Unit], engine: Engine = "fast", micro_tokens: int = 0
) -> Iterator[tuple[int, Tensor]]:
    """Each unit's index and gradient, (parameters) float64, all trained parameters in one vector.

    A unit comes when its last note is computed; one whose notes lie in several micro-batches is
    kept until then. A unit without notes has no gradient and does not come.
    """
    with per_note_gradients(model, engine) as gradients:

        def rows(batch: MicroBatch) -> Tensor:
            found = gradients(batch.ids, batch.lengths)
            return torch.cat([found[name].flatten(1) for name in trained_parameters(model)], 1)

        yield from unit_means(units, rows, micro_tokens, units_at_a_time(model))


def unit_means(
    units: Sequence[Unit],
    rows: Callable[[MicroBatch], Tensor],
    micro_tokens: int,
    together: int,
) -> Iterator[tuple[int, Tensor]]:
    """Each unit's index and the mean of its notes' vectors, float64.

    ``rows`` gives the vectors of a micro-batch, (rows, size); a vector must follow from its note
    and the shape alone. At most about ``together`` units' vectors exist at a time.
    """
    parts: dict[int, Tensor] = {}
    missing = [len(unit) for unit in units]
    for first, batch in _batches(units, micro_tokens, together):
        # The notes of a unit are added in the order of their lengths, then of the unit: an order
        # that depends on that unit alone.
        for row, place in zip(rows(batch), batch.owners):  # noqa: B905  (empty rows have no owner)
            owner = first + place
            own = row.double()
            if owner in parts:
                own += parts.pop(owner)
            missing[owner] -= 1
            if missing[owner]:
                parts[owner] = own
            else:
                yield owner, own / len(units[owner])


def units_at_a_time(model: PeftModel) -> int:
    """How many notes' or units' gradients may exist at a time: a matter of the adapter's size."""
    return max(1, _HELD // sum(p.numel() for p in trained_parameters(model).values()))


def _batches(
    units: Sequence[Unit], micro_tokens: int, together: int
) -> Iterator[tuple[int, MicroBatch]]:
    """Micro-batches of ``together`` units after another, each with the first one's number."""
    for first in range(0, len(units), together):
        for batch in cut(units[first : first + together], micro_tokens, together):
            yield first, batch


def rehearse(model: PeftModel, max_tokens: int, engine: Engine, micro_tokens: int) -> None:
    """Use as much memory as a step of any sample will, on tokens that are nobody's.

    A shortage that comes before anything is sampled tells of nobody. Raises what running out of
    memory raises.
    """
    size = sum(p.numel() for p in trained_parameters(model).values())
    held = torch.ones(units_at_a_time(model), size, dtype=torch.float64)
    clipped_sum(model, [[[0] * max_tokens], [[0]]], 1.0, engine, micro_tokens)
    del held


def clip_factor(norm: float, clip_norm: float) -> float:
    """min(1, C / ||g||): what a gradient of norm ``norm`` is multiplied by."""
    return clip_norm / max(norm, clip_norm)


def clipped_sum(
    model: PeftModel,
    units: Sequence[Unit],
    clip_norm: float,
    engine: Engine = "fast",
    micro_tokens: int = 0,
) -> Gradient:
    """Sum of clipped unit gradients in float64, by parameter name; zeros for an empty batch.

    ``micro_tokens`` is about how many tokens go through the model at a time (0: one note). The sum
    is exact for 4,096 units and more where they do not all point the same way. Raises GradientError
    where the engine cannot handle the model.
    """
    clipped = clipped_gradients(model, units, clip_norm, engine, micro_tokens)
    return sum_by_parameter(model, clipped, min(clip_norm, MAX_CLIP_NORM))


def clipped_gradients(
    model: PeftModel,
    units: Sequence[Unit],
    clip_norm: float,
    engine: Engine = "fast",
    micro_tokens: int = 0,
) -> Iterator[Tensor]:
    """Unit gradients of norm C at most, (parameters) float64; see ``clipped_sum``.

    One that is not finite does not come: a factor of zero would not do, for 0 * NaN is NaN.
    """
    for _, gradient in unit_gradients(model, units, engine, micro_tokens) if units else ():
        norm = float(gradient.norm())
        if math.isfinite(norm):
            yield gradient.mul_(clip_factor(norm, clip_norm))


def sum_by_parameter(model: PeftModel, vectors: Iterable[Tensor], longest: float) -> Gradient:
    """``exact_sum`` of vectors of all trained parameters, cut into their shapes, by name."""
    parameters = trained_parameters(model)
    sizes = [p.numel() for p in parameters.values()]
    device = next(iter(parameters.values())).device
    split = exact_sum(vectors, longest, sum(sizes), device).split(sizes)
    return {n: part.view(p.shape) for part, (n, p) in zip(split, parameters.items(), strict=True)}


def exact_sum(vectors: Iterable[Tensor], longest: float, size: int, device: torch.device) -> Tensor:
    """The sum, without rounding, of float64 vectors of norm ``longest`` at most, (size).

    Each is cut, in place and towards zero, to multiples of a grid that follows from ``longest``: so
    it does not get longer, and the sum does not depend on the order (see ``clipped_sum``).
    """
    grid = 2.0 ** (math.floor(math.log2(longest)) - _SUM_GRID)  # a power of two: division is exact
    total = torch.zeros(size, dtype=torch.float64, device=device)
    for vector in vectors:
        total += vector.div_(grid).trunc_()
    return total * grid


def noised_mean(
    total: Gradient,
    noise_std: float,
    denominator: int,
    normal: Callable[[int], np.ndarray] | None,
) -> Gradient:
    """(S + noise_std N(0, I)) / denominator, float64; ``normal`` None adds no noise.

    With noise the sum is rounded to multiples of ``noise_std`` / 2^20 before it is divided. Raises
    ValueError when noise is asked for and there is nothing to draw it from, or the reverse.
    """
    if (noise_std > 0) != (normal is not None):
        raise ValueError("noise_std and a source of noise go together")
    released = {}
    grid = noise_std * _RELEASE_GRID
    for name, s in total.items():
        if normal is not None:
            noise = torch.from_numpy(normal(s.numel()).reshape(tuple(s.shape)))
            s = torch.round((s + noise_std * noise.to(s.device)) / grid) * grid
        released[name] = s / denominator
    return released
