"""The command: what it refuses, in one line; that its output is whole or absent; what it holds."""

from __future__ import annotations

import json
import re
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import wardround
from conf.load import command_help
from server.model_folder import ModelFolder
from server.offline import command
from tests.server.offline.conftest import Call, lora

TIES = {"merge_method": "ties", "parameters": {"density": 0.5}}
LINEAR = {"merge_method": "linear"}


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on standard error."""
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if "━" not in line and line.strip()]
    assert len(lines) == 1, err
    return lines[0].removeprefix("wardround: ")


def broken(folder: Path, target: Path, change: dict[str, Any]) -> Path:
    """A copy with other tensors, or with other words in its configuration."""
    shutil.copytree(folder, target)
    for file in target.glob("*.safetensors"):
        state = load_file(file)
        for name in state:
            for part, make in change.get("tensors", {}).items():
                if part in name:
                    state[name] = make(state[name])
        save_file(state, file, metadata={"format": "pt"})
    for file in target.glob("*config.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | change.get("config", {})))
    return target


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ({"merge_method": "tise"}, "merge_method=tise: choose one of breadcrumbs, "),
        (
            {"merge_method": "regmean"},
            "merge_method=regmean: regmean needs statistics of no",
        ),
        ({"merge_method": "fisher"}, "merge_method=fisher: fisher needs statistics of"),
        (
            {"merge_method": "noise_aware"},
            "merge_method=noise_aware: noise_aware needs the noi",
        ),
        (
            {"merge_method": "lines", "parameters": {"of": "fisher"}},
            "merge_method=lines: fisher needs statistics of notes, which only rounds have",
        ),
        ({"merge_method": "sce"}, "merge_method=sce is not supported (ties is nearest to it): cho"),
        ({"merge_method": "flora"}, "merge_method=flora: is product_mean here; choose one of b"),
        (
            {"merge_method": "FedEx-LoRA"},
            "merge_method=FedEx-LoRA: is product_mean here; choose",
        ),
        (
            {"merge_method": "flexlora"},
            "merge_method=flexlora: is product_mean (with parameters.rank) here; choose one",
        ),
        (
            {"merge_method": "multi_krum"},
            "merge_method=multi_krum: is krum (parameters.chosen says how many) here; choose",
        ),
        ({"merge_method": "core_space"}, "merge_method=core_space: is core_ties here; choose"),
        (LINEAR | {"slices": []}, "slices is not supported: layers cannot be taken from"),
        (LINEAR | {"modles": []}, "unknown key modles; there are: merge_method, models, "),
        (LINEAR | {"dtype": "int8"}, "dtype=int8: input should be 'float32', 'float16' or "),
        (LINEAR | {"models": []}, "models=[]: "),
        (LINEAR | {"output": "model"}, "output=model: needs base_model, the folder of the"),
        (LINEAR | {"output": "both", "base_model": "a/b"}, "base_model=a/b: no folder of a model"),
        (LINEAR | {"tokenizer_source": "base"}, "tokenizer_source: an adapter has none"),
        (LINEAR | {"parameters": {"density": 1}}, "parameters.density: linear has no such para"),
        (LINEAR | {"parameters": {"rank": 0}}, "parameters.rank=0: must be a whole number"),
        (LINEAR | {"parameters": {"weight": [0, 1]}}, "parameters.weight: must be one number; no "),
        (LINEAR | {"parameters": {"weight": 0}}, "models: all of them have weight 0; give one an"),
        (LINEAR | {"parameters": {"normalize": "no"}}, "parameters.normalize=no: must be true or"),
        (LINEAR | {"parameters": {"t": 0.5}}, "parameters.t: is for slerp between two models"),
        ({"merge_method": "ties"}, "parameters.density: must be given for ties; 1, which"),
        (TIES | {"parameters": {"density": 1.5}}, "ties: parameters.density=1.5: input should be"),
        (
            TIES | {"parameters": {"density": [0.1, 0.9]}},
            "parameters.density: must be one value; no gradients, no filters",
        ),
        (
            TIES | {"parameters": {"density": 0.5, "rescale": True}},
            "parameters.rescale=True: not supported here; entries that are kept are kept as they",
        ),
        (
            TIES | {"parameters": {"density": 0.5, "lambda": 1, "strength": 1}},
            "parameters.strength: is there by another name; give one of them",
        ),
        (
            TIES | {"parameters": {"density": 0.5, "gamma": 0.1}},
            "parameters.gamma: ties has no such parameter; there are: weight, rank, normalize, ",
        ),
        (
            {"merge_method": "dare_ties", "parameters": {"density": 0.5, "elect": False}},
            "parameters.elect: dare_ties has no such parameter; there are: weight, rank, normal",
        ),
        (
            {"merge_method": "della", "parameters": {"density": 0.9}},
            "della: parameters.density=0.9: from 0.15 to 0.85",
        ),
        (
            {"merge_method": "model_stock", "parameters": {"filter_wise": True}},
            "parameters.filter_wise=True: not supported here; tensors are compared whole",
        ),
        (
            {"merge_method": "dare_ties", "parameters": {"density": 0.5, "weight": 9}},
            "models: weights times lambda come to 18, more than 10; give smaller ones, or norma",
        ),
        (TIES | {"parameters": {"density": 0.5, "lambda": 0}}, "parameters.lambda=0: must be ab"),
        (
            TIES | {"parameters": {"density": 0.5, "strength": -1}},
            "parameters.strength=-1: must be above 0; to subtract, give negative weights",
        ),
        (
            {"merge_method": "task_arithmetic", "parameters": {"lambda": 0}},
            "parameters.lambda=0: must be above 0",
        ),
        (
            {"merge_method": "task_arithmetic", "parameters": {"lambda": 30}},
            "models: weights times lambda",
        ),
        (
            {"merge_method": "slerp", "parameters": {"t": 1.5}},
            "parameters.t=1.5: must lie from 0 to 1",
        ),
        ({"merge_method": "slerp"}, "parameters.t: must be given for slerp, or a weight for each"),
    ],
)
def test_a_recipe_that_cannot_be_followed_is_refused_by_key(
    recipe: dict[str, Any],
    expected: str,
    adapters: list[Path],
    tmp_path: Path,
    call: Call,
    capsys: pytest.CaptureFixture[str],
) -> None:
    listed = {"models": adapters[:2]} if "models" not in recipe else {}
    assert call(**{**recipe, **listed}) == 2
    assert said(capsys).removeprefix(f"{tmp_path / 'recipe.yaml'}: ").startswith(expected)
    assert {f.name for f in tmp_path.iterdir()} == {"recipe.yaml"}


def test_whole_models_need_what_their_method_needs(
    models: list[Path], adapters: list[Path], tiny_model: Path, call: Call, capsys: Any
) -> None:
    def refusal(**recipe: Any) -> str:
        assert call(**{"models": models, **recipe}) == 2
        return said(capsys).partition("recipe.yaml: ")[2]

    assert refusal(**TIES).startswith("base_model: must be given; ties merges differences from it")
    whole = {"density": 0.5, "scope": "model"}
    found = refusal(merge_method="ties", parameters=whole, base_model=tiny_model)
    assert found.startswith("parameters.scope=model: the entries of a whole model are not held")
    assert refusal(**LINEAR, parameters={"rank": 4}).startswith("parameters.rank=4: only adapters")
    assert refusal(**LINEAR, output="both") == "output=both: whole models merge to a model"
    mixed = refusal(**LINEAR, models=[models[0], adapters[0]])
    assert "is an adapter among models; first make it a model" in mixed
    assert refusal(**LINEAR, models=["x/y"]).startswith("models.0.model=x/y: no such folder; downl")
    with_lora = refusal(**LINEAR, models=[f"{models[0]}+{adapters[0]}"])
    assert ": a model with an adapter on it is not taken; first make it a model, by a " in with_lora
    assert refusal(**LINEAR, tokenizer_source="union").startswith("tokenizer_source=union: not su")
    assert refusal(
        merge_method="slerp", models=models[:2], base_model=tiny_model, parameters={"t": 0.5}
    ).endswith("slerp needs one of its two models, for t = 0")
    given = {tiny_model: {"weight": 1}, models[0]: {"weight": 1}}
    assert "does not differ from itself" in refusal(**TIES, models=given, base_model=tiny_model)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"tensors": {"lora_A": lambda t: t * torch.nan}},
            "bad: holds NaN or infinity; leave it out",
        ),
        (
            {"config": {"use_dora": True}},
            "bad: use_dora is not supported in an adapter to be merged; make a model of it (PEFT's "
            "merge_and_unload), and merge models",
        ),
        (
            {"config": {"alora_invocation_tokens": [1, 2]}},
            "bad: alora_invocation_tokens is not supported in an adapter to be merged",
        ),
        ({"config": {"use_qalora": True}}, "bad: use_qalora is not supported in an adapter"),
        ({"config": {"kasa_config": {"gamma": 1}}}, "bad: kasa_config is not supported in an"),
        ({"config": {"use_bdlora": {"blocks": 2}}}, "bad: use_bdlora is not supported in an ad"),
        ({"config": {"target_parameters": ["w"]}}, "bad: target_parameters is not supported in"),
        (
            {"config": {"init_lora_weights": "pissa"}},
            "bad: init_lora_weights=pissa changes the b",
        ),
        ({"config": {"layer_replication": [[0, 1]]}}, "bad: layer_replication is not supported"),
        ({"config": {"peft_type": "IA3"}}, "bad: is IA3, and only LoRA is merged"),
        ({"config": {"base_model_name_or_path": "x/other"}}, "bad: was made for x/other, "),
        ({"config": {"r": None}}, "bad: adapter_config.json says no r"),
        ({"config": {"r": 5}}, "bad: model.layers.0.mlp.down_proj: rank 4, expected 5"),
    ],
)
def test_an_adapter_that_does_not_fit_is_named(
    change: dict[str, Any],
    expected: str,
    adapters: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: Call,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    broken(adapters[0], tmp_path / "bad", change)
    assert call(**LINEAR, models=[adapters[1], Path("bad")]) == 1
    assert said(capsys).startswith(expected)
    assert not (tmp_path / "out").exists()


def test_adapters_of_other_layers_or_of_another_base_are_named(
    adapters: list[Path],
    wide_model: Path,
    tiny_model: Path,
    tmp_path: Path,
    call: Call,
    capsys: Any,
) -> None:
    wide = lora(wide_model, tmp_path / "wide", 1)
    assert call(**LINEAR, models=[adapters[0], wide], base_model="one") == 1
    assert "has shape (128, 192), not (32, 48) as in" in said(capsys)
    assert call(**LINEAR, models=[wide], base_model=tiny_model, output="model") == 1
    assert "has shape (32, 48), not (128, 192) as in the adapters" in said(capsys)
    other = lora(tiny_model, tmp_path / "other", 1, target_modules=["q_proj"])
    name = "model.layers.0.mlp.down_proj"
    for listed in ([adapters[0], other], [other, adapters[0]]):
        assert call(**LINEAR, models=listed) == 1
        assert said(capsys) == (
            f"{adapters[0]}: adapts {name}, {other} does not; make a model of each (output: model),"
            " and merge models"
        )


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("lm_head.weight", "; save both with the same tie_word_embeddings"), ("extra", "")],
)
def test_of_models_of_which_one_has_a_tensor_more_it_is_said_which(
    name: str, remedy: str, models: list[Path], tmp_path: Path, call: Call, capsys: Any
) -> None:
    more = broken(models[0], tmp_path / "more", {})
    state = load_file(more / "model.safetensors") | {name: torch.ones(2)}
    save_file(state, more / "model.safetensors", metadata={"format": "pt"})
    for listed in ([models[1], more], [more, models[1]]):
        assert call(**LINEAR, models=listed) == 1
        assert said(capsys) == f"{more}: has {name}, {models[1]} has not{remedy}"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"tensors": {"norm": lambda t: t / 0}}, "bad: model.layers.0.input_layernorm.weight hol"),
        ({"tensors": {"up_proj": lambda t: t[:5].clone()}}, "bad: model.layers.0.mlp.up_proj.wei"),
        ({"config": {"architectures": ["Other"]}}, "bad: architectures is ['Other'], in "),
        ({"config": {"num_attention_heads": 8}}, "bad: has 8 attention heads, "),
        ({"config": {"quantization_config": {"bits": 4}}}, "bad: its weights are quantised; ta"),
    ],
)
def test_a_model_that_does_not_fit_is_named(
    change: dict[str, Any],
    expected: str,
    models: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: Call,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    broken(models[0], tmp_path / "bad", change)
    assert call(**LINEAR, models=[models[1], Path("bad")]) == 1
    assert said(capsys).startswith(expected)
    assert {f.name for f in tmp_path.iterdir()} == {"recipe.yaml", "bad"}


def test_an_output_folder_with_anything_in_it_is_left_alone(
    adapters: list[Path], tmp_path: Path, call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert call(**LINEAR, models=adapters) == 0  # an empty one is filled
    before = {f: f.read_bytes() for f in out.iterdir()}
    capsys.readouterr()
    assert call(**LINEAR, models=adapters) == 2
    assert said(capsys) == f"{out}: exists and is not empty; name a new folder"
    assert {f: f.read_bytes() for f in out.iterdir()} == before


@pytest.mark.parametrize("problem", [KeyboardInterrupt, OSError("No space left on device")])
def test_a_merge_that_does_not_end_leaves_nothing(
    problem: BaseException,
    models: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: Call,
) -> None:
    def fails(*_: object) -> None:
        assert [f for f in tmp_path.iterdir() if f.name.startswith(".out.")]  # all but the report
        raise problem

    monkeypatch.setattr(command, "write_report", fails)
    assert call(**LINEAR, models=models) in (1, 130)
    assert {f.name for f in tmp_path.iterdir()} == {"recipe.yaml"}


def test_of_every_model_one_tensor_is_held(
    models: list[Path], tiny_model: Path, monkeypatch: pytest.MonkeyPatch, call: Call
) -> None:
    held: dict[int, int] = {}
    most = 0
    read = ModelFolder.tensor

    def counted(self: ModelFolder, name: str) -> Tensor:
        nonlocal most
        tensor = read(self, name)
        held[id(tensor)] = tensor.nbytes
        weakref.finalize(tensor, held.pop, id(tensor))
        most = max(most, sum(held.values()))
        return tensor

    monkeypatch.setattr(ModelFolder, "tensor", counted)
    assert call(**TIES, models=models, base_model=tiny_model) == 0
    largest = max(t.nbytes for t in load_file(tiny_model / "model.safetensors").values())
    assert largest <= most <= 4 * largest


def test_the_recipe_in_the_help_can_be_followed(
    adapters: list[Path], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = command_help("merge")[1].splitlines()
    recipe = lines[lines.index(next(x for x in lines if "merge_method" in x)) :]
    text = "\n".join(re.split(r" {3,}(?=\S)", line[2:])[0] for line in recipe)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(text)
    (tmp_path / "experts").mkdir()
    (tmp_path / "models").mkdir()
    (tmp_path / "experts/cardiology").symlink_to(adapters[0])
    (tmp_path / "experts/oncology").symlink_to(adapters[1])
    (tmp_path / "models/base").symlink_to(tiny_model)
    assert wardround.main(["merge", "recipe.yaml", "merged"]) == 0
    made = {f.name for f in (tmp_path / "merged").iterdir()}
    assert made == {"adapter", "model", "merge_report.json"}


@pytest.mark.parametrize("words", [[], ["a.yaml"], ["a.yaml", "b", "c"]])
def test_both_places_must_be_named(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert wardround.main(["merge", *words]) == 2
    assert said(capsys) == "say what and where to: wardround merge FILE.yaml OUT_DIR"
