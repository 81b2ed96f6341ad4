"""The running SuperLink, as the coordinator's daemon talks to it.

A thin client of Flower's Control API: register hospitals, see who is connected, submit the one run
and follow it. The submitted bundle names the two applications and carries no code: each side runs
what is installed there.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from types import TracebackType
from typing import Self

import httpx
from flwr.cli.build import build_fab_from_files
from flwr.common.constant import Status, SubStatus
from flwr.common.serde import fab_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
)
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

APP = b"""\
[project]
name = "wardround"
version = "1.0.0"
description = "Names the installed applications; carries no code."
license = { text = "Apache-2.0" }

[tool.flwr.app]
publisher = "wardround"

[tool.flwr.app.components]
serverapp = "server.app:app"
clientapp = "client.app:app"
"""


@dataclass(frozen=True)
class RunStatus:
    """Where a run stands."""

    state: str  # pending, starting, running or finished
    completed: bool  # finished, and without a failure
    details: str


class SuperLink:
    """A connection to the SuperLink at ``address`` (``host:port``).

    Parameters
    ----------
    address
        As reached from this machine.
    ca
        PEM of the certificate authority; None speaks plain HTTP.

    Raises
    ------
    httpx.HTTPError
        By every method, when the SuperLink is away or refuses.
    """

    def __init__(self, address: str, ca: bytes | None) -> None:
        self._client = ControlHttpClient.from_server_address(
            server_address=address,
            insecure=ca is None,
            root_certificates=ca,
            interceptors=[RuntimeVersionHttpInterceptor(component_name="wardround")],
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._client.close()

    def ready(self) -> bool:
        """Whether it answers."""
        try:
            self._client.ListNodes(ListNodesRequest())
        except httpx.HTTPError:
            return False
        return True

    def register(self, name: str, public_key: bytes) -> None:
        """Let the hospital with this key (PEM, SubjectPublicKeyInfo) connect, under ``name``."""
        self._client.RegisterNode(RegisterNodeRequest(public_key=public_key, name=name))

    def online(self) -> tuple[str, ...]:
        """Names of the connected hospitals, sorted; their node ids where they have no name."""
        nodes = self._client.ListNodes(ListNodesRequest()).nodes_info
        return tuple(sorted(n.name or str(n.node_id) for n in nodes if n.status == "online"))

    def submit(self) -> int:
        """Start the run and return its id."""
        content = build_fab_from_files({"pyproject.toml": APP})[0]
        fab = Fab(sha256(content).hexdigest(), content, {})
        return int(self._client.StartRun(StartRunRequest(fab=fab_to_proto(fab))).run_id)

    def status(self, run_id: int) -> RunStatus:
        """Where the run stands."""
        run = self._client.ListRuns(ListRunsRequest(run_id=run_id)).run_dict[run_id]
        completed = (run.status.status, run.status.sub_status) == (
            Status.FINISHED,
            SubStatus.COMPLETED,
        )
        return RunStatus(run.status.status, completed, run.status.details)

    def stop(self, run_id: int) -> None:
        """Ask the run to stop."""
        self._client.StopRun(StopRunRequest(run_id=run_id))
