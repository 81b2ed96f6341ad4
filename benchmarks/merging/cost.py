"""What merging costs, in time and memory, against the same by other libraries.

Eight hospitals' adapters of rank 16 for one layer become one of rank 16, four ways: ours (QR and a
small SVD in float64, and the report); the dense mean and its SVD in float64, which is as exact;
and in float32, which is not, PEFT's ``add_weighted_adapter`` with ``svd`` and mergekit's dense mean
followed by the SVD that a LoRA would need. Ratios of CPU time and of peak memory to ours, one
thread, variants interleaved; the error is against dense products in float64.
"""

from __future__ import annotations

from statistics import median

import torch
from mergekit.merge_methods import merge_tensors
from peft import LoraConfig, get_peft_model
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from adapters.adapter import Adapter, AdapterSpec
from adapters.lowrank import LowRank
from benchmarks.measure import interleaved
from strategies.merging import merge
from strategies.registry import create

_HOSPITALS, _RANK, _LARGE = 8, 16, 10**7
_SHAPES = {"2048": (2048, 2048), "4096x11008": (4096, 11008)}
_IN_A_ROW = 10
_OTHERS = ("dense64", "peft", "mergekit")
GOALS = {
    **{f"merge.{s}.{other}.time": 100.0 for s in _SHAPES for other in _OTHERS},
    **{f"merge.{s}.error": 1e-12 for s in _SHAPES},
}  # a ratio at least, an error at most


def measure(quick: bool, progress: Progress) -> dict[str, float]:
    """Ratios and errors by name; ``quick`` measures the smaller layer only."""
    torch.set_num_threads(1)
    results: dict[str, float] = {}
    for name in list(_SHAPES)[: 1 if quick else None]:
        results |= _layer(name, progress)
    return results


def _layer(name: str, progress: Progress) -> dict[str, float]:
    m, n = _SHAPES[name]
    repeats = 1 if m * n > _LARGE else 3  # a dense SVD takes minutes there
    g = torch.Generator().manual_seed(0)
    factors = [
        LowRank(torch.randn(m, _RANK, generator=g), torch.randn(_RANK, n, generator=g))
        for _ in range(_HOSPITALS)
    ]
    spec = AdapterSpec(_RANK, float(_RANK), ("layer",))
    adapters = [Adapter(spec, {"layer": factor}) for factor in factors]
    weights = [1 / _HOSPITALS] * _HOSPITALS
    live = _peft_model(factors)
    strategy = create("product_mean")

    def ours() -> None:
        merge(strategy, adapters, weights)

    def dense64() -> None:
        mean = torch.zeros(m, n, dtype=torch.float64)
        for factor, w in zip(factors, weights, strict=True):
            mean.addmm_(factor.B.double(), factor.A.double(), alpha=w)
        _leading(mean)

    def peft() -> None:
        names = [str(i) for i in range(_HOSPITALS)]
        live.add_weighted_adapter(names, weights, "merged", "svd", svd_rank=_RANK)
        live.delete_adapter("merged")

    def mergekit() -> None:
        dense = [factor.dense() for factor in factors]
        mean = merge_tensors(dense, "linear", parameters={"weight": weights})
        _leading(mean)

    variants = {"ours": ours, "dense64": dense64, "peft": peft, "mergekit": mergekit}
    in_a_row = {"ours": _IN_A_ROW}  # as in a model, which has dozens of such layers
    once = repeats == 1
    times = interleaved(
        variants, repeats, progress, name, warm=once, keep_freed=True, in_a_row=in_a_row
    )
    peaks = interleaved(variants, 1, progress, f"{name}, memory", warm=True)
    out = {f"merge.{name}.{v}.seconds": median(times[v].seconds) for v in variants}
    for other in _OTHERS:
        out[f"merge.{name}.{other}.time"], _ = times[other].ratio_to(times["ours"])
        _, out[f"merge.{name}.{other}.memory"] = peaks[other].ratio_to(peaks["ours"])
    out[f"merge.{name}.error"] = _error(adapters, weights)
    return out


def _leading(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of its best approximation of the rank."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, :_RANK] * S[:_RANK], Vh[:_RANK]


def _peft_model(factors: list[LowRank]) -> nn.Module:
    """A live PEFT model of one layer with every hospital's adapter on it."""
    m, n = factors[0].shape
    model = nn.Sequential()
    model.add_module("layer", nn.Linear(n, m, bias=False))
    config = LoraConfig(r=_RANK, lora_alpha=_RANK, target_modules=["layer"])
    live = get_peft_model(model, config, adapter_name="0")  # type: ignore[arg-type]
    for i in range(1, len(factors)):
        live.add_adapter(str(i), config)
    layer = live.base_model.model.layer
    with torch.no_grad():
        for i, factor in enumerate(factors):
            layer.lora_A[str(i)].weight.copy_(factor.A)
            layer.lora_B[str(i)].weight.copy_(factor.B)
    return live.base_model


def _error(adapters: list[Adapter], weights: list[float]) -> float:
    """Relative Frobenius distance of our merged product to the best one of its rank, in float64.

    The best one is made of the dense mean M, knowing only that its rank is at most that of all
    hospitals together: an orthonormal basis Q of its range, the SVD of the small Q^T M, truncated.
    What Q would miss of M counts as error too.
    """
    ours = merge(create("product_mean"), adapters, weights, dtype=torch.float64).adapter
    (merged,) = ours.deltas().values()
    mean = torch.zeros(merged.shape, dtype=torch.float64)
    for adapter, w in zip(adapters, weights, strict=True):
        (update,) = adapter.deltas().values()
        mean.add_(update.to(torch.float64).dense(), alpha=w)
    total = sum(adapter.spec.rank for adapter in adapters)
    g = torch.Generator().manual_seed(1)
    probe = torch.randn(mean.shape[1], total + 16, generator=g, dtype=torch.float64)
    Q = torch.linalg.qr(mean @ probe).Q
    small = Q.T @ mean
    B, A = _leading(small)
    best = Q @ B @ A
    off, missed = (best - merged.dense()).norm(), (mean - Q @ small).norm()
    return float((off + missed) / best.norm())


def table(results: dict[str, float]) -> Table:
    """The figures beside their goals; what misses its goal is red."""
    made = Table(title="What merging costs: seconds, and theirs over ours", title_justify="left")
    for column in ("figure", "measured", "goal"):
        made.add_column(column, justify="left" if column == "figure" else "right")
    for key, value in results.items():
        goal = GOALS.get(key)
        met = goal is None or (value <= goal if key.endswith("error") else value >= goal)
        small = key.endswith(("error", "seconds"))
        shown = f"{value:.2g}" if small else f"{value:.0f}"
        made.add_row(key, shown if met else f"[red]{shown}[/]", "" if goal is None else f"{goal:g}")
    return made
