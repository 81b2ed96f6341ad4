"""LoRA on a live model: attach it, read it out, write it back, fold it into the base weights."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adapters.adapter import Adapter, AdapterSpec
from adapters.base_model import ModelError
from adapters.lowrank import LowRank
from adapters.trained_part import TrainedPart, frame, orthonormal_rows
from conf.schema import TrainedFactors

_NAME = "default"
_PREFIX = "base_model.model."  # of the base model's modules in PEFT's
# Numbers of experts in configurations of mixtures: routing may depend on the whole batch.
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


class UnsupportedAdapter(ValueError):
    """The adapter asked for cannot be trained privately on this base model."""


def attach(
    model: PreTrainedModel, spec: AdapterSpec, train: TrainedPart = "both", seed: int = 0
) -> PeftModel:
    """Attach a fresh LoRA and choose what is trained (see ``train_only``).

    Raises UnsupportedAdapter when a target matches nothing or is not a plain linear layer (an
    embedding, for one, has no per-sample gradient here), or when the notes of a batch would not be
    computed independently of each other.
    """
    _require_independent_rows(model)
    try:
        config = spec.peft_config(depth=depth(model))
    except ValueError as problem:
        raise UnsupportedAdapter(str(problem)) from None
    try:
        peft_model = get_peft_model(model, config)
    except ValueError:
        raise UnsupportedAdapter(
            f"no module of {type(model).__name__} matches targets={list(spec.targets)}; its linear "
            f"layers are named {', '.join(_linear_names(model))}"
        ) from None
    layers = _lora_layers(peft_model)
    adapted = sum(1 for name, _ in peft_model.named_modules() if name.endswith(".lora_A"))
    if not layers or adapted != len(layers):
        raise UnsupportedAdapter(
            f"targets={list(spec.targets)} names a module that is not a linear layer"
        )
    train_only(peft_model, train, seed)
    # Dropout would make the loss of a note depend on a draw that no ledger records.
    peft_model.eval()
    return peft_model


def _linear_names(model: PreTrainedModel) -> list[str]:
    """Last parts of the names of its linear layers, without the one that gives the logits."""
    head = model.get_output_embeddings()
    found = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    }
    return sorted(found)


def depth(model: PreTrainedModel) -> int:
    """How many blocks the model has."""
    return int(getattr(model.config.get_text_config(), "num_hidden_layers", None) or 0)


def train_only(
    peft_model: PeftModel,
    part: TrainedPart,
    seed: int = 0,
    layers: Collection[str] | None = None,
) -> None:
    """Freeze all but one part of the attached adapter, whose product stays as it is.

    ``layers`` are those that are trained, None all; the others are frozen as a whole.
    For "core", B is written as its frame (drawn from ``seed``) times a core, and what of B lies
    outside the frame is lost. Raises UnsupportedAdapter where a layer has no frame of that rank.
    """
    for name, layer in _lora_layers(peft_model).items():
        B = _factor_B(layer)
        trained = layers is None or name in layers
        framed = part == "core" and trained
        if framed:
            if B.shape[1] > B.shape[0]:
                raise UnsupportedAdapter(f"rank {B.shape[1]} exceeds the width of {name}")
            layer.lora_B[_NAME] = _FramedB(B, frame(name, B.shape[0], B.shape[1], seed))
        elif isinstance(layer.lora_B[_NAME], _FramedB):
            layer.lora_B[_NAME] = nn.Linear(B.shape[1], B.shape[0], bias=False)
            cast(nn.Linear, layer.lora_B[_NAME]).weight = nn.Parameter(B)
        _linear_A(layer).weight.requires_grad_(trained and part in ("A", "both"))
        if not framed:
            linear = cast(nn.Linear, layer.lora_B[_NAME])
            linear.weight.requires_grad_(trained and part in ("B", "both"))


class _FramedB(nn.Sequential):
    """B = P R in place of a matrix B: first the trained core R, then the frozen frame P."""

    def __init__(self, B: Tensor, columns: Tensor) -> None:
        """``B`` and ``columns`` (out, rank)."""
        super().__init__()
        self.core = nn.Linear(B.shape[1], B.shape[1], bias=False, device=B.device)
        self.frame = nn.Linear(B.shape[1], B.shape[0], bias=False, device=B.device)
        self.frame.weight = nn.Parameter(columns.to(B), requires_grad=False)
        self.write(B)

    def read(self) -> Tensor:
        """B (out, rank), of the dtype of the core."""
        P, R = self.frame.weight.double(), self.core.weight.detach().double()
        return (P @ R).to(self.core.weight.dtype)

    @torch.no_grad()
    def write(self, B: Tensor) -> None:
        """Take the core whose product with the frame is nearest to B."""
        self.core.weight.copy_(self.frame.weight.double().T @ B.double())


def initial(
    model: PreTrainedModel, spec: AdapterSpec, seed: int, train: TrainedFactors = "B"
) -> Adapter:
    """A public starting point: one factor zero, the other orthonormal, drawn from seed and layer.

    B is zero unless only A is trained. Every hospital gets the same A from the coordinator, so B
    can be averaged exactly (FFA-LoRA, arXiv 2403.12313); orthonormal rows keep the gradient of B on
    the scale of that of dW (FedSVD, arXiv 2505.12805).
    """
    peft_model = attach(model, spec)
    layers = {}
    for name, layer in _lora_layers(peft_model).items():
        m, n = _factor_B(layer).shape[0], _linear_A(layer).weight.shape[1]
        if spec.rank > min(m, n):
            raise UnsupportedAdapter(
                f"adapter.rank={spec.rank} exceeds the width {min(m, n)} of {name}"
            )
        B, A = torch.zeros(m, spec.rank), orthonormal_rows(spec.rank, n, f"{seed}:{name}")
        if train == "A":
            B, A = frame(name, m, spec.rank, seed), torch.zeros(spec.rank, n)
        layers[name] = LowRank(B, A)
    detach(peft_model)
    return Adapter(spec, layers)


def read(peft_model: PeftModel, spec: AdapterSpec) -> Adapter:
    """A copy of the factors that the live model holds now, float32 on the CPU."""
    layers = {
        name: LowRank(
            _factor_B(layer).float().cpu().clone(),
            _linear_A(layer).weight.detach().float().cpu().clone(),
        )
        for name, layer in _lora_layers(peft_model).items()
    }
    return Adapter(spec, layers)


def write(peft_model: PeftModel, adapter: Adapter) -> None:
    """Put the adapter's factors into the live model.

    Raises ValueError when layers or shapes differ: a partial load would train the wrong thing.
    """
    live = _lora_layers(peft_model)
    if set(live) != set(adapter.layers):
        differing = sorted(set(live) ^ set(adapter.layers))
        raise ValueError(
            f"adapter and model differ in {len(differing)} layers, first {differing[0][:120]!a}"
        )
    with torch.no_grad():
        for name, layer in live.items():
            A, B = _linear_A(layer).weight, layer.lora_B[_NAME]
            given = adapter.layers[name]
            for shape, value in ((A.shape, given.A), (_factor_B(layer).shape, given.B)):
                if shape != value.shape:
                    raise ValueError(f"{name}: shape {tuple(value.shape)}, expected {tuple(shape)}")
            A.copy_(given.A)
            if isinstance(B, _FramedB):
                B.write(given.B.to(A.device))
            else:
                cast(nn.Linear, B).weight.copy_(given.B)


def projections(peft_model: PeftModel) -> dict[str, nn.Linear]:
    """The matrix A of every adapted layer: its output is what B multiplies."""
    return {name: _linear_A(layer) for name, layer in _lora_layers(peft_model).items()}


def travel_name(parameter: str) -> str:
    """The name under which a trained parameter of the live model travels."""
    name = parameter.removeprefix(_PREFIX).replace(f".{_NAME}.", ".")
    return name.replace(".lora_B.core.", ".lora_core.")


def detach(peft_model: PeftModel) -> PreTrainedModel:
    """Remove the LoRA modules again; the base weights are as before."""
    model = peft_model.unload()
    if hasattr(model, "peft_config"):
        del model.peft_config
    return model


def fold(model: PreTrainedModel, adapter: Adapter) -> None:
    """Add dW to the base weights; the sum is formed in float64.

    Every adapted layer gets a weight of its own: the token embedding that a head is tied to stays
    as it was, as it does where the LoRA is kept beside the weights. Raises ModelError when the
    model lacks one of the layers or has it in another shape.
    """
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name, delta in adapter.deltas().items():
            if name not in modules:
                raise ModelError(f"the adapter does not fit the base model, which has no {name}")
            weight = cast(Tensor, modules[name].weight)
            dense = delta.to(torch.float64).dense()
            if isinstance(modules[name], Conv1D):  # GPT-2 keeps its weights as (in, out)
                dense = dense.T
            if dense.shape != weight.shape:
                raise ModelError(f"the adapter does not fit the base model: shape of {name}")
            total = (weight.double() + dense).to(weight.dtype)
            modules[name].weight = nn.Parameter(total, weight.requires_grad)


@contextmanager
def applied(model: PreTrainedModel, adapter: Adapter) -> Iterator[None]:
    """The model computes with the adapter while this is open; then it is bit for bit as before.

    Float32 weights take the update in; lower precision would round it away, so there the adapter
    stays beside them.
    """
    if next(model.parameters()).dtype == torch.float32:
        with _folded(model, adapter):
            yield
        return
    live = attach(model, adapter.spec)
    try:
        write(live, adapter)
        yield
    finally:
        detach(live)


@contextmanager
def _folded(model: PreTrainedModel, adapter: Adapter) -> Iterator[None]:
    modules = dict(model.named_modules())
    before = {name: modules[name].weight for name in adapter.layers if name in modules}
    try:
        fold(model, adapter)
        yield
    finally:
        for name, weight in before.items():
            modules[name].weight = weight


def _linear_A(layer: LoraLayer) -> nn.Linear:
    return cast(nn.Linear, layer.lora_A[_NAME])


def _factor_B(layer: LoraLayer) -> Tensor:
    """B (out, rank) of an adapted layer as it is now."""
    B = layer.lora_B[_NAME]
    return B.read() if isinstance(B, _FramedB) else cast(nn.Linear, B).weight.detach()


def _lora_layers(peft_model: PeftModel) -> dict[str, LoraLayer]:
    """Adapted linear layers by their module path in the base model."""
    return {
        name.removeprefix(_PREFIX): module
        for name, module in peft_model.named_modules()
        if isinstance(module, LoraLayer) and _is_linear(module)
    }


def _require_independent_rows(model: PreTrainedModel) -> None:
    """A loss that depends on batch mates would let a note move more than its own clipped part."""
    config = model.config.get_text_config()
    experts = next((n for n in _EXPERTS if (getattr(config, n, None) or 0) > 1), None)
    if experts:
        raise UnsupportedAdapter(f"{type(model).__name__}: experts share the batch ({experts})")
    if any(isinstance(module, _BatchNorm) for module in model.modules()):
        raise UnsupportedAdapter(f"{type(model).__name__}: batch normalisation mixes the notes")


def _is_linear(layer: LoraLayer) -> bool:
    """No embedding, no convolution; what the frozen weight is kept as does not matter."""
    return _NAME in layer.lora_A and isinstance(layer.lora_A[_NAME], nn.Linear)
