"""``wardround experts``: adapter folders and task files in, a merged adapter and a table out."""

from __future__ import annotations

import io
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file

from adapters.adapter import Adapter
from adapters.base_model import BaseModel
from conf.experts import ExpertsCommand
from conf.load import ConfigError, load
from server.experts import command as module
from server.experts.command import run
from server.experts.inputs import weights_under
from server.experts.interpolation import furthest
from server.experts.tasks import read_tasks, scores_of
from strategies.base import MergeError
from strategies.merging import Exact, merge
from strategies.registry import create

QUIET = Console(quiet=True)
Make = Callable[..., ExpertsCommand]


@pytest.fixture
def make(tmp_path: Path, tiny_model: Path, experts: list[Path], task_files: list[Path]) -> Make:
    """The command as typed, with the given options added."""

    def command(*options: str) -> ExpertsCommand:
        def listed(paths: list[Path]) -> str:
            return f"[{','.join(map(str, paths))}]"

        base = [
            f"experts={listed(experts)}", f"tasks={listed(task_files)}", f"out={tmp_path / 'out'}",
            "model=path", f"model.path={tiny_model}", "search.evaluations=8", "max_tokens=128",
        ]  # fmt: skip
        return load("experts", [*base, *options], ExpertsCommand)

    return command


def test_the_result_is_the_best_of_what_was_tried(
    make: Make, tmp_path: Path, base: BaseModel, task_files: list[Path]
) -> None:
    command = make("strategy=ties", "proportions=[0.25,1]")
    merged = run(command, QUIET)
    out = tmp_path / "out"
    report = json.loads((out / "report.json").read_text())
    lines = [json.loads(line) for line in (out / "search.jsonl").read_text().splitlines()][1:]
    tried = [line for line in lines if line["kind"] == "interpolation"]
    evaluated = [line for line in lines if line["kind"] == "evaluation"]
    assert (len(tried), len(evaluated), report["evaluations"]) == (6, 8, 8)
    for name, proportion in report["proportions"].items():
        own = {t["proportion"]: sum(t["scores"].values()) for t in tried if t["expert"] == name}
        assert own[proportion] == max(own.values())
    means = [sum(line["scores"].values()) / 2 for line in evaluated]
    assert report["objective"] == pytest.approx(max(means))
    saved = Adapter.load(out / "adapter")
    assert saved.fingerprint() == merged.adapter.fingerprint()
    assert saved.spec.rank == 2 + 3 + 2
    scores = scores_of(base, saved, read_tasks("tasks", task_files, None), 128)
    assert scores == pytest.approx(report["scores"]["merged"])
    assert list(report["outcomes"]) == list(report["scores"])


def test_it_is_the_merge_of_the_experts_brought_back(
    make: Make, tmp_path: Path, experts: list[Path]
) -> None:
    """With nothing to search and one proportion it is a plain merge, and exact at full rank."""
    run(make("strategy=product_mean", "search.evaluations=1", "proportions=[0.5]"), QUIET)
    folders = [Adapter.load(folder) for folder in experts]
    expected = merge(create("product_mean"), folders, [1 / 3] * 3, rank=7).adapter
    found = Adapter.load(tmp_path / "out" / "adapter")
    for name, delta in expected.deltas().items():
        assert (found.deltas()[name] - delta * 0.5).norm() < 1e-6 * delta.norm()


@pytest.mark.parametrize(
    ("ranks", "option", "expected"),
    [
        ((8, 8, 4), "rank=null", 20),  # more than the 16 outputs of v_proj
        ((8, 8, 4), "rank=24", 24),
        ((16, 16, 16), "rank=null", 32),  # more than the inputs: as many as the update has
    ],
)
def test_a_narrow_layer_does_not_cut_the_rank_of_the_others(
    make: Make,
    tmp_path: Path,
    random_adapter: Callable[..., Adapter],
    ranks: tuple[int, ...],
    option: str,
    expected: int,
) -> None:
    folders = [
        random_adapter(seed, rank, targets=("v_proj", "q_proj")).save(tmp_path / f"{seed}")
        for seed, rank in enumerate(ranks)
    ]
    once = ["strategy=product_mean", "search.evaluations=1", "proportions=[1]"]
    run(make(*once, f"experts=[{','.join(map(str, folders))}]", option), QUIET)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["rank"] == expected
    assert report["kept_energy"] == pytest.approx(1, abs=1e-9)
    whole = merge(
        create("product_mean"), [Adapter.load(f) for f in folders], [1 / 3] * 3, rank=Exact()
    ).adapter.deltas()
    found = Adapter.load(tmp_path / "out" / "adapter").deltas()
    assert all((found[name] - whole[name]).norm() < 1e-6 * whole[name].norm() for name in whole)


