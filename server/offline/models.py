"""Merging whole models tensor by tensor, and folding a merged adapter into its base model.

Of every model one tensor is held at a time, in float64, and of the result one file. A tensor goes
through the same strategy as an adapter's layer does, as a matrix: a vector is a matrix of one row,
and more dimensions than two are folded into the second. What a strategy compares (inner products,
thresholds, ranks) it compares within a tensor, as mergekit does. With ``scope: model`` inner
products are summed over all tensors first, and models are read twice: Krum does, to choose one.

Strategies that work on singular vectors have nothing to say on vectors (norms, biases), nor do
their papers: there the weighted mean is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from adapters.adapter import Adapter, AdapterSpec
from adapters.base_model import ModelError, skeleton
from adapters.lowrank import Dense, LowRank, gram, weighted_sum
from conf.schema import ModelSettings
from server.model_folder import Fingerprint, Header, ModelFolder, write_weights
from server.offline.figures import Figures
from server.offline.plan import Plan
from strategies.base import Draw, MergeError, Strategy
from strategies.inner_products import FromInnerProducts
from strategies.lines import Lines

Step = Callable[[], None]  # called after every tensor


class ModelMerge:
    """A merge of whole models: checked when it is made, done by ``write``."""

    def __init__(self, plan: Plan, base: ModelFolder | None, seed: int) -> None:
        """Open the models and check that they fit. Raises MergeError naming who does not."""
        self.models = [ModelFolder.open(typed) for typed in plan.models]
        self.like = base or self.models[0]  # whose configuration the result has
        self.base = base if plan.differences else None
        for model in self.models:
            _require_same(self.like, model)
        self._plan = plan
        self._draw = Draw(f"merge:{seed}")
        self._strategy, self._factors = _by_depth(plan.strategy, self.like.headers)
        self.steps = len(self.like.headers) * (2 if self._chooses_models else 1)

    def notes(self) -> list[str]:
        """In what the configurations differ, of which only one can be kept."""
        found = []
        for model in self.models:
            if keys := model.differing(self.like):
                found.append(
                    f"config.json of {model.typed} differs in {', '.join(keys)}; that of "
                    f"{self.like.typed} was kept"
                )
        return found

    def write(self, folder: Path, dtype: torch.dtype | None, step: Step) -> Figures:
        """Write the merged weights into ``folder``, of ``dtype`` or of that of the first model.

        Raises MergeError on NaN or infinity in an input or in the result.
        """
        figures = Figures(len(self.models), self._plan.weights)
        self._coefficients = self._over_all(step) if self._chooses_models else None

        def make(name: str) -> Tensor:
            tensor = self._merged(name, figures, dtype)
            step()
            return tensor

        write_weights(folder, _saved_as(self.like.headers, dtype), make)
        return figures

    @property
    def _chooses_models(self) -> bool:
        """Whether inner products over all tensors are needed before the first is merged."""
        return isinstance(self._strategy, FromInnerProducts) and self._strategy.scope == "model"

    def _over_all(self, step: Step) -> list[float]:
        products = torch.zeros(len(self.models), len(self.models), dtype=torch.float64)
        for name, header in sorted(self.like.headers.items()):
            if header.dtype.is_floating_point:
                parts, _ = self._parts(name, [m.tensor(name) for m in self.models], None)
                products += gram(parts)
            step()
        assert isinstance(self._strategy, FromInnerProducts)
        weights = torch.tensor(self._plan.weights, dtype=torch.float64)
        found: list[float] = self._strategy.coefficients(products, weights).tolist()
        return found

    def _merged(self, name: str, figures: Figures, dtype: torch.dtype | None) -> Tensor:
        header = self.like.headers[name]
        stored = [model.tensor(name) for model in self.models]
        if not header.dtype.is_floating_point:
            figures.see(name, stored, self.base.tensor(name) if self.base else None)
            if not all(tensor.equal(stored[0]) for tensor in stored):
                raise MergeError(f"{name} holds whole numbers that differ between the models")
            figures.out(name, stored[0])
            return stored[0]
        parts, origin = self._parts(name, stored, figures)
        del stored
        update = self._combined(name, parts)
        if not torch.isfinite(update).all():
            raise MergeError(f"{self._plan.strategy.name} gave NaN or infinity in {name}")
        result = update if origin is None else origin + update
        saved = _fitting(name, result.reshape(header.shape), dtype or header.dtype)
        figures.merged(name, gram(parts), float(update.norm()))
        figures.rounded(float((saved.reshape(result.shape).double() - result).norm()), result)
        figures.out(name, saved)
        return saved

    def _parts(
        self, name: str, stored: Sequence[Tensor], figures: Figures | None
    ) -> tuple[list[LowRank], Tensor | None]:
        """What the strategy acts on, of every model; the base's tensor where it is differences."""
        base = None if self.base is None else self.base.tensor(name)
        if figures is not None:
            figures.see(name, stored, base)
        origin = None if base is None else _matrix(base)
        parts: list[LowRank] = []
        for tensor, sign in zip(stored, self._plan.signs, strict=True):
            own = _matrix(tensor)
            parts.append(Dense(own if origin is None else own - origin) * sign)
        return parts, origin

    def _combined(self, name: str, parts: Sequence[LowRank]) -> Tensor:
        weights = self._plan.weights
        vector = len(self.like.headers[name].shape) < 2
        if self._coefficients is not None:
            update = weighted_sum(parts, self._coefficients).dense()
        elif vector and self._strategy.declared.space == "core":
            update = weighted_sum(parts, weights).dense()
        else:
            one_layer = [Adapter(AdapterSpec(1, 1.0, ()), {name: part}) for part in parts]
            found = self._strategy.combine(one_layer, weights, self._draw)[name]
            update = found.dense() if isinstance(found, LowRank) else found
        return update * self._factors[name]


