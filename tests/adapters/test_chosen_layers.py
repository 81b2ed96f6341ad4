"""Layers by public rules, halves that are balanced and the same for everyone, and PEFT loads it."""

from __future__ import annotations

import random
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from adapters import lora
from adapters.adapter import Adapter, AdapterSpec, sum_exactly
from adapters.chosen_layers import chosen_layers, half_of, layer_number
from adapters.lowrank import LowRank
from conf.load import ConfigError, load
from conf.schema import AdapterSettings, RunSettings

TARGETS = ("q_proj", "v_proj", "up_proj")
DEPTH = 4


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (None, (0, 1, 2, 3, 4)),
        ("half", (0, 2, 4)),
        ("first:2", (0, 1)),
        ("last:2", (3, 4)),
        ("last:5", (0, 1, 2, 3, 4)),
        ((3, 1), (1, 3)),
    ],
)
def test_rules_choose_layers(rule: Any, expected: tuple[int, ...]) -> None:
    assert chosen_layers(rule, 5) == expected


@pytest.mark.parametrize(
    ("rule", "depth", "said"),
    [
        ("last:6", 5, "adapter.layers=last:6: the base model has 5 layers"),
        ((0, 5), 5, "adapter.layers: 5 is not one of 0 to 4"),
        ("half", 0, "does not say how many layers"),
    ],
)
def test_more_than_there_is_is_refused(rule: Any, depth: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        chosen_layers(rule, depth)


@pytest.mark.parametrize("rule", ["3", "last", "last:0", "second:2", "[]", "[0,0]", "[-1]", "[a]"])
def test_what_is_no_rule_is_named(rule: str) -> None:
    with pytest.raises(ConfigError, match=r"adapter\.layers=.*: take null, half, first:N"):
        load("simulate", [f"adapter.layers={rule}"], RunSettings)


def test_rules_and_numbers_can_be_set_and_survive_the_way_as_json() -> None:
    for given_, expected in (("[0,2]", (0, 2)), ("last:15", "last:15"), ("null", None)):
        settings = load("simulate", [f"adapter.layers={given_}"], RunSettings).adapter
        assert settings.layers == expected
        assert AdapterSettings.model_validate_json(settings.model_dump_json()) == settings


# --- halves -------------------------------------------------------------------------------------

KINDS = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate", "up", "down")}


def modules(blocks: int, kinds: dict[str, tuple[str, ...]]) -> list[str]:
    return [
        f"model.layers.{b}.{kind}.{name}"
        for b in range(blocks)
        for kind, names in kinds.items()
        for name in names
    ]


@given(
    blocks=st.integers(1, 9),
    kinds=st.dictionaries(st.sampled_from(["self_attn", "mlp"]), st.integers(1, 5), min_size=1),
    seed=st.integers(0, 2**31),
    number=st.integers(1, 1000),
)
def test_half_of_every_kind_in_every_block_whoever_asks(
    blocks: int, kinds: dict[str, int], seed: int, number: int
) -> None:
    names = modules(blocks, {k: tuple(f"m{i}" for i in range(n)) for k, n in kinds.items()})
    trained = half_of(names, seed, number)
    assert trained
    assert trained <= set(names)
    shuffled = random.Random(seed).sample(names, len(names))
    assert half_of(shuffled, seed, number) == trained
    for kind, size in kinds.items():
        own = Counter(layer_number(n) for n in trained if f".{kind}." in n)
        counts = [own[block] for block in range(blocks)]
        assert all(c in (size // 2, (size + 1) // 2) for c in counts)
        if size % 2:  # one more in half of the blocks
            assert sum(c > size // 2 for c in counts) in (blocks // 2, (blocks + 1) // 2)


def test_rounds_draw_anew_and_reach_everything_equally() -> None:
    names = modules(4, KINDS)
    rounds = [half_of(names, 7, n) for n in range(1, 401)]
    assert len(set(rounds)) > 390
    share = Counter(name for trained in rounds for name in trained)
    assert all(0.4 < share[name] / 400 < 0.6 for name in names)
    assert half_of(names, 8, 1) != rounds[0]


def test_the_draw_never_changes() -> None:
    """A hospital and a coordinator of different versions must draw the same."""
    assert half_of(modules(2, {"self_attn": ("q_proj", "v_proj")}), 42, 1) == PINNED


PINNED = frozenset(["model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.q_proj"])


# --- adapters in some layers --------------------------------------------------------------------


def model_of(tiny_model: Path) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(tiny_model, num_hidden_layers=DEPTH)
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(20)[None]).logits


def trained_adapter(model: Any, rule: Any, targets: tuple[str, ...] = TARGETS) -> Adapter:
    start = lora.initial(model, AdapterSpec(3, 6.0, targets, rule), seed=1)
    g = torch.Generator().manual_seed(2)
    layers = {n: LowRank(torch.randn(x.B.shape, generator=g), x.A) for n, x in start.layers.items()}
    return Adapter(start.spec, layers)


@pytest.mark.parametrize(
    ("rule", "numbers"),
    [("half", {1, 3}), ("last:1", {3}), ("first:3", {0, 1, 2}), ((0, 2), {0, 2})],
)
def test_only_chosen_layers_get_an_adapter_and_peft_loads_it_with_the_same_logits(
    rule: Any, numbers: set[int], tiny_model: Path, tmp_path: Path
) -> None:
    model = model_of(tiny_model)
    before = logits(model)
    adapter = trained_adapter(model, rule)
    assert {layer_number(n) for n in adapter.layers} == numbers
    assert len(adapter.layers) == len(numbers) * len(TARGETS)
    live = lora.attach(model, adapter.spec)
    lora.write(live, adapter)
    expected = logits(live)
    assert not torch.allclose(expected, before, atol=1e-3)
    lora.detach(live)
    adapter.save(tmp_path / "one")
    loaded = Adapter.load(tmp_path / "one")
    loaded.save(tmp_path / "two")  # what is saved again still says which layers
    for folder in ("one", "two"):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*missing adapter keys")
            theirs = PeftModel.from_pretrained(model_of(tiny_model), str(tmp_path / folder))
        adapted = {n for n, _ in theirs.named_modules() if n.endswith(".lora_A")}
        assert len(adapted) == len(adapter.layers)
        assert torch.allclose(logits(theirs), expected, atol=1e-6)
    with lora.applied(model, loaded):
        assert torch.allclose(logits(model), expected, atol=1e-5)


def test_peft_folders_that_choose_layers_are_read(tiny_model: Path, tmp_path: Path) -> None:
    model = model_of(tiny_model)
    adapter = trained_adapter(model, "last:2")
    live = lora.attach(model, adapter.spec)
    lora.write(live, adapter)
    live.save_pretrained(str(tmp_path))  # PEFT's own layers_to_transform
    loaded = Adapter.load(tmp_path)
    assert loaded.fingerprint() == adapter.fingerprint()
    again = lora.attach(model_of(tiny_model), loaded.spec)
    lora.write(again, loaded)
    assert torch.allclose(logits(again), logits(live), atol=1e-6)


def test_a_sum_with_an_adapter_in_all_layers_loads_too(tiny_model: Path, tmp_path: Path) -> None:
    model = model_of(tiny_model)
    parts = [
        trained_adapter(model, "last:1"),
        trained_adapter(model, None, ("q_proj",)),
        trained_adapter(model, (0,), ("v_proj",)),
    ]
    total = sum_exactly(parts)
    total.save(tmp_path)
    for part in parts:
        lora.fold(model, part)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys")
        theirs = PeftModel.from_pretrained(model_of(tiny_model), str(tmp_path))
    assert torch.allclose(logits(theirs), logits(model), atol=1e-4)


def test_layers_that_the_model_lacks_cannot_be_adapted(tiny_model: Path) -> None:
    with pytest.raises(lora.UnsupportedAdapter, match="the base model has 4 layers"):
        lora.attach(model_of(tiny_model), AdapterSpec(2, 2.0, TARGETS, "last:9"))


@pytest.mark.parametrize("part", ["B", "A", "both", "core"])
def test_layers_that_are_left_out_are_frozen_as_a_whole(part: Any, tiny_model: Path) -> None:
    model = model_of(tiny_model)
    adapter = trained_adapter(model, None)
    live = lora.attach(model, adapter.spec)
    lora.write(live, adapter)
    trained = half_of(adapter.layers, 3, 1)
    for layers in (trained, set(adapter.layers) - trained, None):  # from round to round
        lora.train_only(live, part, 5, layers)
        lora.write(live, adapter)
        moving = {n for n, p in live.named_parameters() if p.requires_grad}
        found = {n.removeprefix("base_model.model.").split(".lora_")[0] for n in moving}
        assert found == set(adapter.layers if layers is None else layers)
        read = lora.read(live, adapter.spec)
        for name in adapter.layers.keys() - found:
            assert read.layers[name].B.equal(adapter.layers[name].B)
            assert read.layers[name].A.equal(adapter.layers[name].A)
