"""What merging many hospitals takes: ``python -m benchmarks.streaming [--quick] [--json FILE]``.

1,000 hospitals (--quick: 100) send adapters of rank 16 for the embedded model, which are made when
they are asked for and not kept (making them is part of the time: once or a few times each). Every
strategy that streams merges them, each in a process of its own: CPU seconds, and the peak of
resident memory, libraries included, as in a round that began with the first of them. The goal is
2 GB.

    qv            30 layers of q (576 x 576) and v (192 x 576): the default adapter
    all-linear    all seven matrices of 30 layers; here the mean of products alone
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from adapters.adapter import Adapter, AdapterSpec
from adapters.lowrank import LowRank
from adapters.statistics import MeasuredAdapter
from strategies.base import Draw, Noise, Strategy
from strategies.merging import merge
from strategies.registry import OURS, create

_RANK, _LAYERS, _WIDTH, _KEYS, _INNER = 16, 30, 576, 192, 1536
_QV = {"self_attn.q_proj": (_WIDTH, _WIDTH), "self_attn.v_proj": (_KEYS, _WIDTH)}
_SHAPES = {
    "qv": _QV,
    "all-linear": {
        **_QV,
        "self_attn.k_proj": (_KEYS, _WIDTH),
        "self_attn.o_proj": (_WIDTH, _WIDTH),
        "mlp.gate_proj": (_INNER, _WIDTH),
        "mlp.up_proj": (_INNER, _WIDTH),
        "mlp.down_proj": (_WIDTH, _INNER),
    },
}
_SHARED = {"ffa", "fedsvd", "rolora", "fisher", "regmean", "noise_aware"}  # all have the same A
GOAL_MB = 2000.0
JOBS = [("qv", kind.name) for kind in OURS if kind.declared.streams]
JOBS += [("all-linear", name) for name in ("product_mean", "fedsvd", "ffa")]


class Hospitals(Sequence[Adapter]):
    """Adapters from a seed, made each time they are asked for."""

    def __init__(self, count: int, shapes: str, strategy: Strategy) -> None:
        self._count, self._shapes = count, _SHAPES[shapes]
        self._shared, self._statistics = strategy.name in _SHARED, strategy.statistics

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, k: Any) -> Any:
        if k >= self._count:
            raise IndexError(k)
        own = torch.Generator().manual_seed(k)
        common = torch.Generator().manual_seed(2**40)
        layers, measured = {}, {}
        for i in range(_LAYERS):
            for name, (m, n) in self._shapes.items():
                A = torch.randn(_RANK, n, generator=common if self._shared else own)
                B = torch.randn(m, _RANK, generator=own)
                layer = f"model.layers.{i}.{name}"
                layers[layer] = LowRank(B, A)
                if self._statistics == "gram":
                    measured[layer] = A @ A.T
                elif self._statistics == "fisher":
                    measured[f"{layer}.lora_B.weight"] = B.square()
        spec = AdapterSpec(_RANK, 2.0 * _RANK, tuple(self._shapes))
        return MeasuredAdapter(spec, layers, measured)


def main() -> None:
    """Measure, print one table, and write the figures where asked."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="100 hospitals, the default adapter")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    parser.add_argument("--one", nargs=3, metavar=("SHAPES", "STRATEGY", "N"), help="one merge")
    options = parser.parse_args()
    if options.one:
        shapes, strategy, count = options.one
        sys.stdout.write(json.dumps(_one(shapes, strategy, int(count))) + "\n")
        return
    count = 100 if options.quick else 1000
    jobs = [job for job in JOBS if job[0] == "qv" or not options.quick]
    results: dict[str, float] = {}
    with Progress(console=Console(stderr=True)) as progress:
        for shapes, name in progress.track(jobs, description=f"{count} hospitals"):
            command = [sys.executable, "-m", "benchmarks.streaming", "--one", shapes, name]
            done = subprocess.run([*command, str(count)], stdout=subprocess.PIPE, check=True)
            for key, value in json.loads(done.stdout).items():
                results[f"stream.{count}.{shapes}.{name}.{key}"] = value
    Console().print(_table(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


def _one(shapes: str, name: str, count: int) -> dict[str, float]:
    """CPU seconds of one merge, and this process's peak of resident megabytes."""
    torch.set_num_threads(1)
    strategy = create(name)
    hospitals = Hospitals(count, shapes, strategy)
    began = time.process_time()
    draw = Draw(noise=Noise(hospitals[0], (0.1,) * count)) if strategy.needs_noise else None
    merge(strategy, hospitals, [1 / count] * count, draw, origin=hospitals[0])
    seconds = time.process_time() - began
    return {"seconds": seconds, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3}


def _table(results: dict[str, float]) -> Table:
    table = Table(title="Merged one at a time", title_justify="left")
    for column in ("figure", "measured", "goal"):
        table.add_column(column, justify="left" if column == "figure" else "right")
    for key, value in results.items():
        goal = GOAL_MB if key.endswith("peak_mb") else None
        shown = f"{value:.0f}"
        over = goal is not None and value > goal
        table.add_row(key, f"[red]{shown}[/]" if over else shown, f"{goal:g}" if goal else "")
    return table


if __name__ == "__main__":
    main()
