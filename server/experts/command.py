"""``wardround experts``: expert adapters and tasks in, one merged adapter and a table out."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape

from adapters.adapter import Adapter
from adapters.base_model import BaseModel, load_base
from conf.experts import ExpertsCommand
from conf.load import ConfigError
from server.experts.inputs import distinct_names, load_adapter, weights_under
from server.experts.interpolation import furthest, towards_base
from server.experts.journal import Journal
from server.experts.outcome import outcome, outcome_table
from server.experts.search import Found, search
from server.experts.space import Candidate, Space
from server.experts.tasks import Task, read_tasks, scores_of, tokens_digest
from server.offline.adapters import highest_rank
from server.progress import stage_progress
from server.run_folder import write_atomically
from strategies.base import Draw
from strategies.merging import Exact, Merge, merge
from strategies.registry import create, innermost, require_adapters_suffice

_BASE = "base"
_FAR_FROM_SLERP = 0.05  # of the update: worth a word


@dataclass(frozen=True)
class Chosen:
    """An expert brought back towards the base: which proportion, and its scores by task."""

    name: str
    proportion: float
    adapter: Adapter
    scores: Mapping[str, float]


def run(command: ExpertsCommand, console: Console) -> Merge:
    """Choose, search, merge and write; prints the table.

    Raises ConfigError, ModelError or MergeError with one line for a person.
    """
    if (command.out / "report.json").exists():
        raise ConfigError(f"out={command.out}: holds a finished search; take another folder")
    strategy = create(command.strategy.name, command.strategy.parameters)
    require_adapters_suffice(strategy, "strategy")
    if innermost(strategy).declared.space == "factors":
        raise ConfigError(
            f"strategy={strategy.name}: acts on factors, which experts have in their own bases; "
            "take product_mean"
        )
    space = Space.of(strategy, len(command.experts), command.search.keep)
    names = distinct_names("experts", command.experts)
    experts = {
        name: load_adapter("experts", folder)
        for name, folder in zip(names, command.experts, strict=True)
    }
    tasks = read_tasks("tasks", command.tasks, command.most)
    test = read_tasks("test", command.test, command.most) or tasks
    base = load_base(command.model)
    bench = _Bench(command, base, tasks)
    for expert in experts.values():
        weights_under(base, expert)  # says at once which does not fit
        if command.rank is not None and command.rank > (narrowest := highest_rank(expert)):
            raise ConfigError(f"rank={command.rank}: a layer is only {narrowest} wide")
    # What cannot be merged fails before anything is scored.
    bench.merged(space.configured, list(experts.values()))
    journal = Journal(command.out / "search.jsonl", _what(command, base, experts, tasks))
    with stage_progress(console) as progress:
        bar = progress.add_task("experts towards the base", total=len(experts))
        chosen = []
        for name, expert in experts.items():
            chosen.append(_choose(name, expert, bench, journal))
            progress.advance(bar)
        brought_back = [one.adapter for one in chosen]
        bar = progress.add_task("search", total=command.search.evaluations)
        found = search(
            space,
            lambda candidate: bench.scores(bench.merged(candidate, brought_back).adapter),
            command.search.evaluations,
            command.seed,
            journal,
            lambda done, total, best: progress.update(
                bar, completed=done, description=f"search, best mean score {best:.4f}"
            ),
        )
        merged = bench.merged(found.candidate, brought_back)
        models = {_BASE: None, **{_label(c): c.adapter for c in chosen}, "merged": merged.adapter}
        bar = progress.add_task("table", total=len(models))
        rows = {}
        for name, adapter in models.items():
            rows[name] = scores_of(base, adapter, test, command.max_tokens)
            progress.advance(bar)
    merged.adapter.save(command.out / "adapter", base.public_name)
    record = _report(command, base, chosen, found, merged, rows)
    write_atomically(command.out / "report.json", json.dumps(record, indent=2) + "\n")
    console.print(outcome_table("score: minus bits per character", rows, _BASE))
    apart = {name: arc["departure"] for name, arc in record["slerp"].items() if arc}
    furthest_off = max(apart, key=lambda name: apart[name], default=None)
    if furthest_off is not None and apart[furthest_off] > _FAR_FROM_SLERP:
        console.print(
            f"SLERP of full weights would be {apart[furthest_off]:.0%} of the update away from "
            f"what was done ({furthest_off}, its worst layer; slerp in report.json)",
            soft_wrap=True,
            markup=False,
            highlight=False,
        )
    if not command.test:
        console.print("on the texts that were chosen by: better than on new ones; give test=[...]")
    console.print(
        f"merged adapter: [bold]{escape(str(command.out / 'adapter'))}[/bold]", soft_wrap=True
    )
    return merged


@dataclass(frozen=True)
class _Bench:
    """Where candidates are merged and scored."""

    command: ExpertsCommand
    base: BaseModel
    tasks: tuple[Task, ...]

    def scores(self, adapter: Adapter) -> dict[str, float]:
        return scores_of(self.base, adapter, self.tasks, self.command.max_tokens)

    def merged(self, candidate: Candidate, adapters: Sequence[Adapter]) -> Merge:
        strategy = create(self.command.strategy.name, candidate.parameters)
        rank = self.command.rank or sum(adapter.spec.rank for adapter in adapters)
        fits = rank <= min(map(highest_rank, adapters))
        draw = Draw(f"experts {self.command.seed}")
        return merge(strategy, adapters, candidate.weights, draw, rank if fits else Exact())


def _choose(name: str, expert: Adapter, bench: _Bench, journal: Journal) -> Chosen:
    """The proportion of the best mean score; the smaller one of equals.

    Raises ConfigError where no score is finite.
    """
    known = {
        record["proportion"]: record["scores"]
        for record in journal.of("interpolation")
        if record["expert"] == name
    }
    for proportion in bench.command.proportions:
        if proportion not in known:
            known[proportion] = bench.scores(towards_base(expert, proportion))
            journal.append(
                {
                    "kind": "interpolation", "expert": name, "proportion": proportion,
                    "scores": known[proportion],
                }
            )  # fmt: skip
    finite = [p for p in sorted(known) if math.isfinite(sum(known[p].values()))]
    if not finite:
        raise ConfigError(f"experts: {name} scores NaN at every proportion; leave it out")
    best = max(finite, key=lambda proportion: sum(known[proportion].values()))
    return Chosen(name, best, towards_base(expert, best), known[best])


def _label(chosen: Chosen) -> str:
    return f"{chosen.name} at {chosen.proportion:.0%}"


def _what(
    command: ExpertsCommand,
    base: BaseModel,
    experts: Mapping[str, Adapter],
    tasks: tuple[Task, ...],
) -> dict[str, Any]:
    """What a search is about: all that its scores and its course depend on."""
    return {
        "what": "wardround experts",
        "model": base.fingerprint,
        # A list: weights are recorded by place, so another order is other work.
        "experts": [[name, a.fingerprint(), a.spec.scale] for name, a in experts.items()],
        "tasks": {task.name: task.digest for task in tasks},
        "tokens": tokens_digest(base, tasks),
        "strategy": command.strategy.model_dump(mode="json"),
        "keep": command.search.keep,
        "proportions": command.proportions,
        "seed": command.seed,
        "rank": command.rank,
        "max_tokens": command.max_tokens,
    }


def _report(
    command: ExpertsCommand,
    base: BaseModel,
    chosen: list[Chosen],
    found: Found,
    merged: Merge,
    rows: Mapping[str, Mapping[str, float]],
) -> dict[str, Any]:
    """``report.json``: what was chosen, what came of it, and on which texts that was measured."""
    outcomes = {name: asdict(outcome(rows[_BASE], scores)) for name, scores in rows.items()}
    return {
        "strategy": command.strategy.name,
        "parameters": dict(found.candidate.parameters),
        "weights": dict(zip((c.name for c in chosen), found.candidate.weights, strict=True)),
        "proportions": {c.name: c.proportion for c in chosen},
        "slerp": {c.name: _slerp(base, command, c) for c in chosen},
        "evaluations": found.evaluations,
        "objective": found.objective,
        "rank": merged.adapter.spec.rank,
        "kept_energy": merged.kept_energy,
        "discrepancy": merged.discrepancy,
        "mean_cosine": merged.mean_cosine,
        "norm_ratio": merged.norm_ratio,
        "measured_on": "test" if command.test else "tasks",
        "scores": rows,
        "outcomes": outcomes,
    }


def _slerp(base: BaseModel, command: ExpertsCommand, chosen: Chosen) -> dict[str, float] | None:
    """How far SLERP of full weights would have been from what was done, at worst over layers."""
    if command.model.precision == "nf4":
        return None
    whole = towards_base(chosen.adapter, 1 / chosen.proportion)
    arc = furthest(weights_under(base, whole), whole, chosen.proportion)
    return {"angle": arc.angle, "departure": arc.departure}
