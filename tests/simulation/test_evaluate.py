"""Evaluation: which held-out notes are scored, and under which model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters import lora
from adapters.adapter import Adapter, AdapterSpec
from adapters.base_model import BaseModel, load_base
from adapters.lowrank import LowRank
from adapters.scoring import TextScore
from client.notes.load import load_notes
from client.site_units import site_units
from conf.load import load
from conf.schema import ModelSettings, RunSettings
from server.run_folder import RunFolder
from simulation.evaluate import as_record, held_out_texts, score
from simulation.sites import Site, prepare

TEXTS = ["The patient has had a fever for 3 days.", "Given aspirin 50 mg.", "Review in 2 weeks."]


@pytest.fixture
def pooled(options: tuple[str, ...], tmp_path: Path) -> Site:
    """All notes of three hospitals at one site."""
    settings = load("simulate", [*options, "hospitals=pooled"], RunSettings)
    folder = RunFolder(tmp_path / "run").create(settings)
    (site,) = prepare(settings, folder, lambda *_: None).sites
    return site


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> BaseModel:
    """The tiny model."""
    return load_base(ModelSettings(source="path", path=str(tiny_model)))


def test_one_note_of_each_held_out_patient_is_scored_at_its_hospital(pooled: Site) -> None:
    texts = held_out_texts(pooled, most=1000)
    assert list(texts) == ["east", "mid", "west"]
    notes = load_notes(pooled.policy.notes).notes
    by_text = {note.text: note for note in notes}
    training = site_units(pooled.policy, "patient").train
    scored: list[Any] = []
    for hospital, own in texts.items():
        assert own
        assert {by_text[text].hospital for text in own} == {hospital}
        scored += [by_text[text].patient_id for text in own]
    assert len(set(scored)) == len(scored)
    assert set(scored) == {note.patient_id for note in notes} - set(training)


def test_no_more_than_so_many_and_always_the_same(pooled: Site) -> None:
    whole, few = held_out_texts(pooled, 1000), held_out_texts(pooled, 2)
    assert min(map(len, whole.values())) >= 2
    assert few == {name: own[:2] for name, own in whole.items()}


def test_an_adapter_counts_only_while_it_is_scored(base: BaseModel) -> None:
    spec = AdapterSpec(2, 4.0, ("q_proj",))
    start = lora.initial(base.model, spec, 1)
    draw = torch.Generator().manual_seed(2)
    layers = {
        name: LowRank(torch.randn(layer.B.shape, generator=draw), layer.A)
        for name, layer in start.layers.items()
    }
    before = base.fingerprint
    plain = score(base, None, TEXTS, 64)
    assert score(base, start, TEXTS, 64).nats == pytest.approx(plain.nats, rel=1e-6)  # B = 0
    moved = score(base, Adapter(spec, layers), TEXTS, 64)
    assert (moved.tokens, moved.chars) == (plain.tokens, plain.chars)
    assert abs(moved.nats - plain.nats) > 1e-3
    assert score(base, None, TEXTS, 64) == plain
    assert base.fingerprint == before


def test_a_record_has_both_measures_of_every_stage() -> None:
    scores = {"base": TextScore(20.0, 10, 50), "merged": TextScore(10.0, 10, 50)}
    assert as_record(scores) == {
        "perplexity": {"base": round(math.exp(2), 6), "merged": round(math.e, 6)},
        "bits_per_char": {
            "base": round(0.4 / math.log(2), 6),
            "merged": round(0.2 / math.log(2), 6),
        },
    }
