"""Whole models in, a model out: against mergekit on the same weights, and in transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit.merge_methods import merge_state_dicts
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters.lowrank import Dense, LowRank, gram, weighted_sum
from server import model_folder
from strategies.registry import strategies
from tests.server.offline.conftest import Call, tuned

WEIGHTS = [0.5, 0.3, 0.4]


def weights_of(folder: Path) -> dict[str, Tensor]:
    return {
        n: t.double() for file in sorted(folder.glob("*.safetensors"))
        for n, t in load_file(file).items()
    }  # fmt: skip


def mergekit(
    method: str, models: list[Path], base: Path | None = None, **parameters: Any
) -> dict[str, Tensor]:
    """mergekit 0.1.5 on the same weights; a weight is given by model."""
    states = {f"m{i}": weights_of(folder) for i, folder in enumerate(models)}
    for key in ("weight", "density"):
        if isinstance(parameters.get(key), list):
            parameters[key] = {f"m{i}": value for i, value in enumerate(parameters[key])}
    if base is not None:
        states = {"base": weights_of(base), **states}
    return merge_state_dicts(  # type: ignore[no-any-return]
        states, method, parameters=parameters, base="base" if base is not None else None
    )


def gap(found: dict[str, Tensor], expected: dict[str, Tensor], base: Path | None = None) -> float:
    """Relative error of what was merged: of differences, where there is a base model."""
    assert set(found) == set(expected)
    origin = weights_of(base) if base else {}
    error = sum(float((found[n] - expected[n]).norm() ** 2) for n in found)
    size = sum(float((expected[n] - origin.get(n, 0)).norm() ** 2) for n in found)
    return (error / size) ** 0.5


def weighted(models: list[Path]) -> dict[Path, dict[str, float]]:
    return {path: {"weight": w} for path, w in zip(models, WEIGHTS, strict=False)}


def test_linear_is_mergekits(models: list[Path], tmp_path: Path, call: Call) -> None:
    for normalize in (True, False):
        out = tmp_path / str(normalize)
        parameters = {"normalize": normalize}
        assert call(out, merge_method="linear", models=weighted(models), parameters=parameters) == 0
        theirs = mergekit("linear", models, weight=WEIGHTS, normalize=normalize)
        assert gap(weights_of(out), theirs) < 1e-6


@pytest.mark.parametrize(
    ("method", "ours", "theirs"),
    [
        ("task_arithmetic", {"lambda": 0.7}, {"lambda": 0.7}),
        ("task_arithmetic", {"normalize": True}, {"normalize": True}),
        ("ties", {"density": 0.5}, {"density": 0.5}),
        ("ties", {"density": 0.5, "normalize": False}, {"density": 0.5, "normalize": False}),
        ("ties", {"density": [0.5, 0.25, 0.75]}, {"density": [0.5, 0.25, 0.75]}),
        ("ties", {"density": 0.25, "lambda": 1.3}, {"density": 0.25, "lambda": 1.3}),
        # Where everything is kept, what is left of these is how they agree and how they add up.
        ("dare_ties", {"density": 1 - 1e-12}, {"density": 1.0}),
        ("dare_ties", {"density": 1 - 1e-12, "normalize": True}, {"normalize": True}),
        ("dare_linear", {"density": 1 - 1e-12, "lambda": 0.5}, {"lambda": 0.5}),
        ("della", {"density": 1 - 1e-12, "epsilon": 1e-12}, {}),
        ("della_linear", {"density": 1 - 1e-12, "epsilon": 1e-12}, {}),
        ("breadcrumbs", {"density": 1 - 1e-12, "gamma": 0.0}, {}),
        ("breadcrumbs_ties", {"density": 1 - 1e-12, "gamma": 0.0}, {}),
        ("multislerp", {}, {}),
    ],
)
def test_task_vectors_are_merged_as_by_mergekit(
    method: str,
    ours: dict[str, Any],
    theirs: dict[str, Any],
    models: list[Path],
    tiny_model: Path,
    tmp_path: Path,
    call: Call,
) -> None:
    listed: dict[Path, dict[str, Any]] = {path: dict(own) for path, own in weighted(models).items()}
    if isinstance(ours.get("density"), list):  # one for each model
        ours = dict(ours)
        for own, density in zip(listed.values(), ours.pop("density"), strict=True):
            own["density"] = density
    assert call(merge_method=method, models=listed, base_model=tiny_model, parameters=ours) == 0
    found = weights_of(tmp_path / "out")
    expected = mergekit(method, models, tiny_model, weight=WEIGHTS, **theirs)
    assert gap(found, expected, tiny_model) < 2e-6  # float32 weights, differences of 5 %


def test_model_stock_is_mergekits_for_differences_of_this_size(
    models: list[Path], tiny_model: Path, tmp_path: Path, call: Call
) -> None:
    listed = {tiny_model: {}, **{m: {} for m in models}}  # as its users list it
    assert call(merge_method="model_stock", models=listed, base_model=tiny_model) == 0
    expected = mergekit("model_stock", models, tiny_model)
    found = weights_of(tmp_path / "out")
    opposed = {  # ours gives the base model where cosines are negative, theirs turns the sign
        name
        for name, layer in report(tmp_path / "out")["layers"].items()
        if layer["mean_cosine"] <= 0
    }
    agreed = set(found) - opposed
    assert len(agreed) > 3
    assert gap(
        {n: found[n] for n in agreed}, {n: expected[n] for n in agreed}, tiny_model
    ) < 1e-5  # fmt: skip
    for name in opposed:
        assert torch.equal(found[name], weights_of(tiny_model)[name])


@pytest.mark.parametrize("order", [0, 1])
def test_slerp_goes_from_the_base_model_to_the_other_wherever_it_is_listed(
    order: int, models: list[Path], tiny_model: Path, tmp_path: Path, call: Call
) -> None:
    from mergekit.merge_methods import merge_tensors

    other = model_far_from(tiny_model, tmp_path / "far")
    listed = [tiny_model, other] if order == 0 else [other, tiny_model]
    code = call(
        merge_method="slerp", models=listed, base_model=tiny_model,
        parameters={"t": 0.3},
    )  # fmt: skip
    assert code == 0
    one, two = weights_of(tiny_model), weights_of(other)
    expected = {
        n: merge_tensors([one[n], two[n]], "slerp", parameters={"t": 0.3}, base_index=0).double()
        for n in one
    }
    assert gap(weights_of(tmp_path / "out"), expected) < 1e-6
    assert report(tmp_path / "out")["acts_on"] == "weights"


def test_nuslerp_interpolates_differences_where_there_is_a_base_model(
    models: list[Path], tiny_model: Path, tmp_path: Path, call: Call
) -> None:
    two = models[:2]
    assert call(merge_method="nuslerp", models=weighted(two), base_model=tiny_model) == 0
    expected = mergekit("nuslerp", two, tiny_model, weight=WEIGHTS[:2])
    assert gap(weights_of(tmp_path / "out"), expected, tiny_model) < 2e-6


def test_karcher_without_a_base_model_is_mergekits(
    models: list[Path], tiny_model: Path, tmp_path: Path, call: Call
) -> None:
    apart = [tiny_model, model_far_from(tiny_model, tmp_path / "far"), models[0]]
    assert call(merge_method="karcher", models=apart) == 0
    expected = mergekit("karcher", apart, max_iter=200, tol=1e-12)
    assert gap(weights_of(tmp_path / "out"), expected) < 1e-6


@pytest.mark.parametrize("name", sorted(strategies()))
def test_every_strategy_merges_whole_models_or_says_why_not(
    name: str,
    models: list[Path],
    tiny_model: Path,
    tmp_path: Path,
    call: Call,
    capsys: pytest.CaptureFixture[str],
) -> None:
    parameters: dict[str, Any] = {
        "ties": {"density": 0.3}, "della": {"density": 0.5}, "breadcrumbs": {"density": 0.3},
        "krum": {"liars": 0}, "slerp": {"t": 0.5},
    }.get(name, {})  # fmt: skip
    listed = models[:2] if name == "slerp" else models
    base = models[0] if name == "slerp" else tiny_model
    code = call(
        merge_method=name, models=listed, base_model=base,
        parameters=parameters,
    )  # fmt: skip
    if strategies()[name].declared.space == "factors":
        assert code == 2
        declared = strategies()[name].declared
        rounds_only = declared.statistics is not None or declared.noise
        why = "only rounds have" if rounds_only else "acts on factors of adapters; take product_me"
        assert why in capsys.readouterr().err
        return
    assert code == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.isfinite(model(torch.arange(9)[None]).logits).all()


def test_krum_chooses_one_model_for_all_tensors(
    models: list[Path], tiny_model: Path, tmp_path: Path, call: Call
) -> None:
    parameters = {"liars": 0, "chosen": 1}
    assert call(merge_method="krum", models=models, parameters=parameters) == 0
    found = weights_of(tmp_path / "out")
    assert sum(gap(found, weights_of(m)) < 1e-6 for m in models) == 1


@pytest.mark.parametrize("name", ["norm_bound", "norm_weighted", "model_stock"])
def test_with_scope_model_a_whole_model_is_one_vector(
    name: str, models: list[Path], tiny_model: Path, tmp_path: Path, call: Call
) -> None:
    """Tensor by tensor it is something else."""
    alike = [tuned(models[0], tmp_path / f"near-{i}", 7 + i, (1 + i) * 0.03) for i in range(3)]
    base = weights_of(tiny_model)
    states = [weights_of(folder) for folder in alike]
    parts = [torch.cat([(own[n] - base[n]).flatten() for n in base]) for own in states]
    sizes = torch.stack([part.norm() for part in parts])
    units = torch.stack(parts) / sizes[:, None]
    if name == "norm_bound":
        expected = (sizes.clamp(max=sizes.median())[:, None] * units).mean(0)
    elif name == "norm_weighted":
        expected = units.sum(0) / units.sum(0).norm() * sizes.mean()
    else:
        c = float(sum(units[i] @ units[j] for i, j in ((0, 1), (0, 2), (1, 2)))) / 3
        expected = 3 * c / (1 + 2 * c) * torch.stack(parts).mean(0)
    found = {}
    for scope in ("model", "layer"):
        out, chosen = tmp_path / scope, {"scope": scope}
        code = call(out, merge_method=name, models=alike, base_model=tiny_model, parameters=chosen)
        assert code == 0
        merged = weights_of(out)
        found[scope] = torch.cat([(merged[n] - base[n]).flatten() for n in base])
    assert float((found["model"] - expected).norm() / expected.norm()) < 1e-6
    assert float((found["layer"] - expected).norm() / expected.norm()) > 1e-3


def test_lines_scales_by_the_depth_of_the_whole_model(
    models: list[Path], tiny_model: Path, tmp_path: Path, call: Call
) -> None:
    code = call(
        merge_method="lines", models=models[:1], base_model=tiny_model,
        parameters={"first": 0.25, "last": 1.0},
    )  # fmt: skip
    assert code == 0
    base, one, found = (weights_of(f) for f in (tiny_model, models[0], tmp_path / "out"))
    for name in base:
        factor = 1.0 if ".layers.1." in name else 0.25
        assert torch.allclose(
            found[name] - base[name], factor * (one[name] - base[name]), atol=1e-6
        )


def test_shards_and_half_precision(
    models: list[Path],
    tiny_model: Path,
    tmp_path: Path,
    call: Call,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Inputs in one file or many, the result in many, of another type: the same weights."""
    split = tmp_path / "split"
    AutoModelForCausalLM.from_pretrained(models[0]).save_pretrained(split, max_shard_size="20KB")
    assert len(list(split.glob("*.safetensors"))) > 2
    monkeypatch.setattr(model_folder, "SHARD", 10_000)
    listed = [split, models[1]]
    assert (
        call(
            merge_method="linear",
            models=listed,
            dtype="bfloat16",
            tokenizer_source=str(tiny_model),
            base_model=tiny_model,
        )
        == 0
    )
    out = tmp_path / "out"
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 2
    assert all(f.stat().st_size < 12_000 for f in files if len(load_file(f)) > 1)
    one, two = weights_of(models[0]), weights_of(models[1])
    expected = {n: ((one[n] + two[n]) / 2).bfloat16().double() for n in one}
    found = weights_of(out)
    assert all(torch.equal(found[n], expected[n]) for n in expected)  # rounded once
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(out)("a patient").input_ids
    exact = {n: (one[n] + two[n]) / 2 for n in one}
    assert report(out)["figures"]["rounding"] == pytest.approx(gap(found, exact), rel=1e-3)


