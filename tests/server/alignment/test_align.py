"""SFT, then DPO, by the real trainers: what is trained, on what, and that the sum is exact."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters import lora
from adapters.adapter import Adapter, AdapterSpec
from adapters.base_model import BaseModel, fingerprint, load_base
from adapters.lowrank import LowRank
from conf.schema import AlignmentSettings, ModelSettings
from server.alignment import align as module
from server.alignment.align import Alignment, align
from server.alignment.mediflow import Instruction, InstructionSet

ROWS = tuple(
    Instruction(
        instruction="Name the drug." if i % 2 else "Name the drug that the patient was given.",
        input=f"Visit {i}. Given {drug} {10 * i} mg for pain.",
        output=drug if i % 3 else f"The drug is {drug}.",
        rejected="No drug was given.",
    )
    for i, drug in enumerate(["aspirin", "ibuprofen", "codeine", "amoxicillin"] * 2, start=1)
)
DATA = InstructionSet("test", ROWS, ROWS, ROWS)
TARGETS = ("q_proj", "v_proj", "down_proj")


def settings(sft: int, dpo: int) -> AlignmentSettings:
    """Every step sees all rows, so that the loss of the first one is known in advance."""
    return AlignmentSettings.model_validate(
        {
            "enabled": True, "data": "mediflow", "examples": 8, "held_out": 4, "max_tokens": 256,
            "rank": 4, "alpha": 8.0, "targets": TARGETS,
            "sft": {"steps": sft, "batch": len(ROWS), "learning_rate": 0.01},
            "dpo": {"steps": dpo, "batch": len(ROWS), "learning_rate": 0.01, "beta": 0.1},
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> BaseModel:
    return load_base(ModelSettings(source="path", path=str(tiny_model)))


@pytest.fixture(scope="module")
def merged(base: BaseModel) -> Adapter:
    """An adapter of another rank and other targets than the stages', which changes the model."""
    start = lora.initial(base.model, AdapterSpec(2, 4.0, ("q_proj", "o_proj")), seed=1)
    g = torch.Generator().manual_seed(1)
    layers = {
        n: LowRank(torch.randn(layer.B.shape, generator=g) * 0.2, layer.A)
        for n, layer in start.layers.items()
    }
    return replace(start, layers=layers)


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> dict[str, Adapter]:
    """The adapter of each stage, as the trainers leave it."""
    seen: dict[str, Adapter] = {}

    def watch(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any) -> Any:
            adapter, record = real(*arguments)
            seen[name] = adapter
            return adapter, record

        return watched

    for name in ("run_sft", "run_dpo"):
        monkeypatch.setattr(module, name, watch(name, getattr(module, name)))
    return seen


def run(base: BaseModel, merged: Adapter, sft: int, dpo: int) -> tuple[Alignment, list[Any]]:
    steps: list[Any] = []
    done = align(base, merged, DATA, settings(sft, dpo), 3, lambda *step: steps.append(step))
    return done, steps


def losses(base: BaseModel, row: Instruction) -> tuple[torch.Tensor, int]:
    """Loss of every token of the whole conversation, and where the answer begins."""
    template = base.tokenizer.apply_chat_template
    prompt = str(template(row.prompt, add_generation_prompt=True, tokenize=False))
    whole = str(template(row.prompt + row.answer(row.output), tokenize=False))
    assert whole.startswith(prompt)
    ids = torch.tensor(base.tokenizer(whole).input_ids)
    with torch.no_grad():
        logs = base.model(ids[None]).logits[0, :-1].log_softmax(-1)
    return -logs[torch.arange(len(ids) - 1), ids[1:]], len(base.tokenizer(prompt).input_ids) - 1


def test_both_stages_train_and_the_release_is_their_exact_sum(
    base: BaseModel, merged: Adapter, parts: dict[str, Adapter]
) -> None:
    before = {name: t.clone() for name, t in base.model.state_dict().items()}
    with lora.applied(base.model, merged):
        rows = [losses(base, row) for row in ROWS]
    done, steps = run(base, merged, sft=3, dpo=3)

    # The loss is that of the answers' tokens, of all rows together, under the merged model.
    answers = torch.cat([loss[start:] for loss, start in rows])
    whole = torch.cat([loss for loss, _ in rows])
    sft, dpo = done.stages["sft"], done.stages["dpo"]
    assert sft.loss[0] == pytest.approx(float(answers.mean()), abs=2e-3)
    assert abs(float(whole.mean()) - float(answers.mean())) > 0.01  # the test can tell them apart
    assert sft.loss[-1] < sft.loss[0] - 0.01

    # Before its first step DPO's model is its reference; after it, pairs move apart.
    assert dpo.loss[0] == pytest.approx(math.log(2), abs=1e-4)
    assert dpo.margin[0] == pytest.approx(0, abs=1e-4)
    assert dpo.loss[-1] < dpo.loss[0]
    assert dpo.margin[-1] > 0
    assert [len(curve) for curve in (sft.loss, dpo.loss, dpo.margin, dpo.accuracy)] == [3] * 4
    assert (sft.steps, sft.examples) == (3, len(ROWS))
    assert "margin" not in sft.as_dict()
    assert steps == [(s, i, 3) for s in ("SFT", "DPO") for i in (1, 2, 3)]

    # The released adapter is the sum of the three, and the base model is untouched.
    assert set(parts) == {"run_sft", "run_dpo"}
    total = done.adapter.deltas()
    assert done.adapter.spec.rank == 2 + 4 + 4
    assert set(total) == set(merged.layers) | set(parts["run_sft"].layers)
    for name, delta in total.items():
        expected = sum(
            a.deltas()[name].dense().double() for a in (merged, *parts.values()) if name in a.layers
        )
        torch.testing.assert_close(delta.dense().double(), expected, rtol=1e-5, atol=1e-6)
    assert all(layer.B.any() for part in parts.values() for layer in part.layers.values())
    after = base.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(p.requires_grad for p in base.model.parameters())
    assert not base.model.training  # dropout would spoil every score that follows


def test_a_stage_of_no_steps_is_left_out(
    base: BaseModel, merged: Adapter, parts: dict[str, Adapter]
) -> None:
    before = fingerprint(base.model)
    neither, steps = run(base, merged, sft=0, dpo=0)
    assert (neither.stages, steps, parts) == ({}, [], {})
    for name, delta in neither.adapter.deltas().items():
        torch.testing.assert_close(delta.dense(), merged.deltas()[name].dense())
    only, steps = run(base, merged, sft=0, dpo=1)
    assert list(only.stages) == ["dpo"]
    assert steps == [("DPO", 1, 1)]
    assert only.adapter.spec.rank == 2 + 4
    assert fingerprint(base.model) == before


def test_the_base_is_as_before_when_a_stage_fails(
    base: BaseModel, merged: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        assert fingerprint(base.model) != before  # the merged adapter is folded in by now
        raise KeyboardInterrupt

    before = fingerprint(base.model)
    monkeypatch.setattr(module, "run_dpo", fail)
    with pytest.raises(KeyboardInterrupt):
        run(base, merged, sft=0, dpo=1)
    assert fingerprint(base.model) == before


def test_a_seed_decides_the_result(base: BaseModel, merged: Adapter) -> None:
    one, other = (run(base, merged, sft=2, dpo=0)[0].adapter.fingerprint() for _ in range(2))
    assert one == other
