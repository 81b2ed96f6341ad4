"""The program that runs the coordinator's ServerApp: only the run that its own daemon submitted.

Flower's Control API has no authentication: whoever reaches the port and holds the public CA
certificate can submit a bundle, and Flower would run its code here, with access to everything the
hospitals send. This program takes the place of ``flwr-serverapp`` (``server.daemon`` puts it first
on ``PATH``) and refuses every run but the submitted one. That run's bundle carries no code
(``server.superlink``), so ``server.app:app`` is imported from the installation.
"""

from __future__ import annotations

import os
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from flwr.cli.install import install_from_fab
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.cli import flwr_serverapp

from transport import processes

# By name: the package shows the function of the same name in place of the module.
runtime = import_module("flwr.superlink.runtime.run_serverapp")

SUBMITTED = "WARDROUND_SUBMITTED"  # names the file that holds the id of the submitted run
_WAIT_S = 30.0  # Flower may start the ServerApp before the daemon knows the run's id


class ForeignRunError(RuntimeError):
    """Somebody else submitted this run."""


def main() -> None:
    """Entry point, with the arguments of Flower's own ``flwr-serverapp``."""
    processes.log_to_stderr()
    if "install_from_fab" not in runtime.run_serverapp.__code__.co_names:
        raise RuntimeError("this release of Flower loads the ServerApp in an unknown way")
    setattr(runtime, "install_from_fab", _install_submitted)  # noqa: B010
    flwr_serverapp()


def _install_submitted(fab: bytes, **options: Any) -> Path:
    require_submitted(TaskIdentity.run_id, Path(os.environ[SUBMITTED]), _WAIT_S)
    return install_from_fab(fab, **options)


def require_submitted(run_id: int | None, record: Path, wait_s: float) -> None:
    """Return if ``record`` holds ``run_id``, waiting up to ``wait_s`` seconds for the file.

    Raises
    ------
    ForeignRunError
        ``record`` names another run, or none in time.
    """
    deadline = time.monotonic() + wait_s
    while not record.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    if not record.exists() or record.read_text(encoding="ascii") != str(run_id):
        raise ForeignRunError(f"run {run_id} was not submitted by this coordinator's daemon")


if __name__ == "__main__":
    main()