def test_the_report_measures_differences_and_names_nothing_but_what_was_typed(
    models: list[Path], tiny_model: Path, tmp_path: Path, call: Call, monkeypatch: Any
) -> None:
    monkeypatch.chdir(models[0].parent)
    names = [m.name for m in models]
    (tmp_path / "base").symlink_to(tiny_model)
    monkeypatch.chdir(tmp_path)
    for m in models:
        (tmp_path / m.name).symlink_to(m)
    code = call(merge_method="linear", models=names, base_model="base")
    assert code == 0
    text = (tmp_path / "out" / "merge_report.json").read_text()
    assert str(tmp_path) not in text
    assert str(models[0].parent) not in text
    found = report(tmp_path / "out")
    vectors = [torch.cat([t.flatten() for _, t in sorted(weights_of(m).items())]) for m in models]
    pairs = [(0, 1), (0, 2), (1, 2)]
    cosines = [float(torch.cosine_similarity(vectors[i], vectors[j], dim=0)) for i, j in pairs]
    assert found["figures"]["mean_cosine"] == pytest.approx(sum(cosines) / 3)
    assert found["figures"]["norm_ratio"] == pytest.approx(1)
    assert [i["model"] for i in found["inputs"]] == names
    assert len({i["fingerprint"] for i in found["inputs"]}) == 3


