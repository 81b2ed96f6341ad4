"""Merging PEFT LoRA folders: checked against each other, merged in product space, of one rank.

Ranks, alpha and rsLoRA may differ. Factors are taken to float64 before anything is scaled, so the
merged update is exact up to the rounding of the factors that are saved; a cap below its rank gives
the best approximation of that rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath

import torch

from adapters.adapter import Adapter
from adapters.lowrank import LowRank
from adapters.peft_config import read_config
from server.offline.plan import Plan
from strategies.base import Draw, MergeError
from strategies.merging import Exact, Merge, merge


@dataclass(frozen=True, eq=False)
class AdapterFolder:
    """An adapter as it was read: float64 factors, what it says of itself, its fingerprint."""

    typed: str
    adapter: Adapter
    base_model: str  # as its configuration names it; may be empty
    everywhere: bool  # its targets name modules of every layer, not of some
    fingerprint: str
    size: int  # bytes of its factors, in the type that they are stored in

    @classmethod
    def open(cls, typed: str) -> AdapterFolder:
        """Read a PEFT folder. Raises MergeError naming the folder and what is wrong with it."""
        folder = Path(typed)
        try:
            config, stored = read_config(folder), Adapter.load(folder)
        except OSError as problem:
            name = Path(problem.filename or "adapter_model.safetensors").name
            raise MergeError(f"{typed}: {name} is absent or cannot be read") from None
        except ValueError as problem:
            said = str(problem).removeprefix(f"{folder}: ")
            raise MergeError(f"{typed}: {said}") from None
        layers = {name: layer.to(torch.float64) for name, layer in stored.layers.items()}
        if not layers:
            raise MergeError(f"{typed}: holds no factors")
        return cls(
            typed,
            Adapter(stored.spec, layers),
            config.base_model_name_or_path or "",
            config.targets is not None and all(n.endswith(config.targets) for n in layers),
            stored.fingerprint(),
            size_bytes(stored),
        )

    @property
    def task(self) -> str | None:
        """What it is for, in PEFT's words; None where it does not say."""
        return self.adapter.spec.task_type


def open_adapters(plan: Plan) -> list[AdapterFolder]:
    """The adapters of a plan, checked to fit each other. Raises MergeError naming who does not."""
    opened = [AdapterFolder.open(typed) for typed in plan.models]
    first = opened[0]
    said = next((o for o in opened if o.task), first)
    for one in opened:
        if not one.adapter.is_finite():
            raise MergeError(f"{one.typed}: holds NaN or infinity; leave it out")
        if one.task and one.task != said.task:
            raise MergeError(
                f"{one.typed}: its task_type is {one.task}, that of {said.typed} {said.task}; "
                "merge adapters for one task, or correct what adapter_config.json says"
            )
        theirs, own = first.adapter.layers, one.adapter.layers
        if differing := sorted(set(theirs) ^ set(own)):
            more, less = (one, first) if differing[0] in own else (first, one)
            raise MergeError(
                f"{more.typed}: adapts {differing[0]}, {less.typed} does not; make a model of each "
                "(output: model), and merge models"
            )
        for name, layer in own.items():
            if layer.shape != theirs[name].shape:
                raise MergeError(
                    f"{one.typed}: {name} has shape {layer.shape}, not {theirs[name].shape} as in "
                    f"{first.typed}"
                )
        if plan.base_model is None and _differ(one.base_model, first.base_model):
            raise MergeError(
                f"{one.typed}: was made for {_public(one.base_model)}, {first.typed} for "
                f"{_public(first.base_model)}; if that is one model, give its folder as base_model"
            )
    return opened


def merge_adapters(plan: Plan, opened: Sequence[AdapterFolder], seed: int) -> tuple[Merge, int]:
    """The merged adapter in float64, of the plan's rank at most, and the rank that loses nothing.

    Raises MergeError.
    """
    turned = [
        o.adapter if sign > 0 else _negative(o.adapter)
        for o, sign in zip(opened, plan.signs, strict=True)
    ]
    draw = Draw(f"merge:{seed}")
    found = merge(plan.strategy, turned, plan.weights, draw, Exact(plan.rank), torch.float64)
    assert found.exact_rank is not None
    return replace(found, adapter=_named(found.adapter, opened)), found.exact_rank


def kept_by_layer(exact: Adapter, rank: int) -> dict[str, float]:
    """Share of each layer's squared norm that its first ``rank`` columns and rows hold.

    An exact merge has B = U S and A = Vh, the largest singular values first, so this is what the
    best approximation of that rank keeps.
    """
    kept = {}
    for name, layer in exact.layers.items():
        energy = layer.B.square().sum(0)
        total = float(energy.sum())
        kept[name] = float(energy[:rank].sum()) / total if total else 1.0
    return kept


def size_bytes(adapter: Adapter) -> int:
    """Of all factors, in the type that they have."""
    return sum(tensor.nbytes for tensor in adapter.tensors().values())


def highest_rank(adapter: Adapter) -> int:
    """Of a merged adapter: the smallest input width of a layer. Narrower outputs are filled up."""
    return min(layer.shape[1] for layer in adapter.layers.values())


def base_name(opened: Sequence[AdapterFolder], base_model: str | None) -> str:
    """What the merged adapter says it is for: as typed, else as the inputs say; no local path."""
    return base_model or _public(next((o.base_model for o in opened if o.base_model), ""))


def other_base(typed: str, said: str, base_model: str) -> list[str]:
    """A note where an adapter says that it was made for ``said``, not for ``base_model``."""
    base = str(Path(base_model).absolute())
    if not _differ(said, base):
        return []
    return [f"{typed} says it was made for {_public(said)}, not {_public(base)}"]


def _named(adapter: Adapter, opened: Sequence[AdapterFolder]) -> Adapter:
    """With targets that name the layers it has and no others, for what the inputs say."""
    targets = opened[0].adapter.spec.targets
    if any(o.adapter.spec.targets != targets or not o.everywhere for o in opened):
        targets = tuple(sorted(adapter.layers))
    task = next((o.task for o in opened if o.task), None)
    return Adapter(replace(adapter.spec, targets=targets, task_type=task), adapter.layers)


def _negative(adapter: Adapter) -> Adapter:
    layers = {name: LowRank(-layer.B, layer.A) for name, layer in adapter.layers.items()}
    return Adapter(adapter.spec, layers)


def _differ(one: str, other: str) -> bool:
    """Whether two names of base models are of different ones; folders may have moved."""
    return bool(one and other) and PurePath(one).name != PurePath(other).name


def _public(name: str) -> str:
    return PurePath(name).name if PurePath(name).is_absolute() else name
