"""The figures of an audit: what canaries prove, and the attack's curve under the promise's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from simulation import wording
from simulation.audit.attack import tpr_bound
from simulation.audit.black_box import FPR, Membership
from simulation.audit.checks import Verdict
from simulation.drawing import COLOURS, Picture, legend, picture, row_height, rows

_LEAST = 1e-3  # where the logarithmic axes begin


def proved(verdicts: Sequence[Verdict]) -> Picture:
    """Epsilon proved by canaries against every engine, beside the claim."""
    claimed = verdicts[0].game.claimed
    names = [v.engine for v in verdicts]
    values = [v.game.proved for v in verdicts]

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        colours = [COLOURS["s5" if x > claimed else "merged"] for x in values]
        axes.barh(range(len(names)), values, height=0.5, color=colours, label="proved")
        axes.axvline(claimed, color=COLOURS["ink"], linestyle="--", linewidth=1.4, label="claimed")
        for row, value in enumerate(values):
            axes.annotate(
                wording.number(value), (value, row), xytext=(5, 0), textcoords="offset points",
                va="center", weight="bold" if value > claimed else "normal",
            )  # fmt: skip
        rows(axes, names, limit=24)
        axes.set_xlim(0, 1.15 * max(claimed, *values))
        axes.set_xlabel("ε (further right: more was leaked)")
        legend(figure, 2)

    alt = f"Claimed epsilon {wording.number(claimed)}. Proved: " + " ".join(
        f"{name}: {wording.number(value)}." for name, value in zip(names, values, strict=True)
    )
    note = (
        "Lower bounds of 95 % confidence. Beyond the dashed line the promise is broken; before it "
        "nothing is proved, and other checks have to speak."
    )
    return picture("Epsilon that canaries prove", alt, draw, note, row_height(len(names)))


def attack(private: Membership, without: Membership) -> Picture:
    """ROC of membership inference on logarithmic axes, with the curve that the promise allows."""
    assert private.claimed is not None
    claimed = private.claimed
    curves = (("with privacy", private, "merged", "-"), ("without privacy", without, "s5", "-."))

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        grid = np.geomspace(_LEAST, 1, 200)
        bound = [tpr_bound(float(x), claimed, private.delta) for x in grid]
        axes.plot(grid, bound, color=COLOURS["ink"], linestyle="--", label="most that ε allows")
        axes.plot(grid, grid, color=COLOURS["base"], linestyle=":", label="guessing")
        for label, one, colour, dash in curves:
            x, y = zip(*one.roc, strict=True)
            axes.step(
                np.maximum(x, _LEAST), np.maximum(y, _LEAST), where="post",
                color=COLOURS[colour], linestyle=dash, label=label,
            )  # fmt: skip
        axes.axvline(FPR, color=COLOURS["line"], linewidth=1)
        axes.set(xscale="log", yscale="log", xlim=(_LEAST, 1), ylim=(_LEAST, 1.4))
        ticks = (_LEAST, 0.01, 0.1, 1.0)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(FixedLocator(ticks))
            axis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
            axis.set_minor_locator(NullLocator())
        axes.set_xlabel("others accused (false positive rate)")
        axes.set_ylabel("members found (true positive rate)")
        legend(figure, 2)

    alt = " ".join(
        f"{label}: area {one.auc.value:.3f}, {one.tpr.value:.3f} found at 1 % false positives."
        for label, one, _, _ in curves
    )
    note = (
        f"{private.members} members, {private.others} others; a share of 0 is drawn at the edge. "
        f"ε = {wording.epsilon(claimed)} is what the hospital's ledger says was spent."
    )
    return picture("Who was trained on?", alt, draw, note, 3.6)
