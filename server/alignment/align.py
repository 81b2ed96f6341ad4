"""Alignment of a merged adapter: fold it in, SFT, fold that in, DPO, and add the three exactly.

The released adapter is the exact sum of merged, SFT and DPO updates (its rank is the sum of their
ranks), so nothing that was measured on the way is approximated at the end.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel

from adapters import lora
from adapters.adapter import Adapter, AdapterSpec, sum_exactly
from adapters.base_model import BaseModel
from conf.schema import AlignmentSettings
from server.alignment.mediflow import InstructionSet, require_chat
from server.alignment.stages import Bench, StageRecord, quiet_libraries, run_dpo, run_sft


@dataclass(frozen=True)
class Alignment:
    """The aligned adapter (merged + SFT + DPO, exactly) and a record of each stage that ran."""

    adapter: Adapter
    stages: dict[str, StageRecord]


def _spec(settings: AlignmentSettings) -> AdapterSpec:
    return AdapterSpec(settings.rank, settings.alpha, settings.targets)


def require_targets(model: PreTrainedModel, settings: AlignmentSettings) -> None:
    """Return when the model has the layers that alignment is to train.

    Raises UnsupportedAdapter. The model may be ``adapters.base_model.skeleton``.
    """
    try:
        lora.detach(lora.attach(model, _spec(settings)))
    except lora.UnsupportedAdapter as problem:
        raise lora.UnsupportedAdapter(f"alignment: {problem}") from None


def align(
    base: BaseModel,
    merged: Adapter,
    data: InstructionSet,
    settings: AlignmentSettings,
    seed: int,
    on_step: Callable[[str, int, int], None],
) -> Alignment:
    """Run both stages on top of ``merged``; a stage of no steps is left out.

    The base weights are as before when this returns. ``on_step`` is called with the stage, the
    finished steps and their number. Raises UnsupportedAdapter where the model lacks the targets,
    InstructionsError where no answer fits into ``max_tokens`` or there is no chat template.
    """
    quiet_libraries()
    require_chat(base.tokenizer)
    require_targets(base.model, settings)
    spec = _spec(settings)
    parts = [merged]
    records: dict[str, StageRecord] = {}
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as before:
        bench = Bench(base.model, base.tokenizer, spec, settings.max_tokens, seed, Path(scratch))
        before.enter_context(lora.applied(base.model, merged))
        for stage, steps, run in (
            ("sft", settings.sft.steps, partial(run_sft, bench, data.sft, settings.sft)),
            ("dpo", settings.dpo.steps, partial(run_dpo, bench, data.dpo, settings.dpo)),
        ):
            if steps == 0:
                continue
            adapter, records[stage] = run(partial(on_step, stage.upper()))
            before.enter_context(lora.applied(base.model, adapter))
            parts.append(adapter)
    return Alignment(sum_exactly(parts), records)
