"""What privacy costs: ``python -m benchmarks.privacy [--quick] [--json FILE]``.

    step.*      one step of eight notes of 128 tokens: private (fast engine) against the same step
                without privacy; the Opacus engine beside it. q/v and all-linear targets, factor B.
    epoch.*     every note once at its real length: private, cut by tokens, against the usual way
                (Transformers' Trainer, batches of eight in random order, padded).
    overhead.*  share of a round that ledger and gate take.

Ratios of CPU time and of peak memory above the process at rest, one thread.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from adapters import lora
from adapters.adapter import AdapterSpec
from adapters.base_model import BaseModel, load_base
from adapters.likelihood import pad_right
from benchmarks.measure import interleaved
from benchmarks.overhead import shares_of_a_round
from client.notes.load import load_notes
from client.privacy.engine import clipped_sum, noised_mean
from client.privacy.microbatch import Unit
from client.privacy.per_note import Engine, trained_parameters
from client.privacy.randomness import SecureRandomness
from conf.schema import ComputeSettings, ModelSettings, NotesSettings

NOTES = Path("../shared/data/mtsamples/mtsamples.jsonl")
TARGETS = {
    "qv": ("q_proj", "v_proj"),
    "all": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
GOALS = {
    "step.qv.time": 1.05, "step.qv.memory": 1.05, "step.all.time": 1.05, "step.all.memory": 1.05,
    "epoch.time": 0.7, "epoch.memory": 0.5, "overhead.ledger_gate": 0.01,
}  # fmt: skip
_NOTES, _LONGEST = 16, 1024
_BATCH, _STEP_TOKENS = 8, 128
_MICRO_TOKENS = 1024  # of a private step: the eight notes in one go, as without privacy
_CLIP, _SIGMA = 1.0, 0.7


def main() -> None:
    """Measure, print one table, and write the figures where asked."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the ratios here too")
    parser.add_argument("--notes", type=Path, default=NOTES, help="JSONL with a field 'text'")
    options = parser.parse_args()
    console = Console()
    if not options.notes.exists():
        console.print(f"skipped: {options.notes} is absent; --notes FILE names other notes")
        return
    _quiet()
    torch.set_num_threads(1)
    base = load_base(ModelSettings(source="smollm2"))
    rows = _rows(base, options.notes, _NOTES)
    results: dict[str, float] = {}
    with Progress(console=console) as progress:
        for name in TARGETS:
            results |= _step(base, rows, name, 2 if options.quick else 5, progress)
        results |= _epoch(base, rows, 1 if options.quick else 2, progress)
        task = progress.add_task("ledger and gate", total=1)
        for kind, share in shares_of_a_round(options.notes).items():
            results[f"overhead.{kind}"] = share
        progress.advance(task)
    console.print(_table(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


def _rows(base: BaseModel, path: Path, count: int) -> list[list[int]]:
    notes = list(load_notes(NotesSettings(source="jsonl", path=path)).notes)
    chosen = random.Random(0).sample(notes, count)
    return [
        base.tokenizer(note.text, truncation=True, max_length=_LONGEST).input_ids for note in chosen
    ]


@contextmanager
def _adapted(base: BaseModel, targets: str) -> Iterator[tuple[PeftModel, torch.optim.Optimizer]]:
    spec = AdapterSpec(8, 16.0, TARGETS[targets])
    start = lora.initial(base.model, spec, seed=0)
    model = lora.attach(base.model, spec, "B")
    lora.write(model, start)
    yield model, torch.optim.SGD(list(trained_parameters(model).values()), lr=0.1)
    lora.detach(model)


def _private_step(
    model: PeftModel,
    optimizer: torch.optim.Optimizer,
    units: list[Unit],
    engine: Engine,
    micro_tokens: int,
) -> None:
    total = clipped_sum(model, units, _CLIP, engine, micro_tokens)
    released = noised_mean(total, _SIGMA * _CLIP, len(units), SecureRandomness().normal)
    for name, p in trained_parameters(model).items():
        p.grad = released[name].to(p.dtype)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _step(
    base: BaseModel, rows: list[list[int]], targets: str, repeats: int, progress: Progress
) -> dict[str, float]:
    long = [row[:_STEP_TOKENS] for row in rows if len(row) >= _STEP_TOKENS][:_BATCH]
    if len(long) < _BATCH:
        raise SystemExit(f"fewer than {_BATCH} notes of {_STEP_TOKENS} tokens")
    with _adapted(base, targets) as (model, optimizer):

        def plain() -> None:
            ids, _ = pad_right(long)
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        def private(engine: Engine) -> None:
            _private_step(model, optimizer, [[row] for row in long], engine, _MICRO_TOKENS)

        found = interleaved(
            {"plain": plain, "fast": lambda: private("fast"), "opacus": lambda: private("opacus")},
            repeats,
            progress,
            f"step, {targets}",
        )
    out = {}
    for engine, key in (("fast", f"step.{targets}"), ("opacus", f"step.{targets}.opacus")):
        out[f"{key}.time"], out[f"{key}.memory"] = found[engine].ratio_to(found["plain"])
    return out


def _epoch(
    base: BaseModel, rows: list[list[int]], repeats: int, progress: Progress
) -> dict[str, float]:
    steps = 4
    with _adapted(base, "qv") as (model, optimizer), tempfile.TemporaryDirectory() as scratch:
        collate = transformers.DataCollatorForLanguageModeling(base.tokenizer, mlm=False)

        def usual() -> None:
            arguments = transformers.TrainingArguments(
                output_dir=scratch, per_device_train_batch_size=_BATCH, num_train_epochs=1,
                save_strategy="no", report_to=[], disable_tqdm=True, logging_strategy="no",
                use_cpu=True, dataloader_pin_memory=False, optim="adamw_torch",
            )  # fmt: skip
            data: Any = [{"input_ids": row} for row in rows]
            trainer = transformers.Trainer(
                model, arguments, data_collator=collate, train_dataset=data
            )
            trainer.remove_callback(transformers.PrinterCallback)
            trainer.train()
            model.eval()

        def private() -> None:
            for start in range(steps):
                units: list[Unit] = [[row] for row in rows[start::steps]]
                _private_step(model, optimizer, units, "fast", ComputeSettings().micro_tokens)

        found = interleaved(
            {"usual": usual, "private": private}, repeats, progress, "epoch", warm=True
        )
    time_ratio, memory = found["private"].ratio_to(found["usual"])
    return {"epoch.time": time_ratio, "epoch.memory": memory}


def _table(results: dict[str, float]) -> Table:
    table = Table(title="What privacy costs: ratios to training without it", title_justify="left")
    for column in ("figure", "measured", "goal"):
        table.add_column(column, justify="left" if column == "figure" else "right")
    for key, value in results.items():
        goal = GOALS.get(key)
        style = "" if goal is None else ("green" if value <= goal else "red")
        table.add_row(key, f"[{style}]{value:.3f}[/]" if style else f"{value:.3f}", f"{goal or ''}")
    return table


def _quiet() -> None:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)


if __name__ == "__main__":
    main()
