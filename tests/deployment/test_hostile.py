"""What the other side sends is never run: neither at a hospital nor at the coordinator."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from flwr.cli.build import build_fab_from_files
from flwr.cli.install import install_from_fab
from flwr.common.serde import fab_to_proto
from flwr.proto.control_pb2 import StartRunRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

from transport import processes

if TYPE_CHECKING:
    from conftest import Loopback

pytestmark = pytest.mark.slow

PYPROJECT = """\
[project]
name = "wardround"
version = "1.0.0"

[tool.flwr.app]
publisher = "wardround"

[tool.flwr.app.components]
serverapp = "hostile:app"
clientapp = "client.app:app"
"""

# Says so when it is imported at a hospital; bears the name of the installed application.
CLIENT = """\
from pathlib import Path
Path({at_hospital!r}).write_text("ran")
from flwr.clientapp import ClientApp
app = ClientApp()
"""

# Says so when it runs, sends a message without a plan, and keeps what the hospital answers.
SERVER = """\
import json
from pathlib import Path
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp
Path({at_coordinator!r}).write_text("ran")
app = ServerApp()

@app.main()
def main(grid, context):
    while not (nodes := list(grid.get_node_ids())):
        pass
    content = RecordDict({{"plan": ConfigRecord({{"json": "{{}}"}})}})
    message = Message(content=content, dst_node_id=nodes[0], message_type="train")
    reply = next(iter(grid.send_and_receive([message], timeout=120)))
    answer = dict(reply.content["refusal"]) if not reply.has_error() else reply.error.reason
    Path({answer!r}).write_text(json.dumps(answer))
"""


class Attack:
    """A hostile bundle, and the files by which its code would show that it ran."""

    def __init__(self, folder: Path) -> None:
        self.at_hospital = folder / "ran-at-hospital"
        self.at_coordinator = folder / "ran-at-coordinator"
        self.answer = folder / "answer.json"
        places = {name: str(path) for name, path in vars(self).items()}
        files = {
            "pyproject.toml": PYPROJECT,
            "hostile.py": SERVER.format(**places),
            "client/__init__.py": "",
            "client/app.py": CLIENT.format(**places),
        }
        self.bundle = build_fab_from_files({n: text.encode() for n, text in files.items()})[0]

    def submit(self, address: str, ca: bytes | None = None) -> None:
        client = ControlHttpClient.from_server_address(
            server_address=address,
            insecure=ca is None,
            root_certificates=ca,
            interceptors=[RuntimeVersionHttpInterceptor(component_name="attacker")],
        )
        fab = Fab(hashlib.sha256(self.bundle).hexdigest(), self.bundle, {})
        assert client.StartRun(StartRunRequest(fab=fab_to_proto(fab))).run_id


@pytest.fixture
def attack(tmp_path: Path) -> Attack:
    return Attack(tmp_path)


def test_the_bundle_would_do_harm_where_it_is_unpacked(attack: Attack, tmp_path: Path) -> None:
    unpacked = install_from_fab(attack.bundle, install_dir=tmp_path / "apps", skip_prompt=True)
    subprocess.run(
        [sys.executable, "-P", "-c", "import client.app"],
        env={"PYTHONPATH": str(unpacked)},
        check=True,
    )
    assert attack.at_hospital.exists()


def test_a_hospital_answers_a_hostile_coordinator_with_its_own_code(
    loopback: Loopback, policies: list[Path], attack: Attack, tmp_path: Path
) -> None:
    env = processes.environment(tmp_path / "hostile", tmp_path / "no-commands")
    superlink = ["flower-superlink", "--insecure", "--port", str(loopback.port)]
    hostile = processes.start(superlink, tmp_path / "hostile.out", env)
    try:
        loopback.client(policies[0], "client.transport=insecure")
        told = loopback.said("east")
        loopback.until(lambda: "connected" in told.read_text(), 90, "connection")
        attack.submit(f"127.0.0.1:{loopback.port}")
        loopback.until(attack.answer.exists, 120, "answer")
    finally:
        processes.stop(hostile)
    assert attack.at_coordinator.exists()
    assert not attack.at_hospital.exists()
    answer = json.loads(attack.answer.read_text())
    assert (answer["site"], answer["code"]) == ("east", "PLAN_INVALID")
    assert not list((tmp_path / "clients").rglob("apps"))


def test_the_coordinator_runs_no_app_but_its_own(
    loopback: Loopback, attack: Attack, tmp_path: Path
) -> None:
    loopback.server(f"run_dir={tmp_path / 'run'}", "privacy=none", "federation.min_hospitals=1")
    told = loopback.said("server")
    loopback.until(lambda: loopback.ca.exists() and "certificate" in told.read_text(), 90, "start")
    loopback.until(loopback.answers, 60, "SuperLink")
    attack.submit(f"127.0.0.1:{loopback.port}", loopback.ca.read_bytes())
    log = loopback.state / "logs" / "serverapp.log"
    loopback.until(lambda: log.exists() and "ForeignRunError" in log.read_text(), 90, "refusal")
    assert not attack.at_coordinator.exists()
