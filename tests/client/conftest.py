"""One hospital in this process: its policy, a plan that fits it, and its ClientApp to ask."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from adapters import lora
from adapters.adapter import Adapter, AdapterSpec
from adapters.base_model import load_base
from adapters.plan import TrainingPlan
from client.app import app
from client.privacy.ledger import Ledger
from client.site import SITE
from conf.policy import SitePolicy
from conf.schema import ModelSettings
from transport.wire import pack_task

TARGETS = ("q_proj", "v_proj")

# Full sampling and four steps in all: the accountants are quick there, and remember the answer.
PLAN: dict[str, Any] = {
    "run": "first",
    "round": 1,
    "rounds": 2,
    "local_steps": 2,
    "seed": 3,
    "strategy": "ffa",
    "base_model": "",
    "adapter": {"rank": 2, "alpha": 4.0, "targets": TARGETS, "train": "B"},
    "privacy": {
        "enabled": True, "unit": "patient", "epsilon": 8.0, "delta": 1e-5, "clip_norm": 1.0,
        "sampling_rate": 1.0, "denominator": 20, "max_notes_per_unit": 1, "max_tokens": 32,
    },
    "optimizer": {"name": "sgd", "learning_rate": 1.0, "final_fraction": 1.0},
    "upload": "B",
}  # fmt: skip


@pytest.fixture(scope="session")
def starting_point(tiny_model: Path) -> tuple[Adapter, str]:
    """The coordinator's first adapter, and the fingerprint of the base model."""
    base = load_base(ModelSettings(source="path", path=str(tiny_model)))
    return lora.initial(base.model, AdapterSpec(2, 4.0, TARGETS), seed=5), base.fingerprint


@pytest.fixture
def plan(starting_point: tuple[Adapter, str]) -> Callable[..., TrainingPlan]:
    """A plan that the policy allows; keywords replace, and merge into its groups."""

    def make(**others: Any) -> TrainingPlan:
        merged = {**PLAN, "base_model": starting_point[1]}
        for key, value in others.items():
            merged[key] = {**merged[key], **value} if isinstance(value, dict) else value
        return TrainingPlan.model_validate(merged)

    return make


@pytest.fixture(scope="session")
def few_notes(tmp_path_factory: pytest.TempPathFactory, notes_file: Path) -> Path:
    """The notes of 15 patients, two of each."""
    path = tmp_path_factory.mktemp("few") / "notes.jsonl"
    path.write_text("".join(notes_file.read_text().splitlines(keepends=True)[:30]))
    return path


@pytest.fixture
def policy(tmp_path: Path, tiny_model: Path, few_notes: Path) -> Callable[..., SitePolicy]:
    """The policy of the hospital ``east``; keywords replace, and merge into its groups."""

    def make(**others: Any) -> SitePolicy:
        merged: dict[str, Any] = {
            "site": "east",
            "lineage": "invented",
            "ledger": tmp_path / "ledger.sqlite",
            "notes": {"source": "jsonl", "path": few_notes, "patient_field": "pid"},
            "model": {"source": "path", "path": str(tiny_model)},
            "privacy": {"epsilon": 8.0, "delta": 1e-5},
        }
        for key, value in others.items():
            known = merged.get(key)
            merged[key] = {**known, **value} if isinstance(known, dict) else value
        return SitePolicy.model_validate(merged)

    return make


class Hospital:
    """Asks the ClientApp as Flower does, and looks into the site's ledger."""

    def __init__(self, policy: SitePolicy) -> None:
        self.policy = policy

    def ask(self, plan: TrainingPlan, adapter: Adapter) -> Message:
        return self.send(pack_task(plan, adapter))

    def send(self, content: RecordDict) -> Message:
        message = Message(content, dst_node_id=7, message_type="train", group_id="1")
        return app(message, Context(1, 7, {}, RecordDict(), {}))

    def ledger(self) -> Ledger:
        return Ledger.of(self.policy)

    def states(self) -> list[str]:
        """States of the ledger's entries, in order; none where there is no ledger."""
        if not self.policy.ledger.exists():
            return []
        with self.ledger() as ledger:
            return [entry.state for entry in ledger.entries()]


@pytest.fixture
def hospital(
    tmp_path: Path, policy: Callable[..., SitePolicy], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Hospital]:
    """Install a policy on this machine, as a file named by its environment."""

    for name in ("_task_id", "_run_id", "_node_id"):  # Flower sets these in its own processes
        monkeypatch.setattr(TaskIdentity, name, 1)

    def install(**others: Any) -> Hospital:
        own = policy(**others)
        file = tmp_path / "site.yaml"
        file.write_text(yaml.safe_dump(own.model_dump(mode="json")))
        monkeypatch.setenv(SITE, str(file))
        return Hospital(own)

    return install
