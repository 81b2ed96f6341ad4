"""The functions that a private step is made of, as one value, so that one of them can be swapped.

``HONEST`` holds the very functions that ``client.local_steps`` calls. The checks take an
``Engine``; a check that cannot tell a sabotaged engine from the honest one is worth nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Literal

import numpy as np
from peft import PeftModel
from torch import Tensor

from client.privacy.engine import clipped_sum, noised_mean
from client.privacy.microbatch import Unit
from client.privacy.randomness import SecureRandomness
from conf.schema import ComputeSettings

Gradient = dict[str, Tensor]  # by parameter name
Normal = Callable[[int], np.ndarray]


@dataclass(frozen=True)
class Mechanism:
    """What a step promises: clip norm C, noise multiplier sigma, public denominator."""

    clip_norm: float
    noise_multiplier: float
    denominator: int


def _public_constant(public: int, units: int) -> int:
    return public


@cache  # one value for all engines that share it, so that checks know it again
def _installed(
    engine: Literal["fast", "opacus"], micro_tokens: int
) -> Callable[[PeftModel, Sequence[Unit], float], Gradient]:
    return partial(clipped_sum, engine=engine, micro_tokens=micro_tokens)


@dataclass(frozen=True)
class Engine:
    """A way to make a step. ``defect`` says what is wrong with it; None for the honest one.

    ``noise`` opens the source of noise of one round. ``denominator`` gets the public constant and
    the number of units that the hospital has.
    """

    name: str
    defect: str | None = None
    gradient_sum: Callable[[PeftModel, Sequence[Unit], float], Gradient] = clipped_sum
    noised: Callable[[Gradient, float, int, Normal | None], Gradient] = noised_mean
    noise: Callable[[], Normal] = lambda: SecureRandomness().normal
    denominator: Callable[[int, int], int] = _public_constant

    def under(self, compute: ComputeSettings) -> Engine:
        """The same where it computes gradients as installed: as a round under ``compute`` does."""
        if self.gradient_sum is not clipped_sum:
            return self
        return replace(self, gradient_sum=_installed(compute.engine, compute.micro_tokens))

    def release(self, total: Gradient, mechanism: Mechanism, units: int) -> Gradient:
        """Noise and divide the sum of one step of a round that has just begun."""
        std = mechanism.noise_multiplier * mechanism.clip_norm
        denominator = self.denominator(mechanism.denominator, units)
        return self.noised(total, std, denominator, self.noise())


HONEST = Engine("honest")
