"""The run folder: the contract with everything that reads a run later.

    config.yaml               the composed configuration
    adapters/round-000/global the public starting point
    adapters/round-NNN/NAME   what each hospital sent, and ``global``, what they merged to
    rounds.jsonl              one line a finished round, written last: its presence means finished
    ledger/  sites/           simulated hospitals only: their ledgers and policies
    summary.json report.html release/

A round is finished when its line is in ``rounds.jsonl``; everything before that can be done again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import yaml

from adapters.adapter import Adapter
from adapters.disk import to_disk
from adapters.statistics import load_measured
from conf.load import validate
from conf.schema import RunSettings, TrainingSettings


@dataclass(frozen=True)
class RunFolder:
    """Paths and records of one run."""

    path: Path

    @property
    def name(self) -> str:
        """Name of the run, used in plans and ledgers."""
        return self.path.name

    def create(self, settings: TrainingSettings) -> RunFolder:
        """Make the folder and save the configuration in it."""
        self.path.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)
        write_atomically(self.path / "config.yaml", text)
        return self

    def settings(self) -> RunSettings:
        """The configuration a simulation was started with.

        Raises FileNotFoundError without one, and ConfigError where it is not valid (any more).
        """
        return validate(self._config(), RunSettings)

    def training(self) -> TrainingSettings:
        """The part of the configuration that the rounds need, whoever started the run.

        Raises ConfigError where it is not valid (any more).
        """
        config = self._config()
        own = {name: config[name] for name in TrainingSettings.model_fields if name in config}
        return validate(own, TrainingSettings)

    @staticmethod
    def training_of(settings: TrainingSettings) -> TrainingSettings:
        """The same part of settings that hold more."""
        names = TrainingSettings.model_fields
        return TrainingSettings(**{name: getattr(settings, name) for name in names})

    def _config(self) -> dict[str, Any]:
        loaded: dict[str, Any] = yaml.safe_load((self.path / "config.yaml").read_text())
        return loaded

    def adapter_folder(self, number: int, name: str = "global") -> Path:
        """Folder of one adapter of round ``number`` (0 is the starting point)."""
        return self.path / "adapters" / f"round-{number:03d}" / name

    def finished_rounds(self) -> list[dict[str, Any]]:
        """Records of finished rounds, in order; a half-written last line does not count."""
        file = self.path / "rounds.jsonl"
        records = []
        if file.exists():
            for line in file.read_text().splitlines():
                try:
                    records.append(json.loads(line))
                except json.JSONDecodeError:
                    break
        return records

    def finish_round(self, record: dict[str, Any]) -> None:
        """Append the record of a round whose adapters are saved; durable on return."""
        lines = [json.dumps(r) for r in (*self.finished_rounds(), record)]
        write_atomically(self.path / "rounds.jsonl", "\n".join(lines) + "\n")

    def begin_round(self, number: int) -> None:
        """Remove what an interrupted try at this round has left: it is no part of the round."""
        shutil.rmtree(self.adapter_folder(number).parent, ignore_errors=True)

    def adapters(self, number: int, names: Sequence[str], layers: Collection[str]) -> SavedAdapters:
        """Those of round ``number`` by ``names``, in these layers, loaded when asked for."""
        return SavedAdapters([self.adapter_folder(number, name) for name in names], layers)

    def drop_adapter(self, number: int, name: str) -> None:
        """Remove an adapter that does not count after all."""
        shutil.rmtree(self.adapter_folder(number, name), ignore_errors=True)

    def global_adapter(self) -> Adapter:
        """The merged adapter of the last finished round (or the starting point)."""
        return Adapter.load(self.adapter_folder(len(self.finished_rounds())))


class SavedAdapters(Sequence[Adapter]):
    """Adapters on disk, with their statistics: each is loaded when asked for, and not kept."""

    def __init__(self, folders: Sequence[Path], layers: Collection[str]) -> None:
        self._folders, self._layers = folders, layers

    def __len__(self) -> int:
        return len(self._folders)

    @overload
    def __getitem__(self, at: int) -> Adapter: ...
    @overload
    def __getitem__(self, at: slice) -> SavedAdapters: ...
    def __getitem__(self, at: int | slice) -> Adapter | SavedAdapters:
        if isinstance(at, slice):
            return SavedAdapters(self._folders[at], self._layers)
        return load_measured(self._folders[at]).only(self._layers)


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a crash leaves the old one or the new one, never half of either."""
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    to_disk(path.parent)
