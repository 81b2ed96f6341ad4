"""One simulated run, from notes to release, in the order it happens.

    hospitals -> rounds (Flower) -> alignment -> evaluation -> release and report

Every stage leaves its result in the run folder, so ``resume`` goes on where a run was interrupted:
finished rounds, hospitals trained alone and the aligned adapter are not made again.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from adapters import lora
from adapters.adapter import Adapter
from adapters.base_model import BaseModel, cache_folder, load_base, load_tokenizer, skeleton
from client.refusal import Refusal
from conf.load import ConfigError
from conf.schema import RunSettings
from server.alignment.align import align, require_targets
from server.alignment.mediflow import (
    InstructionsError,
    InstructionSet,
    load_instructions,
    require_chat,
)
from server.evaluation.instructions import score_instructions
from server.progress import stage_progress
from server.release import release
from server.rounds import RoundFailed
from server.run_folder import RunFolder, write_atomically
from simulation.alone import train_alone
from simulation.cohort import public_cohort
from simulation.evaluate import as_record, held_out_texts, score
from simulation.instructions import write_instructions
from simulation.memory import PeakMemory
from simulation.report import write_report
from simulation.sites import Hospitals, prepare, require_hospital_field
from simulation.summary import Measurements, release_facts, write_summary
from strategies.registry import require_strategy

OnStep = Callable[[str, int, int], None]

_COHORT = 60  # inhabitants of the public cohort's catchment, enough for a few hundred instructions


def new_run_folder(runs: Path, label: str = "") -> RunFolder:
    """A folder that does not exist yet, named by date, time and label."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    name = f"{stamp}-{label}" if label else stamp
    names = itertools.chain([name], (f"{name}-{n}" for n in itertools.count(2)))
    return RunFolder(next(runs / n for n in names if not (runs / n).exists()))


def comparable(settings: RunSettings) -> RunSettings:
    """A pooled run divides by the denominators of all the hospitals it stands for.

    Its sum is over the units of all of them; with one hospital's denominator each of its steps
    would be longer than the federation's, by their number.
    """
    if settings.hospitals.layout != "pooled":
        return settings
    whole = settings.privacy.denominator * settings.hospitals.count
    privacy = settings.privacy.model_copy(update={"denominator": whole})
    return settings.model_copy(update={"privacy": privacy})


def open_run(settings: RunSettings, overrides: list[str]) -> tuple[RunSettings, RunFolder]:
    """The run to do: a new one, or the one to resume, with the configuration it was started with.

    Raises ConfigError when there is nothing to resume, or other options are given beside it, or
    when the strategy's parameters are impossible or hospitals cannot be told apart.
    """
    if settings.resume is None:
        require_strategy(settings)
        require_hospital_field(settings)
        return comparable(settings), new_run_folder(settings.runs)
    others = [o for o in overrides if not o.startswith("resume=")]
    if others:
        raise ConfigError(f"{others[0]}: resume takes its configuration from the run folder, alone")
    folder = RunFolder(settings.resume)
    if not (folder.path / "config.yaml").exists():
        raise ConfigError(f"resume={settings.resume}: no run folder (config.yaml is missing)")
    try:
        started_with = folder.settings()
        require_strategy(started_with)  # an older version may have begun what cannot end
        return started_with, folder
    except ConfigError as problem:
        raise ConfigError(f"{folder.path / 'config.yaml'}: {problem}") from None


