"""``wardround align``: an adapter folder in, an aligned adapter folder out."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from adapters.adapter import Adapter
from adapters.base_model import load_base
from conf.commands import AlignCommand
from conf.load import ConfigError
from server.alignment.align import align
from server.alignment.mediflow import load_instructions


def run(command: AlignCommand, console: Console) -> Path:
    """Align ``command.adapter`` and write the result to ``command.out``.

    Raises ConfigError, InstructionsError or ModelError with one line for a person.
    """
    wanted = command.alignment
    if wanted.data == "synthetic" and wanted.path is None:
        raise ConfigError(
            "alignment.path must name a folder of MediFlow-schema JSONL files; a simulated run "
            "leaves such a folder at RUN/instructions"
        )
    try:
        merged = Adapter.load(command.adapter)
    except (FileNotFoundError, KeyError, ValueError) as problem:
        raise ConfigError(f"adapter={command.adapter}: not a LoRA folder ({problem})") from None
    data = load_instructions(wanted.path, wanted.examples, wanted.held_out)
    base = load_base(command.model)
    with Progress(console=console) as progress:
        tasks = {stage: progress.add_task(stage) for stage in ("SFT", "DPO")}
        aligned = align(
            base,
            merged,
            data,
            wanted,
            command.seed,
            lambda stage, done, total: progress.update(tasks[stage], completed=done, total=total),
        )
    return aligned.adapter.save(command.out, base.public_name)
