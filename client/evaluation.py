"""``wardround evaluate``: base model and adapter on a site's own notes, for the site's own eyes.

Scores on private notes are private too: nothing here is written to a file or sent anywhere.
"""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from adapters import lora
from adapters.adapter import Adapter
from adapters.base_model import load_base
from adapters.scoring import TextScore, score_texts
from client.notes.load import load_notes
from client.notes.split import split_units
from conf.commands import EvaluateCommand
from conf.load import ConfigError


def run(command: EvaluateCommand, console: Console) -> dict[str, TextScore]:
    """Score and print; returns the scores of "base" and "adapter".

    Raises ConfigError, NotesError or ModelError with one line for a person.
    """
    try:
        adapter = Adapter.load(command.adapter)
    except (FileNotFoundError, KeyError, ValueError) as problem:
        raise ConfigError(f"adapter={command.adapter}: not a LoRA folder ({problem})") from None
    found = load_notes(command.notes)
    units = found.units()
    if command.part == "held_out":
        _, units = split_units(units, command.notes.holdout)
    texts = [note.text for notes in units.values() for note in notes][: command.most]
    if not texts:
        raise ConfigError(f"part={command.part}: no held-out note among so few; try part=all")
    base = load_base(command.model)
    with console.status(f"scoring {len(texts)} notes"):
        scores = {"base": score_texts(base.model, base.tokenizer, texts, command.max_tokens)}
        with lora.applied(base.model, adapter):
            scores["adapter"] = score_texts(base.model, base.tokenizer, texts, command.max_tokens)
    table = Table("", "perplexity", "bits per character", title=f"{len(texts)} notes")
    for name, value in scores.items():
        table.add_row(name, f"{value.perplexity:.2f}", f"{value.bits_per_char:.3f}")
    console.print(table)
    for line in found.problems():
        console.print(f"left out: {line}", markup=False)
    return scores
