"""Folding a merged adapter into weights: rounded once, to the type asked for, or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters.adapter import Adapter

Call = Callable[..., int]


@pytest.fixture
def halved(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model in bfloat16."""
    folder = tmp_path / "bfloat16"
    shutil.copytree(tiny_model, folder)
    weights = {n: t.bfloat16() for n, t in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def scaled(adapter: Path, folder: Path, factor: float) -> Path:
    """The same adapter, ``factor`` times as long."""
    shutil.copytree(adapter, folder)
    file = folder / "adapter_model.safetensors"
    tensors = {n: t * factor if "lora_B" in n else t for n, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def lost(folded: Path, base: Path, adapter: Path) -> float:
    """Share of the update, by norm, that is not in the weights."""
    before, after = (load_file(f / "model.safetensors") for f in (base, folded))
    error = size = 0.0
    for name, update in Adapter.load(adapter).deltas().items():
        wanted = update.to(torch.float64).dense()
        moved = after[f"{name}.weight"].double() - before[f"{name}.weight"].double()
        error += float((moved - wanted).square().sum())
        size += float(wanted.square().sum())
    return (error / size) ** 0.5


def test_a_small_update_of_a_bfloat16_model_is_kept_where_float32_is_asked_for(
    halved: Path,
    adapters: list[Path],
    tmp_path: Path,
    call: Call,
    capsys: pytest.CaptureFixture[str],
) -> None:
    small = scaled(adapters[0], tmp_path / "small", 1e-2)
    common = {"merge_method": "linear", "models": [small], "base_model": halved, "output": "both"}
    for dtype in ("float32", None):
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        assert call(**common, **({"dtype": dtype} if dtype else {})) == 0
        found = lost(out / "model", halved, out / "adapter")
        stated = json.loads((out / "merge_report.json").read_text())["output"]["model"]["rounding"]
        assert found == pytest.approx(stated, rel=0.01, abs=1e-5)
        assert (found < 1e-4) == (dtype == "float32")
        assert ("rounding moved the folded weights by" in capsys.readouterr().err) == (
            dtype is None
        )


@pytest.mark.parametrize("whole", [True, False])
def test_what_a_type_cannot_hold_is_refused_and_nothing_is_left(
    whole: bool,
    tiny_model: Path,
    adapters: list[Path],
    tmp_path: Path,
    call: Call,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe: dict[str, Any] = {
        "models": [scaled(adapters[0], tmp_path / "huge", 1e7)],
        "base_model": tiny_model,
    }
    if whole:
        folder = tmp_path / "wide"
        shutil.copytree(tiny_model, folder)
        weights = load_file(folder / "model.safetensors")
        save_file({n: t * 1e7 for n, t in weights.items()}, folder / "model.safetensors")
        recipe: dict[str, Any] = {"models": [folder]}
    assert call(merge_method="linear", output="model", dtype="float16", **recipe) == 1
    said = capsys.readouterr().err
    assert "has numbers beyond float16; say dtype: bfloat16 or float32" in said
    assert not (tmp_path / "out").exists()
