"""An expert brought back towards its base, as MediPhi does it (arXiv 2505.10717, section 3.2).

MediPhi takes SLERP between the full weights W0 and W1 = W0 + dW at t = 10, 25 or 50 %. With theta
the angle between the two as vectors,

    slerp(t) = (sin((1 - t) theta) W0 + sin(t theta) W1) / sin(theta) = c0 W0 + c1 dW.

What is done here is the line, W0 + t dW: exact, and still an adapter. SLERP is not: c0 > 1 makes
W0 itself longer, a change of full rank that nobody trained. Its purpose, that norms do not shrink
on the way, is met by the line as well, since an update is nearly orthogonal to its weight.

How far apart the two are follows from the angle: relative to t dW about (1 - t) theta / 2. What
MediPhi used, mergekit, takes the line itself wherever cos(theta) > 0.9995, theta < 0.0316: for
updates up to 3.2 % of their weight the two are the same. Beyond that ``arc`` gives the coefficients
of SLERP and ``Arc.departure`` the distance; adapters trained under much noise can be tens of per
cent of their weight, and then it is as large as a fifth of the update.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from adapters.adapter import Adapter
from adapters.lowrank import LowRank

LINE = 0.9995  # cosine beyond which mergekit's SLERP is the line


def towards_base(expert: Adapter, proportion: float) -> Adapter:
    """The expert's update times ``proportion``; its factors stay as they are, bit for bit."""
    return replace(expert, spec=replace(expert.spec, alpha=expert.spec.alpha * proportion))


@dataclass(frozen=True)
class Arc:
    """slerp(t) = ``base`` W0 + ``update`` dW, the angle in radians, and how far off the line it is.

    ``departure`` is ||slerp(t) - (W0 + t dW)|| / ||t dW||; 0 for a zero update.
    """

    base: float
    update: float
    angle: float
    departure: float


def arc(weight: Tensor, delta: LowRank, proportion: float, line: float = LINE) -> Arc:
    """SLERP between ``weight`` (m, n) and ``weight`` + ``delta``; nothing dense is formed.

    As in mergekit the vectors are not normalised, and where the cosine exceeds ``line`` in
    magnitude the arc is the line.
    """
    d = delta.to(weight.double().dtype)
    own = float(weight.double().square().sum())
    across = float(((weight.double() @ d.A.T) * d.B).sum())
    square = max(d.inner(d), 0.0)
    length = math.sqrt(own * max(own + 2 * across + square, 0.0))
    cosine = max(-1.0, min(1.0, (own + across) / length)) if length else 1.0
    # From the sine, which small angles do not lose to rounding as they do from the cosine.
    sine = math.sqrt(max(own * square - across**2, 0.0)) / length if length else 0.0
    angle = math.atan2(sine, cosine)
    if abs(cosine) > line or sine == 0.0:
        return Arc(1.0, proportion, angle, 0.0)
    first = math.sin((1 - proportion) * angle) / sine
    second = math.sin(proportion * angle) / sine
    extra, more = first + second - 1, second - proportion
    apart = extra**2 * own + 2 * extra * more * across + more**2 * square
    moved = proportion * math.sqrt(square)
    departure = math.sqrt(max(apart, 0.0)) / moved if moved else 0.0
    return Arc(first + second, second, angle, departure)


def furthest(weights: Mapping[str, Tensor], expert: Adapter, proportion: float) -> Arc:
    """Of all adapted layers the arc that departs most from the line, without mergekit's fallback.

    ``weights`` are those of the base, (out, in) as the updates. KeyError where a layer is absent.
    """
    arcs = [
        arc(weights[name], delta, proportion, line=1.0) for name, delta in expert.deltas().items()
    ]
    return max(arcs, key=lambda found: found.departure)
