"""The paper figures are drawn on: matplotlib SVG that follows the page's light or dark colours.

Matplotlib draws with placeholder colours, which are then replaced by the CSS variables of the page,
so one figure serves both themes. Text stays text: it can be selected, searched and enlarged.
"""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

WIDTH = 4.8  # inches: wide enough for a label, narrow enough for a phone
MANY = 6  # more lines than this cannot be told apart; they are drawn alike, with their median

COLOURS = {
    name: f"#0a0b{index:02x}"
    for index, name in enumerate(
        ["ink", "muted", "line", "card", "base", "local", "merged", "aligned"]
        + [f"s{i}" for i in range(1, MANY + 1)],
        start=16,
    )
}
STYLE: Any = {  # matplotlib settings
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9,
    "axes.labelsize": 9,
    "axes.labelcolor": COLOURS["muted"],
    "axes.edgecolor": COLOURS["line"],
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": COLOURS["line"],
    "grid.linewidth": 0.6,
    "xtick.color": COLOURS["line"],
    "ytick.color": COLOURS["line"],
    "xtick.labelcolor": COLOURS["muted"],
    "ytick.labelcolor": COLOURS["muted"],
    "text.color": COLOURS["ink"],
    "legend.frameon": False,
    "legend.labelcolor": COLOURS["ink"],
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
}


@dataclass(frozen=True)
class Picture:
    """One figure: ``svg`` is complete, labelled markup; ``note`` is the caption under it."""

    title: str
    svg: str
    note: str


def _markup(figure: Figure, name: str, alt: str) -> str:
    """The figure as an inline ``<svg>``: ids made unique, colours made variables, no metadata."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</defs>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r"font-family: [^;\"]*", "font-family: inherit", text)
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1; font-family: inherit", text)
    for colour, code in COLOURS.items():
        text = text.replace(code, f"var(--{colour})")
    label = f'<svg role="img" aria-label="{html.escape(alt)}"'
    return re.sub(r'<svg(?: (?:width|height)="[^"]*")*', lambda _: label, text, count=1)


def picture(
    title: str, alt: str, draw: Callable[[Figure], None], note: str = "", height: float = 2.7
) -> Picture:
    """Draw on a fresh figure, ``height`` inches tall, under the style of the reports."""
    name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the reader's browser has the glyph
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure)
        return Picture(title, _markup(figure, name, alt), note)


def short(name: str, limit: int = 18) -> str:
    """``name``, cut to ``limit`` characters; tables carry it whole."""
    return name if len(name) <= limit else name[: limit - 1] + "…"


def rows(axes: Axes, names: Sequence[str], limit: int = 18) -> None:
    """One labelled row for each name, the first on top."""
    axes.set_yticks(range(len(names)), [short(name, limit) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0, labelcolor=COLOURS["ink"])
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)


def whole_rounds(axes: Axes, label: str = "round") -> None:
    """An x axis that counts: whole numbers only."""
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    axes.set_xlabel(label)


def row_height(rows: int, each: float = 0.42) -> float:
    """Inches that ``rows`` rows need, with legend and axis."""
    return 0.95 + each * rows


def legend(figure: Figure, entries: int) -> None:
    """One legend above all panels."""
    figure.legend(
        loc="outside upper left", ncols=min(entries, 4), columnspacing=1.4, handletextpad=0.4
    )
