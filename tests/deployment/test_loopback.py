"""The deployed federation on loopback, through the commands, against the simulation of the same."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
import torch

from adapters.adapter import Adapter
from server.run_folder import RunFolder
from transport import processes

if TYPE_CHECKING:
    from conftest import Loopback

pytestmark = pytest.mark.slow

PLAN = (
    "privacy=none", "adapter.rank=4", "privacy.max_tokens=32", "federation.rounds=2",
    "federation.timeout_s=200",
)  # fmt: skip


def admit(loopback: Loopback, *sites: str) -> None:
    """What the coordinator does by hand: put the hospitals' public keys into the folder."""
    for site in sites:
        key = loopback.public_key(site)
        loopback.until(key.exists, 60, f"key of {site}")
        shutil.copy(key, loopback.sites)


def simulated(folder: RunFolder, policies: list[Path]) -> None:
    """The same rounds through Flower's simulation engine, in a process of their own."""
    (folder.path / "sites").mkdir()
    for policy in policies:
        shutil.copy(policy, folder.path / "sites")
    script = (
        "import sys; from pathlib import Path; from server.run_folder import RunFolder; "
        "from simulation.flower import run_rounds; run_rounds(RunFolder(Path(sys.argv[1])), 2)"
    )
    subprocess.run(
        [sys.executable, "-c", script, str(folder.path)],
        check=True,
        cwd=processes.ROOT,
        timeout=300,
    )


def test_two_hospitals_over_tls_give_what_the_simulation_gives(
    loopback: Loopback, policies: list[Path], tiny_model: Path, tmp_path: Path
) -> None:
    run = RunFolder(tmp_path / "run")
    model = ("model=path", f"model.path={tiny_model}")
    server = loopback.server(f"run_dir={run.path}", *model, *PLAN)
    loopback.until(loopback.ca.exists, 90, "certificate")
    clients = [loopback.client(policy) for policy in policies]
    admit(loopback, "east", "west")

    assert server.wait(timeout=300) == 0, loopback.said("server").read_text()
    rounds = run.finished_rounds()
    assert [record["hospitals"] for record in rounds] == [["east", "west"]] * 2
    deployed = run.global_adapter()
    start = Adapter.load(run.adapter_folder(0))
    assert deployed.is_finite()
    assert any(not torch.equal(deployed.tensors()[k], start.tensors()[k]) for k in start.tensors())

    for client in clients:
        family = psutil.Process(client.pid).children(recursive=True)
        client.send_signal(signal.SIGTERM)
        assert client.wait(timeout=40) == 0
        assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family)

    again = RunFolder(tmp_path / "simulated")
    again.create(run.training())
    simulated(again, policies)
    expected = again.global_adapter().tensors()
    for name, tensor in deployed.tensors().items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-4, rtol=0)


def test_without_tls_only_when_asked_for_and_with_a_warning(
    loopback: Loopback, policies: list[Path], tiny_model: Path, tmp_path: Path
) -> None:
    run = RunFolder(tmp_path / "run")
    server = loopback.server(
        f"run_dir={run.path}", "model=path", f"model.path={tiny_model}", *PLAN,
        "federation.rounds=1", "server.transport=insecure",
    )  # fmt: skip
    for policy in policies:
        loopback.client(policy, "client.transport=insecure")
    assert server.wait(timeout=300) == 0, loopback.said("server").read_text()
    assert run.finished_rounds()[0]["hospitals"] == ["east", "west"]
    for who in ("server", "east"):
        assert "transport=insecure" in loopback.said(who).read_text()
    assert not loopback.ca.exists()
