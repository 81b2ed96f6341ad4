"""Clinical gain against forgetting, along the line from the base model to the adapter.

At a point a the model is W0 + a dW: for a low-rank update that is the interpolation of the clinical
model with the general instruct model that it was tuned from (the idea of arXiv 2604.01538: weight
interpolation keeps instruction following). Gain and loss are bits per character, mean over files:

    clinical gain   = bits of the base - bits at a, on clinical texts
    general loss    = bits at a - bits of the base, on general instructions

and beside them the number of intruder dimensions, in which forgetting sits (arXiv 2410.21228).
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from adapters.adapter import Adapter
from adapters.base_model import BaseModel, load_base
from conf.experts import TradeoffCommand
from conf.load import ConfigError
from server.experts.inputs import load_adapter, weights_under
from server.experts.interpolation import towards_base
from server.experts.intruder import count_intruders
from server.experts.journal import Journal
from server.experts.tasks import Task, read_tasks, scores_of, tokens_digest
from server.experts.tradeoff_figure import draw
from server.progress import stage_progress
from server.run_folder import write_atomically

_KINDS = ("clinical", "general")


@dataclass(frozen=True)
class Point:
    """One model on the line: gain and loss in bits per character, intruders over all layers."""

    at: float
    clinical_gain: float
    general_loss: float
    intruders: int


def curve(
    scores: Mapping[float, Mapping[str, float]], intruders: Mapping[float, int]
) -> list[Point]:
    """The points, from mean scores (minus bits per character) of "clinical" and "general" texts.

    ``scores`` has the base, 0, beside the points that ``intruders`` names.
    """
    base = scores[0.0]
    return [
        Point(
            at,
            scores[at]["clinical"] - base["clinical"],
            base["general"] - scores[at]["general"],
            count,
        )
        for at, count in sorted(intruders.items())
    ]


def run(command: TradeoffCommand, console: Console) -> list[Point]:
    """Measure every point and write ``tradeoff.json`` and ``tradeoff.svg``; prints a table.

    Raises ConfigError or ModelError with one line for a person.
    """
    done = command.out / "tradeoff.json"
    if done.exists():
        raise ConfigError(f"out={command.out}: holds a finished curve; take another folder")
    adapter = load_adapter("adapter", command.adapter)
    tasks = {
        "clinical": read_tasks("clinical", command.clinical, command.most),
        "general": read_tasks("general", command.general, command.most),
    }
    base = load_base(command.model)
    weights_under(base, adapter)  # says at once whether it fits
    journal = Journal(command.out / "points.jsonl", _what(command, base, adapter, tasks))
    places = sorted(set(command.points))
    with stage_progress(console) as progress:
        bar = progress.add_task("points scored", total=len({0.0, *places}))
        scores = _scores(command, base, adapter, tasks, journal, partial(progress.advance, bar))
        bar = progress.add_task("layers decomposed", total=len(adapter.layers))
        found = _intruders(command, base, adapter, places, journal, partial(progress.advance, bar))
    points = curve(scores, found)
    record = {
        "vectors": command.intruders.vectors,
        "below": command.intruders.below,
        "layers": len(adapter.layers),
        "base": {kind: -scores[0.0][kind] for kind in _KINDS},
        "points": [asdict(point) for point in points],
    }
    draw(command.out / "tradeoff.svg", points)
    write_atomically(done, json.dumps(record, indent=2) + "\n")
    console.print(_table(points))
    console.print(
        f"figure: [bold]{escape(str(command.out / 'tradeoff.svg'))}[/bold]", soft_wrap=True
    )
    return points


def _scores(
    command: TradeoffCommand,
    base: BaseModel,
    adapter: Adapter,
    tasks: Mapping[str, tuple[Task, ...]],
    journal: Journal,
    on_done: Callable[[], None],
) -> dict[float, dict[str, float]]:
    """Mean scores of "clinical" and "general" texts at every point, and at the base (0)."""
    known = {record["at"]: record["scores"] for record in journal.of("scores")}
    for at in sorted({0.0, *command.points}):
        if at not in known:
            scaled = towards_base(adapter, at) if at else None
            known[at] = {
                kind: statistics.fmean(scores_of(base, scaled, own, command.max_tokens).values())
                for kind, own in tasks.items()
            }
            journal.append({"kind": "scores", "at": at, "scores": known[at]})
        on_done()
    return known


def _intruders(
    command: TradeoffCommand,
    base: BaseModel,
    adapter: Adapter,
    places: Sequence[float],
    journal: Journal,
    on_done: Callable[[], None],
) -> dict[float, int]:
    """Intruder dimensions of all layers together, by point. One SVD a layer serves all points."""
    known = {record["layer"]: record["counts"] for record in journal.of("intruders")}
    deltas = adapter.deltas()
    wanted = command.intruders
    for name, weight in weights_under(base, adapter).items():
        if name not in known:
            known[name] = count_intruders(
                weight, deltas[name], places, wanted.vectors, wanted.below
            )
            journal.append({"kind": "intruders", "layer": name, "counts": known[name]})
        on_done()
    totals = [sum(counts) for counts in zip(*known.values(), strict=True)]
    return dict(zip(places, totals, strict=True))


def _what(
    command: TradeoffCommand,
    base: BaseModel,
    adapter: Adapter,
    tasks: Mapping[str, tuple[Task, ...]],
) -> dict[str, Any]:
    """All that the figures depend on."""
    return {
        "what": "wardround tradeoff",
        "model": base.fingerprint,
        "adapter": [adapter.fingerprint(), adapter.spec.scale],
        "tasks": {kind: [task.digest for task in own] for kind, own in tasks.items()},
        "tokens": tokens_digest(base, [task for own in tasks.values() for task in own]),
        "points": sorted(set(command.points)),
        "max_tokens": command.max_tokens,
        "intruders": command.intruders.model_dump(),
    }


def _table(points: Sequence[Point]) -> Table:
    table = Table(title="bits per character, against the base model", title_justify="left")
    for name in ("scale of the adapter", "clinical gain", "general loss", "intruder dimensions"):
        table.add_column(name, justify="right")
    for point in points:
        table.add_row(
            f"{point.at:g}", f"{point.clinical_gain:+.4f}", f"{point.general_loss:+.4f}",
            str(point.intruders),
        )  # fmt: skip
    return table
