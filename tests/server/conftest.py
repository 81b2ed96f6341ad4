"""Three real hospitals in this process, and a grid that carries messages to them and back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from flwr.app import Context, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from client.app import app as client_app
from client.site import SITE, SITES
from conf.schema import TrainingSettings
from server import rounds
from server.run_folder import RunFolder

NODES = {11: "east", 12: "mid", 13: "west"}  # node ids and sites, in the order of the policies

Answer = Callable[[Message], Message | None]


class LocalGrid(Grid):
    """Hands each message to a hospital in this process, and its reply back when it is asked for."""

    def __init__(self, hospitals: Mapping[int, Answer], keys: dict[int, str] | None = None) -> None:
        self.hospitals, self.keys = hospitals, keys or {}
        self.asked: list[tuple[int, int]] = []  # round and node of every task sent
        self._replies: dict[str, Message] = {}

    def get_nodes(self) -> Iterable[NodeInfo]:
        for node in self.hospitals:
            name = self.keys.get(node, "")
            yield NodeInfo(node_id=node, name=name, public_key=b"key" if name else b"")

    def get_node_ids(self) -> Iterable[int]:
        return list(self.hospitals)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            node = message.metadata.dst_node_id
            message_id = f"message-{len(self.asked)}"
            message.metadata.__dict__["_message_id"] = message_id
            self.asked.append((int(message.metadata.group_id or 0), node))
            if reply := self.hospitals[node](message):
                self._replies[message_id] = reply
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(i) for i in list(message_ids) if i in self._replies]

    def send_and_receive(self, messages: Iterable[Message], **_: Any) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))

    def create_message(self, *_: Any, **__: Any) -> Message:
        raise NotImplementedError

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Run:
        raise NotImplementedError


@pytest.fixture(autouse=True)
def _task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower gives its own processes an identity; without one no message can be made."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.fixture
def sites(
    tmp_path: Path, tiny_model: Path, notes_file: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Policies of the three hospitals, found by the ClientApp through the environment."""
    folder = tmp_path / "sites"
    folder.mkdir()
    notes = [json.loads(line) for line in notes_file.read_text().splitlines()]
    for site in NODES.values():
        own = tmp_path / f"{site}.jsonl"
        own.write_text("".join(json.dumps(n) + "\n" for n in notes if n["hospital"] == site))
        policy = {
            "site": site, "lineage": "invented", "ledger": str(tmp_path / f"{site}.sqlite"),
            "notes": {"source": "jsonl", "path": str(own), "patient_field": "pid"},
            "model": {"source": "path", "path": str(tiny_model)},
            "privacy": {"required": False, "epsilon": 8.0, "delta": 1e-5},
        }  # fmt: skip
        (folder / f"{site}.yaml").write_text(yaml.safe_dump(policy))
    monkeypatch.setenv(SITES, str(folder))
    monkeypatch.delenv(SITE, raising=False)
    monkeypatch.setattr(rounds, "_POLL_S", 0.01)
    return folder


@pytest.fixture
def honest(sites: Path) -> dict[int, Answer]:
    """All three hospitals as they are installed."""

    def answer(node: int, message: Message) -> Message:
        index = list(NODES).index(node)
        context = Context(1, node, {"partition-id": index}, RecordDict(), {})
        return client_app(message, context)

    return {node: partial(answer, node) for node in NODES}


@pytest.fixture
def settings(tiny_model: Path) -> Callable[..., TrainingSettings]:
    """Two rounds of two steps without privacy; keywords replace, and merge into their groups."""

    def make(**others: Any) -> TrainingSettings:
        values: dict[str, Any] = {
            "seed": 5,
            "model": {"source": "path", "path": str(tiny_model)},
            "adapter": {"rank": 2, "alpha": 4.0, "targets": ("q_proj", "v_proj"), "train": "B"},
            "privacy": {
                "enabled": False, "unit": "patient", "epsilon": 8.0, "delta": 1e-5,
                "clip_norm": 5.0, "sampling_rate": 0.5, "denominator": 16,
                "max_notes_per_unit": 1, "max_tokens": 32,
            },
            "optimizer": {"name": "adamw", "learning_rate": 0.05, "final_fraction": 0.5},
            "federation": {"rounds": 2, "local_steps": 2, "min_hospitals": 2, "timeout_s": 60.0},
            "strategy": {"name": "ffa"},
        }  # fmt: skip
        for key, value in others.items():
            values[key] = {**values[key], **value} if isinstance(value, dict) else value
        return TrainingSettings.model_validate(values)

    return make


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


@pytest.fixture
def local_grid() -> type[LocalGrid]:
    return LocalGrid
