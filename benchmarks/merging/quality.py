"""What merging keeps of what hospitals learned, with and without noise, on real notes.

Hospitals are the largest departments of the MTSamples; the unit is the note. A cell is one whole
federation: so many hospitals, one arm, one epsilon, one seed. Its figure is the mean over
departments of the bits per character that its adapter saves on held-out notes.

Every cell is a line of a file, written when it ends: what is there under the same settings is not
computed again, and what was interrupted goes on after its last finished hospital's round.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache
from multiprocessing import get_context
from pathlib import Path

import torch
from rich.progress import Progress

from adapters.adapter import Adapter
from adapters.base_model import cache_folder
from benchmarks.merging.departments import Department, departments
from benchmarks.merging.federation import Federation, Outcome
from conf.load import load
from conf.schema import ModelSettings, RunSettings
from strategies.base import MergeError
from strategies.merging import merge
from strategies.registry import create, strategies

Epsilon = float | None
EPSILONS: tuple[Epsilon, ...] = (None, 8.0, 3.0, 1.0)
SEEDS = (0, 1, 2)

_NOTES_FOR_RULES = 12  # of each department
_EPSILONS_OF_RULES = (None, 8.0, 1.0)
# What the arms share, beyond the defaults of `wardround simulate`.
_COMMON = (
    "alignment=none",
    "model.precision=bfloat16",  # half the time of float32 on these cores
    "privacy=patient_eps8",
    "privacy.unit=note",
    "privacy.sampling_rate=0.25",
    "privacy.denominator=43",  # about a quarter of a department's notes
    "privacy.clip_norm=0.25",
    "optimizer=sgd",
)
# Every arm has the rate that suits what it trains, which is the default: of those tried
# (``_OTHER_RATES``) the one with the largest gain at epsilon 3 with four hospitals, first seed.
_MOVING_A: dict[str, tuple[str, ...]] = {
    "rolora": ("strategy=rolora", "adapter.train=alternate"),
    "fedavg": ("strategy=fedavg", "adapter.train=both"),
    "product_mean": ("strategy=product_mean", "adapter.train=both"),
    "lora_fair": ("strategy=lora_fair", "adapter.train=both"),
}
ARMS: dict[str, tuple[str, ...]] = {
    "fedsvd": ("strategy=fedsvd",),
    "core": ("strategy=ffa", "adapter.train=core", "adapter.rank=32", "adapter.alpha=64"),
    **_MOVING_A,
    "hetlora": ("strategy=hetlora", "adapter.train=both"),  # at FedAvg's rate, not one of its own
}
_TRIED_AT: tuple[Epsilon, ...] = (3.0, 1.0)
_FULL_RATE = 10.0  # that of B alone, measured at every epsilon
_OTHER_RATES = {
    "fedsvd": (5.0, 7.0, 14.0),
    "core": (5.0, 20.0),
    "rolora": (2.5, _FULL_RATE),
    "fedavg": (2.5, _FULL_RATE),
    "product_mean": (_FULL_RATE,),
    "lora_fair": (_FULL_RATE,),
    "pooled": (14.0,),  # one noise in place of four bears a longer step,
    "alone": (2.5, 5.0),  # and one that is not averaged a shorter one
}
STATISTICS: dict[str, tuple[str, ...]] = {  # under privacy only
    "regmean": ("strategy=regmean",),
    "fisher": ("strategy=fisher",),
}
IN_ROUNDS: dict[str, tuple[str, ...]] = {  # with few hospitals, under the first seed only
    name: (f"strategy={name}",)
    for name, kind in sorted(strategies().items())
    if kind.declared.of_changes
}
POOLED, ALONE = "pooled", "alone"
OWN_NOTES = "alone, own notes"  # of ALONE: what each hospital's adapter saves on its own notes
AT_OTHER_RATES: dict[str, tuple[str, ...]] = {  # under the first seed only
    f"{name}, rate {rate:g}": (
        *ARMS.get(name, ARMS["fedsvd"]), f"optimizer.learning_rate={rate:g}"
    )
    for name, rates in _OTHER_RATES.items()
    for rate in rates
}  # fmt: skip
# What noise is not to blame for: longer and unclipped training, under the first seed only.
WITHOUT_PRIVACY: dict[str, tuple[str, ...]] = {
    "fedsvd, 4 local steps": ("strategy=fedsvd", "federation.local_steps=4"),
    **{
        f"fedsvd, unclipped, rate {rate:g}": (
            "strategy=fedsvd", "privacy.clip_norm=1e6", f"optimizer.learning_rate={rate:g}"
        )
        for rate in (1.0, 2.0, 4.0)
    },
}  # fmt: skip
# Every second hospital has an epsilon of 1 whatever the cell's is.
MIXED: dict[str, tuple[str, ...]] = {
    "fedsvd, half at 1": ARMS["fedsvd"],
    "noise_aware, half at 1": ("strategy=noise_aware",),
}
_SMALL_BUDGET = 1.0


@dataclass(frozen=True)
class Scale:
    """How large the measurement is."""

    max_tokens: int
    held_out: int  # notes of each department
    rounds: int
    local_steps: int
    rules: bool = True  # also merge the last round by every other strategy


FULL = Scale(max_tokens=64, held_out=32, rounds=4, local_steps=1)
QUICK = Scale(max_tokens=32, held_out=12, rounds=2, local_steps=1, rules=False)


@dataclass(frozen=True)
class Cell:
    """One federation of ``hospitals`` departments; ``epsilon`` None is without privacy."""

    hospitals: int
    arm: str
    epsilon: Epsilon
    seed: int
    scale: Scale

    @property
    def key(self) -> str:
        """What makes two cells the same."""
        return json.dumps(asdict(self), sort_keys=True)


@dataclass(frozen=True)
class Result:
    """Bits and characters of every held-out note, by department; under other rules if merged."""

    cell: Cell
    base: dict[str, list[float]]
    bits: dict[str, list[float]]
    chars: dict[str, list[int]]
    rules: dict[str, dict[str, list[float]]]  # last round merged by other strategies; OWN_NOTES
    settings: str = ""  # fingerprint of what it was measured under

    @classmethod
    def of(cls, line: str) -> Result:
        """From a line of the file."""
        raw = json.loads(line)
        cell = raw.pop("cell")
        return cls(Cell(**{**cell, "scale": Scale(**cell["scale"])}), **raw)


def cells(scale: Scale, hospitals: Sequence[int], seeds: Sequence[int]) -> Iterator[Cell]:
    """All cells, some twice; those first that tell most."""
    first, *others = seeds
    few, *more = hospitals
    for epsilon in EPSILONS:
        yield Cell(few, "fedsvd", epsilon, first, scale)
    yield Cell(few, POOLED, None, first, scale)
    for arm in ARMS:
        for epsilon in (None, EPSILONS[-1]):
            yield Cell(few, arm, epsilon, first, scale)
    for arm in MIXED:
        yield Cell(few, arm, EPSILONS[1], first, scale)
    for seed in others:
        for epsilon in EPSILONS:
            yield Cell(few, "fedsvd", epsilon, seed, scale)
    for count in more:
        for epsilon in EPSILONS:
            yield Cell(count, "fedsvd", epsilon, first, scale)
    for arm in AT_OTHER_RATES:
        for epsilon in _TRIED_AT:
            yield Cell(few, arm, epsilon, first, scale)
    for count in hospitals:
        for name in _MOVING_A:
            for epsilon in EPSILONS:
                yield Cell(count, f"{name}, rate {_FULL_RATE:g}", epsilon, first, scale)
    every = [(first, count) for count in hospitals]
    every += [(seed, count) for count in hospitals for seed in others]
    for seed, count in every:
        for arm in (ALONE, POOLED, *ARMS):
            for epsilon in EPSILONS:
                yield Cell(count, arm, epsilon, seed, scale)
    for arm in (name for name in IN_ROUNDS if _merges(name, few)):
        for epsilon in _EPSILONS_OF_RULES:
            yield Cell(few, arm, epsilon, first, scale)
    for arm in WITHOUT_PRIVACY:
        yield Cell(few, arm, None, first, scale)
    for seed, count in [*((first, count) for count in hospitals), *((s, few) for s in others)]:
        for arm in MIXED:
            yield Cell(count, arm, EPSILONS[1], seed, scale)
        for arm in STATISTICS:
            for epsilon in EPSILONS[1:]:
                yield Cell(count, arm, epsilon, seed, scale)


def _merges(strategy: str, count: int) -> bool:
    try:
        create(strategy).require_count(count)
    except MergeError:
        return False
    return True


def measure(wanted: Sequence[Cell], file: Path, jobs: int, progress: Progress) -> list[Result]:
    """Results of all cells, from the file or by ``jobs`` processes of one thread each."""
    known = {result.cell.key: result for result in current(file)}
    missing = list({cell.key: cell for cell in wanted if cell.key not in known}.values())
    task = progress.add_task("federations", total=len(known) + len(missing), completed=len(known))
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        running = [pool.submit(_measured, cell) for cell in missing]
        for ended in as_completed(running):
            if ended.exception():
                pool.shutdown(wait=False, cancel_futures=True)
            result = ended.result()
            known[result.cell.key] = result
            _append(file, json.dumps(asdict(result)))
            progress.advance(task)
    return [known[key] for key in dict.fromkeys(cell.key for cell in wanted)]


def _append(file: Path, line: str) -> None:
    """On a line of its own, even after one that was cut short."""
    before = file.read_bytes() if file.exists() else b""
    cut = bool(before) and not before.endswith(b"\n")
    with file.open("a") as out:
        out.write("\n" * cut + line + "\n")


def read(file: Path) -> list[Result]:
    """What was measured before; a line cut short by an interruption is measured again."""
    found = []
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            found.append(Result.of(line))
        except json.JSONDecodeError:
            continue
    return found


def current(file: Path) -> list[Result]:
    """What was measured under today's settings; what was not is no figure of what runs now."""
    return [result for result in read(file) if result.settings == fingerprint(result.cell)]


