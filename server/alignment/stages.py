"""The two stages, run by TRL: supervised fine-tuning, then direct preference optimisation.

Each stage trains a fresh LoRA on a model into which everything before it is folded. For DPO that
makes the reference model exact and free: it is the same model with the LoRA switched off.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import transformers
from datasets import Dataset
from peft import PeftModel
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from adapters import lora
from adapters.adapter import Adapter, AdapterSpec
from conf.schema import DpoSettings, StageSettings
from server.alignment.mediflow import Instruction, InstructionsError

OnStep = Callable[[int, int], None]


@dataclass
class StageRecord:
    """What a stage did, for summary and model card; curves have one value a step."""

    steps: int
    examples: int
    seconds: float = 0.0
    loss: list[float] = field(default_factory=list)
    margin: list[float] = field(default_factory=list)  # DPO: reward chosen minus rejected
    accuracy: list[float] = field(default_factory=list)  # DPO: share of pairs ranked right

    def as_dict(self) -> dict[str, Any]:
        """JSON form; curves a stage does not have are left out."""
        return {k: v for k, v in asdict(self).items() if v != []}


@dataclass(frozen=True)
class Bench:
    """What both stages work on and with; ``model`` holds everything before the stage folded in."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    spec: AdapterSpec
    max_tokens: int
    seed: int
    scratch: Path


def run_sft(
    bench: Bench, rows: Sequence[Instruction], settings: StageSettings, on_step: OnStep
) -> tuple[Adapter, StageRecord]:
    """Fit answers given instruction and input; the loss counts answer tokens only."""
    data = [{"prompt": r.prompt, "completion": Instruction.answer(r.output)} for r in rows]
    trainer = SFTTrainer(
        model=bench.model,
        args=SFTConfig(**_common(bench, settings), completion_only_loss=True),
        train_dataset=Dataset.from_list(data),
        processing_class=bench.tokenizer,
        peft_config=bench.spec.peft_config(),
    )
    return _train(trainer, bench, StageRecord(settings.steps, len(rows)), on_step)


def run_dpo(
    bench: Bench, rows: Sequence[Instruction], settings: DpoSettings, on_step: OnStep
) -> tuple[Adapter, StageRecord]:
    """Prefer ``output`` to ``rejected``, held near the model as it was before (beta)."""
    answer = Instruction.answer
    data = [
        {"prompt": r.prompt, "chosen": answer(r.output), "rejected": answer(r.rejected)}
        for r in rows
    ]
    trainer = DPOTrainer(
        model=bench.model,
        args=DPOConfig(**_common(bench, settings), beta=settings.beta),
        train_dataset=Dataset.from_list(data),
        processing_class=bench.tokenizer,
        peft_config=bench.spec.peft_config(),
    )
    return _train(trainer, bench, StageRecord(settings.steps, len(rows)), on_step)


def _common(bench: Bench, settings: StageSettings) -> dict[str, Any]:
    """Trainer arguments of both stages: nothing is saved, reported or sent anywhere."""
    return {
        "output_dir": str(bench.scratch),
        "max_steps": settings.steps,
        "per_device_train_batch_size": settings.batch,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "cosine",
        # The first warm-up step has rate 0: in a stage of a few steps it would be a step lost.
        "warmup_steps": settings.steps // 10,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": bench.seed,
        "data_seed": bench.seed,
        "max_length": bench.max_tokens,
        "gradient_checkpointing": False,
        "bf16": False,
        "dataloader_pin_memory": False,
    }


def _train(
    trainer: SFTTrainer | DPOTrainer, bench: Bench, record: StageRecord, on_step: OnStep
) -> tuple[Adapter, StageRecord]:
    if len(cast(Dataset, trainer.train_dataset)) == 0:  # TRL dropped rows without room
        raise InstructionsError(f"alignment.max_tokens={bench.max_tokens}: no room for any answer")
    began = time.monotonic()
    trainer.add_callback(_Watch(record, on_step))
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    used = len(cast(Dataset, trainer.train_dataset))
    record.examples = min(used, record.steps * trainer.args.per_device_train_batch_size)
    record.seconds = round(time.monotonic() - began, 3)
    model = trainer.model
    assert isinstance(model, PeftModel)
    adapter = lora.read(model, bench.spec)
    lora.detach(model).eval()  # the trainer leaves dropout on
    return adapter, record


class _Watch(TrainerCallback):
    """Collects the curves and reports progress."""

    def __init__(self, record: StageRecord, on_step: OnStep) -> None:
        self._record, self._on_step = record, on_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        logs = logs or {}
        for key, curve in (
            ("loss", self._record.loss),
            ("rewards/margins", self._record.margin),
            ("rewards/accuracies", self._record.accuracy),
        ):
            if key in logs:
                curve.append(round(float(logs[key]), 5))
        if "loss" in logs:
            self._on_step(state.global_step, state.max_steps)


def quiet_libraries() -> None:
    """Keep Transformers and TRL from writing over the progress bars."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("trl").setLevel(logging.ERROR)
