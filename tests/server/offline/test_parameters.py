"""Weights, densities and t: what a recipe gives to each model, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.server.offline.conftest import Call
from tests.server.offline.test_command import LINEAR, TIES, broken, said


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ([{}, {"density": 1.4}], "models.1.parameters.density=1.4: must lie above 0 and below 1"),
        ([{"density": [0, 1]}, {}], "models.0.parameters.density: must be one number; no gradie"),
        ([{"scope": "model"}, {}], "models.0.parameters.scope=model: must be the same for all mo"),
        ([{"lambda": 1}, {}], "models.0.parameters.lambda: belongs under parameters of the who"),
        ([{"weight": 1}, {}], "models.1.parameters.weight: is missing; others have one"),
        ([{"weight": -1}, {"weight": 2}], "models.0.parameters.weight=-1: must be positive; "),
        ([{"weight": "x"}, {"weight": 2}], "models.0.parameters.weight=x: must be a number"),
    ],
)
def test_parameters_of_one_model_are_followed_or_refused(
    own: list[dict[str, Any]],
    expected: str,
    adapters: list[Path],
    tmp_path: Path,
    call: Call,
    capsys: pytest.CaptureFixture[str],
) -> None:
    listed = dict(zip(adapters, own, strict=False))
    assert call(**TIES, models=listed) == 2
    assert said(capsys).removeprefix(f"{tmp_path / 'recipe.yaml'}: ").startswith(expected)


@pytest.mark.parametrize(
    ("own", "wrong"),
    [
        ([{"weight": 0}, {"weight": 1}, {"weight": "x"}], "models.2.parameters.weight=x"),
        ([{"weight": 0}, {"weight": 1}, {}], "models.2.parameters.weight: is missing"),
        ([{"weight": 0}, {}, {"density": "x"}], "models.2.parameters.density=x"),
        ([{"weight": 0}, {}, {"lambda": 1}], "models.2.parameters.lambda: belongs under"),
        ([{"weight": 0}, {"scope": "model"}, {}], "models.1.parameters.scope=model: must be"),
    ],
)
def test_a_message_counts_the_models_as_written_though_one_of_weight_0_is_left_out(
    own: list[dict[str, Any]],
    wrong: str,
    adapters: list[Path],
    call: Call,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call(**TIES, models=dict(zip(adapters, own, strict=True))) == 2
    assert f": {wrong}" in said(capsys)


def test_a_message_counts_the_models_as_written_wherever_the_base_model_stands(
    models: list[Path], tiny_model: Path, call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = {tiny_model: {}, models[0]: {"weight": 1}, models[1]: {"weight": "x"}}
    assert call(**TIES, models=listed, base_model=tiny_model) == 2
    assert ": models.2.parameters.weight=x: must be a number" in said(capsys)
    listed = {models[0]: {"weight": "x"}, models[1]: {"weight": 1}}
    assert call(merge_method="slerp", models=listed, base_model=models[1]) == 2
    assert ": models.0.parameters.weight=x: must be a number" in said(capsys)


def test_weights_that_nearly_cancel_are_refused_in_the_recipes_words(
    adapters: list[Path], call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = {adapters[0]: {"weight": 1}, adapters[1]: {"weight": -0.995}}
    assert call(**LINEAR, models=listed) == 2
    found = said(capsys)
    assert (
        "models: weights times lambda, divided by the weights' sum 0.005, come to 399, mo" in found
    )
    assert "strength" not in found


@pytest.mark.parametrize(
    ("method", "parameters"),
    [("median", {}), ("trimmed_mean", {}), ("lines", {"of": "median"})],
)
def test_weights_that_would_be_ignored_are_refused(
    method: str,
    parameters: dict[str, Any],
    adapters: list[Path],
    tmp_path: Path,
    call: Call,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = {"merge_method": method, "parameters": {**parameters, "rank": 4}}
    listed = {path: {"weight": w} for path, w in zip(adapters, (2, 1, 1), strict=True)}
    assert call(**recipe, models=listed) == 2
    assert (
        said(capsys)
        .removeprefix(f"{tmp_path / 'recipe.yaml'}: ")
        .startswith(
            f"models: {method} counts all of them alike; give them the same weight, or none"
        )
    )
    assert call(**recipe, models={path: {"weight": 2} for path in adapters}) == 0


def test_density_given_to_each_model_alike_is_the_density(
    adapters: list[Path], tmp_path: Path, call: Call
) -> None:
    assert call(tmp_path / "a", **TIES, models=adapters) == 0
    own = {path: {"density": 0.5, "weight": 2} for path in adapters}
    assert call(tmp_path / "b", merge_method="ties", models=own) == 0
    one, two = (load_file(tmp_path / n / "adapter_model.safetensors") for n in "ab")
    assert all(one[name].equal(two[name]) for name in one)


@pytest.mark.parametrize(("t", "which"), [(0, 0), (0.0, 0), (1, 1)])
def test_an_end_of_the_arc_is_one_adapter(
    t: float, which: int, adapters: list[Path], tmp_path: Path, call: Call
) -> None:
    assert call(merge_method="slerp", models=adapters[:2], parameters={"t": t}) == 0
    assert call(tmp_path / "one", **LINEAR, models=[adapters[which]]) == 0
    found, one = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("out", "one"))
    assert all(found[name].equal(one[name]) for name in one)


def test_t_beside_a_model_of_weight_0_is_refused_and_not_ignored(
    adapters: list[Path], call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = {adapters[0]: {"weight": 0}, adapters[1]: {}}
    assert call(merge_method="slerp", models=listed, parameters={"t": 0.3}) == 2
    assert ": parameters.t: is for slerp between two models; give weight" in said(capsys)


@pytest.mark.parametrize("parameters", [{"t": 0.3}, {"weight": 1}, {}])
def test_slerp_of_more_than_two_is_told_at_once_what_merges_them(
    parameters: dict[str, float], adapters: list[Path], call: Call, capsys: Any
) -> None:
    assert call(merge_method="slerp", models=adapters, parameters=parameters) == 2
    assert said(capsys).endswith(": merge_method=slerp: merges two models, not 3; take karcher")


def test_a_model_of_weight_0_is_left_out_and_the_report_says_so(
    adapters: list[Path], tmp_path: Path, call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = {adapters[0]: {"weight": 0, "density": 0.1}, adapters[1]: {"weight": 2},
              adapters[2]: {"weight": 1, "density": 0.7}}  # fmt: skip
    assert call(merge_method="ties", models=listed) == 0
    assert f"note: {adapters[0]} was left out: its weight is 0" in capsys.readouterr().err
    del listed[adapters[0]]
    assert call(tmp_path / "two", merge_method="ties", models=listed) == 0
    found, two = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("out", "two"))
    assert all(found[name].equal(two[name]) for name in two)


def test_what_fails_offline_speaks_of_no_hospitals(
    adapters: list[Path], tmp_path: Path, call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    twice = {"tensors": {"lora_": lambda t: 2 * t}}
    other = broken(adapters[0], tmp_path / "other", twice)  # of the same rank, with another A and B
    for method in ("krum", "trimmed_mean", "ffa", "rolora", "regmean", "fisher", "noise_aware"):
        assert call(merge_method=method, models=[adapters[0], other]) in (1, 2)
        found = capsys.readouterr().err
        assert "wardround: " in found
        assert "hospital" not in found


def test_a_density_of_its_own_for_each_adapter_and_the_default_for_the_others(
    adapters: list[Path], tmp_path: Path, call: Call
) -> None:
    def resolved(*own: float | None, **common: float) -> Any:
        out = tmp_path / f"{own}{common}"
        listed = {
            path: {} if d is None else {"density": d} for path, d in zip(adapters, own, strict=True)
        }
        assert call(out, merge_method="ties", models=listed, parameters=common) == 0
        return json.loads((out / "merge_report.json").read_text())["parameters"]["density"]

    assert resolved(0.4, 0.1, 0.7) == [0.4, 0.1, 0.7]
    assert resolved(0.4, None, 0.7) == [0.4, 0.2, 0.7]
    assert resolved(None, None, 0.7, density=0.3) == [0.3, 0.3, 0.7]
    assert resolved(0.7, 0.7, 0.7, density=0.3) == 0.7


def test_one_density_for_all_where_a_strategy_has_no_other(
    adapters: list[Path], call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    own = {adapters[0]: {"density": 0.4}, adapters[1]: {}}
    assert call(merge_method="core_ties", models=own) == 2
    assert "models.0.parameters.density=0.4: must be the same for all models" in said(capsys)
