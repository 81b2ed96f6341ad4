"""Which replies to plain Flower messages can be merged, and why the others cannot.

A reply holds all factors that were sent, or all of one factor where the other stays as it was sent,
under the same names. One that is no such thing, or that the strategy could not merge with others
(of another rank, or with a factor trained that should have stayed as it was sent), costs its sender
the round and nobody else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from flwr.app import ArrayRecord, Message, RecordDict
from torch import Tensor

from adapters.adapter import Adapter, AdapterSpec
from server.acceptance import LeftOut, impossibly_large
from strategies.base import Strategy
from strategies.registry import innermost

EQUAL = "wardround-equal-weight"  # stands for the key of weights where hospitals count equally
_PREFIX = "base_model.model."  # PEFT's
_A = ".lora_A.weight"
_WEIGHTS = 1e-6, 1e12  # of a hospital; beyond, the others would vanish beside it, or it beside them
_ROOM = 100  # by how much a strategy and LoRA's scale may enlarge the longest update of a hospital


class Unusable(ValueError):
    """A reply that cannot be merged; the message says why and quotes no more of it than shapes."""


@dataclass(frozen=True)
class Sent:
    """What a round began with: the adapter, and how each of its tensors was called and stored."""

    arrays: ArrayRecord
    adapter: Adapter
    names: dict[str, str]  # by plain name
    tensors: dict[str, Tensor]  # by plain name
    alpha: float | None  # LoRA's, of all hospitals; None: always the rank

    @classmethod
    def read(cls, arrays: ArrayRecord, alpha: float | None) -> Sent:
        """``arrays`` as sent. Raises ValueError when they are not the factors of a LoRA adapter."""
        named = {name.removeprefix(_PREFIX): name for name in arrays}
        try:
            tensors = _tensors(arrays)
            return cls(arrays, _adapter(tensors, alpha), named, tensors, alpha)
        except ValueError as problem:
            raise ValueError(
                f"{problem}; send what peft.get_peft_model_state_dict(model) gives"
            ) from None


@dataclass(frozen=True)
class Good:
    """A reply that can be merged: its records, its adapter, and what the hospital counts."""

    content: RecordDict
    adapter: Adapter
    weight: float


def judged(
    replies: Iterable[Message], asked: Iterable[Message], sent: Sent, strategy: Strategy, key: str
) -> tuple[dict[int, Good], dict[int, LeftOut]]:
    """By node, replies that ``strategy`` can merge, and the other nodes, which are left out.

    ``key`` names the metric that holds a hospital's weight. A reply belongs to the node that it
    answers for; its sender may be the SuperLink.
    """
    nodes = {m.metadata.message_id: m.metadata.dst_node_id for m in asked}
    good: dict[int, Good] = {}
    left_out = {n: LeftOut(str(n), "no answer in time", lied=False) for n in nodes.values()}
    inner = innermost(strategy)
    for reply in replies:
        meta = reply.metadata
        node = nodes.get(meta.reply_to_message_id, meta.src_node_id)
        left_out.pop(node, None)
        try:
            weight = weight_of(reply, key)
            good[node] = Good(reply.content, _accepted(reply.content, sent, inner), weight)
        except Unusable as reason:
            left_out[node] = LeftOut(str(node), str(reason), lied=not reply.has_error())
    left_out |= _moved_what_was_frozen(good, sent, inner)
    return {node: one for node, one in good.items() if node not in left_out}, left_out


def weight_of(reply: Message, key: str) -> float:
    """What the hospital counts, before normalisation. Raises Unusable."""
    if reply.has_error():  # its text may quote what a hospital was working on
        raise Unusable(f"Flower error {reply.error.code}")
    if not isinstance(reply.content, RecordDict):  # Flower hands on whatever it was sent
        raise Unusable("no records")
    if key == EQUAL:
        return 1.0
    records = list(reply.content.metric_records.values())
    weight = records[0].get(key) if len(records) == 1 else None
    least, most = _WEIGHTS
    if not isinstance(weight, int | float) or not least <= weight <= most:
        raise Unusable(f"metric {key} is no number from {least:g} to {most:g}")
    return float(weight)


def _accepted(content: RecordDict, sent: Sent, strategy: Strategy) -> Adapter:
    """The hospital's adapter. Raises Unusable."""
    try:
        (arrays,) = content.array_records.values()
        tensors = _tensors(arrays)
    except Exception:  # rubbish fails in many ways; each costs only its sender
        raise Unusable("not one record of arrays") from None
    names = set(sent.names)
    parts = [names, *({n for n in names if f".lora_{f}." in n} for f in "AB")]
    if set(tensors) not in parts:
        raise Unusable("factors missing or unexpected")
    try:
        adapter = _adapter({**sent.tensors, **tensors}, sent.alpha)
    except ValueError as problem:
        raise Unusable(str(problem)) from None
    expected = sent.adapter.layers
    if any(layer.shape != expected[name].shape for name, layer in adapter.layers.items()):
        raise Unusable("factors of another shape")
    rank, own = adapter.spec.rank, sent.adapter.spec.rank
    most = max(own, min(min(layer.shape) for layer in expected.values()))
    one_rank = strategy.declared.space == "factors" and not strategy.declared.ranks
    if rank != own and (one_rank or not 1 <= rank <= most):
        raise Unusable(f"factors of rank {rank}, not {own if one_rank else f'1 to {most}'}")
    if not adapter.is_finite():
        raise Unusable("factors hold NaN or infinity")
    if impossibly_large(tensors, sent.tensors):
        raise Unusable("factors impossibly large")
    room = min(torch.finfo(t.dtype).max for t in sent.tensors.values()) / _ROOM
    if any(layer.norm() > room for layer in adapter.layers.values()):
        raise Unusable("updates too large for the type that was sent")
    return adapter