@dataclass(frozen=True)
class Folded:
    """Fingerprints of the base model and of the result, and what rounding has cost.

    ``rounding`` is the Frobenius norm of what the weights' type could not hold, relative to that of
    the update, over all layers with an update.
    """

    base: str
    result: str
    rounding: float


def fold_adapter(
    base: ModelFolder, adapter: Adapter, folder: Path, dtype: torch.dtype | None, step: Step
) -> Folded:
    """Write the base model with the adapter's update added to its weights, float64 inside.

    Raises MergeError when the model lacks a layer of the adapter or has it in another shape, or
    when a sum is beyond what ``dtype`` (None: the type that the weight has) can hold.
    """
    targets = _weights_of(base, adapter)
    before, after = Fingerprint(), Fingerprint()
    lost = size = 0.0

    def make(name: str) -> Tensor:
        nonlocal lost, size
        stored = base.tensor(name)
        before.add(name, stored)
        if stored.is_floating_point():
            kind, exact = dtype or stored.dtype, stored
            if name in targets:
                update, transposed = targets[name]
                dense = update.to(torch.float64).dense()
                exact = stored.double() + (dense.T if transposed else dense)
            stored = _fitting(name, exact, kind)
            if name in targets:
                lost += float((stored.double() - exact).norm()) ** 2
                size += update.norm() ** 2
        after.add(name, stored)
        step()
        return stored

    write_weights(folder, _saved_as(base.headers, dtype), make)
    return Folded(before.hex(), after.hex(), (lost / size) ** 0.5 if size else 0.0)


def _fitting(name: str, exact: Tensor, dtype: torch.dtype) -> Tensor:
    """``exact`` in that type. Raises MergeError where a number is too large for it."""
    stored = exact.to(dtype)
    if not torch.isfinite(stored).all():
        kind = str(dtype).removeprefix("torch.")
        raise MergeError(f"{name} has numbers beyond {kind}; say dtype: bfloat16 or float32")
    return stored


