"""An adapter as a value and as a PEFT folder."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from adapters import lora
from adapters.adapter import Adapter, AdapterSpec, sum_exactly
from adapters.lowrank import LowRank
from conf.schema import AdapterSettings

SPEC = AdapterSpec(rank=4, alpha=8.0, targets=("q_proj", "v_proj"))
IDS = torch.tensor([[5, 9, 40, 41, 7, 3]])


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)


def random_adapter(model: torch.nn.Module, seed: int, spec: AdapterSpec = SPEC) -> Adapter:
    start = lora.initial(model, spec, seed)
    g = torch.Generator().manual_seed(seed)
    layers = {
        n: LowRank(torch.randn(u.B.shape, generator=g) * 0.1, u.A) for n, u in start.layers.items()
    }
    return Adapter(spec, layers)


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits


def test_saved_adapter_loads_in_peft_and_gives_the_same_logits(
    tiny_model: Path, tmp_path: Path
) -> None:
    model = load(tiny_model)
    adapter = random_adapter(model, 1)
    adapter.save(tmp_path, "some/base")
    with lora.applied(model, adapter):
        folded = logits(model)
    through_peft = logits(PeftModel.from_pretrained(load(tiny_model), tmp_path).eval())
    assert torch.allclose(folded, through_peft, atol=1e-5)
    assert not torch.allclose(folded, logits(model), atol=1e-3)
    assert (
        json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"]
        == "some/base"
    )


def test_round_trip_through_the_file_changes_nothing(tiny_model: Path, tmp_path: Path) -> None:
    adapter = random_adapter(load(tiny_model), 2)
    again = Adapter.load(adapter.save(tmp_path))
    assert again.spec == adapter.spec
    assert again.fingerprint() == adapter.fingerprint()


@pytest.mark.parametrize("task", [None, "CAUSAL_LM", "FEATURE_EXTRACTION", "SEQ_2_SEQ_LM"])
def test_what_an_adapter_is_for_stays_what_it_was(
    tiny_model: Path, tmp_path: Path, task: str | None
) -> None:
    file = random_adapter(load(tiny_model), 2).save(tmp_path) / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"task_type": task}))
    adapter = Adapter.load(tmp_path)
    for again in (adapter, sum_exactly([adapter, adapter])):
        again.save(tmp_path / "again")
        assert LoraConfig.from_pretrained(str(tmp_path / "again")).task_type == task


def test_an_rslora_folder_becomes_the_alpha_that_gives_the_same_logits(
    tiny_model: Path, tmp_path: Path
) -> None:
    config = LoraConfig(r=4, lora_alpha=3, target_modules=["q_proj"], use_rslora=True)
    live = get_peft_model(load(tiny_model), config)
    with torch.no_grad():
        for name, p in live.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    live.save_pretrained(tmp_path)
    adapter = Adapter.load(tmp_path)
    assert adapter.spec.scale == pytest.approx(3 / 4**0.5)
    model = load(tiny_model)
    with lora.applied(model, adapter):
        assert torch.allclose(logits(model), logits(live.eval()), atol=1e-4)


def test_settings_with_rslora_divide_alpha_by_the_root_of_the_rank() -> None:
    plain = AdapterSettings(rank=9, alpha=6.0, targets=("q",), train="B")
    assert AdapterSpec.of(plain).scale == pytest.approx(6 / 9)
    rs = AdapterSpec.of(plain.model_copy(update={"rslora": True}))
    assert rs.scale == pytest.approx(6 / 3)
    assert rs.rank == 9


def test_attach_read_write_and_detach_leave_the_base_alone(tiny_model: Path) -> None:
    model = load(tiny_model)
    before = logits(model)
    adapter = random_adapter(model, 3)
    live = lora.attach(model, SPEC, "B")
    lora.write(live, adapter)
    assert lora.read(live, SPEC).fingerprint() == adapter.fingerprint()
    trained = [n for n, p in live.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_B" in n for n in trained)
    assert torch.equal(logits(lora.detach(live)), before)


def test_folded_restores_the_weights_bit_for_bit_even_after_an_error(tiny_model: Path) -> None:
    model = load(tiny_model)
    before = logits(model)
    with pytest.raises(KeyError), lora.applied(model, random_adapter(model, 4)):
        raise KeyError
    assert torch.equal(logits(model), before)


def test_starting_point_is_zero_shared_and_orthonormal(tiny_model: Path) -> None:
    one = lora.initial(load(tiny_model), SPEC, seed=7)
    again = lora.initial(load(tiny_model), SPEC, seed=7)
    other = lora.initial(load(tiny_model), SPEC, seed=8)
    assert one.fingerprint() == again.fingerprint() != other.fingerprint()
    for layer in one.layers.values():
        assert not layer.B.any()
        assert torch.allclose(layer.A @ layer.A.T, torch.eye(4), atol=1e-6)


def test_sum_of_mixed_ranks_is_exact(tiny_model: Path) -> None:
    model = load(tiny_model)
    small = random_adapter(model, 5)
    big = random_adapter(model, 6, AdapterSpec(7, 3.0, ("q_proj", "o_proj")))
    total = sum_exactly([small, big])
    assert total.spec.rank == 11
    assert total.spec.targets == ("o_proj", "q_proj", "v_proj")
    with lora.applied(model, small), lora.applied(model, big):
        apart = logits(model)
    with lora.applied(model, total):
        assert torch.allclose(logits(model), apart, atol=1e-5)


def test_gpt2_weights_are_transposed_when_folded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=60, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    model = GPT2LMHeadModel(config).eval().requires_grad_(False)
    spec = AdapterSpec(2, 4.0, ("c_attn", "c_proj"))
    adapter = random_adapter(model, 1, spec)
    with lora.applied(model, adapter):
        folded = logits(model)
    live = lora.attach(model, spec)
    lora.write(live, adapter)
    assert torch.allclose(logits(live), folded, atol=1e-5)


@pytest.mark.parametrize(
    "option",
    [
        {"use_dora": True},
        {"lora_bias": True},
        {"rank_pattern": {"q_proj": 2}},
        {"layer_replication": [[0, 1], [0, 1]]},
    ],
)
def test_what_the_algebra_cannot_represent_is_refused(
    tiny_model: Path, tmp_path: Path, option: dict[str, object]
) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", **option)
    get_peft_model(load(tiny_model), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=next(iter(option))):
        Adapter.load(tmp_path)


@pytest.mark.parametrize(
    "chosen",
    [
        {"target_modules": r".*\.(q_proj|down_proj)"},
        {"target_modules": ["q_proj", "down_proj"], "exclude_modules": ["layers.0.mlp.down_proj"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    ],
)
def test_modules_that_no_name_alone_chooses_are_named_by_their_paths(
    tiny_model: Path, tmp_path: Path, chosen: dict[str, object]
) -> None:
    """PEFT loads what is saved of it again, with no factor missing and none too many."""
    live = get_peft_model(load(tiny_model), LoraConfig(r=2, task_type="CAUSAL_LM", **chosen))
    live.save_pretrained(tmp_path / "theirs")
    adapter = Adapter.load(tmp_path / "theirs")
    assert adapter.spec.targets == tuple(sorted(adapter.layers))
    adapter.save(tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = PeftModel.from_pretrained(load(tiny_model), tmp_path / "ours")
    names = {n for n, _ in again.named_parameters() if "lora_A" in n}
    assert names == {n for n, _ in live.named_parameters() if "lora_A" in n}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lora_alpha", "16"),
        ("lora_alpha", float("nan")),
        ("lora_alpha", None),
        ("r", 4.5),
        ("r", -4),
        ("target_modules", 5),
        ("target_modules", [5]),
        ("base_model_name_or_path", 5),
        ("task_type", "CAUSAL"),
        ("task_type", 5),
    ],
)
def test_a_configuration_that_cannot_be_is_refused_by_key(
    tiny_model: Path, tmp_path: Path, key: str, value: object
) -> None:
    random_adapter(load(tiny_model), 1).save(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=f"adapter_config.json(:| says no) {key}"):
        Adapter.load(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000])
def test_a_configuration_that_is_broken_is_refused(
    tiny_model: Path, tmp_path: Path, text: str
) -> None:
    random_adapter(load(tiny_model), 1).save(tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"adapter_config\.json is broken"):
        Adapter.load(tmp_path)


def test_what_is_saved_outlasts_a_power_cut(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []

    def fsync(handle: int) -> None:
        synced.append(Path(f"/proc/self/fd/{handle}").readlink().name)

    monkeypatch.setattr("os.fsync", fsync)
    random_adapter(load(tiny_model), 1).save(tmp_path / "saved")
    assert synced == ["adapter_config.json", "adapter_model.safetensors.part", "saved"]


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_an_adapter_that_changes_the_base_on_loading_is_refused(
    tiny_model: Path, tmp_path: Path, start: str
) -> None:
    model = load(tiny_model)
    name = "model.layers.0.self_attn.q_proj"
    before = model.get_submodule(name).weight.clone()
    config = LoraConfig(
        r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=start
    )
    live = get_peft_model(model, config)
    assert not torch.allclose(model.get_submodule(name).base_layer.weight, before)  # why
    live.save_pretrained(tmp_path / "as_it_is")
    with pytest.raises(ValueError, match="path_initial_model_for_weight_conversion"):
        Adapter.load(tmp_path / "as_it_is")


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_an_adapter_that_leaves_the_base_as_it_is_is_read(
    tiny_model: Path, tmp_path: Path, start: bool | str
) -> None:
    """Its start decides nothing: PEFT's model is W0 plus the update."""
    model = load(tiny_model)
    name = "model.layers.0.self_attn.q_proj"
    before = model.get_submodule(name).weight.clone()
    config = LoraConfig(
        r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=start
    )
    live = get_peft_model(model, config)
    assert torch.equal(model.get_submodule(name).base_layer.weight, before)
    live.save_pretrained(tmp_path)
    delta = Adapter.load(tmp_path).deltas()[name].dense()
    whole = live.merge_and_unload().get_submodule(name).weight
    assert torch.allclose(whole, before + delta, atol=1e-6)


