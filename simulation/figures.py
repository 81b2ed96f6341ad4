"""The figures of the reports, each a pure function of what a run measured.

Colour is never the only mark (shapes and dashes differ), and every figure carries its numbers as
alternative text.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from simulation import wording
from simulation.drawing import (
    COLOURS,
    MANY,
    Picture,
    legend,
    picture,
    row_height,
    rows,
    short,
    whole_rounds,
)
from simulation.record import Measure, Stage, Summary

STAGE_NAMES: dict[Stage, str] = {
    "base": "base",
    "local": "alone",
    "merged": "merged",
    "aligned": "aligned",
}
_STAGE_MARKS: dict[Stage, str] = {"base": "o", "local": "^", "merged": "D", "aligned": "s"}
_MEASURES: dict[Measure, str] = {"perplexity": "perplexity", "bits_per_char": "bits per character"}


def stages(summary: Summary, measure: Measure) -> Picture:
    """Base, alone, merged and aligned side by side, one row a hospital."""
    names = list(summary.hospitals)
    shown = summary.stages_measured()
    show = wording.number if measure == "perplexity" else wording.fine
    values = {
        stage: [summary.hospitals[name].scores(measure).of(stage) for name in names]
        for stage in shown
    }

    labelled = len(names) <= MANY
    step = 0.8 / (len(shown) + 1)  # each stage has its own level within a hospital's row

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for level, stage in enumerate(shown):
            shift = (level - (len(shown) - 1) / 2) * step
            points = [(x, row + shift) for row, x in enumerate(values[stage]) if x is not None]
            axes.plot(
                [x for x, _ in points], [y for _, y in points], _STAGE_MARKS[stage],
                color=COLOURS[stage], label=STAGE_NAMES[stage], markersize=6,
            )  # fmt: skip
            for x, y in points if labelled else ():
                axes.annotate(
                    show(x),
                    (x, y),
                    xytext=(7, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=8,
                )
        for row in range(1, len(names)):
            axes.axhline(row - 0.5, color=COLOURS["line"], linewidth=0.6)
        rows(axes, names)
        axes.margins(x=0.12)
        axes.set_xlabel(f"{_MEASURES[measure]} (further left is better)")
        legend(figure, len(shown))

    alt = f"{_MEASURES[measure]} on held-out notes. " + " ".join(
        f"{name}: "
        + ", ".join(
            f"{STAGE_NAMES[s]} {wording.fine(x)}"
            for s in shown
            if (x := summary.hospitals[name].scores(measure).of(s)) is not None
        )
        + "."
        for name in names
    )
    title = f"{_MEASURES[measure].capitalize()} by hospital"
    note = "Held-out notes of patients never trained on. The axis does not start at zero."
    return picture(
        title, alt, draw, note, row_height(len(names), 0.2 * len(shown) + 0.1 if labelled else 0.42)
    )


def by_round(summary: Summary, measure: Measure) -> Picture | None:
    """The global adapter after each round, from the base model (round 0); None without rounds."""
    lines = {name: h.trajectory(measure) for name, h in summary.hospitals.items() if h.by_round}
    lines = {name: line for name, line in lines.items() if line}
    if not lines:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        _lines(axes, lines)
        whole_rounds(axes, "round (0 is the base model)")
        axes.set_ylabel(_MEASURES[measure])
        legend(figure, len(lines) if len(lines) <= MANY else 2)

    alt = f"{_MEASURES[measure]} on held-out notes by round. " + " ".join(
        f"{name}: from {wording.fine(line[0][1])} to {wording.fine(line[-1][1])}."
        for name, line in lines.items()
    )
    note = "The global adapter on each hospital's held-out notes; lower is better."
    return picture(f"{_MEASURES[measure].capitalize()} by round", alt, draw, note)


def _lines(axes: Axes, lines: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    """One line a name; too many to tell apart become thin lines and their median."""
    if len(lines) > MANY:
        for i, line in enumerate(lines.values()):
            axes.plot(
                *zip(*line, strict=True), color=COLOURS["base"], linewidth=0.8, alpha=0.6,
                label=None if i else "each hospital",
            )  # fmt: skip
        at: dict[int, list[float]] = {}
        for n, value in itertools.chain.from_iterable(lines.values()):
            at.setdefault(n, []).append(value)
        middle = [(n, statistics.median(v)) for n, v in sorted(at.items())]
        axes.plot(*zip(*middle, strict=True), color=COLOURS["merged"], label="median", marker="o")
        return
    for (name, line), mark, dash, i in zip(
        lines.items(),
        "oD^svP",
        itertools.cycle(["-", "--", "-."]),
        itertools.count(1),
        strict=False,
    ):
        axes.plot(
            *zip(*line, strict=True), color=COLOURS[f"s{i}"], linestyle=dash, label=short(name),
            marker=mark if len(line) <= 40 else None, markeredgecolor=COLOURS["card"],
        )  # fmt: skip


def spent(summary: Summary) -> Picture | None:
    """Privacy loss by hospital against its budget; None when privacy was off."""
    budget = summary.privacy.epsilon_budget
    known = {n: h.epsilon for n, h in summary.hospitals.items() if h.epsilon is not None}
    if not summary.privacy.enabled or budget is None or not known:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.barh(
            range(len(known)),
            list(known.values()),
            height=0.5,
            color=COLOURS["merged"],
            label="spent",
        )
        axes.axvline(budget, color=COLOURS["ink"], linestyle="--", linewidth=1.4, label="budget")
        for row, value in enumerate(known.values()):
            inside = value > 0.25 * budget  # room for the number within its bar
            axes.text(
                value + (-0.02 if inside else 0.02) * budget, row, wording.epsilon(value),
                va="center", ha="right" if inside else "left", weight="bold",
                color=COLOURS["card" if inside else "ink"],
            )  # fmt: skip
        rows(axes, list(known))
        axes.set_xlim(0, max(budget, *known.values()) * 1.06)
        axes.set_xlabel("privacy loss ε (smaller is more private)")
        legend(figure, 2)

    alt = f"Privacy loss against the budget of {wording.epsilon(budget)}. " + " ".join(
        f"{name}: {wording.epsilon(value)}." for name, value in known.items()
    )
    note = f"Worst case for any one {summary.privacy.unit}, over everything the hospital sent."
    return picture("Privacy loss by hospital", alt, draw, note, row_height(len(known)))


def training(title: str, series: Mapping[str, Sequence[float]], note: str) -> Picture | None:
    """Curves of one alignment stage, one panel each; None when nothing was logged."""
    kept = {label: values for label, values in series.items() if len(values)}
    if not kept:
        return None

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, len(kept), squeeze=False)[0]
        for panel, (label, values) in zip(panels, kept.items(), strict=True):
            mark = "o" if len(values) <= 12 else None
            panel.plot(range(1, len(values) + 1), values, color=COLOURS["aligned"], marker=mark)
            panel.set_title(label, loc="left", fontsize=9)
            whole_rounds(panel, "logged step")

    alt = f"{title}. " + " ".join(
        f"{label}: from {wording.fine(v[0])} to {wording.fine(v[-1])}." for label, v in kept.items()
    )
    return picture(title, alt, draw, note)


def instructions(summary: Summary) -> Picture | None:
    """Held-out instructions for base, merged and aligned: loss and preference accuracy."""
    scores = {s: i for s in STAGE_NAMES if (i := summary.alignment.instructions.get(s))}
    panels = {
        "loss (lower is better)": {s: i.loss for s, i in scores.items()},
        "good answer preferred (%)": {
            s: None if i.preference_accuracy is None else 100 * i.preference_accuracy
            for s, i in scores.items()
        },
    }
    kept = {
        label: {s: v for s, v in values.items() if v is not None}
        for label, values in panels.items()
        if any(v is not None for v in values.values())
    }
    if not kept:
        return None

    def draw(figure: Figure) -> None:
        for axes, (label, values) in zip(
            figure.subplots(1, len(kept), squeeze=False)[0], kept.items(), strict=True
        ):
            names = [STAGE_NAMES[s] for s in values]
            bars = axes.bar(names, list(values.values()), 0.6, color=[COLOURS[s] for s in values])
            digits = "%.0f" if "%" in label else "%.2f"
            axes.bar_label(bars, fmt=digits, padding=2, color=COLOURS["ink"])
            axes.set_title(label, loc="left", fontsize=9)
            axes.grid(visible=False, axis="x")
            axes.tick_params(axis="x", length=0, labelcolor=COLOURS["ink"])
            if "%" in label:
                axes.set_ylim(0, 108)
                axes.axhline(50, color=COLOURS["ink"], linestyle=":", linewidth=1.2)
            else:
                axes.margins(y=0.12)

    alt = "Held-out instructions. " + " ".join(
        f"{label}: "
        + ", ".join(f"{STAGE_NAMES[s]} {wording.fine(v)}" for s, v in values.items())
        + "."
        for label, values in kept.items()
    )
    note = "Examples that no stage was trained on."
    if any("%" in label for label in kept):
        note += " Dotted: guessing."
    return picture("Held-out instructions", alt, draw, note)


def traffic(summary: Summary) -> Picture | None:
    """Bytes that hospitals sent and received in each round; None without rounds."""
    if not summary.rounds:
        return None
    rounds = [r.round for r in summary.rounds]
    up, down = [r.bytes_up for r in summary.rounds], [r.bytes_down for r in summary.rounds]
    unit, scale = ("MB", 1e6) if max(up + down) >= 1e6 else ("kB", 1e3)

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for values, label, colour, mark, dash in (
            (up, "sent by hospitals", "s1", "o", "-"),
            (down, "sent to hospitals", "s2", "D", "--"),
        ):
            axes.plot(
                rounds, [v / scale for v in values], color=COLOURS[colour], label=label,
                linestyle=dash, marker=mark if len(rounds) <= 40 else None,
            )  # fmt: skip
        axes.set_ylim(0, max(up + down) / scale * 1.15 or 1)
        axes.set_ylabel(unit)
        whole_rounds(axes)
        legend(figure, 2)

    alt = (
        f"Traffic by round. In all, hospitals sent {wording.size(sum(up))} "
        f"and received {wording.size(sum(down))}."
    )
    return picture("Traffic by round", alt, draw, "All hospitals of a round together.")


def discrepancy(summary: Summary) -> Picture | None:
    """What averaging the factors would have got wrong, by round; None when not measured."""
    points = [(r.round, r.discrepancy) for r in summary.rounds if r.discrepancy is not None]
    if not points:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.plot(*zip(*points, strict=True), color=COLOURS["s3"], marker="o")
        axes.set_ylim(0, max(v for _, v in points) * 1.15 or 0.01)
        axes.set_ylabel("relative error")
        whole_rounds(axes)

    alt = "FedAvg discrepancy by round: " + ", ".join(
        f"round {n} {wording.small(value)}" for n, value in points
    )
    note = (
        "Distance between averaging the two LoRA factors and the exact mean of their products, "
        "relative to what that mean has changed. Zero where all hospitals share one factor."
    )
    return picture("FedAvg discrepancy by round", alt, draw, note)


def arms(labels: Sequence[str], gains: Sequence[Sequence[float]]) -> Picture:
    """Mean gain over the base model for each arm of a sweep (bars), and each hospital's (dots)."""
    means = [statistics.fmean(values) if values else 0.0 for values in gains]

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.barh(
            range(len(labels)), means, height=0.5, color=COLOURS["merged"], label="mean", alpha=0.55
        )
        dots = [(x, row) for row, values in enumerate(gains) for x in values]
        axes.plot(
            [x for x, _ in dots], [row for _, row in dots], "o", color=COLOURS["ink"],
            markersize=4.5, label="each hospital", markeredgecolor=COLOURS["card"],
        )  # fmt: skip
        axes.axvline(0, color=COLOURS["muted"], linewidth=1)
        rows(axes, [label.replace(", ", ",\n") for label in labels], 40)
        axes.set_xlabel("bits per character gained over the base model")
        legend(figure, 2)

    alt = "Gain over the base model in bits per character. " + " ".join(
        f"{label}: {wording.fine(mean)}." for label, mean in zip(labels, means, strict=True)
    )
    note = "The merged adapter on held-out notes; further right is better."
    return picture("Gain over the base model", alt, draw, note, row_height(len(labels)))