def simulate(settings: RunSettings, folder: RunFolder, console: Console) -> dict[str, Any]:
    """Run (or finish) one simulation and return its summary; the report is in the run folder.

    Raises ConfigError, NotesError, ModelError or RoundFailed with one line for a person.
    """
    began = time.monotonic()
    measured = Measurements()
    model = skeleton(settings.model)
    if settings.alignment.enabled:
        require_targets(model, settings.alignment)
        require_chat(load_tokenizer(settings.model))
    folder.create(settings)
    console.print(f"run folder: [bold]{escape(str(folder.path))}[/bold]", soft_wrap=True)
    with PeakMemory() as memory:
        with _stage(console, measured, "hospitals") as on_step:
            settings, hospitals = _hospitals(settings, folder, measured, on_step)
        for notice in measured.notices:
            console.print(f"[yellow]note[/yellow] {notice}")
        instructions = None
        if settings.alignment.enabled:  # before the rounds, so that a mistake in them costs little
            with _stage(console, measured, "instructions") as on_step:
                instructions = _instructions(settings, folder, on_step)
        with _timed(measured, "rounds"):
            _rounds(settings, folder, hospitals)
        base = load_base(settings.model)
        adapters = {"merged": folder.global_adapter()}
        if instructions is not None:
            with _stage(console, measured, "alignment") as on_step:
                adapters["aligned"] = _aligned(
                    settings, folder, base, instructions, measured, on_step
                )
        with _stage(console, measured, "evaluation") as on_step:
            _evaluate(settings, folder, base, hospitals, adapters, instructions, measured, on_step)
        seconds = time.monotonic() - began
        summary = write_summary(
            settings, folder, base, hospitals, measured, seconds, memory.peak_mb
        )
        final = adapters.get("aligned", adapters["merged"])
        release(final, release_facts(settings, summary, base, final.spec), folder.path / "release")
        write_report(folder.path)
    return summary


def _hospitals(
    settings: RunSettings, folder: RunFolder, measured: Measurements, on_step: OnStep
) -> tuple[RunSettings, Hospitals]:
    """Simulated hospitals; without patient ids the privacy unit falls back to the note."""
    if settings.privacy.enabled and not settings.notes.names_patients:
        if settings.privacy.unit == "patient":
            privacy = settings.privacy.model_copy(update={"unit": "note"})
            settings = settings.model_copy(update={"privacy": privacy})
            folder.create(settings)
        measured.notices.append(
            "the notes carry no patient ids (notes.patient_field is not set): the privacy unit is "
            "the NOTE; a patient with several notes is protected less than epsilon says"
        )
    if not settings.privacy.enabled:
        measured.notices.append("privacy is off: nothing this run produces is protected")
    hospitals = prepare(settings, folder, on_step)
    if hospitals.unplaced:
        measured.notices.append(
            f"records rejected: {hospitals.unplaced}; which hospital they belong to is not known"
        )
    return settings, hospitals


def _rounds(settings: RunSettings, folder: RunFolder, hospitals: Hospitals) -> None:
    if len(folder.finished_rounds()) >= settings.federation.rounds:
        return
    from simulation.flower import run_rounds  # imports Ray, which a finished run does not need

    run_rounds(folder, len(hospitals.sites))
    if len(folder.finished_rounds()) < settings.federation.rounds:
        raise RoundFailed(f"rounds ended early, see {folder.path / 'flower.log'}")


def _instructions(settings: RunSettings, folder: RunFolder, on_step: OnStep) -> InstructionSet:
    """MediFlow, or a MediFlow-schema set from simulated patients of no hospital."""
    wanted = settings.alignment
    path = wanted.path
    if wanted.data == "synthetic":
        if path is not None:
            raise ConfigError(f"alignment.path={path}: is read with alignment=mediflow")
        on_step("simulating the public cohort", 0, 1)
        cohort = public_cohort(_COHORT, settings.seed, cache_folder() / "clinosim")
        path = folder.path / "instructions"
        try:
            write_instructions(cohort.export, path, wanted.examples, wanted.held_out, settings.seed)
        except ValueError as problem:
            raise InstructionsError(
                f"alignment.examples={wanted.examples}, alignment.held_out={wanted.held_out}: "
                f"{problem}"
            ) from None
    return load_instructions(path, wanted.examples, wanted.held_out)


