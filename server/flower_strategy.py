"""Any of our merges as a plain Flower strategy, for a ServerApp of one's own.

The arrays that ``start`` is given are PEFT LoRA factors (``LAYER.lora_A.weight``,
``LAYER.lora_B.weight``, with or without PEFT's prefix), and so are those of the replies, which are
merged as products; see ``strategies``. What a reply must be is in ``server.flower_replies``; one
that cannot be merged costs its sender the round and nobody else: who was left out and why is in the
log and in ``left_out``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from adapters.adapter import Adapter
from conf.load import ConfigError
from server.flower_replies import EQUAL, Sent, Unusable, frozen_in, judged, weight_of
from strategies.base import Draw, MergeError, Strategy
from strategies.merging import Merge, merge
from strategies.registry import create, require_no_order

log = logging.getLogger("flwr")  # where Flower's own strategies write


class MergeStrategy(FedAvg):
    """Flower's sampling and messages, our merge.

    Parameters
    ----------
    strategy
        Name of a strategy (see ``docs/merging.md``), or one that is made already.
    parameters
        Of the strategy of that name; none of one that is made already.
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

    Raises ConfigError for an unknown strategy or parameter, parameters beside a strategy that is
    made already, a strategy that needs statistics, which these messages do not carry, or an order,
    which hospitals do not have, and for an ``alpha`` not above 0. With no usable reply at all, or
    with too few for the strategy as some were left out, the arrays stay as they were. A round
    raises MergeError when it samples more or fewer hospitals than the strategy can merge, before it
    asks them: no later round would do better.
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
        super().__init__(weighted_by_key=weighted_by_key or EQUAL, **sampling)
        made = create(strategy, parameters) if isinstance(strategy, str) else strategy
        if made is strategy and parameters:
            raise ConfigError(
                f"parameters: strategy={made.name} is made already; give its name with them, or "
                "make it with them"
            )
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
        if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
            raise ConfigError(f"alpha={alpha}: must be a number above 0, or None")
        if weighted_by_key and not made.weighted:
            raise ConfigError(
                f"weighted_by_key={weighted_by_key}: strategy={made.name} counts all hospitals "
                "alike; leave it out, or take another strategy"
            )
        self.strategy: Strategy = made
        self.alpha = alpha
        self.run = run
        self.left_out: dict[int, dict[int, str]] = {}  # round -> node -> reason
        self._sent: Sent | None = None
        self._asked: list[Message] = []

    def summary(self) -> None:
        log.info("\t├──> Merge: %s %s", self.strategy.name, self.strategy.model_dump())
        super().summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As FedAvg. Raises ValueError when ``arrays`` are not the factors of a LoRA adapter.

        Raises MergeError, before anybody is asked, when the strategy cannot merge such layers or as
        many hospitals as were sampled.
        """
        self._sent = Sent.read(arrays, self.alpha)
        self.strategy.require_layers(self._sent.adapter.layers)
        self._asked = list(super().configure_train(server_round, arrays, config, grid))
        if self._asked:
            self.strategy.require_count(len(self._asked))
        return self._asked

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The merged factors, under the names and in the types that were sent; and metrics.

        Beside the hospitals' metrics there is what the merge reports of itself (``merge-...``; see
        ``strategies.merging.Merge``). Of nothing that can be merged: the arrays as they were sent,
        and no metrics. Raises MergeError.
        """
        if self._sent is None:
            raise RuntimeError("configure_train has not been called")
        good, left_out = judged(
            replies, self._asked, self._sent, self.strategy, self.weighted_by_key
        )
        self.left_out[server_round] = {node: one.reason for node, one in sorted(left_out.items())}
        for node, reason in self.left_out[server_round].items():
            log.warning("round %d: node %d left out: %s", server_round, node, reason)
        if not good:
            return self._sent.arrays, None
        in_order = [good[node] for node in sorted(good)]
        adapters = [one.adapter for one in in_order]
        total = math.fsum(one.weight for one in in_order)
        shares = [one.weight / total for one in in_order]
        spec = self._sent.adapter.spec
        alike = all(adapter.spec == spec for adapter in adapters)
        draw = Draw(self.run, server_round)
        caught = sum(one.lied for one in left_out.values())
        try:
            rank = None if alike else spec.rank
            strategy = self.strategy.after(caught, len(self._asked))
            found = merge(
                strategy,
                adapters,
                shares,
                draw,
                rank,
                origin=self._sent.adapter,
                orthonormal=frozen_in(in_order, self._sent),
            )
        except MergeError as problem:
            if not left_out:
                raise
            log.warning("round %d: nothing was merged: %s", server_round, problem)
            return self._sent.arrays, None
        contents = [one.content for one in in_order]
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
                weight_of(reply, self.weighted_by_key)
            except Unusable as reason:
                node = reply.metadata.src_node_id
                log.warning("round %d: metrics of node %d left out: %s", server_round, node, reason)
            else:
                contents.append(reply.content)
        return self._metrics(contents, self.evaluate_metrics_aggr_fn)

    def _metrics(self, contents: Sequence[RecordDict], mean: Any) -> MetricRecord | None:
        """The hospitals' metrics through Flower's (or the user's) function, if they are alike."""
        key = self.weighted_by_key
        found = []
        for content in contents:
            for name, record in content.metric_records.items():
                weighted = {**record, key: 1.0} if key == EQUAL else dict(record)
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


def _report(found: Merge) -> dict[str, float]:
    figures = {
        "merge-kept-energy": found.kept_energy,
        "merge-norm-ratio": found.norm_ratio,
        "merge-discrepancy": found.discrepancy,
        "merge-mean-cosine": found.mean_cosine,
    }
    return {name: value for name, value in figures.items() if value is not None}
