"""A made-up finished run as ``summary.json`` records it, and quick real runs of a tiny model."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from flwr.app import Context, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from client.app import app as client_app
from client.site import SITE, SITES
from server import rounds
from server.run_folder import RunFolder

Json = dict[str, Any]

_SCORES = {  # base, local, merged, aligned perplexity; then the same in bits per character
    "north": ((23.418, 15.902, 14.377, 14.611), (1.2712, 1.1154, 1.0747, 1.0812)),
    "harbor": ((19.264, 13.871, 12.056, 12.340), (1.1929, 1.0605, 1.0038, 1.0133)),
    "valley": ((27.955, 20.118, 17.480, 17.902), (1.3428, 1.2101, 1.1534, 1.1630)),
}
_STAGES = ("base", "local", "merged", "aligned")


def _hospital(name: str, patients: int, notes: int, epsilon: float) -> Json:
    perplexity, bits = (dict(zip(_STAGES, s, strict=True)) for s in _SCORES[name])

    def after(n: int, scores: Json) -> float:
        """Three rounds from base to merged, each smaller than the one before."""
        share = (0.62, 0.88, 1.0)[n - 1]
        return float(scores["base"] + share * (scores["merged"] - scores["base"]))

    return {
        "patients": patients,
        "notes": notes,
        "rejected_records": 2 if name == "valley" else 0,
        "epsilon": epsilon,
        "delta": 1e-5,
        "perplexity": perplexity,
        "bits_per_char": bits,
        "by_round": [
            {"round": n, "perplexity": after(n, perplexity), "bits_per_char": after(n, bits)}
            for n in (1, 2, 3)
        ],
        "simulation_only": ["patients", "notes", "rejected_records", "perplexity", "bits_per_char"],
    }


def _round(n: int, **changes: Any) -> Json:
    names = ["north", "harbor", "valley"]
    return {
        "round": n,
        "seconds": 61.4 + n,
        "bytes_up": 5_531_904,
        "bytes_down": 11_063_808,
        "rank": 8,
        "kept_energy": 0.8731,
        "discrepancy": 0.0,
        "mean_cosine": 0.214 + 0.05 * n,
        "norm_ratio": 0.9377,
        "hospitals": names,
        "left_out": {},
        "sigma": dict.fromkeys(names, 0.547),
    } | changes


@pytest.fixture(scope="session")
def example_summary() -> Json:
    """The complete summary; not to be changed."""
    return {
        "run": "2026-11-21_10-42-07",
        "created": "2026-11-21T10:42:07+00:00",
        "seed": 7,
        "model": {
            "name": "SmolLM2-135M-Instruct",
            "fingerprint": "sha256:8f6d0c2b51e7a94d",
            "parameters": 134_515_008,
        },
        "strategy": "fedsvd",
        "privacy": {
            "enabled": True,
            "unit": "patient",
            "epsilon_budget": 8.0,
            "delta": 1e-5,
            "accountant": "PLD (dp-accounting 0.6.0)",
            "clip_norm": 1.0,
            "sampling_rate": 0.25,
        },
        "hospitals": {
            "north": _hospital("north", 161, 512, 7.9412),
            "harbor": _hospital("harbor", 204, 731, 7.9412),
            "valley": _hospital("valley", 138, 377, 5.2037),
        },
        "rounds": [
            _round(1, discrepancy=0.0713),
            _round(
                2,
                discrepancy=0.0421,
                hospitals=["north", "harbor"],
                left_out={"valley": "no answer within 600 s"},
                sigma={"north": 0.547, "harbor": 0.547},
            ),
            _round(3, discrepancy=0.0388),
        ],
        "alignment": {
            "sft": {
                "steps": 24,
                "seconds": 88.2,
                "examples": 96,
                "loss": [2.31 - 0.9 * (1 - 0.86**n) + 0.05 * (-1) ** n for n in range(24)],
            },
            "dpo": {
                "steps": 12,
                "seconds": 70.9,
                "loss": [0.6931 - 0.021 * n for n in range(12)],
                "margin": [0.055 * n for n in range(12)],
                "accuracy": [0.5 + 0.03 * n for n in range(12)],
            },
            "instructions": {
                "base": {
                    "loss": 2.402,
                    "perplexity": 11.045,
                    "preference_accuracy": 0.53125,
                    "examples": 32,
                },
                "merged": {
                    "loss": 2.377,
                    "perplexity": 10.772,
                    "preference_accuracy": 0.5625,
                    "examples": 32,
                },
                "aligned": {
                    "loss": 1.489,
                    "perplexity": 4.433,
                    "preference_accuracy": 0.8125,
                    "examples": 32,
                },
            },
        },
        "peak_rss_mb": 3811.4,
        "seconds": 512.6,
        "stages": {"notes": 21.0, "rounds": 190.2, "alignment": 159.1, "evaluation": 142.3},
        "versions": {"torch": "2.13.0", "flwr": "1.41.0", "peft": "0.21.2", "opacus": "1.6.0"},
        "notices": ["2 records without text were skipped at valley."],
    }


@pytest.fixture
def summary(example_summary: Json) -> Json:
    """A copy of the complete summary, from which tests take parts away."""
    return copy.deepcopy(example_summary)


@pytest.fixture(scope="session")
def example_config() -> Json:
    """The part of a composed configuration that the reports read or compare."""
    return {
        "seed": 7,
        "runs": "runs",
        "resume": None,
        "privacy": {"enabled": True, "unit": "patient", "epsilon": 8.0, "delta": 1e-5},
        "hospitals": {"layout": "separate", "count": 3},
        "strategy": {"name": "fedsvd"},
        "adapter": {"rank": 8, "targets": ["q_proj", "v_proj"]},
    }


@pytest.fixture
def config(example_config: Json) -> Json:
    """A copy of the configuration, to change."""
    return copy.deepcopy(example_config)


@pytest.fixture(scope="session")
def make_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Json, Json], Path]:
    """Write a run folder of the given name, summary and configuration."""

    def write(name: str, summary: Json, config: Json) -> Path:
        folder = tmp_path_factory.mktemp("runs") / name
        folder.mkdir()
        (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
        (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        return folder

    return write


@pytest.fixture(scope="session")
def mediflow_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Invented instructions in MediFlow's columns: 16 rows for SFT, 24 pairs for DPO."""
    folder = tmp_path_factory.mktemp("mediflow")

    def row(i: int, flawed: bool) -> str:
        content = {
            "instruction": "Name the drug and the dose.",
            "input": f"Visit {i}: given aspirin {i} mg.",
            "output": f"Aspirin {i} mg.",
            "rejected_output": f"Codeine {i} mg." if flawed else "",
        }
        return json.dumps(content) + "\n"

    (folder / "mediflow.jsonl").write_text("".join(row(i, False) for i in range(16)))
    (folder / "mediflow_dpo.jsonl").write_text("".join(row(i, True) for i in range(24)))
    return folder


