"""A bench of a tiny model for the checks of engines."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from adapters import lora
from adapters.adapter import AdapterSpec
from conf.commands import AuditCommand
from conf.load import load
from simulation.audit.checks import Bench
from simulation.audit.engine import Mechanism

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make_bench(canaries: int = 300, train: str = "B") -> Bench:
    """A one-block random Llama with all-linear LoRA and notes of 3 to 30 tokens."""
    config = LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    base = LlamaForCausalLM(config).eval().requires_grad_(False)
    start = lora.initial(base, AdapterSpec(16, 32.0, TARGETS), 1, train)
    model = lora.attach(base, AdapterSpec(16, 32.0, TARGETS), train)
    lora.write(model, start)
    draw = random.Random(3)
    notes = [[draw.randrange(2, 290) for _ in range(n)] for n in (3, 5, 9, 14, 30)]
    return Bench(model, notes, Mechanism(0.7, 1.0, 24), 1e-5, canaries)


@pytest.fixture(scope="session")
def bench() -> Bench:
    return make_bench()


@pytest.fixture(scope="session")
def tiny_audit(tiny_model: Path, notes_file: Path) -> AuditCommand:
    """Settings of an audit that takes seconds."""
    options = [
        "model=path", f"model.path={tiny_model}", "notes=jsonl", f"notes.path={notes_file}",
        "notes.patient_field=pid", "white_box.canaries=200", "black_box.canaries=40",
        "black_box.controls=100", "black_box.patients=2", "black_box.steps=24",
        "privacy.sampling_rate=1", "privacy.max_tokens=12", "optimizer.learning_rate=0.1",
        "seed=3",
    ]  # fmt: skip
    return load("audit", options, AuditCommand)