@pytest.mark.parametrize("targets", [("nothing",), ("embed_tokens",), ("q_proj", "embed_tokens")])
def test_targets_that_are_no_linear_layers_are_refused(
    tiny_model: Path, targets: tuple[str, ...]
) -> None:
    with pytest.raises(lora.UnsupportedAdapter, match="targets"):
        lora.attach(load(tiny_model), AdapterSpec(2, 4.0, targets))


def test_models_that_mix_the_notes_of_a_batch_are_refused(tiny_model: Path) -> None:
    model = load(tiny_model)
    model.config.num_local_experts = 8
    with pytest.raises(lora.UnsupportedAdapter, match="experts"):
        lora.attach(model, SPEC)
    model.config.num_local_experts = None
    model.model.norm = torch.nn.BatchNorm1d(32)
    with pytest.raises(lora.UnsupportedAdapter, match="batch normalisation"):
        lora.attach(model, SPEC)


def test_tensors_that_do_not_fit_are_refused(tiny_model: Path) -> None:
    model = load(tiny_model)
    adapter = random_adapter(model, 1)
    flat = adapter.tensors()
    name = next(iter(flat))
    with pytest.raises(ValueError, match="missing"):
        Adapter.from_tensors({k: v for k, v in flat.items() if k != name}, SPEC)
    with pytest.raises(ValueError, match="plain LoRA factor"):
        Adapter.from_tensors({**flat, "x.bias": torch.ones(1)}, SPEC)
    with pytest.raises(ValueError, match="rank"):
        Adapter.from_tensors(flat, AdapterSpec(5, 8.0, SPEC.targets))
    live = lora.attach(model, SPEC)
    fewer = Adapter(SPEC, dict(list(adapter.layers.items())[1:]))
    with pytest.raises(ValueError, match="differ"):
        lora.write(live, fewer)
