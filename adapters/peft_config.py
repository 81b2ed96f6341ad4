"""What the configuration of a PEFT adapter says, once it is sure to be a plain product B A.

Only that can be added, averaged and folded: DoRA, biases, ranks that differ by layer and the like
cannot, and starts such as PiSSA change the base weights on loading.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from peft import TaskType
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

NAME = "adapter_config.json"
_NEEDED = ("r", "lora_alpha", "target_modules")
_STARTS = ("gaussian", "eva", "orthogonal", "mica")  # of PEFT's, those that leave W0 as it is
_UNSUPPORTED = (
    "use_dora",
    "lora_bias",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "layer_replication",
    "alora_invocation_tokens",  # active behind these tokens only
    "use_qalora",
    "kasa_config",
    "use_bdlora",
    "target_parameters",
)
_IN_NO_MODEL = ("layer_replication", "alora_invocation_tokens", "use_qalora")  # PEFT folds none in


class PeftConfig(BaseModel):
    """The keys that say how factors are to be read, named as in the file."""

    model_config = ConfigDict(strict=True, frozen=True)

    r: Annotated[int, Field(ge=1)]
    lora_alpha: FiniteFloat
    target_modules: str | list[str]
    use_rslora: bool | None = None
    exclude_modules: Any = None
    layers_to_transform: Any = None
    base_model_name_or_path: str | None = None
    task_type: Annotated[TaskType, Field(strict=False)] | None = None  # a file holds its name

    @property
    def alpha(self) -> float:
        """The alpha that gives the same scale without rsLoRA."""
        return self.lora_alpha * (self.r**0.5 if self.use_rslora else 1)

    @property
    def targets(self) -> tuple[str, ...] | None:
        """Names of modules that are adapted wherever they are; None where it is not that simple."""
        if isinstance(self.target_modules, str):  # a pattern
            return None
        if self.exclude_modules or self.layers_to_transform is not None:
            return None
        return tuple(sorted(self.target_modules))


def read_config(folder: Path) -> PeftConfig:
    """The configuration of the adapter in ``folder``.

    Raises FileNotFoundError; ValueError when the file is broken, says something impossible, or
    describes what is no plain LoRA.
    """
    try:
        raw = json.loads((folder / NAME).read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raw = None
    if not isinstance(raw, dict):
        raise ValueError(f"{folder}: {NAME} is broken")
    if (kind := raw.get("peft_type") or "LORA") != "LORA":
        raise ValueError(f"{folder}: is {kind}, and only LoRA is merged")
    for key in _UNSUPPORTED:
        if raw.get(key):
            remedy = "; make a model of it (PEFT's merge_and_unload), and merge models"
            raise ValueError(
                f"{folder}: {key} is not supported in an adapter to be merged"
                f"{'' if key in _IN_NO_MODEL else remedy}"
            )
    start = raw.get("init_lora_weights")
    if isinstance(start, str) and start.lower() not in _STARTS:
        raise ValueError(
            f"{folder}: init_lora_weights={start} changes the base model's weights on loading, "
            "so its factors are no update of them; have PEFT save it with "
            "path_initial_model_for_weight_conversion, or merge it into whole models"
        )
    for key in _NEEDED:
        if not raw.get(key):
            raise ValueError(f"{folder}: {NAME} says no {key}")
    try:
        return PeftConfig.model_validate(raw)
    except ValidationError as problem:
        first = problem.errors(include_url=False, include_input=False)[0]
        said = first["msg"][:1].lower() + first["msg"][1:]
        raise ValueError(f"{folder}: {NAME}: {first['loc'][0]}: {said}") from None
