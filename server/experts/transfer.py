"""What was learned on one checkpoint, applied to another of the same architecture; no training.

    adapter      theta_target + s B A                      PortLLM, arXiv 2410.10870
    difference   theta_target + s (theta_tuned - theta_base)      "diff vectors", arXiv 2503.20110

Both rest on the two checkpoints being close: ||theta_target - theta_base|| / ||theta_base|| is
reported. Sums are formed in float64 and stored in the target's precision.

Vocabularies may differ by tokens appended at the end, nothing else. Rows of embedding and output
layer beyond the tokens that all checkpoints have stay the target's own, spare rows included; such
rows of the tuned model are left out. Both are counted in the report.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adapters.adapter import Adapter
from adapters.lowrank import LowRank
from conf.load import ConfigError
from server.experts.checkpoint import Checkpoint


@dataclass(frozen=True)
class Rows:
    """Rows of token-wise weights: moved, kept from the target, left out of the tuned model."""

    moved: int
    kept: int
    left_out: int


class Norms:
    """Relative norms of what differs, tensor by tensor."""

    def __init__(self) -> None:
        """Nothing measured yet."""
        self._apart: dict[str, tuple[float, float]] = {}

    def add(self, name: str, difference: Tensor, reference: Tensor) -> None:
        """Measure one tensor's ``difference`` against its ``reference``, of the same shape."""
        self._apart[name] = (
            float(difference.double().square().sum()),
            float(reference.double().square().sum()),
        )

    @property
    def relative(self) -> float:
        """Norm of all differences over the norm of all references."""
        apart, whole = (sum(pair[i] for pair in self._apart.values()) for i in (0, 1))
        return math.sqrt(apart / whole) if whole else 0.0

    def record(self) -> dict[str, Any]:
        """For a report: the whole, and the tensor that differs most in proportion."""
        found = {n: math.sqrt(a / w) if w else 0.0 for n, (a, w) in self._apart.items()}
        furthest = max(found, key=lambda name: found[name], default=None)
        record: dict[str, Any] = {"relative_norm": self.relative, "tensors": len(found)}
        if furthest is not None:
            record |= {"furthest": furthest, "furthest_relative_norm": found[furthest]}
        return record


def require_same_shape(first: Checkpoint, others: Sequence[Checkpoint]) -> Rows:
    """The rows that are moved, when all have the same architecture, layers and tokens.

    ``others`` ends with the target. Raises ConfigError naming both options and what differs.
    """
    for other in others:
        pair = f"{other.key} and {first.key}"
        if other.architecture() != first.architecture():
            raise ConfigError(
                f"{pair} are of different architecture: {' '.join(other.architecture())}, "
                f"{' '.join(first.architecture())}"
            )
        if differing := sorted(other.shapes.keys() ^ first.shapes.keys()):
            raise ConfigError(
                f"{pair} differ in {len(differing)} weights: only one has {differing[0]}"
            )
        for name, shape in first.shapes.items():
            theirs = other.shapes[name]
            if shape[1:] != theirs[1:] or (shape != theirs and not _by_token(name, first, other)):
                raise ConfigError(
                    f"{pair} differ in the shape of {name}: {list(theirs)}, {list(shape)}"
                )
    return _rows(first, others)


def require_fit(adapter: Adapter, checkpoint: Checkpoint) -> dict[str, str]:
    """The name of the weight under every adapted layer. Raises ConfigError where one is missing."""
    found = {}
    for layer, delta in adapter.layers.items():
        whole = f"{layer}.weight"
        # A stored name may lack the prefix of the head's wrapper, as those of GPT-2 do.
        names = [whole] if whole in checkpoint.shapes else [
            name for name in checkpoint.shapes if whole.endswith(f".{name}")
        ]  # fmt: skip
        if not names:
            raise ConfigError(f"adapter does not fit {checkpoint.key}, which has no {layer}")
        if checkpoint.shapes[names[0]] not in (delta.shape, delta.shape[::-1]):  # GPT-2: (in, out)
            raise ConfigError(f"adapter does not fit {checkpoint.key}: shape of {layer}")
        found[layer] = names[0]
    return found


def moved(target: Tensor, base: Tensor, tuned: Tensor, strength: float, rows: int | None) -> Tensor:
    """target + strength (tuned - base), of the target's shape and precision.

    Only the first ``rows`` move, None: all of them. Integers stay as they are.
    """
    if not target.is_floating_point():
        return target
    out = target.double()
    some = ... if rows is None else slice(rows)  # a scalar has no rows
    out[some] += strength * (tuned[some].double() - base[some].double())
    return out.to(target.dtype)


def distance(base: Checkpoint, target: Checkpoint, rows: int, names: Sequence[str] = ()) -> Norms:
    """Norms of target - base over ``names``, all weights if empty.

    Of weights with one row for each token only the first ``rows`` count: those that are shared.
    """
    norms = Norms()
    for name in names or base.shapes:
        old, new = base.tensor(name), target.tensor(name)
        if not old.is_floating_point():
            continue
        if name in base.token_wise:
            old, new = old[:rows], new[:rows]
        norms.add(name, new.double() - old.double(), old)
    return norms


def only_shared(
    adapter: Adapter, weights: Mapping[str, str], target: Checkpoint, rows: Rows
) -> tuple[Adapter, Rows]:
    """The adapter without its update of tokens that are not shared, and the rows it moves.

    ``weights`` names the weight under every layer. Most adapters leave embedding and output layer
    alone, and so move none of the target's rows.
    """
    layers = dict(adapter.layers)
    by_token = [name for name, weight in weights.items() if weight in target.token_wise]
    for name in by_token:
        B = layers[name].B.clone()
        B[rows.moved :] = 0
        layers[name] = LowRank(B, layers[name].A)
    if not by_token:
        rows = Rows(0, target.tokens(), 0)
    return Adapter(adapter.spec, layers), rows


def update_norms(adapter: Adapter, target: Checkpoint, weights: Mapping[str, str]) -> Norms:
    """Norms of the adapter's updates against the weights of the target that they are added to."""
    norms = Norms()
    for layer, delta in adapter.deltas().items():
        norms.add(layer, torch.tensor(delta.norm()), target.tensor(weights[layer]))
    return norms


def _by_token(name: str, first: Checkpoint, other: Checkpoint) -> bool:
    """Whether this weight has one row for each token in both checkpoints."""
    counts = first.shapes[name][0], other.shapes[name][0]
    return name in first.token_wise and counts == (first.tokens(), other.tokens())


def _rows(first: Checkpoint, others: Sequence[Checkpoint]) -> Rows:
    """Rows whose tokens all checkpoints have, by number. Raises ConfigError on other tokens."""
    everyone = (first, *others)
    vocabularies = [{i: token for token, i in c.vocabulary().items()} for c in everyone]
    shared = min(checkpoint.tokens() for checkpoint in everyone)
    if any(v != vocabularies[0] for v in vocabularies):
        shared = min(shared, *(max(v, default=-1) + 1 for v in vocabularies))
    own = vocabularies[0]
    for other, theirs in zip(others, vocabularies[1:], strict=True):
        wrong = [i for i in range(shared) if own.get(i) != theirs.get(i)]
        if wrong:
            raise ConfigError(
                f"{other.key} and {first.key} have different tokenizers: {len(wrong)} tokens "
                f"differ, the first is number {wrong[0]}"
            )
    tuned, target = everyone[-2], everyone[-1]
    return Rows(shared, target.tokens() - shared, tuned.tokens() - shared)
