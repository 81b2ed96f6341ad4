"""``wardround transfer``: what was learned moves to a checkpoint it fits, and to no other."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from adapters import lora
from adapters.adapter import Adapter, AdapterSpec
from adapters.lowrank import LowRank
from conf.experts import TransferCommand
from conf.load import ConfigError, load
from server.experts import transfer
from server.experts.transfer_command import run
from tests.conftest import make_llama

QUIET = Console(quiet=True)
EMBEDDING = "model.embed_tokens.weight"


def test_a_weight_of_one_number_moves_too() -> None:
    one, two = torch.tensor(1.0), torch.tensor(3.0)
    assert transfer.moved(one, one, two, 0.5, None).equal(torch.tensor(2.0))
    table = torch.zeros(3, 2)
    assert transfer.moved(table, table, table + 1, 1.0, 2).tolist() == [[1, 1], [1, 1], [0, 0]]


def near(model: Path, out: Path, seed: int, size: float = 0.01, dtype: str = "float32") -> Path:
    """A checkpoint near another: every weight moved a little at random."""
    moved = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in moved.parameters():
            weight += size * torch.randn(weight.shape, generator=g)
    moved.to(getattr(torch, dtype)).save_pretrained(out)
    AutoTokenizer.from_pretrained(model).save_pretrained(out)
    return out


def with_tokens(model: Path, out: Path, tokens: list[str], seed: int) -> Path:
    """The model with tokens appended, and random rows for them."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(tokens)
    longer = AutoModelForCausalLM.from_pretrained(model)
    torch.manual_seed(seed)
    longer.resize_token_embeddings(len(tokenizer))
    longer.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def loaded(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture
def move(tmp_path: Path, tiny_model: Path) -> Callable[..., dict[str, object]]:
    """Run the command into ``tmp_path/out``, from the tiny model; options replace."""

    def command(**options: object) -> dict[str, object]:
        given = {"base": tiny_model, "out": tmp_path / "out", **options}
        overrides = [f"{key}={value}" for key, value in given.items()]
        return run(load("transfer", overrides, TransferCommand), QUIET)

    return command


Move = Callable[..., dict[str, object]]


def test_an_adapter_moves_as_it_is(
    move: Move, tmp_path: Path, tiny_model: Path, random_adapter: Callable[..., Adapter]
) -> None:
    adapter = random_adapter(1)
    adapter.save(tmp_path / "adapter")
    target = near(tiny_model, tmp_path / "newer", 1)
    record = move(adapter=tmp_path / "adapter", target=target, strength=0.5)
    found = Adapter.load(tmp_path / "out")
    for name, delta in adapter.deltas().items():
        assert torch.allclose(found.deltas()[name].dense(), 0.5 * delta.dense())
    ids = torch.tensor([[1, 5, 9, 30]])
    theirs = PeftModel.from_pretrained(loaded(target), tmp_path / "out")(ids).logits
    ours = loaded(target)
    lora.fold(ours, found)
    assert torch.allclose(theirs, ours(ids).logits, atol=1e-5)
    old, new = weights(tiny_model), weights(target)
    own = [f"{name}.weight" for name in adapter.layers]
    apart = sum(float((new[n] - old[n]).double().square().sum()) for n in own)
    whole = sum(float(old[n].double().square().sum()) for n in own)
    measured = record["base_to_target"]
    assert isinstance(measured, dict)
    assert measured["relative_norm"] == pytest.approx((apart / whole) ** 0.5)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "newer"


def test_what_an_adapter_is_for_moves_with_it(
    move: Move, tmp_path: Path, tiny_model: Path, random_adapter: Callable[..., Adapter]
) -> None:
    adapter = random_adapter(1)
    replace(adapter, spec=replace(adapter.spec, task_type=None)).save(tmp_path / "adapter")
    move(adapter=tmp_path / "adapter", target=tiny_model)
    assert Adapter.load(tmp_path / "out").spec.task_type is None


def test_an_adapter_that_says_it_was_made_for_another_base_is_told(
    tmp_path: Path, tiny_model: Path, random_adapter: Callable[..., Adapter]
) -> None:
    def notes(base: str) -> list[str]:
        folder = random_adapter(1).save(tmp_path / "adapter", base)
        options = {"adapter": folder, "base": tiny_model, "target": tiny_model}
        options["out"] = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        given = [f"{key}={value}" for key, value in options.items()]
        console = Console(file=io.StringIO(), width=60)
        record = run(load("transfer", given, TransferCommand), console)
        assert isinstance(console.file, io.StringIO)
        told = console.file.getvalue()
        assert all(f"\nnote: {note}\n" in f"\n{told}" for note in record["notes"])
        assert ("made for" in told) == bool(record["notes"])
        return list(record["notes"])

    expected = "the adapter says it was made for {}, not " + tiny_model.name
    assert notes("meta/Llama-2-7b-chat-hf") == [expected.format("meta/Llama-2-7b-chat-hf")]
    assert notes("/srv/models/mistral") == [expected.format("mistral")]
    assert notes(f"elsewhere/{tiny_model.name}") == notes("") == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_difference_is_added_in_float64(
    move: Move, tmp_path: Path, tiny_model: Path, dtype: str
) -> None:
    tuned = near(tiny_model, tmp_path / "tuned", 1)
    target = near(tiny_model, tmp_path / "newer", 2, dtype=dtype)
    record = move(tuned=tuned, target=target, strength=0.7)
    found, old, new, own = (weights(f) for f in (tmp_path / "out", tiny_model, tuned, target))
    assert found.keys() == own.keys()
    for name, weight in found.items():
        exact = own[name].double() + 0.7 * (new[name].double() - old[name].double())
        assert weight.equal(exact.to(own[name].dtype))
    assert loaded(tmp_path / "out").config.model_type == "llama"
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    report = json.loads((tmp_path / "out" / "transfer.json").read_text())
    assert report == record
    assert report["token_rows"] == {
        "moved": len(own["model.embed_tokens.weight"]),
        "kept": 0,
        "left_out": 0,
    }
    assert str(tmp_path) not in json.dumps(report)


def test_to_the_base_itself_it_gives_the_tuned_model(
    move: Move, tmp_path: Path, tiny_model: Path
) -> None:
    tuned = near(tiny_model, tmp_path / "tuned", 1)
    record = move(tuned=tuned, target=tiny_model)
    new = weights(tuned)
    assert all(w.equal(new[name]) for name, w in weights(tmp_path / "out").items())
    assert record["base_to_target"]["relative_norm"] == 0  # type: ignore[index]
    old = weights(tiny_model)
    moved = sum(float((w.double() - old[name].double()).square().sum()) for name, w in new.items())
    whole = sum(float(w.double().square().sum()) for w in old.values())
    assert record["applied"]["relative_norm"] == pytest.approx((moved / whole) ** 0.5)  # type: ignore[index]


def test_rows_of_appended_tokens_stay_the_target_s(
    move: Move, tmp_path: Path, tiny_model: Path
) -> None:
    tuned = near(tiny_model, tmp_path / "tuned", 1)
    target = with_tokens(tiny_model, tmp_path / "newer", ["<new>", "<newer>"], 3)
    record = move(tuned=tuned, target=target)
    name = EMBEDDING
    found, new, own = (weights(f)[name] for f in (tmp_path / "out", tuned, target))
    count = len(new)
    assert found[count:].equal(own[count:])
    assert torch.allclose(found[:count], new, atol=1e-7)
    assert record["token_rows"] == {"moved": count, "kept": 2, "left_out": 0}


def test_rows_that_only_the_tuned_model_has_are_left_out(
    move: Move, tmp_path: Path, tiny_model: Path
) -> None:
    tuned = with_tokens(tiny_model, tmp_path / "tuned", ["<special>"], 3)
    target = near(tiny_model, tmp_path / "newer", 2)
    record = move(tuned=tuned, target=target)
    own = weights(target)
    assert all(w.shape == own[name].shape for name, w in weights(tmp_path / "out").items())
    assert record["token_rows"]["left_out"] == 1  # type: ignore[index]


@pytest.mark.parametrize("tied", [True, False])
def test_spare_rows_do_not_hide_that_tokens_differ(
    move: Move, tmp_path: Path, tiny_model: Path, tied: bool
) -> None:
    """Three checkpoints with equally many rows, whose last ones mean different tokens."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    known = len(tokenizer)
    folders = {}
    for seed, (name, added) in enumerate(
        {"old": [], "old2": ["<x>", "<y>"], "new": ["<q>"]}.items()
    ):
        model = make_llama(known + 4, tied=tied)
        g = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in model.parameters():
                weight += 0.01 * torch.randn(weight.shape, generator=g)
        folders[name] = tmp_path / name
        model.save_pretrained(folders[name])
        extended = AutoTokenizer.from_pretrained(tiny_model)
        extended.add_tokens(added)
        extended.save_pretrained(folders[name])
    record = move(base=folders["old"], tuned=folders["old2"], target=folders["new"])
    old, _, own, found = (weights(folder) for folder in (*folders.values(), tmp_path / "out"))
    names = [EMBEDDING] if tied else [EMBEDDING, "lm_head.weight"]
    for name in names:
        assert found[name][known:].equal(own[name][known:])
        assert (found[name] != own[name]).any(1).sum() == known
    assert record["token_rows"] == {"moved": known, "kept": 4, "left_out": 4}
    apart = whole = 0.0
    for name, weight in old.items():
        rows = slice(known if name in names else None)
        apart += float((own[name][rows].double() - weight[rows].double()).square().sum())
        whole += float(weight[rows].double().square().sum())
    measured = record["base_to_target"]
    assert isinstance(measured, dict)
    assert measured["relative_norm"] == pytest.approx((apart / whole) ** 0.5)


@pytest.mark.parametrize("head", [True, False])
def test_an_adapter_leaves_tokens_alone_that_are_not_shared(
    move: Move, tmp_path: Path, tiny_model: Path, head: bool
) -> None:
    known = len(AutoTokenizer.from_pretrained(tiny_model))
    for name, added in (("old", []), ("new", ["<q>"])):
        make_llama(known + 4, tied=not head).save_pretrained(tmp_path / name)
        extended = AutoTokenizer.from_pretrained(tiny_model)
        extended.add_tokens(added)
        extended.save_pretrained(tmp_path / name)
    layer = "lm_head" if head else "model.layers.0.self_attn.q_proj"
    shape = AutoModelForCausalLM.from_pretrained(tmp_path / "old").get_submodule(layer).weight.shape
    factors = LowRank(torch.ones(shape[0], 2), torch.ones(2, shape[1]))
    spec = AdapterSpec(2, 2.0, (layer.rpartition(".")[2],))
    Adapter(spec, {layer: factors}).save(tmp_path / "adapter")
    record = move(adapter=tmp_path / "adapter", base=tmp_path / "old", target=tmp_path / "new")
    changed = Adapter.load(tmp_path / "out").layers[layer].dense().any(1).sum()
    assert changed == (known if head else shape[0])
    moved = known if head else 0
    assert record["token_rows"] == {
        "moved": moved, "kept": known + 4 - moved, "left_out": 4 if head else 0,
    }  # fmt: skip


def test_other_positions_are_no_other_architecture_but_said(
    move: Move, tmp_path: Path, tiny_model: Path
) -> None:
    target = near(tiny_model, tmp_path / "newer", 1)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    record = move(tuned=tiny_model, target=target)
    assert record["config_differs"] == ["max_position_embeddings"]


def test_other_tokens_under_the_same_numbers_are_refused(
    move: Move, tmp_path: Path, tiny_model: Path
) -> None:
    tuned = with_tokens(tiny_model, tmp_path / "tuned", ["<a>", "<b>"], 1)
    target = with_tokens(tiny_model, tmp_path / "newer", ["<b>", "<a>"], 2)
    based = with_tokens(tiny_model, tmp_path / "base", ["<a>", "<b>"], 3)
    with pytest.raises(ConfigError, match="target and base have different tokenizers: 2 tokens"):
        move(base=based, tuned=tuned, target=target)


def test_what_does_not_fit_is_said_and_nothing_is_written(
    move: Move,
    tmp_path: Path,
    tiny_model: Path,
    wide_model: Path,
    random_adapter: Callable[..., Adapter],
) -> None:
    deep = tmp_path / "deep"
    make_llama(len(AutoTokenizer.from_pretrained(tiny_model)), layers=3).save_pretrained(deep)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(deep)
    bare = near(tiny_model, tmp_path / "bare", 1)
    (bare / "tokenizer.json").unlink()
    (bare / "tokenizer_config.json").unlink()
    cut = near(tiny_model, tmp_path / "cut", 1)
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-50])
    heads = near(tiny_model, tmp_path / "heads", 1)  # of the same shapes
    config = json.loads((heads / "config.json").read_text())
    halves = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}
    (heads / "config.json").write_text(json.dumps(config | halves))
    other = near(tiny_model, tmp_path / "other", 1)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "mistral"}))
    huge = near(tiny_model, tmp_path / "huge", 1)
    save_file(
        {n: w * 3e38 if "norm" in n else w for n, w in weights(huge).items()},
        huge / "model.safetensors", metadata={"format": "pt"},
    )  # fmt: skip
    endless = near(tiny_model, tmp_path / "endless", 1)
    save_file(
        {n: w * float("inf") if "norm" in n else w for n, w in weights(endless).items()},
        endless / "model.safetensors", metadata={"format": "pt"},
    )  # fmt: skip
    random_adapter(1).save(tmp_path / "adapter")
    for options, said in (
        ({"tuned": wide_model, "target": tiny_model}, "tuned and base differ in the shape of"),
        ({"tuned": tiny_model, "target": deep}, "target and base differ in 9 weights"),
        ({"tuned": tiny_model, "target": bare}, "bare: holds no tokenizer"),
        ({"tuned": tiny_model, "target": cut}, "model.safetensors is broken"),
        ({"tuned": other, "target": tiny_model}, "of different architecture: mistral"),
        ({"tuned": tiny_model, "target": heads}, "different architecture: .* 8 heads, .* 4 heads"),
        ({"tuned": huge, "target": huge}, "the sum is not finite in float32"),
        ({"tuned": endless, "target": tiny_model}, "tuned=.*norm.* holds NaN or infinity"),
        ({"tuned": tiny_model, "target": tmp_path}, "target=.*: config.json is absent or broken"),
        ({"adapter": tmp_path, "target": tiny_model}, "adapter=.*not a LoRA folder"),
        (
            {"adapter": tmp_path / "adapter", "base": wide_model, "target": wide_model},
            "adapter does not fit target: shape of",
        ),
        ({"target": tiny_model}, "give adapter=FOLDER or tuned=FOLDER, one of them"),
    ):
        before = sorted(tmp_path.iterdir())
        with pytest.raises(ConfigError, match=said) as found:
            move(**options)
        assert "\n" not in str(found.value)
        assert sorted(tmp_path.iterdir()) == before  # no output, no scratch folder


def test_a_model_in_several_files_is_moved_whole_and_stray_files_are_not_part_of_it(
    move: Move, tmp_path: Path, tiny_model: Path
) -> None:
    tuned = near(tiny_model, tmp_path / "tuned", 1)
    target = near(tiny_model, tmp_path / "target", 2)
    parts = AutoModelForCausalLM.from_pretrained(target)
    split = tmp_path / "split"
    shutil.copytree(target, split)
    (split / "model.safetensors").unlink()
    parts.save_pretrained(split, max_shard_size="40KB")
    assert len(list(split.glob("*.safetensors"))) > 1
    save_file({"stray": torch.zeros(1)}, split / "stray.safetensors")
    (split / "pytorch_model.bin").write_bytes(b"weights that nobody has moved")
    move(tuned=tuned, target=target, out=tmp_path / "from_one")
    move(tuned=tuned, target=split, out=tmp_path / "from_several")
    one, several = weights(tmp_path / "from_one"), weights(tmp_path / "from_several")
    assert one.keys() == several.keys()
    assert not (tmp_path / "from_several" / "pytorch_model.bin").exists()
    assert (tmp_path / "from_several" / "tokenizer.json").exists()
    assert all(torch.equal(one[name], several[name]) for name in one)


def test_existing_output_is_left_alone(move: Move, tmp_path: Path, tiny_model: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="exists already; take another folder"):
        move(tuned=tiny_model, target=tiny_model)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
