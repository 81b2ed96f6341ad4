"""The run folder: what counts as finished, and what a crash can leave behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from adapters.adapter import Adapter, AdapterSpec
from adapters.lowrank import LowRank
from conf.load import ConfigError, load
from conf.schema import RunSettings, TrainingSettings
from server.run_folder import RunFolder, write_atomically

Settings = Callable[..., TrainingSettings]


def adapter(value: float) -> Adapter:
    layer = LowRank(torch.full((3, 2), value), torch.eye(2, 4))
    return Adapter(AdapterSpec(2, 4.0, ("q",)), {"layer.q": layer})


def test_rounds_are_counted_in_order_and_the_last_one_is_global(folder: RunFolder) -> None:
    adapter(0.0).save(folder.adapter_folder(0))
    assert folder.finished_rounds() == []
    assert folder.global_adapter().fingerprint() == adapter(0.0).fingerprint()
    for number in (1, 2):
        adapter(float(number)).save(folder.adapter_folder(number))
        adapter(9.0).save(folder.adapter_folder(number, "east"))
        folder.finish_round({"round": number, "hospitals": ["east"]})
        assert folder.global_adapter().fingerprint() == adapter(float(number)).fingerprint()
    assert [record["round"] for record in folder.finished_rounds()] == [1, 2]
    names = sorted(p.parent for p in (folder.path / "adapters").rglob("*.safetensors"))
    assert [name.relative_to(folder.path).as_posix() for name in names[:3]] == [
        "adapters/round-000/global",
        "adapters/round-001/east",
        "adapters/round-001/global",
    ]


def test_a_round_whose_adapters_are_saved_but_not_its_record_is_not_finished(
    folder: RunFolder,
) -> None:
    adapter(0.0).save(folder.adapter_folder(0))
    adapter(1.0).save(folder.adapter_folder(1))
    assert folder.finished_rounds() == []
    assert folder.global_adapter().fingerprint() == adapter(0.0).fingerprint()


@pytest.mark.parametrize("cut", [1, 7, 20])
def test_a_half_written_last_line_does_not_count_and_is_written_over(
    folder: RunFolder, cut: int
) -> None:
    folder.path.mkdir()
    for number in (1, 2):
        folder.finish_round({"round": number, "seconds": 1.5, "hospitals": ["east", "west"]})
    file = folder.path / "rounds.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text(lines[0] + lines[1][:cut])
    assert [record["round"] for record in folder.finished_rounds()] == [1]
    folder.finish_round({"round": 2, "seconds": 2.5})
    assert [json.loads(line)["round"] for line in file.read_text().splitlines()] == [1, 2]
    assert folder.finished_rounds()[1]["seconds"] == 2.5


def test_a_file_is_the_old_one_or_the_new_one_whatever_goes_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "rounds.jsonl"
    write_atomically(file, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(file, "new, up to here \ud800")
    assert file.read_text() == "old"

    def full_disk(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_atomically(file, "new")
    assert file.read_text() == "old"
    monkeypatch.undo()
    write_atomically(file, "new")
    assert file.read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["rounds.jsonl"]


def test_the_text_is_on_the_disk_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    replace = Path.replace

    def watched(self: Path, target: Path) -> Path:
        steps.append("named")
        assert self.read_text() == "new"
        return replace(self, target)

    monkeypatch.setattr("os.fsync", lambda _: steps.append("synced"))
    monkeypatch.setattr(Path, "replace", watched)
    write_atomically(tmp_path / "file", "new")
    assert steps == ["synced", "named", "synced"]  # the folder, which holds the name


def test_the_configuration_is_kept_as_it_was(folder: RunFolder, settings: Settings) -> None:
    folder.create(settings())
    assert folder.training() == settings()
    with pytest.raises(FileNotFoundError):
        RunFolder(folder.path / "other").training()


def test_a_configuration_that_is_not_whole_is_told_in_one_line(
    folder: RunFolder, settings: Settings
) -> None:
    folder.create(settings())
    file = folder.path / "config.yaml"
    config = yaml.safe_load(file.read_text())
    del config["privacy"]
    file.write_text(yaml.safe_dump(config))
    with pytest.raises(ConfigError, match="privacy: field required"):
        folder.training()


def test_a_simulations_configuration_holds_that_of_its_rounds(folder: RunFolder) -> None:
    whole = load("simulate", ["strategy=fedsvd", "privacy.epsilon=3"], RunSettings)
    folder.create(whole)
    assert folder.settings() == whole
    assert folder.training() == RunFolder.training_of(whole)
    assert folder.training().privacy.epsilon == 3
    assert not hasattr(folder.training(), "notes")  # the rounds know nothing about notes
