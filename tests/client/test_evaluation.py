"""``wardround evaluate``: scores for the site's own eyes, on the part of the notes asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from adapters import lora
from adapters.adapter import Adapter
from adapters.base_model import ModelError, load_base
from adapters.lowrank import LowRank
from adapters.scoring import score_texts
from client.evaluation import run
from client.notes.load import NotesError, load_notes
from client.notes.split import split_units
from conf.commands import EvaluateCommand
from conf.load import ConfigError
from conf.schema import ModelSettings, NotesSettings

Start = tuple[Adapter, str]
Make = Callable[..., EvaluateCommand]


@pytest.fixture
def trained(starting_point: Start) -> Adapter:
    """An adapter that changes the model."""
    adapter = starting_point[0]
    g = torch.Generator().manual_seed(1)
    layers = {
        n: LowRank(torch.randn(layer.B.shape, generator=g) * 0.3, layer.A)
        for n, layer in adapter.layers.items()
    }
    return replace(adapter, layers=layers)


@pytest.fixture
def command(tmp_path: Path, tiny_model: Path, notes_file: Path, trained: Adapter) -> Make:
    """The command on the invented notes; keywords replace."""
    trained.save(tmp_path / "adapter")

    def make(**others: Any) -> EvaluateCommand:
        values = {
            "adapter": tmp_path / "adapter",
            "part": "held_out",
            "most": None,
            "max_tokens": 24,
            "model": {"source": "path", "path": str(tiny_model)},
            "notes": {"source": "jsonl", "path": notes_file, "patient_field": "pid"},
        }
        return EvaluateCommand.model_validate(values | others)

    return make


def quiet() -> Console:
    return Console(quiet=True)


def test_base_and_adapter_are_scored_on_the_held_out_notes(
    command: Make, notes_file: Path, tiny_model: Path, trained: Adapter
) -> None:
    scores = run(command(), quiet())
    settings = NotesSettings(source="jsonl", path=notes_file, patient_field="pid")
    _, held_out = split_units(load_notes(settings).units(), 0.2)
    texts = [note.text for notes in held_out.values() for note in notes]
    base = load_base(ModelSettings(source="path", path=str(tiny_model)))
    assert scores["base"] == score_texts(base.model, base.tokenizer, texts, 24)
    live = lora.attach(base.model, trained.spec)
    lora.write(live, trained)
    with_lora = score_texts(live, base.tokenizer, texts, 24)
    assert scores["adapter"].nats == pytest.approx(with_lora.nats, rel=1e-5)
    assert scores["adapter"].nats != pytest.approx(scores["base"].nats, rel=1e-3)


def test_all_notes_are_more_than_the_held_out_and_most_bounds_them(command: Make) -> None:
    held_out, every, few = (
        run(command(**options), quiet())["base"].tokens
        for options in ({}, {"part": "all"}, {"part": "all", "most": 3})
    )
    assert held_out < every == 120 * 23  # the first token of each note has no context
    assert few == 3 * 23


def test_a_person_sees_scores_and_what_was_left_out_but_no_note(
    command: Make, tmp_path: Path, notes_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own.jsonl"
    own.write_text(notes_file.read_text() + '{"text": "unfinished business\n')
    notes = {"source": "jsonl", "path": own, "patient_field": "pid"}
    before = sorted(tmp_path.rglob("*"))
    scores = run(command(notes=notes), Console(width=100))
    said = capsys.readouterr().out
    for score in scores.values():
        assert f"{score.perplexity:.2f}" in said
        assert f"{score.bits_per_char:.3f}" in said
    assert "left out: 1 x broken JSON: own.jsonl:121" in said
    for word in ("unfinished", "patient has had", "aspirin"):
        assert word not in said
    assert sorted(tmp_path.rglob("*")) == before  # nothing is written


def test_what_is_no_adapter_and_what_are_no_notes_is_said_in_one_line(
    command: Make, tmp_path: Path
) -> None:
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(ConfigError, match="not a LoRA folder") as error:
            run(command(adapter=folder), quiet())
        assert "\n" not in str(error.value)
    broken = tmp_path / "adapter" / "adapter_config.json"
    broken.write_text("{")
    with pytest.raises(ConfigError, match="not a LoRA folder"):
        run(command(), quiet())
    (tmp_path / "adapter" / "adapter_config.json").unlink()
    with pytest.raises(ConfigError, match="not a LoRA folder"):
        run(command(), quiet())


def test_absent_notes_are_said_to_be_absent(command: Make) -> None:
    with pytest.raises(NotesError, match=r"notes.path=/nowhere.jsonl: no such file"):
        run(command(notes={"source": "jsonl", "path": "/nowhere.jsonl"}), quiet())


def test_an_adapter_of_another_model_or_a_cut_file_is_said_to_be_so(
    command: Make, tmp_path: Path, trained: Adapter
) -> None:
    name, layer = next(iter(trained.layers.items()))
    for layers in (
        {"transformer.h.0.attn": layer},
        {name: LowRank(torch.zeros(9, 2), torch.zeros(2, 9))},
    ):
        Adapter(trained.spec, layers).save(tmp_path / "other")
        with pytest.raises(ModelError, match="does not fit the base model"):
            run(command(adapter=tmp_path / "other"), quiet())
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ConfigError, match="not a LoRA folder"):
        run(command(), quiet())


def test_too_few_notes_to_hold_out_any_is_said_to_be_so(command: Make, tmp_path: Path) -> None:
    trained = next(p for p in map(str, range(99)) if split_units({p: ()}, 0.2)[0])
    one = tmp_path / "one.jsonl"
    one.write_text(json.dumps({"text": "The only note of its patient.", "pid": trained}) + "\n")
    with pytest.raises(ConfigError, match="no held-out note"):
        run(command(notes={"source": "jsonl", "path": one, "patient_field": "pid"}), quiet())