def _aligned(
    settings: RunSettings,
    folder: RunFolder,
    base: BaseModel,
    data: InstructionSet,
    measured: Measurements,
    on_step: OnStep,
) -> Adapter:
    saved, record = folder.path / "adapters" / "aligned", folder.path / "alignment.json"
    if not record.exists():
        result = align(
            base, folder.global_adapter(), data, settings.alignment, settings.seed, on_step
        )
        result.adapter.save(saved, base.public_name)
        stages = {name: stage.as_dict() for name, stage in result.stages.items()}
        write_atomically(record, json.dumps(stages))
    measured.alignment = json.loads(record.read_text())
    return Adapter.load(saved)


def _evaluate(
    settings: RunSettings,
    folder: RunFolder,
    base: BaseModel,
    hospitals: Hospitals,
    adapters: dict[str, Adapter],
    instructions: InstructionSet | None,
    measured: Measurements,
    on_step: OnStep,
) -> None:
    """Scores of every hospital and stage, and of the held-out instructions."""
    limits = settings.evaluation
    local = _local(settings, folder, hospitals, on_step)
    earlier = {
        n: Adapter.load(folder.adapter_folder(n)) for n in range(1, settings.federation.rounds)
    }
    total = sum(len(site.stands_for) for site in hospitals.sites)
    for site in hospitals.sites:
        for name, texts in held_out_texts(site, limits.notes).items():
            on_step("scoring held-out notes", len(measured.scores), total)

            def of(adapter: Adapter | None, texts: list[str] = texts) -> Any:
                return score(base, adapter, texts, limits.max_tokens)

            scores = {"base": of(None)}
            if site.name in local:
                scores["local"] = of(local[site.name])
            scores |= {stage: of(adapter) for stage, adapter in adapters.items()}
            by_round = {n: of(adapter) for n, adapter in earlier.items()}
            by_round[settings.federation.rounds] = scores["merged"]
            measured.scores[name] = as_record(scores) | {
                "by_round": [
                    {"round": n, "perplexity": s.perplexity, "bits_per_char": s.bits_per_char}
                    for n, s in by_round.items()
                ]
            }
    on_step("scoring held-out notes", total, total)
    if instructions is None:
        return
    scored = {}
    for done, stage in enumerate(("base", *adapters)):
        on_step("scoring held-out instructions", done, 1 + len(adapters))
        tokens = settings.alignment.max_tokens
        with _under(base, adapters.get(stage)):
            scored[stage] = score_instructions(
                base.model, base.tokenizer, instructions.held_out, tokens
            )
    measured.alignment["instructions"] = scored


def _local(
    settings: RunSettings, folder: RunFolder, hospitals: Hospitals, on_step: OnStep
) -> dict[str, Adapter]:
    """The adapter of each hospital alone, where asked for; a single site is alone already.

    Where all notes were pooled nobody was.
    """
    if settings.hospitals.layout == "pooled":
        return {}
    if len(hospitals.sites) == 1:
        return {hospitals.sites[0].name: folder.global_adapter()}
    if not settings.evaluation.alone:
        return {}
    alone = {}
    for site in hospitals.sites:
        name = site.name
        on_step(f"{name} alone", 0, 1)
        try:
            alone[name] = train_alone(settings, folder, site, partial(on_step, f"{name} alone"))
        except (Refusal, FileNotFoundError):  # it took no part in the first round, or has no budget
            continue
    return alone


@contextmanager
def _under(base: BaseModel, adapter: Adapter | None) -> Iterator[None]:
    if adapter is None:
        yield
    else:
        with lora.applied(base.model, adapter):
            yield


@contextmanager
def _timed(measured: Measurements, name: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    measured.stages[name] = time.monotonic() - began


@contextmanager
def _stage(console: Console, measured: Measurements, name: str) -> Iterator[OnStep]:
    """A progress line for one stage; ``OnStep`` takes what is being done, done, total."""
    with _timed(measured, name), stage_progress(console) as progress:
        task = progress.add_task(name, total=1)

        def on_step(what: str, done: int, total: int) -> None:
            progress.update(task, description=f"{name}: {what}", completed=done, total=total)

        yield on_step
        progress.update(task, description=name, completed=progress.tasks[0].total)
