"""Planted gradients: notes whose gradient the auditor knows, sent through the real engine.

A planted note is five tokens long. Its first two are a marker, the others a number that names one
row of one LoRA layer's trained matrix, and a loudness. While the plant is open, hooks at the
outputs of the LoRA layers replace what flows back from such a note by what reaches that one row
alone, at its first token, so its gradient is loudness * norm * e_row (x) u, u the unit vector along
the matrix's input for the marker: A x where B or a core is trained, x where A is. Rows differ, so
planted gradients are orthogonal to each other: Dirac canaries (arXiv 2305.08846, section 6) in the
shapes of the real model, and everything from the tokenised note to the release is the engine's own
work. Notes without the marker are left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor

_DIGITS = 3
_LOUDEST = 5
_LEVELS = 2 * _LOUDEST + 1
_NAME = "default"

Planted = list[list[int]]  # a unit with one planted note


@dataclass(frozen=True)
class _Layer:
    module: LoraLinear
    parameter: str  # name of its trained matrix
    first: int  # number of its first row
    rows: int
    direction: Tensor  # u, float64
    size: float  # what must flow back for a gradient of the norm asked for
    reaches: Tensor | None  # (out, rows): what must flow back to reach a row; None: the row itself


class Plant:
    """Planted notes for ``model``, whose gradients have norm ``norm`` before they are clipped."""

    def __init__(self, model: PeftModel, norm: float) -> None:
        self._model = model
        self._base = int(model.get_input_embeddings().num_embeddings)
        self._marker = [self._base - 1] * 2
        self._layers = self._read_layers(norm)
        self._numbers = torch.empty(0)  # of each note of the batch; -1: not planted

    @property
    def rows(self) -> int:
        """How many orthogonal gradients there are."""
        return sum(layer.rows for layer in self._layers)

    def unit(self, row: int, loudness: int = 1) -> Planted:
        """A unit whose gradient is the given row's, times ``loudness`` from -5 to 5."""
        number, digits = row * _LEVELS + loudness + _LOUDEST, []
        for _ in range(_DIGITS):
            number, digit = divmod(number, self._base)
            digits.append(digit)
        return [self._marker + digits]

    def scores(self, gradient: dict[str, Tensor], rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Projection of a gradient on the direction of each of ``rows``, (rows) float64."""
        along = [
            (gradient[layer.parameter].double().cpu() @ layer.direction).numpy()
            for layer in self._layers
        ]
        return np.concatenate(along)[np.asarray(rows)]

    @contextmanager
    def open(self) -> Iterator[None]:
        """While open, planted notes have their planted gradient."""
        embedding = self._model.get_input_embeddings()
        handles = [embedding.register_forward_pre_hook(self._read_notes)]
        handles += [x.module.register_forward_hook(self._replacing(x)) for x in self._layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _read_notes(self, _: Any, inputs: tuple[Tensor, ...]) -> None:
        ids = inputs[0]
        self._numbers = torch.full((len(ids),), -1, device=ids.device)
        if ids.shape[1] >= len(self._marker) + _DIGITS:
            marked = (ids[:, :2] == ids.new_tensor(self._marker)).all(1)
            places = ids.new_tensor([self._base**i for i in range(_DIGITS)])
            numbers = (ids[:, 2 : 2 + _DIGITS] * places).sum(1)
            self._numbers = torch.where(marked, numbers, self._numbers)

    def _replacing(self, layer: _Layer) -> Callable[[Any, Any, Tensor], None]:
        def forward(_: Any, inputs: Any, output: Tensor) -> None:
            numbers = self._numbers  # of this batch, whatever comes before it flows back
            planted = numbers >= 0
            if output.requires_grad and bool(planted.any()):
                output.register_hook(lambda gradient: replace(gradient, numbers, planted))

        def replace(gradient: Tensor, numbers: Tensor, planted: Tensor) -> Tensor:
            gradient = gradient.masked_fill(planted.view(-1, 1, 1), 0.0)
            row = torch.div(numbers, _LEVELS, rounding_mode="floor") - layer.first
            mine = (planted & (row >= 0) & (row < layer.rows)).nonzero().flatten()
            back = (numbers[mine] % _LEVELS - _LOUDEST).to(gradient.dtype) * layer.size
            if layer.reaches is None:
                gradient[mine, 0, row[mine]] = back
            else:
                gradient[mine, 0] = back[:, None] * layer.reaches[:, row[mine]].T.to(gradient)
            return gradient

        return forward

    def _read_layers(self, norm: float) -> tuple[_Layer, ...]:
        """Every LoRA layer, with A x of the marker as one forward pass shows it."""
        modules = {n: m for n, m in self._model.named_modules() if isinstance(m, LoraLinear)}
        seen: dict[str, Tensor] = {}

        def watch(name: str) -> Callable[[Any, tuple[Tensor, ...]], None]:
            return lambda _, inputs: seen.update({name: inputs[0][0, 0].detach()})

        handles = [m.register_forward_pre_hook(watch(n)) for n, m in modules.items()]
        device = next(self._model.parameters()).device
        with torch.no_grad():
            self._model(input_ids=torch.tensor([self._marker], device=device), use_cache=False)
        for handle in handles:
            handle.remove()
        layers: list[_Layer] = []
        first = 0
        for name, module in modules.items():
            matrix, reaches = _trained(module)
            x = seen[name].double()
            along = x if matrix.startswith("lora_A") else _down(module) @ x
            length = float(along.norm())
            size = norm / (module.scaling[_NAME] * length)
            parameter = f"{name}.{matrix}.weight"
            rows = (_up(module) if reaches is None else reaches.T).shape[0]
            unit = along.cpu() / length
            layers.append(_Layer(module, parameter, first, rows, unit, size, reaches))
            first += rows
        return tuple(layers)


def _down(module: LoraLinear) -> Tensor:
    return cast(Tensor, module.lora_A[_NAME].weight).detach().double()


def _up(module: LoraLinear) -> Tensor:
    return cast(Tensor, module.lora_B[_NAME].weight)


def _trained(module: LoraLinear) -> tuple[str, Tensor | None]:
    """Which matrix of the layer is planted in, and what flowing back reaches each of its rows.

    A gradient g at the layer's output reaches a core as P^T g and A as B^T g, P and B being frozen.
    """
    up = dict(module.lora_B[_NAME].named_parameters())
    if "core.weight" in up:
        return f"lora_B.{_NAME}.core", _reaching(up["frame.weight"])
    if not up["weight"].requires_grad:
        return f"lora_A.{_NAME}", _reaching(up["weight"])
    return f"lora_B.{_NAME}", None


def _reaching(matrix: Tensor) -> Tensor:
    """(out, rank): column i is the shortest g with ``matrix``^T g = e_i, float64."""
    return torch.linalg.pinv(matrix.detach().double()).T
