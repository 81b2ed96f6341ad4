"""Adapter folders in, an adapter out: exact unless a rank is asked for, as PEFT reads it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PeftModelForFeatureExtraction, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, BertModel

from adapters.adapter import Adapter
from tests.server.offline.conftest import Call, lora


def dense(folder: Path) -> dict[str, Tensor]:
    """What a PEFT folder adds to each weight, float64, as PEFT itself computes it."""
    config = json.loads((folder / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"] ** (0.5 if config["use_rslora"] else 1)
    stored = load_file(folder / "adapter_model.safetensors")
    names = {name.split(".lora_")[0] for name in stored}
    return {
        n: scale * stored[f"{n}.lora_B.weight"].double() @ stored[f"{n}.lora_A.weight"].double()
        for n in names
    }


def expected(folders: list[Path], weights: list[float]) -> dict[str, Tensor]:
    own = [dense(folder) for folder in folders]
    return {n: sum(w * d[n] for w, d in zip(weights, own, strict=True)) for n in own[0]}


def gap(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert set(one) == set(other)
    error = sum(float((one[n] - other[n]).norm() ** 2) for n in other)
    return (error / sum(float(d.norm() ** 2) for d in other.values())) ** 0.5


def logits(base: Path, adapter: Path | None) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(base)
    live = model if adapter is None else PeftModel.from_pretrained(model, str(adapter))
    with torch.no_grad():
        return live.eval()(torch.arange(3, 20)[None]).logits


def encoder_lora(base: Path, folder: Path, task: str | None) -> Path:
    """A random PEFT adapter for the encoder in ``base``."""
    config = LoraConfig(r=2, target_modules=["query"], task_type=task, init_lora_weights=False)
    get_peft_model(AutoModel.from_pretrained(base), config).save_pretrained(folder)
    return folder


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A tiny BERT, which generates nothing."""
    config = BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16,
    )  # fmt: skip
    BertModel(config).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


@pytest.mark.parametrize("second", ["FEATURE_EXTRACTION", None])
def test_merged_adapters_of_an_encoder_are_loaded_by_peft(
    second: str | None, encoder: Path, tmp_path: Path, call: Call
) -> None:
    """One that does not say what it is for has no say."""
    two = encoder_lora(encoder, tmp_path / "two", second)
    one = encoder_lora(encoder, tmp_path / "one", "FEATURE_EXTRACTION")
    assert call(merge_method="linear", models=[two, one]) == 0
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(encoder), str(tmp_path / "out"))
    assert isinstance(model, PeftModelForFeatureExtraction)