def settings(cell: Cell, hospitals: int) -> RunSettings:
    """The configuration of a cell. ``hospitals`` is how many there are in the federation.

    What an arm says wins over the scale. A pooled site takes the same steps on all the notes: its
    sums are as much larger as the divisor.
    """
    arms = {**ARMS, **AT_OTHER_RATES, **MIXED, **STATISTICS, **IN_ROUNDS, **WITHOUT_PRIVACY}
    chosen = arms.get(cell.arm, ARMS["fedsvd"])
    scale = cell.scale
    own = [
        f"seed={cell.seed}",
        f"privacy.max_tokens={scale.max_tokens}",
        f"federation.rounds={scale.rounds}",
        f"federation.local_steps={scale.local_steps}",
    ]
    if cell.epsilon is None:
        own.append("privacy.enabled=false")
    else:
        own.append(f"privacy.epsilon={cell.epsilon:g}")
    made = load("simulate", [*_COMMON, *own, *chosen], RunSettings)
    if not _is(POOLED, cell):
        return made
    larger = {"denominator": made.privacy.denominator * hospitals}
    return made.model_copy(update={"privacy": made.privacy.model_copy(update=larger)})


def fingerprint(cell: Cell) -> str:
    """Of the settings that decide its figures: a default that changes makes another federation."""
    return _fingerprint(replace(cell, seed=0))  # no setting follows from the seed


