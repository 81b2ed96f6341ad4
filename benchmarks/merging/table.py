"""The quality of merging, as a table for the terminal, the same as Markdown, and a figure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure as Drawing
from rich.table import Table

from benchmarks.merging.quality import (
    AT_OTHER_RATES,
    EPSILONS,
    IN_ROUNDS,
    WITHOUT_PRIVACY,
    Epsilon,
    Result,
)
from benchmarks.merging.shares import Figure, Row, rows

GOALS: dict[Epsilon, float] = {8.0: 0.85, 3.0: 0.60, 1.0: 0.30}  # shares, with four hospitals
_ORDER = EPSILONS[::-1]
_LOWEST = -50  # per cent; what noise has ruined would hide the rest
_MARKERS = "osD^vP*X"


@dataclass(frozen=True)
class View:
    """What of each row a table shows, under which title."""

    title: str
    caption: str
    cell: Callable[[Row], str]
    figure: Callable[[Row], Figure | None]  # of the cell, which rests on so many seeds


def gains(title: str) -> View:
    """Gain in thousandths of a bit per character, and share of the reference."""
    caption = (
        "millibits per character saved; share of fedsvd without privacy; 95 % intervals, of one "
        "seed over notes only"
    )
    return View(title, caption, _gain_and_share, lambda row: row.gain)


def differences(title: str) -> View:
    """Shares less that of the default."""
    caption = (
        "points of share more than fedsvd at the same epsilon, under the same seeds; 95 % "
        "intervals, of one seed over notes only"
    )
    return View(title, caption, _difference, lambda row: row.difference)


def of(found: Sequence[Row], view: View) -> Table:
    """For the terminal, a column an epsilon."""
    table = Table(
        title=view.title, title_justify="left", caption=view.caption, caption_justify="left"
    )
    for column in _HEAD:
        table.add_column(column, justify="left" if column == _HEAD[0] else "right", no_wrap=True)
    for cells in _cells(found, view):
        table.add_row(*cells)
    return table


def markdown(found: Sequence[Row], view: View) -> str:
    """The same for a page."""
    lines = [_HEAD, ["---", *["--:"] * (len(_HEAD) - 1)], *_cells(found, view)]
    body = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"## {view.title}\n\n{view.caption[0].upper()}{view.caption[1:]}.\n\n{body}\n"


def _cells(found: Sequence[Row], view: View) -> list[list[str]]:
    lines = []
    for arm in dict.fromkeys(row.arm for row in found):
        own = {row.epsilon: row for row in found if row.arm == arm}
        cells = [view.cell(own[epsilon]) if epsilon in own else "" for epsilon in EPSILONS]
        if any(cells):
            seeds = sorted({f.seeds for row in own.values() if (f := view.figure(row))})
            lines.append([arm, *cells, " to ".join(map(str, seeds))])
    return lines


def figures(found: Sequence[Row], hospitals: int) -> dict[str, float]:
    """Shares by name, for a JSON file."""
    return {
        f"quality.{hospitals}.{row.arm}.{_name(row.epsilon)}.share": row.share.value
        for row in found
        if row.share
    }


def draw(results: Sequence[Result], file: Path) -> None:
    """Share of the non-private gain by strategy and epsilon, one panel a number of hospitals.

    Dotted lines are the goals, at four hospitals. Rates that suit an arm less are left out, and
    rules that are no means, which the table has. Where one arm alone was measured there is nothing
    to compare, and no panel.
    """
    everything = {n: rows(results, n) for n in sorted({r.cell.hospitals for r in results})}
    counts = [n for n, own in everything.items() if len({row.arm for row in own}) > 1]
    if not counts:
        return
    left_out = AT_OTHER_RATES.keys() | IN_ROUNDS.keys() | WITHOUT_PRIVACY.keys()
    found = {
        n: [row for row in everything[n] if row.share and row.arm not in left_out] for n in counts
    }
    arms = list(dict.fromkeys(row.arm for n in counts for row in found[n]))
    drawing = Drawing(figsize=(5 * len(counts) + 2, 4), layout="constrained")
    panels = drawing.subplots(1, len(counts), sharey=True, squeeze=False)[0]
    for panel, count in zip(panels, counts, strict=True):
        for row in found[count]:
            assert row.share is not None  # the others were left out above
            place = arms.index(row.arm)
            share = 100 * np.array([row.share.value, row.share.low, row.share.high])
            panel.errorbar(
                _ORDER.index(row.epsilon) + 0.8 * ((place + 0.5) / len(arms) - 0.5),
                share[0], [[share[0] - share[1]], [share[2] - share[0]]],
                fmt=_MARKERS[place % len(_MARKERS)], markersize=5, capsize=2,
                color=mpl.colormaps["tab20"](place % 20), label=row.arm,
            )  # fmt: skip
        for epsilon, goal in GOALS.items() if count == 4 else ():
            at = _ORDER.index(epsilon)
            panel.hlines(100 * goal, at - 0.4, at + 0.4, colors="grey", linestyles="dotted")
        for level in (0, 100):
            panel.axhline(level, color="grey", linewidth=0.8)
        for between in range(1, len(_ORDER)):
            panel.axvline(between - 0.5, color="lightgrey", linewidth=0.8)
        panel.set_xticks(range(len(_ORDER)), [_name(epsilon) for epsilon in _ORDER])
        panel.set(title=f"{count} hospitals", xlim=(-0.5, len(_ORDER) - 0.5), ylim=(_LOWEST, 120))
    panels[0].set_ylabel(f"share of the gain without privacy, %\n(below {_LOWEST} % not shown)")
    labels = {
        text: handle
        for panel in panels
        for handle, text in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    shown = [arm for arm in arms if arm in labels]
    drawing.legend([labels[arm] for arm in shown], shown, loc="outside right center", fontsize=8)
    drawing.savefig(file, dpi=150)


def _gain_and_share(row: Row) -> str:
    gain = f"{1000 * row.gain.value:.0f}"
    if row.share is None:
        return f"{gain} ({_interval(row.gain, 1000)})"
    return f"{gain}, {100 * row.share.value:.0f} % ({_interval(row.share, 100)})"


def _difference(row: Row) -> str:
    if row.difference is None:
        return ""
    return f"{100 * row.difference.value:+.0f} ({_interval(row.difference, 100)})"


def _interval(figure: Figure, unit: float) -> str:
    return f"{unit * figure.low:.0f} to {unit * figure.high:.0f}"


def _name(epsilon: Epsilon) -> str:
    return "no privacy" if epsilon is None else f"epsilon {epsilon:g}"


_HEAD = ["strategy", *map(_name, EPSILONS), "seeds"]
