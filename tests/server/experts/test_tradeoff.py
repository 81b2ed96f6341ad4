"""``wardround tradeoff``: gain, loss and intruders along the line from base to adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from adapters.adapter import Adapter
from adapters.base_model import BaseModel
from conf.experts import TradeoffCommand
from conf.load import ConfigError, load
from server.experts import tradeoff
from server.experts.inputs import weights_under
from server.experts.interpolation import towards_base
from server.experts.intruder import count_intruders
from server.experts.tasks import read_tasks, scores_of
from server.experts.tradeoff import Point, curve, run

QUIET = Console(quiet=True)
Make = Callable[..., TradeoffCommand]


@pytest.fixture
def adapter(tmp_path: Path, random_adapter: Callable[..., Adapter]) -> Adapter:
    """Strong enough to bring in directions of its own."""
    made = random_adapter(1, size=2.0)
    made.save(tmp_path / "adapter")
    return made


@pytest.fixture
def make(tmp_path: Path, tiny_model: Path, adapter: Adapter, task_files: list[Path]) -> Make:
    """The command as typed, with the given options added."""

    def command(*options: str) -> TradeoffCommand:
        base = [
            f"adapter={tmp_path / 'adapter'}", f"clinical=[{task_files[0]}]",
            f"general=[{task_files[1]}]", f"out={tmp_path / 'out'}", "model=path",
            f"model.path={tiny_model}", "points=[1,0,0.5]", "max_tokens=128",
        ]  # fmt: skip
        return load("tradeoff", [*base, *options], TradeoffCommand)

    return command


def test_gain_and_loss_are_against_the_base() -> None:
    scores = {
        0.0: {"clinical": -2.0, "general": -1.0},
        0.5: {"clinical": -1.5, "general": -1.25},
    }
    assert curve(scores, {0.5: 3}) == [Point(0.5, 0.5, 0.25, 3)]


def test_every_point_is_what_measuring_it_alone_gives(
    make: Make, tmp_path: Path, base: BaseModel, adapter: Adapter, task_files: list[Path]
) -> None:
    points = run(make(), QUIET)
    assert [point.at for point in points] == [0, 0.5, 1]
    assert points[0] == Point(0, 0, 0, 0)
    weights, deltas = weights_under(base, adapter), adapter.deltas()
    for point in points[1:]:
        tasks = read_tasks("", task_files, None)
        plain = scores_of(base, None, tasks, 128)
        scaled = scores_of(base, towards_base(adapter, point.at), tasks, 128)
        assert point.clinical_gain == pytest.approx(scaled["ward"] - plain["ward"])
        assert point.general_loss == pytest.approx(plain["lab"] - scaled["lab"])
        counts = [count_intruders(weights[n], deltas[n], [point.at])[0] for n in weights]
        assert point.intruders == sum(counts)
    assert points[-1].intruders > 0
    record = json.loads((tmp_path / "out" / "tradeoff.json").read_text())
    assert record["points"][1]["clinical_gain"] == points[1].clinical_gain
    assert "intruder dimensions" in (tmp_path / "out" / "tradeoff.svg").read_text()


def test_stopped_in_either_stage_it_goes_on_and_ends_the_same(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(make(), QUIET)
    for name in ("scores_of", "count_intruders"):
        real, out, left = getattr(tradeoff, name), tmp_path / name, 2

        def stopping(*arguments: Any, real: Any = real) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(tradeoff, name, stopping)
            with pytest.raises(KeyboardInterrupt):
                run(make(f"out={out}"), QUIET)
        assert not (out / "tradeoff.json").exists()
        run(make(f"out={out}"), QUIET)
        for file in ("points.jsonl", "tradeoff.json"):
            assert (out / file).read_bytes() == (tmp_path / "out" / file).read_bytes()


def test_a_finished_curve_is_not_overwritten(make: Make) -> None:
    run(make("points=[0]"), QUIET)
    with pytest.raises(ConfigError, match="holds a finished curve; take another folder"):
        run(make(), QUIET)


def test_a_record_is_gone_on_with_only_by_the_command_that_its_figures_depend_on(
    make: Make, tmp_path: Path, adapter: Adapter
) -> None:
    run(make("points=[0]"), QUIET)
    (tmp_path / "out" / "tradeoff.json").unlink()
    towards_base(adapter, 0.5).save(tmp_path / "half")
    for option, other in (
        ("points=[0,1]", "points"),
        ("max_tokens=64", "max_tokens"),
        ("most=2", "tasks, tokens"),
        ("intruders.below=0.4", "intruders"),
        (f"adapter={tmp_path / 'half'}", "adapter"),  # the same factors
    ):
        with pytest.raises(ConfigError, match=rf"holds other work \(another {other}\)"):
            run(make("points=[0]", option), QUIET)


def test_packed_weights_are_refused(make: Make) -> None:
    with pytest.raises(ConfigError, match=r"model.precision=nf4: 4-bit weights have no singular"):
        make("model.precision=nf4")
