"""Noise-aware mean: what the server knows of each hospital's noise decides how its update counts.

In a round under a shared factor, hospital k moves the trained factor (B, say) by X_k = signal +
noise, the noise of known standard deviation tau_k in every entry: plain SGD adds it, with the
plan's rate, clip norm and divisor, and a noise multiplier that the hospital states. So

    X = sum_k a_k X_k,   a_k = c w_k / (tau_k^2 + v),   noise of X: tau^2 = sum_k a_k^2 tau_k^2

c makes the a_k sum to one; v is the variance per entry by which hospitals' signals differ, by the
method of moments (DerSimonian and Laird 1986). Equal noise gives the plain mean, and so do
hospitals that differ much. Then X (m, r) is shrunk, layer by layer: with
y = singular values / (tau sqrt(m)) and b = r / m (m >= r), by

    singular   y -> sqrt((y^2 - b - 1)^2 - 4 b) / y  where y > 1 + sqrt(b), else 0
    stein      y -> y max(0, 1 - m r tau^2 / ||X||^2)

of which the first loses least in Frobenius norm under white noise, asymptotically (Gavish and
Donoho 2017), and the second is James and Stein's. The merged factor is the one that was sent plus
the shrunk X. Without noise it is the exact mean.

All of it is post-processing of what hospitals have released. A hospital that understates its noise
counts for more, so this is for hospitals that are trusted to state it.

The default does not shrink: what is nearest in Frobenius norm is not what predicts best. While a
model still learns fast, noise spread over all directions costs it little, and the same shrinkage of
the signal costs it much (docs/merging.md has the figures).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from adapters.adapter import Adapter
from adapters.lowrank import LowRank
from strategies.base import Declaration, Draw, MergeError, Strategy, Update
from strategies.sums import accumulate

Factor = Literal["A", "B"]
Shrinkage = Literal["none", "singular", "stein"]

_LEAST = 1e-9


class NoiseAware(Strategy):
    """Mean weighted by precision, then shrunk by what of it is noise."""

    name: ClassVar[str] = "noise_aware"
    declared: ClassVar = Declaration(
        space="factors",
        streams=True,
        keeps=frozenset({"one", "equal"}),
        paper="10.1016/0197-2456(86)90046-2, 10.1109/TIT.2017.2653801",
        trains=("B", "A", "alternate"),
        noise=True,
    )
    weigh: bool = True  # by precision; False keeps the given weights
    shrink: Shrinkage = "none"

    def combine(
        self, adapters: Sequence[Adapter], weights: Sequence[float], draw: Draw
    ) -> Mapping[str, Update]:
        """See ``Strategy.combine``. Raises MergeError unless one factor is shared."""
        start, stds = _known(draw, adapters)
        trained = _trained(adapters, start)
        if self.weigh:
            moves = (_moved(adapter, start, trained) for adapter in adapters)
            weights = precision_weights(moves, weights, stds)
        sums: dict[str, Tensor] = {}
        for adapter, a in zip(adapters, weights, strict=True):
            accumulate(sums, _moved(adapter, start, trained), a)
        tau = sum((a * std) ** 2 for a, std in zip(weights, stds, strict=True)) ** 0.5
        scale, merged = start.spec.scale, {}
        for name, mean in sums.items():
            layer = start.layers[name]
            factor = getattr(layer, trained).double() + shrunk(mean, tau, self.shrink)
            pair = (factor, layer.A.double()) if trained == "B" else (layer.B.double(), factor)
            merged[name] = LowRank(pair[0] * scale, pair[1])
        return merged


def precision_weights(
    moves: Iterable[Mapping[str, Tensor]], weights: Sequence[float], stds: Sequence[float]
) -> list[float]:
    """a_k of the module's formula, with one v for all layers.

    ``moves`` are the X_k of one hospital after the other, by layer; ``stds`` the tau_k. Without any
    noise, ``weights`` as they are.
    """
    if len(stds) == 1 or not any(stds):
        return list(weights)
    noise = [std**2 for std in stds]
    between = _between(moves, _inverse(weights, noise), noise)
    return _inverse(weights, [variance + between for variance in noise])


def _inverse(weights: Sequence[float], variances: Sequence[float]) -> list[float]:
    """w_k / variance_k, summing to one; next to one without noise nobody else counts."""
    least = _LEAST * max(variances)
    found = [w / max(v, least) for w, v in zip(weights, variances, strict=True)]
    return [a / sum(found) for a in found]


def _between(
    moves: Iterable[Mapping[str, Tensor]], weights: Sequence[float], noise: Sequence[float]
) -> float:
    """v: variance per entry between hospitals' signals; unbiased but for being cut at 0.

    For any weights p that sum to one, and X = sum_k p_k X_k, every entry adds on average
    sum_k p_k (1 - p_k) (tau_k^2 + v) to sum_k p_k ||X_k - X||^2, which is also
    sum_k p_k ||X_k - X_1||^2 - ||X - X_1||^2.
    """
    means: dict[str, Tensor] = {}
    spread, origin = 0.0, None
    for p, own in zip(weights, moves, strict=True):
        origin = own if origin is None else origin  # without it what they share would cancel
        apart = {name: x - origin[name] for name, x in own.items()}
        accumulate(means, apart, p)
        spread += p * sum(float(x.square().sum()) for x in apart.values())
    spread -= sum(float(mean.square().sum()) for mean in means.values())
    count = sum(mean.numel() for mean in means.values())
    shares = [p * (1 - p) for p in weights]
    expected = sum(s * variance for s, variance in zip(shares, noise, strict=True))
    return max(0.0, (spread / count - expected) / sum(shares))


def shrunk(X: Tensor, tau: float, how: Shrinkage) -> Tensor:
    """X (m, r), of noise ``tau`` in every entry, drawn towards zero; X itself without noise."""
    if how == "none" or tau == 0 or not X.any():
        return X
    if how == "stein":
        return X * max(0.0, 1 - X.numel() * tau**2 / float(X.square().sum()))
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    long, short = max(X.shape), min(X.shape)
    ratio = short / long
    y = S / (tau * long**0.5)
    kept = ((y**2 - ratio - 1) ** 2 - 4 * ratio).clamp(min=0).sqrt() / y**2
    kept[y <= 1 + ratio**0.5] = 0.0
    return (U * (S * kept)) @ Vh


def _known(draw: Draw, adapters: Sequence[Adapter]) -> tuple[Adapter, Sequence[float]]:
    if draw.noise is None:
        raise MergeError("noise_aware needs the noise of every hospital, which only rounds know")
    if len(draw.noise.stds) != len(adapters):
        raise MergeError("noise_aware needs one noise for each adapter")
    return draw.noise.start, draw.noise.stds


def _trained(adapters: Iterable[Adapter], start: Adapter) -> Factor:
    """The factor that hospitals trained: the other is as it was sent."""
    frozen: set[Factor] = {"A", "B"}
    for adapter in adapters:
        frozen = {
            factor
            for factor in frozen
            if all(
                getattr(layer, factor).equal(getattr(start.layers[name], factor))
                for name, layer in adapter.layers.items()
            )
        }
    if not frozen:
        raise MergeError(
            "noise_aware needs one rank, and a factor that every hospital left as it was sent"
        )
    return "B" if "A" in frozen else "A"


def _moved(adapter: Adapter, start: Adapter, trained: Factor) -> dict[str, Tensor]:
    """X_k of one hospital by layer, float64."""
    return {
        name: getattr(layer, trained).double() - getattr(start.layers[name], trained).double()
        for name, layer in adapter.layers.items()
    }