def _moved_what_was_frozen(
    good: Mapping[int, Good], sent: Sent, strategy: Strategy
) -> dict[int, LeftOut]:
    """Hospitals that changed the factor which the strategy needs shared.

    Of two that may be it is the one that more of them kept, so that few cannot choose it.
    """
    trained = strategy.declared.trains
    kept = [factor for factor, other in (("A", "B"), ("B", "A")) if other in trained]
    if strategy.declared.space != "factors" or "both" in trained or not kept:
        return {}
    moved = {
        factor: [node for node, one in good.items() if not _same(one.adapter, sent.adapter, factor)]
        for factor in kept
    }
    factor = min(moved, key=lambda f: len(moved[f]))
    reason = f"lora_{factor} is not as it was sent"
    return {node: LeftOut(str(node), reason) for node in moved[factor]}


def frozen_in(good: Sequence[Good], sent: Sent) -> Literal["A", "B"]:
    """The factor that every hospital has left as it was sent; A where it is neither or both."""

    def moved(factor: str) -> bool:
        return any(not _same(one.adapter, sent.adapter, factor) for one in good)

    return "B" if moved("A") and not moved("B") else "A"


def _same(one: Adapter, other: Adapter, factor: str) -> bool:
    return all(
        getattr(layer, factor).equal(getattr(other.layers[name], factor))
        for name, layer in one.layers.items()
    )


def _adapter(tensors: Mapping[str, Tensor], alpha: float | None) -> Adapter:
    """Of the rank that its first A has; the others must agree. Raises ValueError."""
    firsts = {n.removesuffix(_A): t for n, t in tensors.items() if n.endswith(_A)}
    if not firsts:
        raise ValueError(f"no factor LAYER{_A}")
    rank = next(iter(firsts.values())).shape[0]
    targets = tuple(sorted({layer.rpartition(".")[2] for layer in firsts}))
    spec = AdapterSpec(rank, float(rank if alpha is None else alpha), targets)
    return Adapter.from_tensors({n: t.float() for n, t in tensors.items()}, spec)


def _tensors(arrays: ArrayRecord) -> dict[str, Tensor]:
    """By plain name; ValueError for what is no array of floating-point numbers."""
    tensors = arrays.to_torch_state_dict()
    if any(tensor.ndim != 2 for tensor in tensors.values()):
        raise ValueError("arrays are not matrices")
    if not all(tensor.is_floating_point() for tensor in tensors.values()):
        raise ValueError("arrays are not of floating-point numbers")
    return {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
