"""The release: any PEFT user loads it and gets the model that was measured; the card says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel

from adapters import lora
from adapters.adapter import Adapter, AdapterSpec, sum_exactly
from adapters.base_model import load_base
from adapters.lowrank import LowRank
from conf.schema import ModelSettings
from server.release import release
from server.release_card import HospitalFacts, PrivacyFacts, ReleaseFacts


def random_adapter(tiny: Path, spec: AdapterSpec, seed: int) -> Adapter:
    base = load_base(ModelSettings(source="path", path=str(tiny)))
    g = torch.Generator().manual_seed(seed)
    start = lora.initial(base.model, spec, seed)
    layers = {
        n: LowRank(torch.randn(layer.B.shape, generator=g) * 0.3, layer.A)
        for n, layer in start.layers.items()
    }
    return Adapter(spec, layers)


@pytest.fixture
def released(tiny_model: Path) -> Adapter:
    """As after alignment: a sum of adapters of different ranks and targets."""
    merged = random_adapter(tiny_model, AdapterSpec(2, 4.0, ("q_proj", "v_proj")), 1)
    return sum_exactly([merged, random_adapter(tiny_model, AdapterSpec(3, 6.0, ("o_proj",)), 2)])


def facts(adapter: Adapter) -> ReleaseFacts:
    return ReleaseFacts(
        name="first", created="2026-11-21T10:42:07+00:00", base_model="tiny-llama",
        base_fingerprint="8f6d", base_remark="", strategy="ffa", rounds=2, rank=adapter.spec.rank,
        alpha=adapter.spec.alpha, targets=adapter.spec.targets, trained="B",
        hospitals=(HospitalFacts("east", 7.9412, 1e-5), HospitalFacts("west", 5.2, 2e-6)),
        privacy=PrivacyFacts("patient", 8.0, "PLD", 1.0, 0.25),
    )  # fmt: skip


def test_peft_loads_the_release_and_computes_what_was_measured(
    tiny_model: Path, released: Adapter, tmp_path: Path
) -> None:
    folder = release(released, facts(released), tmp_path / "release")
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip
    base = load_base(ModelSettings(source="path", path=str(tiny_model)))
    ids = torch.arange(2, 60).view(2, 29)
    with torch.no_grad():
        plain = base.model(ids).logits
        with lora.applied(base.model, released):
            measured = base.model(ids).logits
        loaded = PeftModel.from_pretrained(base.model, str(folder))(input_ids=ids).logits
    assert float((measured - plain).abs().max()) > 0.05
    torch.testing.assert_close(loaded, measured, rtol=1e-4, atol=1e-5)
    assert Adapter.load(folder).fingerprint() == released.fingerprint()


def test_the_card_states_what_each_hospital_spent_and_names_no_path(
    released: Adapter, tmp_path: Path
) -> None:
    folder = release(released, facts(released), tmp_path / "release")
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "| east | 7.95 | 1e-05 |" in card
    assert "| west | 5.2 | 2e-06 |" in card
    assert "rank 5, alpha 5.0, on o_proj, q_proj, v_proj".replace("_", r"\_") in card
    for file in ("README.md", "adapter_config.json"):
        assert str(tmp_path) not in (folder / file).read_text()
