"""A federation on this machine's loopback, through the commands that people type."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from transport import processes

COMMAND = [sys.executable, str(processes.ROOT / "wardround.py")]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Loopback:
    """Starts commands in a folder, shows what they said, and ends them by their pids."""

    free_port = staticmethod(free_port)

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.state = folder / "server"
        self.sites = folder / "keys"
        self.ca = self.state / "certificates" / "ca.pem"
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        env = processes.environment(self.folder / "flower", self.folder / "no-commands")
        process = processes.start([*COMMAND, *arguments], self.said(name), env)
        self._started.append(process)
        return process

    def said(self, name: str) -> Path:
        return self.folder / f"{name}.out"

    def server(self, *options: str) -> subprocess.Popen[bytes]:
        where = [f"server.port={self.port}", f"server.state={self.state}"]
        return self.start("server", "server", *where, f"server.sites={self.sites}", *options)

    def client(self, policy: Path, *options: str) -> subprocess.Popen[bytes]:
        where = [f"client.server=127.0.0.1:{self.port}", f"client.state={self.folder / 'clients'}"]
        trust = f"client.certificate={self.ca}"
        return self.start(policy.stem, "client", f"site={policy}", trust, *where, *options)

    def answers(self) -> bool:
        """Whether anything listens on the server's port."""
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def public_key(self, site: str) -> Path:
        return self.folder / "clients" / site / f"{site}.pub"

    @staticmethod
    def until(happens: Callable[[], bool], seconds: float, what: str) -> None:
        """Wait for something, and fail with its name when it does not come."""
        deadline = time.monotonic() + seconds
        while not happens():
            assert time.monotonic() < deadline, f"after {seconds} s: no {what}"
            time.sleep(0.2)

    def end(self) -> None:
        for process in reversed(self._started):
            processes.stop(process, grace_s=30)


@pytest.fixture
def loopback(tmp_path: Path) -> Iterator[Loopback]:
    federation = Loopback(tmp_path)
    yield federation
    federation.end()


@pytest.fixture
def policies(tmp_path: Path, tiny_model: Path, notes_file: Path) -> list[Path]:
    """Site policies of ``east`` and ``west``; privacy is off, the notes are invented."""
    notes = [json.loads(line) for line in notes_file.read_text().splitlines()]
    paths = []
    for site in ("east", "west"):
        own = tmp_path / f"{site}.jsonl"
        own.write_text("".join(json.dumps(n) + "\n" for n in notes if n["hospital"] == site))
        policy = {
            "site": site,
            "lineage": "invented",
            "ledger": str(tmp_path / f"{site}.sqlite"),
            "notes": {"source": "jsonl", "path": str(own), "patient_field": "pid"},
            "model": {"source": "path", "path": str(tiny_model)},
            "privacy": {"required": False, "epsilon": 8.0, "delta": 1e-5},
        }
        paths.append(tmp_path / "policies" / f"{site}.yaml")
        paths[-1].parent.mkdir(exist_ok=True)
        paths[-1].write_text(yaml.safe_dump(policy))
    return paths