def test_stopped_anywhere_it_goes_on_and_ends_the_same(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(make(), QUIET)
    real = module.scores_of
    for stop in (2, 11):  # while choosing proportions; while searching
        left = stop

        def stopping(*arguments: Any) -> dict[str, float]:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            return real(*arguments)

        out = tmp_path / f"stopped-{stop}"
        with monkeypatch.context() as patch:
            patch.setattr(module, "scores_of", stopping)
            with pytest.raises(KeyboardInterrupt):
                run(make(f"out={out}"), QUIET)
        run(make(f"out={out}"), QUIET)
        for file in ("search.jsonl", "report.json"):
            assert (out / file).read_bytes() == (tmp_path / "out" / file).read_bytes()


def test_the_table_can_be_about_other_texts_than_the_search(
    make: Make, tmp_path: Path, task_files: list[Path]
) -> None:
    test = tmp_path / "test.jsonl"
    test.write_text('{"text": "another ward, another day"}\n')
    shown = Console(record=True, width=150)
    run(make(f"test=[{test}]"), shown)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["measured_on"] == "test"
    assert set(report["scores"]["merged"]) == {"test"}
    text = shown.export_text()
    assert "expert-2/adapter at " in text
    assert "chosen by" not in text
    shown = Console(record=True, width=150)
    run(make(f"out={tmp_path / 'other'}"), shown)
    assert "on the texts that were chosen by: better than on new ones" in shown.export_text()


def test_no_path_and_no_text_is_in_what_is_written(
    make: Make, tmp_path: Path, task_files: list[Path]
) -> None:
    run(make(), QUIET)
    for file in ("search.jsonl", "report.json", "adapter/adapter_config.json"):
        content = (tmp_path / "out" / file).read_text()
        assert str(tmp_path) not in content
        assert "patient" not in content
        assert "sodium" not in content


def test_a_finished_search_is_not_overwritten_nor_another_one_mixed_in(
    make: Make, tmp_path: Path
) -> None:
    run(make(), QUIET)
    before = {f: f.read_bytes() for f in (tmp_path / "out").rglob("*") if f.is_file()}
    with pytest.raises(ConfigError, match="holds a finished search; take another folder"):
        run(make(), QUIET)
    assert all(f.read_bytes() == data for f, data in before.items())


def test_a_record_is_gone_on_with_only_by_the_command_that_its_scores_depend_on(
    make: Make, tmp_path: Path, experts: list[Path], tiny_model: Path
) -> None:
    run(make("search.evaluations=1"), QUIET)
    out = tmp_path / "out"
    (out / "report.json").unlink()
    before = (out / "search.jsonl").read_bytes()
    near = tmp_path / "near"
    shutil.copytree(tiny_model, near)
    weights = load_file(near / "model.safetensors")
    save_file({n: w * 1.01 for n, w in weights.items()}, near / "model.safetensors")
    reworded = tmp_path / "reworded"
    shutil.copytree(tiny_model, reworded)
    template = reworded / "chat_template.jinja"
    template.write_text(template.read_text() + "Today is another day.")
    for option, other in (
        ("seed=7", "seed"),
        (f"experts=[{experts[1]},{experts[0]},{experts[2]}]", "experts"),  # weights go by place
        (f"experts=[{experts[0]},{experts[1]}]", "experts"),
        ("most=2", "tasks, tokens"),
        ("strategy.strength=2", "strategy"),
        ("search.keep=[weights]", "keep"),
        ("proportions=[0.1,0.25]", "proportions"),
        ("rank=5", "rank"),
        (f"model.path={reworded}", "tokens"),
        ("max_tokens=64", "max_tokens"),
        (f"model.path={near}", "model"),
    ):
        with pytest.raises(ConfigError, match=rf"holds other work \(another {other}\)"):
            run(make(option), QUIET)
        assert (out / "search.jsonl").read_bytes() == before
    run(make("search.evaluations=2"), QUIET)
    assert (out / "search.jsonl").read_bytes().startswith(before)


def test_what_is_drawn_at_random_follows_from_the_seed(make: Make, tmp_path: Path) -> None:
    def merged(seed: int, out: str) -> Adapter:
        once = ["strategy=dare", "search.evaluations=1", "proportions=[1]"]
        return run(make(*once, f"seed={seed}", f"out={tmp_path / out}"), QUIET).adapter

    first = merged(1, "first").fingerprint()
    assert first == merged(1, "again").fingerprint() != merged(2, "other").fingerprint()


def test_of_proportions_that_score_alike_the_smallest_is_taken(
    make: Make, tmp_path: Path, random_adapter: Callable[..., Adapter]
) -> None:
    nothing = random_adapter(1, size=0.0).save(tmp_path / "nothing")
    run(make(f"experts=[{nothing}]", "search.evaluations=1", "proportions=[0.5,0.1]"), QUIET)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["proportions"] == {"nothing": 0.1}


def test_the_report_has_the_departure_from_slerp_of_each_expert_as_it_was(
    make: Make, tmp_path: Path, base: BaseModel, experts: list[Path]
) -> None:
    run(make("search.evaluations=1", "proportions=[0.25]"), QUIET)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    for folder, found in zip(experts, report["slerp"].values(), strict=True):
        expert = Adapter.load(folder)
        arc = furthest(weights_under(base, expert), expert, 0.25)
        assert found == pytest.approx({"angle": arc.angle, "departure": arc.departure})


@pytest.mark.parametrize("size", [1.0, 1e-4])
def test_where_slerp_would_have_given_something_else_the_console_says_how_far_off(
    size: float, make: Make, tmp_path: Path, random_adapter: Callable[..., Adapter]
) -> None:
    folder = random_adapter(1, size=size).save(tmp_path / "icu")
    console = Console(file=io.StringIO(), width=40)
    options = ("search.evaluations=1", "proportions=[0.25]", "model.precision=float32")
    run(make(*options, f"experts=[{folder}]"), console)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    departure = report["slerp"]["icu"]["departure"]
    assert (departure > 0.05) == (size == 1.0)
    said = (
        f"SLERP of full weights would be {departure:.0%} of the update away from what was done "
        "(icu, its worst layer; slerp in report.json)"
    )
    assert isinstance(console.file, io.StringIO)
    assert (said in console.file.getvalue().splitlines()) == (departure > 0.05)
    assert ("SLERP" in console.file.getvalue()) == (departure > 0.05)


def test_what_cannot_be_merged_is_said_in_one_line(
    make: Make, tmp_path: Path, experts: list[Path], tiny_model: Path
) -> None:
    other = tmp_path / "other"
    Adapter.load(experts[0]).save(other)
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    scaled = tmp_path / "scaled"
    Adapter.load(experts[0]).save(scaled)
    (scaled / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "IA3"}))
    for options, said in (
        ([f"experts=[{scaled}]"], "is IA3, and only LoRA is merged"),
        ([f"experts=[{tmp_path}]"], "experts=.*not a LoRA folder"),
        ([f"experts=[{other}]"], "use_dora is not supported"),
        ([f"experts=[{experts[0]},{experts[0]}]"], "is named twice"),
        (["search.keep=[gamma]"], "search.keep: gamma is not searched"),
        (["strategy=ties", "strategy.density=2"], "strategy.density=2: input should be less"),
        (["strategy=fedavg"], "strategy=fedavg: acts on factors"),
        (["strategy=lines", "strategy.of=hetlora"], "strategy=lines: acts on factors"),
        (["strategy=regmean"], "strategy=regmean: regmean needs statistics"),
        (
            ["strategy=lines", "strategy.of=noise_aware"],
            "strategy=lines: noise_aware needs the noise",
        ),
        (["search.evaluations=501"], "search.evaluations=501: input should be less than or eq"),
        (["rank=33"], "rank=33: a layer is only 32 wide"),
        ([f"tasks=[{tmp_path / 'no.jsonl'}]"], "no.jsonl: cannot be read"),
    ):
        with pytest.raises(ConfigError, match=said) as found:
            run(make(*options), QUIET)
        assert "\n" not in str(found.value)
        assert not (tmp_path / "out").exists()


