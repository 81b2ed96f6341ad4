"""Per-note gradients of the trained factors, by two routes that must agree.

``fast``    Each trained factor's matrix product records its own per-note gradient on the way back,
            one batched product of the gradient of its output with its input, and the gradient
            summed over notes is never formed. Instantiating costs no more than summing; "ghost"
            norms would repeat the whole backward pass and pay only for notes of fewer tokens than
            sqrt(rank * width / 2) (Book-Keeping, Bu et al. 2023).
``opacus``  GradSampleModule hooks in non-wrapping mode and the plain loss: the reference.

Either way a note's gradient is that of the mean loss over the note's own tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from opacus.grad_sample import GradSampleHooks
from peft import PeftModel
from torch import Tensor, nn

from adapters.likelihood import note_losses
from client.privacy.chunked_loss import memory_saving_losses

Engine = Literal["fast", "opacus"]
NoteGradients = Callable[[Tensor, Tensor], dict[str, Tensor]]


class GradientError(RuntimeError):
    """A per-note gradient was missing or misshapen; the step must not be released."""


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that a step moves, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@contextmanager
def per_note_gradients(model: PeftModel, engine: Engine = "fast") -> Iterator[NoteGradients]:
    """While open, gives a function: ids (n, T), lengths (n) -> gradients (n, *shape) by name.

    The model is as before afterwards. Raises GradientError when a trained parameter is not a plain
    matrix of a LoRA layer, or its gradient is missing or misshapen: no data can cause that, only a
    model that the engine cannot handle.
    """
    route = _recorded if engine == "fast" else _hooked
    with _checkpoints(model), route(model) as (backward, collect):
        parameters = trained_parameters(model)

        def gradients(ids: Tensor, lengths: Tensor) -> dict[str, Tensor]:
            backward(ids, lengths)
            found = collect()
            for name, p in parameters.items():
                g = found.get(name)
                if g is None or g.shape != (len(ids), *p.shape):
                    raise GradientError(f"no per-note gradient for {name}")
            return found

        yield gradients


@contextmanager
def _checkpoints(model: PeftModel) -> Iterator[None]:
    """Let layers recompute their activations where the model was told to (they do it in training).

    Only the checkpointed layers themselves go into training mode, and those that drop out by a rate
    of their own (OPT's do) have it set to zero: masks would be drawn in the order of the batch.
    """
    layers = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    changes = [
        (layer, name, value)
        for layer in layers
        for name, value in vars(layer).items()
        if name == "training" or ("drop" in name and isinstance(value, float))
    ]
    for layer, name, _ in changes:
        setattr(layer, name, True if name == "training" else 0.0)
    try:
        yield
    finally:
        for layer, name, value in changes:
            setattr(layer, name, value)


Route = tuple[Callable[[Tensor, Tensor], None], Callable[[], dict[str, Tensor]]]


@contextmanager
def _recorded(model: PeftModel) -> Iterator[Route]:
    found: dict[str, Tensor] = {}
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    trained = [n for n, m in layers.items() if m.weight.requires_grad]
    if {f"{n}.weight" for n in trained} != set(trained_parameters(model)):
        raise GradientError("a trained parameter is not the weight of a linear layer without bias")
    losses = memory_saving_losses(model)
    for name in trained:
        layer = layers[name]
        layer.forward = _recording(layer, f"{name}.weight", found)  # type: ignore[method-assign, assignment]

    def backward(ids: Tensor, lengths: Tensor) -> None:
        losses(ids, lengths).sum().backward()

    def collect() -> dict[str, Tensor]:
        taken = dict(found)
        found.clear()
        return taken

    try:
        yield backward, collect
    finally:
        for name in trained:
            del layers[name].forward


def _recording(layer: nn.Linear, name: str, found: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        return cast(Tensor, _RecordingProduct.apply(x, layer.weight, name, found))

    return forward


class _RecordingProduct(torch.autograd.Function):
    """x (n, T, in), weight (out, in) -> x W^T; leaves dW of each note in ``found[name]``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, name: str, found: dict[str, Tensor]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.name, ctx.found = name, found
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, None, None, None]:
        x, weight = ctx.saved_tensors
        own = torch.bmm(upstream.transpose(1, 2), x).float()
        earlier = ctx.found.get(ctx.name)  # a layer that is used twice adds up
        ctx.found[ctx.name] = own if earlier is None else earlier + own
        return (upstream @ weight if ctx.needs_input_grad[0] else None), None, None, None


@contextmanager
def _hooked(model: PeftModel) -> Iterator[Route]:
    modules = {
        module
        for module in model.modules()
        if any(p.requires_grad for p in module.parameters(recurse=False))
    }
    for module in modules:
        module.training = True  # Opacus records only training modules; dropout elsewhere stays off
    hooks = GradSampleHooks(model, loss_reduction="sum")

    def backward(ids: Tensor, lengths: Tensor) -> None:
        note_losses(model, ids, lengths).sum().backward()

    def collect() -> dict[str, Tensor]:
        found = {}
        for name, p in trained_parameters(model).items():
            if isinstance(per_note := getattr(p, "grad_sample", None), Tensor):
                found[name] = per_note.float()
            p.grad_sample = None  # type: ignore[attr-defined]
            p.grad = None
        return found

    try:
        yield backward, collect
    finally:
        hooks.cleanup()
        for module in modules:
            module.training = False
        model.zero_grad(set_to_none=True)
