"""``wardround transfer``: an adapter or a weight difference in, one for another checkpoint out."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from torch import Tensor

from adapters.peft_config import read_config
from conf.experts import TransferCommand
from conf.load import ConfigError
from server.experts.checkpoint import Checkpoint
from server.experts.inputs import load_adapter
from server.experts.interpolation import towards_base
from server.experts.transfer import (
    Norms,
    Rows,
    distance,
    moved,
    only_shared,
    require_fit,
    require_same_shape,
    update_norms,
)
from server.offline.adapters import other_base
from server.progress import stage_progress
from server.run_folder import write_atomically
from server.whole_folder import whole_folder

_FILE = "transfer.json"


def run(command: TransferCommand, console: Console) -> dict[str, Any]:
    """Check, apply and write; returns what ``transfer.json`` holds.

    Raises ConfigError with one line for a person; then nothing was written.
    """
    if command.out.exists():
        raise ConfigError(f"out={command.out}: exists already; take another folder")
    with whole_folder(command.out) as made:
        base, target = Checkpoint("base", command.base), Checkpoint("target", command.target)
        if command.adapter is not None:
            record = _adapter(command, base, target, made)
        else:
            assert command.tuned is not None  # one of the two is given
            record = _difference(command, base, Checkpoint("tuned", command.tuned), target, made,
                                 console)  # fmt: skip
        write_atomically(made / _FILE, json.dumps(record, indent=2) + "\n")
    for note in record["notes"]:
        console.print(f"note: {note}", soft_wrap=True, markup=False, highlight=False)
    apart = record["base_to_target"]["relative_norm"]
    console.print(f"base to target: {apart:.2%} of the base's norm", highlight=False)
    if differing := record["config_differs"]:
        console.print(f"config.json of the two differs in {', '.join(differing)}", highlight=False)
    console.print(
        f"what was applied: {record['applied']['relative_norm']:.2%} of the target's norm",
        highlight=False,
    )
    console.print(f"written: [bold]{escape(str(command.out))}[/bold]", soft_wrap=True)
    return record


def _adapter(
    command: TransferCommand, base: Checkpoint, target: Checkpoint, made: Path
) -> dict[str, Any]:
    assert command.adapter is not None
    adapter = towards_base(load_adapter("adapter", command.adapter), command.strength)
    rows = require_same_shape(base, [target])
    under = require_fit(adapter, target)
    require_fit(adapter, base)
    adapter, own = only_shared(adapter, under, target, rows)
    adapter.save(made, target.name)
    apart = distance(base, target, rows.moved, list(under.values()))
    record = _record(command, base, target, own, apart, update_norms(adapter, target, under))
    said = read_config(command.adapter).base_model_name_or_path or ""
    return record | {"notes": other_base("the adapter", said, str(base.folder))}


def _difference(
    command: TransferCommand,
    base: Checkpoint,
    tuned: Checkpoint,
    target: Checkpoint,
    made: Path,
    console: Console,
) -> dict[str, Any]:
    rows = require_same_shape(base, [tuned, target])
    applied = Norms()
    with stage_progress(console) as progress:
        bar = progress.add_task("weights", total=len(target.shapes))

        def change(name: str, own: Tensor) -> Tensor:
            shared = rows.moved if name in target.token_wise else None
            out = moved(own, base.tensor(name), tuned.tensor(name), command.strength, shared)
            if not out.isfinite().all():
                raise ConfigError(f"{name}: the sum is not finite in {str(own.dtype)[6:]}")
            if own.is_floating_point():
                applied.add(name, out.double() - own.double(), own)
            progress.advance(bar)
            return out

        target.copy(made, change)
    return _record(command, base, target, rows, distance(base, target, rows.moved), applied)


def _record(
    command: TransferCommand,
    base: Checkpoint,
    target: Checkpoint,
    rows: Rows,
    apart: Norms,
    applied: Norms,
) -> dict[str, Any]:
    """Names only: a report may be passed on with what it describes."""
    return {
        "applied_kind": "adapter" if command.adapter is not None else "difference",
        "base": base.name,
        "target": target.name,
        "strength": command.strength,
        "config_differs": base.differing(target),
        "base_to_target": apart.record(),
        "applied": applied.record(),
        "token_rows": asdict(rows),
        "notes": [],
    }