def test_adapters_for_different_tasks_are_refused(
    encoder: Path, tmp_path: Path, call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    one = encoder_lora(encoder, tmp_path / "one", "FEATURE_EXTRACTION")
    two = lora(encoder, tmp_path / "two", 1, target_modules=["query"])
    assert call(merge_method="linear", models=[one, two]) == 1
    said = capsys.readouterr().err
    assert f"{two}: its task_type is CAUSAL_LM, that of {one} FEATURE_EXTRACTION; merge" in said


def test_who_says_an_adapter_was_made_for_another_base_is_told_what_it_says(
    tiny_model: Path, tmp_path: Path, call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"one": "meta/Llama-2-7b", "two": "/srv/models/mistral", "three": str(tiny_model)}
    folders = []
    for seed, (name, base) in enumerate(names.items()):
        folders.append(lora(tiny_model, tmp_path / name, seed))
        file = folders[-1] / "adapter_config.json"
        file.write_text(
            json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": base})
        )
    assert call(merge_method="linear", models=folders, base_model=tiny_model) == 0
    notes = [
        f"{folder} says it was made for {said}, not {tiny_model.name}"
        for folder, said in zip(folders, ("meta/Llama-2-7b", "mistral"), strict=False)
    ]
    told = capsys.readouterr().err.splitlines()
    assert [line for line in told if "made for" in line] == [f"note: {note}" for note in notes]
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert report["notes"][:2] == notes


def test_without_a_rank_the_weighted_sum_is_exact(
    adapters: list[Path], tmp_path: Path, call: Call
) -> None:
    weights = dict(zip(adapters, (0.5, 0.3, 1e-5), strict=True))  # the last one: weak directions
    models = {path: {"weight": w} for path, w in weights.items()}
    assert call(merge_method="task_arithmetic", models=models) == 0
    found = tmp_path / "out"
    assert gap(dense(found), expected(adapters, [0.5, 0.3, 1e-5])) < 2e-7  # factors are float32
    report = json.loads((found / "merge_report.json").read_text())
    assert report["output"]["adapter"]["rank"] == 4 + 2 + 3
    assert report["output"]["adapter"]["exact"] is True
    assert report["figures"]["kept_energy"] == pytest.approx(1)
    assert [i["rank"] for i in report["inputs"]] == [4, 2, 3]
    prints = [Adapter.load(folder).fingerprint() for folder in (*adapters, found)]
    assert [i["fingerprint"] for i in report["inputs"]] == prints[:3]
    assert report["output"]["adapter"]["fingerprint"] == prints[3]


@pytest.mark.parametrize("rank", [None, 3])
def test_peft_cat_and_svd_give_the_same_model(
    rank: int | None, adapters: list[Path], tiny_model: Path, tmp_path: Path, call: Call
) -> None:
    """The third adapter is left out: PEFT merges rsLoRA sqrt(rank) too large."""
    two, weights = adapters[:2], [0.7, 0.5]
    live = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_model), str(two[0]), adapter_name="a"
    )
    live.load_adapter(str(two[1]), adapter_name="b")
    how = "cat" if rank is None else "svd"  # ours: exact, or the best of the rank
    live.add_weighted_adapter(["a", "b"], weights, "c", how, svd_rank=rank)
    live.set_adapter("c")
    with torch.no_grad():
        theirs = live.eval()(torch.arange(3, 20)[None]).logits
    models = {path: {"weight": w} for path, w in zip(two, weights, strict=True)}
    parameters = {"normalize": False} | ({} if rank is None else {"rank": rank})
    assert call(merge_method="linear", models=models, parameters=parameters) == 0
    ours = logits(tiny_model, tmp_path / "out")
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert not torch.allclose(ours, logits(tiny_model, two[0]), atol=1e-2)


def test_adapters_that_share_a_factor_keep_their_rank(
    tiny_model: Path, tmp_path: Path, call: Call
) -> None:
    one = lora(tiny_model, tmp_path / "one", 1)
    two = lora(tiny_model, tmp_path / "two", 2)
    shared = Adapter.load(one)
    other = Adapter.load(two)
    layers = {n: type(x)(other.layers[n].B, x.A) for n, x in shared.layers.items()}
    Adapter(other.spec, layers).save(two)
    assert call(merge_method="linear", models=[one, two]) == 0
    assert Adapter.load(tmp_path / "out").spec.rank == 4
    assert gap(dense(tmp_path / "out"), expected([one, two], [0.5, 0.5])) < 2e-7


def test_a_rank_gives_the_best_approximation(
    adapters: list[Path], tmp_path: Path, call: Call
) -> None:
    assert call(merge_method="linear", models=adapters, parameters={"rank": 3}) == 0
    found, exact = dense(tmp_path / "out"), expected(adapters, [1 / 3] * 3)
    kept = []
    for name, update in exact.items():
        values = torch.linalg.svdvals(update)
        lost = float((found[name] - update).norm() ** 2)
        assert lost == pytest.approx(float(values[3:].square().sum()), rel=1e-4)
        kept.append(1 - lost / float(values.square().sum()))
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert report["figures"]["kept_energy"] == pytest.approx(min(kept))
    size, whole = (sum(float(d.norm() ** 2) for d in x.values()) for x in (found, exact))
    assert report["figures"]["norm_ratio"] == pytest.approx((size / whole) ** 0.5)
    assert report["output"]["adapter"] | {"fingerprint": ""} == {
        "fingerprint": "", "rank": 3, "exact": False,
    }  # fmt: skip