def require_fit(base: ModelFolder, adapter: Adapter) -> None:
    """Return when the adapter's layers are the model's. Raises MergeError."""
    _weights_of(base, adapter)


def _weights_of(base: ModelFolder, adapter: Adapter) -> dict[str, tuple[LowRank, bool]]:
    """By tensor: the update of it, and whether the model keeps it as (in, out), as GPT-2 does."""
    try:
        model = skeleton(ModelSettings(source="path", path=str(base.path)))
    except ModelError as problem:
        raise MergeError(f"{base.typed}: {str(problem).partition(': ')[2]}") from None
    modules = dict(model.named_modules())
    prefix = f"{model.base_model_prefix}."  # which old checkpoints leave out
    found = {}
    for layer, update in adapter.deltas().items():
        names = (f"{layer}.weight", f"{layer.removeprefix(prefix)}.weight")
        name = next((n for n in names if n in base.headers), None)
        if name is None or layer not in modules:
            raise MergeError(f"{base.typed}: has no {layer}, which the adapters adapt")
        transposed = isinstance(modules[layer], Conv1D)
        shape = update.shape[::-1] if transposed else update.shape
        if base.headers[name].shape != shape:
            raise MergeError(
                f"{base.typed}: {layer} has shape {base.headers[name].shape}, not {shape} as in "
                "the adapters"
            )
        if not base.headers[name].dtype.is_floating_point:
            raise MergeError(f"{base.typed}: {layer} holds whole numbers, and nothing is folded in")
        found[name] = update, transposed
    return found


def _require_same(one: ModelFolder, other: ModelFolder) -> None:
    for key in ("model_type", "architectures"):
        if one.config.get(key) != other.config.get(key):
            raise MergeError(
                f"{other.typed}: {key} is {other.config.get(key)}, in {one.typed} it is "
                f"{one.config.get(key)}"
            )
    if one.heads != other.heads:
        raise MergeError(
            f"{other.typed}: has {other.heads} attention heads, {one.typed} has {one.heads}"
        )
    if differing := sorted(set(one.headers) ^ set(other.headers)):
        name = differing[0]
        more, less = (one, other) if name in one.headers else (other, one)
        tied = "; save both with the same tie_word_embeddings" if "lm_head" in name else ""
        raise MergeError(f"{more.typed}: has {name}, {less.typed} has not{tied}")
    for name, header in sorted(one.headers.items()):
        found = other.headers[name]
        if found.shape != header.shape:
            raise MergeError(
                f"{other.typed}: {name} has shape {found.shape}, not {header.shape} as in "
                f"{one.typed}"
            )
        if found.dtype.is_floating_point != header.dtype.is_floating_point:
            raise MergeError(f"{other.typed}: {name} is {found.dtype}, in {one.typed} it is not")


def _by_depth(
    strategy: Strategy, names: Mapping[str, Header]
) -> tuple[Strategy, Mapping[str, float]]:
    """LiNeS taken apart: its depth is that of the model, and a strategy here sees one tensor."""
    if isinstance(strategy, Lines):
        inner, factors = _by_depth(strategy.wrapped, names)
        own = strategy.factors(names)
        return inner, {name: own[name] * factors[name] for name in names}
    return strategy, dict.fromkeys(names, 1.0)


def _saved_as(headers: Mapping[str, Header], dtype: torch.dtype | None) -> dict[str, Header]:
    return {
        name: Header(h.shape, dtype if dtype and h.dtype.is_floating_point else h.dtype)
        for name, h in headers.items()
    }


def _matrix(tensor: Tensor) -> Tensor:
    """As (m, n), float64: a vector as one row, of more dimensions all but the first as columns."""
    flat = tensor.double()
    return flat.reshape(1, -1) if flat.ndim < 2 else flat.reshape(flat.shape[0], -1)
