"""Any of our merges as a plain Flower strategy, for a ServerApp of one's own.

Replies hold PEFT LoRA factors (``LAYER.lora_A.weight``, ``LAYER.lora_B.weight``, with or without
PEFT's prefix) under the names of the arrays that ``start`` was given: all of them, or all of one
factor where the other stays as it was sent. They are merged as products; see ``strategies``.

A reply that is no such thing, or that the strategy could not merge with others (of another rank, or
with a factor trained that should have stayed as it was sent), costs its sender the round and nobody
else: who was left out and why is in the log and in ``left_out``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from torch import Tensor

from adapters.adapter import Adapter, AdapterSpec
from conf.load import ConfigError
from server.acceptance import LARGEST
from strategies.base import Draw, MergeError, Strategy
from strategies.hetlora import HetLoRA
from strategies.lines import Lines
from strategies.merging import Merge, merge
from strategies.registry import create, require_no_order

log = logging.getLogger("flwr")  # where Flower's own strategies write

_PREFIX = "base_model.model."  # PEFT's
_A = ".lora_A.weight"
_EQUAL = "wardround-equal-weight"  # stands for the key of weights where hospitals count equally
_WEIGHTS = 1e-6, 1e12  # of a hospital; beyond, the others would vanish beside it, or it beside them
_ROOM = 100  # by how much a strategy and LoRA's scale may enlarge the longest update of a hospital


class _LeftOut(ValueError):
    """A reply that cannot be merged; the message says why and quotes nothing of it."""


@dataclass(frozen=True)
class _Sent:
    """What a round began with: the adapter, and how each of its tensors was called and stored."""

    adapter: Adapter
    names: dict[str, str]  # by plain name
    tensors: dict[str, Tensor]  # by plain name


class MergeStrategy(FedAvg):
    """Flower's sampling and messages, our merge.

    Parameters
    ----------
    strategy
        Name of a strategy (see ``docs/merging.md``), or one that is made already.
    parameters
        Of the strategy of that name.
    alpha
        LoRA's alpha of all hospitals; an update is alpha / rank times B A. None: B A itself. It
        matters only where ranks differ.
    weighted_by_key
        Name of the metric by which hospitals count, such as ``num-examples``. None: equally, and
        nothing about the size of a hospital needs to leave it.
    run
        Seeds the masks of random strategies, together with round and tensor.
    sampling
        All other parameters of Flower's ``FedAvg``.

    Raises ConfigError for an unknown strategy or parameter, or one that needs statistics, which
    these messages do not carry, or an order, which hospitals do not have. With no usable reply at
    all, or with too few for the strategy as some were left out, the arrays stay as they were. A
    round raises MergeError when every hospital has answered as it should and the strategy still
    cannot merge that many: no later round would do better.
    """

    def __init__(
        self,
        strategy: str | Strategy = "product_mean",
        parameters: Mapping[str, Any] | None = None,
        *,
        alpha: float | None = None,
        weighted_by_key: str | None = None,
        run: str = "",
        **sampling: Any,
    ) -> None:
        super().__init__(weighted_by_key=weighted_by_key or _EQUAL, **sampling)
        made = create(strategy, parameters) if isinstance(strategy, str) else strategy
        require_no_order(made)
        if made.statistics:
            raise ConfigError(
                f"strategy={made.name}: needs {made.statistics} statistics, which plain Flower "
                "messages do not carry; use `wardround server`, or another strategy"
            )
        if made.needs_noise:
            raise ConfigError(
                f"strategy={made.name}: needs to know every hospital's noise, which plain Flower "
                "messages do not state; use `wardround server`, or another strategy"
            )
        if weighted_by_key and not made.weighted:
            raise ConfigError(
                f"weighted_by_key={weighted_by_key}: strategy={made.name} counts all hospitals "
                "alike; leave it out, or take another strategy"
            )
        self.strategy: Strategy = made
        self.alpha = alpha
        self.run = run
        self.left_out: dict[int, dict[int, str]] = {}  # round -> node -> reason
        self._sent: _Sent | None = None
        self._asked: list[Message] = []
        inner = _innermost(made)
        # HetLoRA pads; all others that act on factors need them of one shape.
        self._one_rank = inner.declared.space == "factors" and not isinstance(inner, HetLoRA)
        self._kept = _kept_factors(inner)

    def summary(self) -> None:
        log.info("\t├──> Merge: %s %s", self.strategy.name, self.strategy.model_dump())
        super().summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As FedAvg. Raises ValueError when ``arrays`` are not the factors of a LoRA adapter."""
        self._sent = self._read(arrays)
        self._asked = list(super().configure_train(server_round, arrays, config, grid))
        return self._asked

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The merged factors, under the names and in the types that were sent; and metrics.

        Beside the hospitals' metrics there is what the merge reports of itself (``merge-...``; see
        ``strategies.merging.Merge``). Raises MergeError.
        """
        if self._sent is None:
            raise RuntimeError("configure_train has not been called")
        good, left_out = self._sorted(replies)
        left_out |= self._moved_what_was_frozen(good)
        good = {node: one for node, one in good.items() if node not in left_out}
        for node, reason in sorted(left_out.items()):
            log.warning("round %d: node %d left out: %s", server_round, node, reason)
        self.left_out[server_round] = left_out
        if not good:
            return None, None
        contents, adapters, weights = zip(*(good[node] for node in sorted(good)), strict=True)
        total = math.fsum(weights)
        spec = self._sent.adapter.spec
        alike = all(adapter.spec == spec for adapter in adapters)
        shares = [weight / total for weight in weights]
        draw = Draw(self.run, server_round)
        try:
            found = merge(self.strategy, adapters, shares, draw, None if alike else spec.rank)
        except MergeError as problem:
            if not left_out:
                raise
            log.warning("round %d: nothing was merged: %s", server_round, problem)
            return None, None
        metrics = self._metrics(contents, self.train_metrics_aggr_fn) or MetricRecord()
        metrics.update({"merge-hospitals": len(good), **_report(found)})
        merged = found.adapter if alike else Adapter.from_deltas(found.adapter.deltas(), spec)
        tensors = {
            self._sent.names[name]: tensor.to(self._sent.tensors[name].dtype)
            for name, tensor in merged.tensors().items()
        }
        return ArrayRecord({name: tensors[name] for name in self._sent.names.values()}), metrics

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Weighted mean of the metrics, of whom a weight is known; None when they do not fit."""
        contents = []
        for reply in replies:
            try:
                self._weight(reply)
            except _LeftOut as reason:
                node = reply.metadata.src_node_id
                log.warning("round %d: metrics of node %d left out: %s", server_round, node, reason)
            else:
                contents.append(reply.content)
        return self._metrics(contents, self.evaluate_metrics_aggr_fn)

    def _read(self, arrays: ArrayRecord) -> _Sent:
        named = {name.removeprefix(_PREFIX): name for name in arrays}
        tensors = {name.removeprefix(_PREFIX): t for name, t in _tensors(arrays).items()}
        return _Sent(self._adapter(tensors), named, tensors)

    def _adapter(self, tensors: Mapping[str, Tensor]) -> Adapter:
        """Of the rank that its first A has; the others must agree. Raises ValueError."""
        firsts = {n.removesuffix(_A): t for n, t in tensors.items() if n.endswith(_A)}
        if not firsts:
            raise ValueError(f"no factor LAYER{_A}")
        rank = next(iter(firsts.values())).shape[0]
        targets = tuple(sorted({layer.rpartition(".")[2] for layer in firsts}))
        spec = AdapterSpec(rank, float(rank if self.alpha is None else self.alpha), targets)
        return Adapter.from_tensors({n: t.float() for n, t in tensors.items()}, spec)

    def _sorted(
        self, replies: Iterable[Message]
    ) -> tuple[dict[int, tuple[RecordDict, Adapter, float]], dict[int, str]]:
        """By node, replies that are sound, with adapter and weight; why the others are not.

        A reply belongs to the node that it answers for; its sender may be the SuperLink.
        """
        asked = {m.metadata.message_id: m.metadata.dst_node_id for m in self._asked}
        good: dict[int, tuple[RecordDict, Adapter, float]] = {}
        left_out = dict.fromkeys(asked.values(), "no answer in time")
        for reply in replies:
            meta = reply.metadata
            node = asked.get(meta.reply_to_message_id, meta.src_node_id)
            left_out.pop(node, None)
            try:
                weight, adapter = self._weight(reply), self._accept(reply)
                good[node] = reply.content, adapter, weight
            except _LeftOut as reason:
                left_out[node] = str(reason)
        return good, left_out

    def _moved_what_was_frozen(
        self, good: Mapping[int, tuple[RecordDict, Adapter, float]]
    ) -> dict[int, str]:
        """Why, of hospitals that changed the factor which the strategy needs shared.

        Of two that may be it is the one that more of them kept, so that few cannot choose it.
        """
        if not self._kept:
            return {}
        assert self._sent is not None
        sent = self._sent.adapter.layers
        moved = {
            factor: {
                node
                for node, (_, adapter, _) in good.items()
                if not all(
                    getattr(layer, factor).equal(getattr(sent[name], factor))
                    for name, layer in adapter.layers.items()
                )
            }
            for factor in self._kept
        }
        factor = min(self._kept, key=lambda f: len(moved[f]))
        return dict.fromkeys(moved[factor], f"lora_{factor} is not as it was sent")

    def _accept(self, reply: Message) -> Adapter:
        """The hospital's adapter. Raises _LeftOut."""
        assert self._sent is not None
        try:
            (arrays,) = reply.content.array_records.values()
            tensors = {n.removeprefix(_PREFIX): t for n, t in _tensors(arrays).items()}
        except Exception:  # rubbish fails in many ways; each costs only its sender
            raise _LeftOut("not one record of arrays") from None
        names = set(self._sent.names)
        parts = [names, *({n for n in names if f".lora_{f}." in n} for f in "AB")]
        if set(tensors) not in parts:
            raise _LeftOut("factors missing or unexpected")
        try:
            adapter = self._adapter({**self._sent.tensors, **tensors})
        except ValueError as problem:
            raise _LeftOut(str(problem)) from None
        expected = self._sent.adapter.layers
        if any(layer.shape != expected[name].shape for name, layer in adapter.layers.items()):
            raise _LeftOut("factors of another shape")
        rank, sent = adapter.spec.rank, self._sent.adapter.spec.rank
        most = max(sent, min(min(layer.shape) for layer in expected.values()))
        if rank != sent and (self._one_rank or not 1 <= rank <= most):
            allowed = f"{sent}" if self._one_rank else f"1 to {most}"
            raise _LeftOut(f"factors of rank {rank}, not {allowed}")
        if not adapter.is_finite():
            raise _LeftOut("factors hold NaN or infinity")
        if any(tensor.abs().max() > LARGEST for tensor in tensors.values()):
            raise _LeftOut("factors impossibly large")
        room = min(torch.finfo(t.dtype).max for t in self._sent.tensors.values()) / _ROOM
        if any(layer.norm() > room for layer in adapter.layers.values()):
            raise _LeftOut("updates too large for the type that was sent")
        return adapter

    def _weight(self, reply: Message) -> float:
        """What the hospital counts, before normalisation. Raises _LeftOut."""
        if reply.has_error():  # its text may quote what a hospital was working on
            raise _LeftOut(f"Flower error {reply.error.code}")
        if not isinstance(reply.content, RecordDict):  # Flower hands on whatever it was sent
            raise _LeftOut("no records")
        if self.weighted_by_key == _EQUAL:
            return 1.0
        records = list(reply.content.metric_records.values())
        weight = records[0].get(self.weighted_by_key) if len(records) == 1 else None
        least, most = _WEIGHTS
        if not isinstance(weight, int | float) or not least <= weight <= most:
            raise _LeftOut(f"metric {self.weighted_by_key} is no number from {least:g} to {most:g}")
        return float(weight)

    def _metrics(self, contents: Sequence[RecordDict], mean: Any) -> MetricRecord | None:
        """The hospitals' metrics through Flower's (or the user's) function, if they are alike."""
        key = self.weighted_by_key
        found = []
        for content in contents:
            for name, record in content.metric_records.items():
                weighted = {**record, key: 1.0} if key == _EQUAL else dict(record)
                found.append(RecordDict({**content, name: MetricRecord(weighted)}))
        if not found:
            return None
        shapes = [
            {k: len(v) if isinstance(v, list) else None for k, v in record.items()}
            for content in found
            for record in content.metric_records.values()
        ]
        if len(shapes) != len(contents) or any(s != shapes[0] for s in shapes) or (
            shapes[0].get(key, 0) is not None
        ):  # fmt: skip
            log.warning("metrics are not averaged: they differ, or metric %s is missing", key)
            return None
        result: MetricRecord = mean(found, key)
        return result


def _innermost(strategy: Strategy) -> Strategy:
    """What acts on the factors, where a strategy wraps another."""
    while isinstance(strategy, Lines):
        strategy = create(strategy.of, strategy.parameters)
    return strategy


def _kept_factors(strategy: Strategy) -> tuple[str, ...]:
    """The factors of which one must come back as it was sent; none where both may move."""
    trained = strategy.declared.trains
    if strategy.declared.space != "factors" or "both" in trained:
        return ()
    return tuple(kept for kept, moved in (("A", "B"), ("B", "A")) if moved in trained)


def _tensors(arrays: ArrayRecord) -> dict[str, Tensor]:
    """By name; ValueError for what is no array of floating-point numbers."""
    tensors = arrays.to_torch_state_dict()
    if not all(tensor.is_floating_point() for tensor in tensors.values()):
        raise ValueError("arrays are not of floating-point numbers")
    return dict(tensors)


def _report(found: Merge) -> dict[str, float]:
    figures = {
        "merge-kept-energy": found.kept_energy,
        "merge-norm-ratio": found.norm_ratio,
        "merge-discrepancy": found.discrepancy,
        "merge-mean-cosine": found.mean_cosine,
    }
    return {name: value for name, value in figures.items() if value is not None}
