"""One audit, from notes to verdict: white box, then whole rounds, then black box.

Everything lies in a temporary folder that is gone afterwards, the ledger too; ``audit.json`` and
``audit.html`` hold numbers only, never a note.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adapters import lora
from adapters.base_model import cache_folder, load_base
from adapters.trained_part import part_of_round
from client.notes.load import load_notes
from conf.commands import AuditCommand
from server.progress import stage_progress
from simulation.audit.black_box import Membership, OnStep, black_box, findings
from simulation.audit.checks import Bench, Finding, Verdict, examine
from simulation.audit.deployed import deployed_noise
from simulation.audit.engine import HONEST, Mechanism
from simulation.audit.hospital import Patients, spec
from simulation.audit.sabotage import SABOTAGED
from simulation.cohort import hospital_orders, simulate

_LENGTHS = (4, 7, 12, 20, 32)  # tokens of the notes that the checks of the engine use


@dataclass(frozen=True)
class Audit:
    """Everything that was measured."""

    created: str
    seconds: float
    model: str
    settings: AuditCommand
    verdicts: tuple[Verdict, ...]  # the honest engine first
    rounds: tuple[Finding, ...]  # the noise of whole rounds
    private: Membership
    without: Membership
    notes: tuple[Finding, ...]  # planted notes

    @property
    def honest(self) -> Verdict:
        """The engine that is installed."""
        return self.verdicts[0]

    @property
    def problems(self) -> tuple[str, ...]:
        """What is not as it should be, one line each; empty when the audit is passed."""
        told = [f"{f.check}: {self._said(f)}" for f in self.honest.findings if not f.passed]
        told += [f"whole rounds, {f.check}: {self._said(f)}" for f in self.rounds if not f.passed]
        told += [f"planted notes, {f.check}: {self._said(f)}" for f in self.notes if not f.passed]
        blind = [v.engine for v in self.verdicts[1:] if not v.failed]
        return (*told, *(f"no check caught the sabotaged engine: {name}" for name in blind))

    @staticmethod
    def _said(finding: Finding) -> str:
        side = "least" if finding.least else "most"
        return f"{finding.measured:.4g}, must be at {side} {finding.limit:.4g}"


def audit(settings: AuditCommand, console: Console) -> Audit:
    """Run the whole audit. Raises NotesError, ModelError, UnsupportedAdapter or Refusal."""
    began = time.monotonic()
    seed = random.SystemRandom().randrange(2**31) if settings.seed is None else settings.seed
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with _stage(console, "notes") as on_step:
            ordinary = _ordinary_notes(settings, folder, seed, on_step)
        with _stage(console, "white box") as on_step:
            verdicts = _white_box(settings, ordinary, seed, on_step)
        base = load_base(settings.model)
        start = (
            lora.initial(base.model, spec(settings), seed, settings.adapter.train),
            base.fingerprint,
        )
        with _stage(console, "whole rounds") as on_step:
            rounds = deployed_noise(
                settings, folder, start, lambda done, of: on_step("measuring noise", done, of)
            )
        with _stage(console, "black box") as on_step:
            private, without = black_box(settings, folder, base, start, ordinary, on_step)
    return Audit(
        datetime.now(UTC).isoformat(timespec="seconds"),
        time.monotonic() - began,
        base.public_name,
        settings,
        verdicts,
        tuple(rounds),
        private,
        without,
        tuple(findings(private, without)),
    )


def _ordinary_notes(
    settings: AuditCommand, folder: Path, seed: int, on_step: OnStep
) -> dict[str, list[str]]:
    """Texts by patient, of the first patients only; ids are replaced."""
    notes, wanted = settings.notes, settings.black_box
    if notes.source == "clinosim":
        on_step("simulating patients", 0, 1)
        cache = folder if settings.seed is None else cache_folder()  # a drawn seed never returns
        (hospital,) = simulate(hospital_orders(1, wanted.population, seed), cache / "clinosim")
        notes = notes.model_copy(update={"source": "fhir", "path": hospital.export})
    units = list(load_notes(notes).units().values())[: wanted.patients]
    return {f"patient-{i}": [note.text for note in own] for i, own in enumerate(units)}


def _white_box(
    settings: AuditCommand, ordinary: Patients, seed: int, on_step: OnStep
) -> tuple[Verdict, ...]:
    """The honest engine and every sabotaged one, on the first blocks of the base model."""
    base = load_base(settings.model)
    _keep_first(base.model, settings.white_box.blocks)
    start = lora.initial(base.model, spec(settings), seed, settings.adapter.train)
    model = lora.attach(base.model, spec(settings), part_of_round(settings.adapter.train, 1), seed)
    lora.write(model, start)
    privacy, wanted = settings.privacy, settings.white_box
    bench = Bench(
        model,
        _rows(ordinary, base.tokenizer),
        Mechanism(privacy.clip_norm, wanted.noise_multiplier, privacy.denominator),
        privacy.delta,
        wanted.canaries,
    )
    engines = tuple(engine.under(settings.compute) for engine in (HONEST, *SABOTAGED))
    verdicts = []
    for done, engine in enumerate(engines):
        on_step(f"engine: {engine.name}", done, len(engines))
        verdicts.append(examine(engine, bench))
    return tuple(verdicts)


def _rows(ordinary: Patients, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The beginnings of some notes, of different lengths."""
    texts = [text for own in ordinary.values() for text in own][: len(_LENGTHS)]
    texts = (texts * len(_LENGTHS))[: len(_LENGTHS)]
    return [tokenizer(t).input_ids[:n] for t, n in zip(texts, _LENGTHS, strict=True)]


def _keep_first(model: PreTrainedModel, blocks: int | None) -> None:
    """Cut the model to its first blocks: shapes, embedding and head stay what they are."""
    if blocks is None or blocks >= model.config.num_hidden_layers:
        return
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList):
                setattr(module, name, child[:blocks])
                model.config.num_hidden_layers = blocks
                return


@contextmanager
def _stage(console: Console, name: str) -> Iterator[Callable[[str, int, int], None]]:
    """A progress line for one stage; called with what is being done, done, total."""
    with stage_progress(console) as progress:
        task = progress.add_task(name, total=1)

        def on_step(what: str, done: int, total: int) -> None:
            progress.update(task, description=f"{name}: {what}", completed=done, total=total)

        yield on_step
        progress.update(task, description=name, completed=progress.tasks[0].total)
