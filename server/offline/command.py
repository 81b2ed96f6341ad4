"""``wardround merge FILE.yaml OUT_DIR``: read the recipe, check, merge, report; all or nothing.

The result is written beside its place and moved there when it is complete and on the disk, so an
interrupted merge leaves nothing behind that could be taken for a result.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from adapters.adapter import Adapter
from conf.load import ConfigError
from server.model_folder import ModelFolder, copy_rest, same_tokenizer
from server.offline.adapters import base_name, merge_adapters, open_adapters
from server.offline.models import ModelMerge, fold_adapter, require_fit
from server.offline.plan import Kind, Plan, plan
from server.offline.recipe import Output, Recipe, read_recipe
from server.offline.report import of_adapters, of_models, summary, write_report
from server.progress import stage_progress
from server.whole_folder import whole_folder
from strategies.base import MergeError

Job = Callable[[Path], dict[str, Any]]  # fills an empty folder and gives the report


def run(file: Path, out: Path, console: Console) -> Path:
    """Merge as the recipe in ``file`` says, into the new folder ``out``.

    Raises ConfigError naming the key of the recipe that cannot be followed, MergeError naming the
    input that does not fit, OSError when the disk gives up.
    """
    recipe = read_recipe(file)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: exists and is not empty; name a new folder")
    try:
        kind = _kind(recipe)
        todo = plan(recipe, kind)
        output = _output(recipe, kind, todo)
        tokenizer = _tokenizer(recipe, output, todo)
    except ConfigError as problem:
        raise ConfigError(f"{file}: {problem}") from None
    job = _adapters if kind == "adapter" else _models
    fill = job(recipe, todo, output, tokenizer, console)
    with whole_folder(out) as made:
        report = fill(made)
    for line in summary(report, out):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    return out


def _adapters(
    recipe: Recipe, todo: Plan, output: Output, tokenizer: Path | None, console: Console
) -> Job:
    """Checked and ready: adapters into an adapter, its base model with it folded in, or both."""
    began = time.monotonic()
    opened = open_adapters(todo)
    base = None
    if output != "adapter" and todo.base_model is not None:
        base = ModelFolder.open(todo.base_model)
        require_fit(base, opened[0].adapter)
    dtype = _dtype(recipe)

    def job(folder: Path) -> dict[str, Any]:
        with stage_progress(console) as progress:
            bar = progress.add_task("merge", total=1 + (len(base.headers) if base else 0))
            found, exact = merge_adapters(todo, opened, recipe.seed)
            progress.advance(bar)
            # One and the same adapter, whichever form it leaves in.
            kept = dtype if output == "adapter" and dtype else torch.float32
            saved = _rounded(found.adapter, kept)
            if output != "model":
                place = folder / "adapter" if output == "both" else folder
                name = base_name(opened, todo.base_model)
                saved.save(place, name, kept)
            folded = None
            if base is not None and tokenizer is not None:
                place = _made(folder / "model" if output == "both" else folder)
                folded = fold_adapter(base, saved, place, dtype, lambda: progress.advance(bar))
                copy_rest(place, base, tokenizer, dtype)
        report = of_adapters(recipe, todo, opened, found, exact, saved, folded)
        write_report(folder, report, began)
        return report

    return job


def _models(
    recipe: Recipe, todo: Plan, output: Output, tokenizer: Path | None, console: Console
) -> Job:
    """Checked and ready: whole models into one."""
    began = time.monotonic()
    base = None if todo.base_model is None else ModelFolder.open(todo.base_model)
    merge = ModelMerge(todo, base, recipe.seed)
    source = tokenizer or merge.like.path
    dtype = _dtype(recipe)
    notes = merge.notes()
    notes += [
        f"the tokenizer of {model.typed} is another than the one that was kept"
        for model in merge.models
        if not same_tokenizer(model.path, source)
    ]

    def job(folder: Path) -> dict[str, Any]:
        with stage_progress(console) as progress:
            bar = progress.add_task("merge", total=merge.steps)
            figures = merge.write(folder, dtype, lambda: progress.advance(bar))
        copy_rest(folder, merge.like, source, dtype)
        report = of_models(recipe, todo, merge, figures, notes)
        write_report(folder, report, began)
        return report

    return job


def _kind(recipe: Recipe) -> Kind:
    """What the inputs are. Raises ConfigError when they are nothing, or of both kinds."""
    kinds: dict[Kind, int] = {}
    for number, entry in enumerate(recipe.models):
        folder = Path(entry.model)
        where = f"models.{number}.model={entry.model}"
        if not folder.is_dir() and "+" in entry.model:
            raise ConfigError(
                f"{where}: a model with an adapter on it is not taken; first make it a model, by a "
                "recipe with models: the adapter, base_model: the model, output: model"
            )
        if not folder.is_dir():
            raise ConfigError(f"{where}: no such folder; download it first, nothing is fetched")
        if (folder / "adapter_config.json").exists():
            kinds.setdefault("adapter", number)
        elif (folder / "config.json").exists():
            kinds.setdefault("model", number)
        else:
            raise ConfigError(f"{where}: neither a PEFT adapter nor a model (no config)")
    if len(kinds) > 1:
        raise ConfigError(
            f"models.{kinds['adapter']}.model={recipe.models[kinds['adapter']].model}: is an "
            "adapter among models; first make it a model of its own, by a recipe with output: model"
        )
    return next(iter(kinds))


def _output(recipe: Recipe, kind: Kind, todo: Plan) -> Output:
    """What is written. Raises ConfigError when the inputs or the base model do not allow it."""
    output, base = recipe.output or kind, todo.base_model
    if kind == "model" and output != "model":
        raise ConfigError(f"output={output}: whole models merge to a model")
    if output == "adapter":
        return output
    if base is None and kind == "adapter":
        raise ConfigError(f"output={output}: needs base_model, the folder of the adapters' model")
    if base is not None and not (Path(base) / "config.json").is_file():
        raise ConfigError(f"base_model={base}: no folder of a model; download it first")
    return output


def _tokenizer(recipe: Recipe, output: Output, todo: Plan) -> Path | None:
    """The folder whose tokenizer is kept; None when that is up to the first model."""
    source = recipe.tokenizer_source
    if source is None:
        return None if todo.base_model is None or output == "adapter" else Path(todo.base_model)
    if output == "adapter":
        raise ConfigError("tokenizer_source: an adapter has none; leave it out")
    if source == "union":
        raise ConfigError("tokenizer_source=union: not supported; take base, or one of the models")
    if source == "base":
        return Path(todo.base_model or todo.models[0])
    if source not in (todo.base_model, *todo.models):
        raise ConfigError(f"tokenizer_source={source}: must be base, or a folder that is merged")
    return Path(source)


def _rounded(adapter: Adapter, dtype: torch.dtype) -> Adapter:
    """The adapter as it will be read again. Raises MergeError when it is beyond the type."""
    saved = Adapter(adapter.spec, {n: layer.to(dtype) for n, layer in adapter.layers.items()})
    if not saved.is_finite():
        raise MergeError(f"dtype={str(dtype)[6:]}: cannot hold the merged adapter; take another")
    return saved


def _dtype(recipe: Recipe) -> torch.dtype | None:
    return getattr(torch, recipe.saved_as) if recipe.saved_as else None


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