def test_a_rank_is_a_cap(adapters: list[Path], tmp_path: Path, call: Call) -> None:
    """Above what the merge has (4 + 2 + 3) it changes nothing, however wide the layers are."""
    assert call(tmp_path / "exact", merge_method="linear", models=adapters) == 0
    exact = load_file(tmp_path / "exact" / "adapter_model.safetensors")
    for rank in (9, 20, 33):
        out = tmp_path / str(rank)
        assert call(out, merge_method="linear", models=adapters, parameters={"rank": rank}) == 0
        report = json.loads((out / "merge_report.json").read_text())
        assert report["output"]["adapter"]["rank"] == 9
        assert report["output"]["adapter"]["exact"] is True
        assert report["figures"]["kept_energy"] == 1
        found = load_file(out / "adapter_model.safetensors")
        assert all(found[name].equal(exact[name]) for name in exact)


def test_the_console_says_what_was_made_and_what_to_know_of_it(
    adapters: list[Path], tmp_path: Path, call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(**recipe: Any) -> list[str]:
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        assert call(out, models=adapters, **recipe) == 0
        size = (out / "adapter_model.safetensors").stat().st_size
        lines = [x for x in capsys.readouterr().err.splitlines() if x and "━" not in x]
        assert lines.pop() == f"merged: {out}"
        assert f", {size / 1e6:.3g} MB" in lines[0]
        return lines

    (exact,) = told(merge_method="linear")
    assert exact.startswith("adapter of rank 9, ")
    assert "keeps" not in exact
    (cut,) = told(merge_method="linear", parameters={"rank": 2})
    assert re.search(r"rank 2, .* MB; keeps \d+(\.\d)? % of the squared norm", cut)
    sparse = told(merge_method="ties", parameters={"density": 0.3})
    assert sparse[0].startswith("adapter of rank 32, ")
    assert sparse[1].startswith("note: ties, other than in mergekit: ")
    advice = re.fullmatch(
        r"note: the exact adapter \(rank 32, .* MB\) is larger than the inputs together "
        r"\(rank 9, .* MB\); parameters.rank: 4 would keep (.*) %", sparse[2]
    )  # fmt: skip
    assert advice
    (kept, *_) = told(merge_method="ties", parameters={"density": 0.3, "rank": 4})
    assert f"; keeps {advice[1]} % of" in kept


def test_what_was_made_of_dense_entries_is_kept_whole(
    adapters: list[Path], tmp_path: Path, call: Call
) -> None:
    """TIES gives full rank; layers of less width than the widest are filled up with zeros."""
    from strategies.base import Draw
    from strategies.registry import create

    assert call(merge_method="ties", models=adapters, parameters={"density": 0.3}) == 0
    own = [Adapter.load(folder) for folder in adapters]
    ties = create("ties", {"density": 0.3, "scope": "layer"})
    wanted = {
        f"base_model.model.{n}": update
        for n, update in ties.combine(own, [1 / 3] * 3, Draw()).items()
    }
    assert gap(dense(tmp_path / "out"), wanted) < 1e-6  # type: ignore[arg-type]
    assert Adapter.load(tmp_path / "out").spec.rank == 32


@pytest.mark.parametrize("output", ["model", "both"])
def test_the_merged_adapter_folded_into_its_base_is_the_same_model(
    output: str, adapters: list[Path], tiny_model: Path, tmp_path: Path, call: Call
) -> None:
    models = {path: {"weight": w} for path, w in zip(adapters, (1, -0.5, 0.7), strict=True)}
    common = {"merge_method": "task_arithmetic", "models": models, "base_model": tiny_model}
    assert call(tmp_path / "adapter", **common) == 0
    assert call(tmp_path / "out", output=output, **common) == 0
    wanted = logits(tiny_model, tmp_path / "adapter")
    folder = tmp_path / "out" / ("model" if output == "both" else "")
    assert torch.allclose(logits(folder, None), wanted, atol=1e-5)
    assert (folder / "tokenizer.json").exists()
    assert (tmp_path / "out" / "merge_report.json").exists()
    if output == "both":
        assert torch.allclose(logits(tiny_model, tmp_path / "out" / "adapter"), wanted, atol=1e-6)
    signed = expected(adapters, [1, -0.5, 0.7])
    assert gap(dense(tmp_path / "adapter"), signed) < 2e-7


def test_the_report_compares_what_is_subtracted_with_its_sign(
    adapters: list[Path], tmp_path: Path, call: Call
) -> None:
    models = {path: {"weight": w} for path, w in zip(adapters[:2], (1, -0.5), strict=True)}
    assert call(merge_method="task_arithmetic", models=models) == 0
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    one, other = map(dense, adapters[:2])
    for name, layer in report["layers"].items():
        d, e = (
            one[f"base_model.model.{name}"].flatten(),
            -other[f"base_model.model.{name}"].flatten(),
        )
        assert layer["mean_cosine"] == pytest.approx(float(d @ e / d.norm() / e.norm()), rel=1e-6)


def test_gpt2_keeps_its_weights_the_other_way_round(tmp_path: Path, call: Call) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    small = GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    GPT2LMHeadModel(small).save_pretrained(tmp_path / "base")
    targets = ["c_attn", "attn.c_proj"]  # the second is square
    one = lora(tmp_path / "base", tmp_path / "one", 1, target_modules=targets, fan_in_fan_out=True)
    common = {"merge_method": "linear", "models": [one], "base_model": tmp_path / "base"}
    assert call(output="model", **common) == 0
    assert torch.allclose(logits(tmp_path / "out", None), logits(tmp_path / "base", one), atol=1e-5)


@pytest.mark.parametrize(
    ("asked", "dtype", "least", "most"),
    [({"dtype": "bfloat16"}, torch.bfloat16, 1e-4, 1e-2), ({}, torch.float32, 1e-9, 1e-6)],
)
def test_the_result_is_rounded_once_and_its_loss_reported(
    asked: dict[str, str],
    dtype: torch.dtype,
    least: float,
    most: float,
    adapters: list[Path],
    tmp_path: Path,
    call: Call,
) -> None:
    assert call(merge_method="linear", models=adapters, **asked) == 0
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {t.dtype for t in stored.values()} == {dtype}
    off = gap(dense(tmp_path / "out"), expected(adapters, [1 / 3] * 3))
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert report["figures"]["rounding"] == pytest.approx(off, rel=1e-3)
    assert least < off < most


def test_a_type_that_cannot_hold_the_result_is_refused(
    tiny_model: Path, tmp_path: Path, call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    large = lora(tiny_model, tmp_path / "large", 1, lora_alpha=10**12)
    assert call(merge_method="linear", models=[large], dtype="float16") == 1
    assert "dtype=float16: cannot hold the merged adapter; take another" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_adapters_in_half_precision_are_scaled_in_float64(
    tiny_model: Path, tmp_path: Path, call: Call
) -> None:
    one = lora(tiny_model, tmp_path / "one", 1, lora_alpha=7)  # 7 / 4 and 1 / 3 round in bfloat16
    two = lora(tiny_model, tmp_path / "two", 2, r=3, lora_alpha=1)
    for folder in (one, two):
        Adapter.load(folder).save(folder / "half", dtype=torch.bfloat16)
        alpha = json.loads((folder / "adapter_config.json").read_text())["lora_alpha"]
        assert json.loads((folder / "half/adapter_config.json").read_text())["lora_alpha"] == alpha
    halves = [one / "half", two / "half"]
    assert call(merge_method="linear", models=halves) == 0
    assert gap(dense(tmp_path / "out"), expected(halves, [0.5, 0.5])) < 2e-7


def test_targets_name_the_layers_that_are_adapted_and_no_others(
    tiny_model: Path, tmp_path: Path, call: Call
) -> None:
    one = lora(tiny_model, tmp_path / "one", 1, layers_to_transform=[1])
    assert call(merge_method="linear", models=[one]) == 0
    assert torch.allclose(logits(tiny_model, tmp_path / "out"), logits(tiny_model, one), atol=1e-6)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert all(".layers.1." in target for target in config["target_modules"])
