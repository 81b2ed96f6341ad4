"""Our merges as Flower strategies: over real messages, and once in Flower's simulation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Strategy as FlowerStrategy
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from transformers import AutoModelForCausalLM

from conf.load import ConfigError
from server.flower_strategy import MergeStrategy
from strategies.base import MergeError
from strategies.registry import OURS, create

if TYPE_CHECKING:
    from conftest import LocalGrid

Grids = type["LocalGrid"]
Change = Callable[[RecordDict], None]

PREFIX = "base_model.model."
SHAPES = {"model.layers.0.self_attn.q_proj": (8, 6), "model.layers.1.self_attn.v_proj": (5, 6)}


def factors(seed: int, rank: int = 2, prefix: str = PREFIX) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    made = {}
    for name, (m, n) in SHAPES.items():
        made[f"{prefix}{name}.lora_A.weight"] = torch.randn(rank, n, generator=g)
        made[f"{prefix}{name}.lora_B.weight"] = torch.randn(m, rank, generator=g)
    return made


def products(tensors: dict[str, Tensor], alpha: float | None = None) -> dict[str, Tensor]:
    """Scaled dense updates by layer."""
    found = {}
    for name in (n.removesuffix(".lora_A.weight") for n in tensors if "lora_A" in n):
        A, B = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
        scale = 1.0 if alpha is None else alpha / len(A)
        found[name.removeprefix(PREFIX)] = scale * B.double() @ A.double()
    return found


def arrays_of(content: RecordDict) -> dict[str, Tensor]:
    return dict(content.array_records["arrays"].to_torch_state_dict())


def reply(message: Message, tensors: dict[str, Tensor], **metrics: Any) -> Message:
    content = RecordDict({"arrays": ArrayRecord(tensors)})
    if metrics:
        content["metrics"] = MetricRecord({k.replace("_", "-"): v for k, v in metrics.items()})
    return Message(content, reply_to=message)


def hospital(seed: int, message: Message, rank: int = 2, changed: Change | None = None) -> Message:
    """Trains (draws) factors of its own and counts ``seed`` examples."""
    answer = reply(message, factors(seed, rank), num_examples=seed, loss=float(seed))
    if changed:
        changed(answer.content)
    return answer


def trained(moved: str, seed: int, message: Message) -> Message:
    """Adds ``seed`` to the factors named, and sends all."""
    sent = arrays_of(message.content)
    return reply(
        message, {n: t + seed if any(f"lora_{f}." in n for f in moved) else t
                  for n, t in sent.items()}
    )  # fmt: skip


def hospitals(**options: Any) -> dict[int, Callable[[Message], Message | None]]:
    return {10 + k: partial(hospital, k, **options) for k in (1, 2, 3)}


def start(strategy: MergeStrategy, grid: Grid, rounds: int = 1, rank: int = 2) -> Any:
    return strategy.start(grid, ArrayRecord(factors(0, rank)), num_rounds=rounds)


def only_train(name: str = "product_mean", *args: Any, **options: Any) -> MergeStrategy:
    return MergeStrategy(name, *args, fraction_evaluate=0.0, **options)


def gap(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert set(one) == set(other)
    size = sum(float(x.square().sum()) for x in other.values())
    return (sum(float((one[n] - other[n]).square().sum()) for n in one) / size) ** 0.5


def mean(seeds: tuple[int, ...], weights: list[float]) -> dict[str, Tensor]:
    own = [products(factors(seed)) for seed in seeds]
    return {n: sum(w * p[n] for w, p in zip(weights, own, strict=True)) for n in own[0]}  # type: ignore[misc]


def best_of_rank(dense: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    found = {}
    for name, update in dense.items():
        U, S, Vh = torch.linalg.svd(update, full_matrices=False)
        found[name] = (U[:, :rank] * S[:rank]) @ Vh[:rank]
    return found


def test_it_is_a_flower_strategy_and_gives_back_what_was_sent_in_names_types_and_shapes(
    local_grid: Grids,
) -> None:
    strategy = only_train()
    assert isinstance(strategy, FlowerStrategy)
    sent = {n: t.half() for n, t in factors(0).items()}
    found = strategy.start(local_grid(hospitals()), ArrayRecord(sent), num_rounds=2).arrays
    tensors = found.to_torch_state_dict()
    assert list(tensors) == list(sent)
    assert all(t.dtype == torch.float16 and t.shape == sent[n].shape for n, t in tensors.items())


@pytest.mark.parametrize(
    ("key", "weights"), [(None, [1 / 3] * 3), ("num-examples", [1 / 6, 2 / 6, 3 / 6])]
)
def test_products_are_averaged_equally_or_by_a_metric(
    key: str | None, weights: list[float], local_grid: Grids
) -> None:
    result = start(only_train(weighted_by_key=key), local_grid(hospitals()))
    expected = best_of_rank(mean((1, 2, 3), weights), 2)
    assert gap(products(result.arrays.to_torch_state_dict()), expected) < 1e-6
    metrics = result.train_metrics_clientapp[1]
    assert metrics["loss"] == pytest.approx(sum(w * k for w, k in zip(weights, (1, 2, 3))))  # noqa: B905
    assert metrics["merge-hospitals"] == 3
    assert 0 < metrics["merge-kept-energy"] < 1 < metrics["merge-discrepancy"] + 1


@pytest.mark.parametrize(
    "name",
    [
        kind.name
        for kind in OURS
        if kind.name not in ("ffa", "fedsvd", "rolora")
        and not (kind.declared.statistics or kind.declared.noise)
    ],
)
def test_every_strategy_of_ours_runs_as_one_of_flowers(name: str, local_grid: Grids) -> None:
    own = hospitals()
    own |= {14: partial(hospital, 4), 15: partial(hospital, 5)}
    if name == "slerp":
        own = {k: own[k] for k in (11, 12)}
    tensors = start(only_train(name), local_grid(own), 2).arrays.to_torch_state_dict()
    assert all(torch.isfinite(t).all() for t in tensors.values())


@pytest.mark.parametrize("name", ["ffa", "fedsvd", "rolora"])
@pytest.mark.parametrize("sends_all", [True, False])
def test_under_a_shared_factor_only_the_other_one_need_travel(
    name: str, sends_all: bool, local_grid: Grids
) -> None:
    def trained(seed: int, message: Message) -> Message:
        sent = arrays_of(message.content)
        own = {n: t + seed if "lora_B" in n else t for n, t in sent.items()}
        return reply(message, {n: t for n, t in own.items() if sends_all or "lora_B" in n})

    result = start(only_train(name), local_grid({k: partial(trained, k) for k in (1, 2, 3)}))
    expected = {n: t + 2 if "lora_B" in n else t for n, t in factors(0).items()}
    assert gap(products(result.arrays.to_torch_state_dict()), products(expected)) < 1e-6


def test_ranks_may_differ_and_then_alpha_counts(local_grid: Grids) -> None:
    own = hospitals() | {11: partial(hospital, 1, rank=4)}
    result = start(only_train(alpha=8.0), local_grid(own))
    updates = [products(factors(1, 4), 8.0), *(products(factors(k), 8.0) for k in (2, 3))]
    expected = {n: torch.stack([u[n] for u in updates]).mean(0) for n in updates[0]}
    found = products(result.arrays.to_torch_state_dict(), 8.0)
    assert gap(found, best_of_rank(expected, 2)) < 1e-6


# --- mistakes of the user -----------------------------------------------------------------------


@pytest.mark.parametrize("moved", ["A", "B"])
def test_where_a_rule_factorises_again_what_hospitals_left_frozen_is_orthonormal(
    moved: str, local_grid: Grids
) -> None:
    own = {k: partial(trained, moved, k) for k in (1, 2, 3)}
    arrays = start(only_train("median"), local_grid(own)).arrays.to_torch_state_dict()
    for name, tensor in arrays.items():
        rows = tensor.T if "lora_B" in name else tensor
        orthonormal = torch.allclose(rows @ rows.T, torch.eye(len(rows)), atol=1e-5)
        assert orthonormal == (f"lora_{moved}" not in name)


@pytest.mark.parametrize(("name", "count"), [("median", 2), ("slerp", 3)])
def test_nobody_is_asked_for_a_round_that_could_not_be_merged(
    name: str, count: int, local_grid: Grids
) -> None:
    grid = local_grid({k: partial(hospital, k) for k in range(1, count + 1)})
    with pytest.raises(MergeError, match=r"needs at least 3|merges two"):
        start(only_train(name), grid)
    assert grid.asked == []


def test_mistakes_are_told_at_once(local_grid: Grids) -> None:
    with pytest.raises(ConfigError, match=r"strategy\.name=best: choose one of"):
        MergeStrategy("best")
    with pytest.raises(
        ConfigError, match="parameters: strategy=ties is made already; give its nam"
    ):
        MergeStrategy(create("ties"), {"density": 0.3})
    with pytest.raises(ConfigError, match=r"strategy\.density=2"):
        MergeStrategy("ties", {"density": 2})
    with pytest.raises(ConfigError, match="strategy=ties: a density for each adapter needs an ord"):
        MergeStrategy("ties", {"density": [0.2, 0.3]})
    with pytest.raises(ConfigError, match="noise_aware: needs to know every hospital's noise"):
        MergeStrategy("noise_aware")
    with pytest.raises(ConfigError, match="lines: needs to know every hospital's noise"):
        MergeStrategy("lines", {"of": "noise_aware"})
    with pytest.raises(ConfigError, match="weighted_by_key=num-examples: strategy=median counts"):
        MergeStrategy("median", weighted_by_key="num-examples")
    for alpha in (0, -1.0, float("inf")):
        with pytest.raises(ConfigError, match=r"alpha=.*: must be a number above 0"):
            MergeStrategy(alpha=alpha)
    with pytest.raises(MergeError, match=r"block 1 is adapted, strategy\.blocks=1"):
        start(MergeStrategy("lines", {"blocks": 1}), local_grid(hospitals()))
    with pytest.raises(ConfigError, match="strategy=lines: needs gram statistics"):
        MergeStrategy("lines", {"of": "regmean"})
    live = {n.replace(".weight", ".default.weight"): t for n, t in factors(0).items()}
    other = {"conv.weight": torch.ones(2, 2)}
    for arrays in (live, other, factors(0) | {"head.weight": torch.ones(2)}):
        with pytest.raises(
            ValueError, match=r"(factor|not matrices).*; send what peft\.get_peft_mod"
        ):
            only_train().start(local_grid(hospitals()), ArrayRecord(arrays), num_rounds=1)
    with pytest.raises(MergeError, match="slerp merges two"):
        start(only_train("slerp"), local_grid(hospitals()))


# --- Flower's own engine ------------------------------------------------------------------------


@pytest.mark.slow
def test_in_flowers_simulation_peft_adapters_learn_and_a_broken_hospital_is_left_out(
    tiny_model: Path,
) -> None:
    from simulation.flower import run_simulation

    client = ClientApp()

    def live() -> Any:
        config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
        return get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config)

    ids = torch.arange(24).reshape(2, 12)

    @client.train()
    def train(message: Message, context: Context) -> Message:
        model = live()
        set_peft_model_state_dict(model, arrays_of(message.content))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
        for _ in range(3):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        own = get_peft_model_state_dict(model)
        if context.node_config["partition-id"] == 2:
            own = {n: t * float("nan") for n, t in own.items()}
        return reply(message, own, num_examples=5, loss=float(loss))

    server = ServerApp()
    seen: dict[str, Any] = {}

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = MergeStrategy(
            "product_mean", alpha=4, min_available_nodes=3, fraction_evaluate=0.0
        )
        start = ArrayRecord(get_peft_model_state_dict(live()))
        seen["result"] = strategy.start(grid, start, num_rounds=3, train_config=ConfigRecord())
        seen["left_out"] = strategy.left_out

    run_simulation(server, client, 3, backend_config={"client_resources": {"num_cpus": 1}})
    assert [list(reasons.values()) for reasons in seen["left_out"].values()] == [
        ["factors hold NaN or infinity"]
    ] * 3
    losses = [m["loss"] for m in seen["result"].train_metrics_clientapp.values()]
    assert losses[0] > losses[1] > losses[2]