def test_a_merge_that_cannot_work_fails_before_anything_is_scored(
    make: Make, tmp_path: Path, experts: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def scored(*_: object) -> dict[str, float]:
        raise AssertionError("scored in vain")

    monkeypatch.setattr(module, "scores_of", scored)
    with pytest.raises(MergeError, match="krum with liars=1 needs at least 5"):
        run(make("strategy=krum"), QUIET)
    assert not (tmp_path / "out").exists()


def test_an_expert_that_gives_nan_is_named(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    real = module.scores_of

    def scores(base: BaseModel, adapter: Adapter, *others: Any) -> dict[str, float]:
        spoiled = adapter.spec.rank == 3  # the second one's
        return {n: math.nan if spoiled else s for n, s in real(base, adapter, *others).items()}

    monkeypatch.setattr(module, "scores_of", scores)
    with pytest.raises(ConfigError, match="experts: expert-2/adapter scores NaN at every"):
        run(make(), QUIET)


def test_an_adapter_of_another_model_is_refused_before_anything_is_scored(
    make: Make, tmp_path: Path, wide_model: Path
) -> None:
    with pytest.raises(ConfigError, match="an adapter does not fit wide-llama: shape of"):
        run(make(f"model.path={wide_model}"), QUIET)
    assert not (tmp_path / "out").exists()
