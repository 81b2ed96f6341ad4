"""A picture of a trade-off: gain against loss, point by point, and the intruders under each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


class Measured(Protocol):
    """A point of the curve, as ``server.experts.tradeoff.Point``."""

    @property
    def at(self) -> float:
        """Scale of the adapter, 0 to 1."""

    @property
    def clinical_gain(self) -> float:
        """Bits per character."""

    @property
    def general_loss(self) -> float:
        """Bits per character."""

    @property
    def intruders(self) -> int:
        """Over all layers."""


def draw(file: Path, points: Sequence[Measured]) -> None:
    """Write the picture; the suffix of ``file`` says in which format."""
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    curve, count = figure.subplots(1, 2, width_ratios=(3, 2))
    gains, losses = [p.clinical_gain for p in points], [p.general_loss for p in points]
    curve.plot(losses, gains, color="#0b6e4f", marker="o", linewidth=1.4, markersize=4)
    for p in points:
        curve.annotate(
            f"{p.at:g}", (p.general_loss, p.clinical_gain), xytext=(5, -9),
            textcoords="offset points", fontsize=8, color="#555",
        )  # fmt: skip
    for zero in (curve.axhline, curve.axvline):
        zero(0, color="#222", linestyle="--", linewidth=0.8)
    curve.set_xlabel("general loss (bits per character)")
    curve.set_ylabel("clinical gain (bits per character)")
    curve.set_title("points: scale of the adapter", loc="left", fontsize=10)
    count.plot(
        [p.at for p in points], [p.intruders for p in points], color="#9a6a00", marker="s",
        linewidth=1.4, markersize=4,
    )  # fmt: skip
    count.set_xlabel("scale of the adapter")
    count.set_ylabel("intruder dimensions")
    count.set_ylim(bottom=0)
    count.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    for axes in (curve, count):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#ddd", linewidth=0.6)
        axes.set_axisbelow(True)
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
