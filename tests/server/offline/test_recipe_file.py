"""A file that is no recipe is refused in one line that names it."""

from __future__ import annotations

from pathlib import Path

import pytest

import wardround
from server.offline.recipe import read_recipe
from tests.server.offline.test_command import said


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "no readable file"),
        ("a: [", "not valid YAML (line 2)"),
        (
            "merge_method: ties\nmerge_method: dare",
            "merge_method is given twice (line 2); give it once",
        ),
        (
            "parameters: {density: 0.5,\n  density: 1}",
            "density is given twice (line 2); give it once",
        ),
        (
            "merge_method: ties\nmodels: [{model: a}, {model: b, wieght: 1}]",
            "models.1.wieght=1: unknown key; there are: model, parameters",
        ),
        ("just words", "says no merge_method and models; see docs/offline-merging.md"),
    ],
)
def test_a_file_that_is_no_recipe(
    text: str | None, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "r.yaml"
    if text is not None:
        file.write_text(text + "\n")
    assert wardround.main(["merge", str(file), str(tmp_path / "out")]) == 2
    assert said(capsys) == f"{file}: {expected}"


@pytest.mark.parametrize("number", ["1e-1", "1E-12", "2e3", "+1.5e+2", ".5e1", "1.e0", "-3e-4"])
def test_numbers_are_those_of_yaml_1_2(number: str, tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(
        f"merge_method: ties\nparameters: {{lambda: {number}, density: 0.5}}\n"
        f"models: [{{model: a1e5, parameters: {{weight: {number}}}}}, {{model: 1e5x}}]\n"
    )
    recipe = read_recipe(file)
    assert recipe.parameters == {"lambda": float(number), "density": 0.5}
    assert recipe.models[0].parameters == {"weight": float(number)}
    assert [one.model for one in recipe.models] == ["a1e5", "1e5x"]
