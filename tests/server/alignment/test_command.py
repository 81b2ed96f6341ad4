"""``wardround align``: an adapter folder in, an aligned adapter folder out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from adapters import lora
from adapters.adapter import Adapter, AdapterSpec
from adapters.base_model import ModelError, fingerprint, load_base
from conf.commands import AlignCommand
from conf.load import ConfigError
from conf.schema import ModelSettings
from server.alignment.command import run
from server.alignment.mediflow import InstructionsError

Make = Callable[..., AlignCommand]


@pytest.fixture
def command(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """The command on an untrained adapter and a few rows; keywords merge into its groups."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    base = load_base(ModelSettings(source="path", path=str(tiny_model)))
    lora.initial(base.model, AdapterSpec(2, 4.0, ("q_proj",)), 1).save(tmp_path / "merged")
    data = tmp_path / "data"
    data.mkdir()
    for name in ("mediflow", "mediflow_dpo"):
        rows = [
            {"instruction": f"{name} {i}", "input": "x", "output": "yes", "rejected_output": "no"}
            for i in range(12)
        ]
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(**others: Any) -> AlignCommand:
        values: dict[str, Any] = {
            "adapter": tmp_path / "merged", "out": tmp_path / "aligned", "seed": 1,
            "model": {"source": "path", "path": str(tiny_model)},
            "alignment": {
                "enabled": True, "data": "mediflow", "path": data, "examples": 8, "held_out": 4,
                "max_tokens": 128, "rank": 2, "alpha": 4.0, "targets": ("q_proj", "o_proj"),
                "sft": {"steps": 2, "batch": 4, "learning_rate": 0.01},
                "dpo": {"steps": 2, "batch": 4, "learning_rate": 0.01, "beta": 0.1},
            },
        }  # fmt: skip
        for key, value in others.items():
            values[key] = {**values[key], **value} if isinstance(value, dict) else value
        return AlignCommand.model_validate(values)

    return make


def test_the_aligned_adapter_is_a_folder_that_fits_the_model(
    command: Make, tmp_path: Path, tiny_model: Path
) -> None:
    folder = run(command(), Console(quiet=True))
    aligned = Adapter.load(folder)
    assert folder == tmp_path / "aligned"
    assert aligned.spec.rank == 2 + 2 + 2
    base = load_base(ModelSettings(source="path", path=str(tiny_model)))
    before = fingerprint(base.model)
    with lora.applied(base.model, aligned):
        assert fingerprint(base.model) != before
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny-llama"  # a name, no path of this machine


def test_what_cannot_be_aligned_is_said_in_one_line(
    command: Make, tmp_path: Path, tiny_model: Path
) -> None:
    for others, error, expected in (
        ({"adapter": tmp_path / "nowhere"}, ConfigError, "not a LoRA folder"),
        ({"alignment": {"data": "synthetic", "path": None}}, ConfigError, "alignment.path must"),
        ({"alignment": {"path": tmp_path}}, InstructionsError, "needs files"),
        ({"model": {"path": str(tmp_path)}}, ModelError, "not a causal language model"),
    ):
        with pytest.raises(error, match=expected) as found:
            run(command(**others), Console(quiet=True))
        assert "\n" not in str(found.value)
        assert not (tmp_path / "aligned").exists()


def test_a_window_too_small_for_any_answer_is_said_to_be_so(command: Make) -> None:
    with pytest.raises(InstructionsError, match=r"alignment.max_tokens=32: no room"):
        run(command(alignment={"max_tokens": 32}), Console(quiet=True))


def test_targets_the_model_does_not_have_are_said_to_be_absent(command: Make) -> None:
    with pytest.raises(lora.UnsupportedAdapter, match=r"alignment: no module .*\['c_attn'\]"):
        run(command(alignment={"targets": ("c_attn",)}), Console(quiet=True))