def test_whole_matrices_obey_the_same_algebra() -> None:
    g = torch.Generator().manual_seed(0)
    for shape in ((3, 5), (5, 3), (1, 4)):
        own = [torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(3)]
        whole = [Dense(m) for m in own]
        plain = [LowRank(d.B, d.A) for d in whole]
        assert torch.allclose(gram(whole), gram(plain))
        assert torch.allclose(
            weighted_sum(whole, WEIGHTS).dense(), weighted_sum(plain, WEIGHTS).dense()
        )
        for d, p in zip(whole, plain, strict=True):
            assert (d.rank, d.shape) == (p.rank, p.shape)
            assert d.norm() == pytest.approx(p.norm())
            assert torch.allclose((d * 3).dense(), 3 * p.dense())
        assert torch.allclose(gram([whole[0], plain[1]]), gram(plain[:2]))


def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "merge_report.json").read_text())
    return found


def model_far_from(base: Path, folder: Path) -> Path:
    """Of the same shapes, at angles that make an arc differ from a line."""
    model = AutoModelForCausalLM.from_pretrained(base)
    g = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g))
    model.save_pretrained(folder)
    return folder


def test_whole_numbers_must_be_equal(
    models: list[Path], tmp_path: Path, call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = []
    for i, model in enumerate(models[:2]):
        folder = tmp_path / f"n{i}"
        folder.mkdir()
        (folder / "config.json").write_text((model / "config.json").read_text())
        state = load_file(model / "model.safetensors") | {"steps": torch.tensor([i])}
        save_file(state, folder / "model.safetensors")
        folders.append(folder)
    assert call(merge_method="linear", models=folders) == 1
    assert "steps holds whole numbers that differ" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
