"""Shared fixtures: a tiny random model, invented notes, and no network."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

torch.set_num_threads(1)
# How fast a shared machine draws examples says nothing about the code; and the same code passes or
# fails every time. Fresh examples are drawn by `make explore`.
settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "explore", settings.get_profile("repeatable"), derandomize=False, print_blob=True
)
settings.load_profile("repeatable")

_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer in which, as in the embedded model, pad is the end-of-turn token."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(["the patient was seen today and given aspirin for pain"] * 9, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
    )
    wrapped.chat_template = _CHAT
    return wrapped


def make_llama(
    vocabulary: int = 300, seed: int = 0, layers: int = 2, width: int = 32, tied: bool = True
) -> LlamaForCausalLM:
    """A tiny random Llama, float32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 3 // 2,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Llama with its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tokenizer = make_tokenizer()
    make_llama(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like ``tiny_model``, but wide enough for blocks of 64 four-bit weights."""
    folder = tmp_path_factory.mktemp("models") / "wide-llama"
    tokenizer = make_tokenizer()
    make_llama(len(tokenizer), width=128).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def notes_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 invented notes of 60 patients at three hospitals, JSONL."""
    draw = random.Random(7)
    path = tmp_path_factory.mktemp("notes") / "notes.jsonl"
    lines = []
    for i in range(120):
        complaint = draw.choice(["chest pain", "a fever", "a dry cough", "low back pain"])
        drug = draw.choice(["aspirin", "ibuprofen", "amoxicillin"])
        text = (
            f"Visit {i}. The patient has had {complaint} for {draw.randint(2, 20)} days. "
            f"Given {drug} {draw.randint(1, 50) * 10} mg. Review in {draw.randint(1, 9)} weeks."
        )
        patient = i // 2
        hospital = ("east", "west", "mid")[patient % 3]
        lines.append(json.dumps({"text": text, "pid": f"p{patient}", "hospital": hospital}))
    path.write_text("\n".join(lines) + "\n")
    return path