@pytest.fixture(scope="session")
def options(tiny_model: Path, notes_file: Path) -> tuple[str, ...]:
    """Overrides of a quick run: three hospitals, two rounds of two steps, no alignment."""
    return (
        "model=path", f"model.path={tiny_model}",
        "notes=jsonl", f"notes.path={notes_file}",
        "notes.patient_field=pid", "notes.hospital_field=hospital", "hospitals=by_field",
        "adapter.rank=2", "privacy.max_tokens=24",
        "privacy.sampling_rate=1", "privacy.denominator=16",  # accounted for in no time
        "federation.rounds=2", "federation.local_steps=2",
        "evaluation.notes=3", "evaluation.max_tokens=24",
        "alignment=none", "evaluation.pooled_reference=false",
    )  # fmt: skip


class _Neighbours:
    """The part of Flower's Grid that the rounds use; every hospital answers in this process."""

    def __init__(self, hospitals: int) -> None:
        self._hospitals, self._replies = hospitals, dict[str, Message]()

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=1 + n) for n in range(self._hospitals)]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        sent = {f"{m.metadata.group_id}-{m.metadata.dst_node_id}": m for m in messages}
        for name, message in sent.items():
            message.metadata.__dict__["_message_id"] = name
            node = message.metadata.dst_node_id
            place = {"partition-id": node - 1}
            self._replies[name] = client_app(message, Context(1, node, place, RecordDict(), {}))
        return list(sent)

    def pull_messages(self, names: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(name) for name in list(names)]


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs go through the real apps in this process; holds the names of the runs that needed it."""
    ran: list[str] = []

    def run_rounds(folder: RunFolder, hospitals: int) -> None:
        ran.append(folder.name)
        monkeypatch.setenv(SITES, str((folder.path / "sites").resolve()))
        grid = cast(Grid, _Neighbours(hospitals))
        rounds.federate(grid, folder.training(), folder, threading.Event(), lambda *_: None)

    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    monkeypatch.delenv(SITE, raising=False)
    monkeypatch.setattr(rounds, "_POLL_S", 0.01)
    monkeypatch.setattr("simulation.flower.run_rounds", run_rounds)
    return ran
