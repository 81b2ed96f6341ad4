"""merge_report.json: how a merge came about, for who has only its result.

It names inputs as they were typed in the recipe, and no other path.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from adapters.adapter import Adapter
from adapters.lowrank import LowRank, gram
from server.offline.adapters import AdapterFolder, kept_by_layer, other_base, size_bytes
from server.offline.figures import Figures
from server.offline.models import Folded, ModelMerge
from server.offline.plan import Plan
from server.offline.recipe import Recipe
from server.run_folder import write_atomically
from strategies.base import deltas
from strategies.merging import Merge, mean_cosine

REPORT = "merge_report.json"
_MUCH = 0.01  # of an update lost by folding it into weights: worth a word
_PACKAGES = ("wardround", "torch", "safetensors", "peft", "transformers")


def of_adapters(
    recipe: Recipe,
    plan: Plan,
    opened: Sequence[AdapterFolder],
    found: Merge,
    exact: int,
    saved: Adapter,
    folded: Folded | None,
) -> dict[str, Any]:
    """The report on merged adapters.

    ``exact`` is the rank that loses nothing; ``saved`` the adapter as it is written; ``folded``
    tells of the merged model, where one was written.
    """
    inputs = [
        {
            "model": one.typed,
            "fingerprint": one.fingerprint,
            "rank": one.adapter.spec.rank,
            "scale": one.adapter.spec.scale,
            "weight": weight * sign,
        }
        for one, weight, sign in zip(opened, plan.weights, plan.signs, strict=True)
    ]
    output: dict[str, Any] = {"adapter": {"fingerprint": saved.fingerprint()}}
    output["adapter"] |= {"rank": saved.spec.rank, "exact": saved.spec.rank == exact}
    base = None
    if folded is not None:
        base = {"model": plan.base_model, "fingerprint": folded.base}
        output["model"] = {"fingerprint": folded.result, "rounding": folded.rounding}
    elif plan.base_model is not None:
        base = {"model": plan.base_model}
    figures = {
        "kept_energy": found.kept_energy,
        "discrepancy": found.discrepancy,
        "mean_cosine": found.mean_cosine,
        "norm_ratio": found.norm_ratio,
        "rounding": _rounding(found.adapter, saved),
    }
    about = "updates of adapters"
    layers = _layers(plan, opened, found)
    notes = []
    if plan.base_model is not None:
        notes = [n for o in opened for n in other_base(o.typed, o.base_model, plan.base_model)]
    notes += _grown(opened, found, saved) if saved.spec.rank == exact else []
    if folded is not None and folded.rounding > _MUCH:
        notes.append(
            f"rounding moved the folded weights by {_percent(folded.rounding)} of the update; "
            "dtype: float32 keeps it"
        )
    return _report(recipe, plan, about, base, inputs, output, figures, layers, notes)


def of_models(
    recipe: Recipe, plan: Plan, merge: ModelMerge, figures: Figures, notes: Sequence[str]
) -> dict[str, Any]:
    """The report on merged models."""
    inputs = [
        {"model": model.typed, "fingerprint": fingerprint, "weight": weight * sign}
        for model, fingerprint, weight, sign in zip(
            merge.models, figures.fingerprints, plan.weights, plan.signs, strict=True
        )
    ]
    base = None
    if merge.base is not None:
        base = {"model": merge.base.typed, "fingerprint": figures.base_fingerprint}
    about = "differences from the base model" if merge.base else "weights"
    output = {"model": {"fingerprint": figures.fingerprint, "tensors": len(merge.like.headers)}}
    totals = figures.totals()
    return _report(recipe, plan, about, base, inputs, output, totals, figures.layers, notes)


def summary(report: Mapping[str, Any], folder: Path) -> list[str]:
    """What a person wants to know at once of the merge that lies in ``folder``; its notes."""
    made, output = [], report["output"]
    for kind in ("adapter", "model"):
        if kind in output:
            place = folder / kind if (folder / kind).exists() else folder
            size = sum(f.stat().st_size for f in place.glob(f"{kind}*.safetensors"))
            rank = f" of rank {output[kind]['rank']}" if kind == "adapter" else ""
            made.append(f"{kind}{rank}, {_megabytes(size) if size else 'folded in'}")
    kept = report["figures"].get("kept_energy", 1.0)
    if kept < 1 - 1e-6:
        made.append(f"keeps {_percent(kept)} of the squared norm in the layer that loses most")
    return ["; ".join(made), *(f"note: {note}" for note in report["notes"])]


def write_report(folder: Path, report: dict[str, Any], began: float) -> None:
    """Write it, with the seconds since ``began`` (``time.monotonic``)."""
    report["seconds"] = round(time.monotonic() - began, 3)
    write_atomically(folder / REPORT, json.dumps(report, indent=2) + "\n")


def _report(
    recipe: Recipe,
    plan: Plan,
    about: str,
    base: dict[str, Any] | None,
    inputs: list[dict[str, Any]],
    output: dict[str, Any],
    figures: dict[str, Any],
    layers: dict[str, dict[str, Any]],
    notes: Sequence[str],
) -> dict[str, Any]:
    return {
        "merge_method": recipe.merge_method,
        "strategy": plan.strategy.name,
        "parameters": plan.strategy.model_dump(mode="json"),
        "paper": plan.strategy.declared.paper,
        "acts_on": about,
        "inputs": inputs,
        "base_model": base,
        "dtype": recipe.saved_as,
        "seed": recipe.seed,
        "output": output,
        "figures": figures,
        "notes": [*plan.notes, *notes],
        "layers": layers,
        "recipe": recipe.model_dump(mode="json", exclude_unset=True),
        "versions": {package: version(package) for package in _PACKAGES},
    }


def _grown(opened: Sequence[AdapterFolder], found: Merge, saved: Adapter) -> list[str]:
    """A warning when the exact adapter is larger than all that went into it."""
    ranks, size = [one.adapter.spec.rank for one in opened], sum(one.size for one in opened)
    own = size_bytes(saved)
    if own <= size:
        return []
    kept = min(kept_by_layer(found.adapter, max(ranks)).values())
    return [
        f"the exact adapter (rank {saved.spec.rank}, {_megabytes(own)}) is larger than the inputs "
        f"together (rank {sum(ranks)}, {_megabytes(size)}); parameters.rank: {max(ranks)} would "
        f"keep {_percent(kept)}"
    ]


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.3g} MB"


def _percent(share: float) -> str:
    return f"{math.floor(1000 * share) / 10:g} %"  # never says that all is kept of what is not


def _layers(plan: Plan, opened: Sequence[AdapterFolder], found: Merge) -> dict[str, dict[str, Any]]:
    weights = torch.tensor(plan.weights, dtype=torch.float64)
    signs = torch.tensor(plan.signs, dtype=torch.float64)
    merged = found.adapter.deltas()
    layers = {}
    for name, parts in deltas([one.adapter for one in opened]).items():
        products = gram(parts) * signs[:, None] * signs[None, :]
        mean = math.sqrt(max(0.0, float(weights @ products @ weights)))
        layers[name] = {
            "kept_energy": found.kept_by_layer[name],
            "mean_cosine": mean_cosine(products),
            "norm_ratio": merged[name].norm() / mean if mean else 1.0,
        }
    return layers


def _rounding(exact: Adapter, saved: Adapter) -> float:
    """Relative Frobenius norm of what the type that is saved has lost, over all layers."""
    error = size = 0.0
    for name, update in exact.layers.items():
        kept = saved.layers[name].to(torch.float64)
        # B A - B' A' by small differences of factors: those of products would cancel.
        lost = LowRank(update.B - kept.B, update.A) + LowRank(kept.B, update.A - kept.A)
        error += lost.norm() ** 2
        size += update.norm() ** 2
    return math.sqrt(error / size) if size else 0.0