@cache
def _fingerprint(cell: Cell) -> str:
    whole = dict.fromkeys(("adapter", "model", "optimizer", "privacy", "strategy"), True)
    told = settings(cell, cell.hospitals).model_dump_json(
        include={**whole, "federation": {"rounds", "local_steps"}}
    )
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _is(arm: str, cell: Cell) -> bool:
    """At its own rate or another."""
    return cell.arm.partition(", ")[0] == arm


def _measured(cell: Cell) -> Result:
    """Runs in a process of its own."""
    torch.set_num_threads(1)
    made = settings(cell, cell.hospitals)
    federation = _federation(made.model.model_dump_json())
    sites = departments(
        federation.tokenizer, cell.hospitals, cell.scale.max_tokens, cell.scale.held_out
    )

    def bits(adapter: Adapter) -> dict[str, list[float]]:
        return {site.name: federation.bits(adapter, site.held_out) for site in sites}

    base = {site.name: federation.base_bits(made, site) for site in sites}
    rules: dict[str, dict[str, list[float]]] = {}
    if _is(POOLED, cell):
        everyone = {unit: rows for site in sites for unit, rows in site.units.items()}
        found = bits(federation.run(made, [Department(POOLED, everyone, [])]).merged)
    elif _is(ALONE, cell):
        alone = [bits(federation.run(made, [site]).merged) for site in sites]
        found = min(alone, key=lambda one: sum(map(sum, one.values())))  # the best for all
        rules[OWN_NOTES] = {s.name: own[s.name] for s, own in zip(sites, alone, strict=True)}
    else:
        budgets = [_SMALL_BUDGET if i % 2 else cell.epsilon for i in range(len(sites))]
        ended = federation.run(made, sites, budgets if cell.arm in MIXED else ())
        found = bits(ended.merged)
        if (
            cell.scale.rules
            and cell.arm == "fedsvd"
            and cell.seed == 0
            and cell.epsilon in _EPSILONS_OF_RULES
        ):
            rules = {
                name: {s.name: federation.bits(one, s.held_out[:_NOTES_FOR_RULES]) for s in sites}
                for name, one in _by_other_rules(ended)
            }
    chars = {site.name: [note.chars for note in site.held_out] for site in sites}
    return Result(cell, base, found, chars, rules, fingerprint(cell))


def _by_other_rules(ended: Outcome) -> Iterator[tuple[str, Adapter]]:
    """What was sent last, merged whole, as without rounds, by every strategy that takes it."""
    weights = [1 / len(ended.sent)] * len(ended.sent)
    rules: dict[str, tuple[str, dict[str, str]]] = {
        name: (name, {})
        for name, kind in sorted(strategies().items())
        if "B" in kind.declared.trains and kind.declared.statistics is None
    }
    for shrink in ("singular", "stein"):
        rules[f"noise_aware, {shrink}"] = ("noise_aware", {"shrink": shrink})
    for name in ("tsv_m", "iso_c"):
        rules[f"{name}, sum"] = (name, {"strength": str(len(ended.sent))})
    for rule, (name, parameters) in rules.items():
        try:
            yield rule, merge(create(name, parameters), ended.sent, weights, ended.draw).adapter
        except MergeError:  # too many hospitals for SLERP, too few for Krum
            continue


@lru_cache(maxsize=1)
def _federation(configured: str) -> Federation:
    model = ModelSettings.model_validate_json(configured)
    return Federation(model, cache_folder() / "benchmarks" / "merging")
