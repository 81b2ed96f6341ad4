"""The rounds of a run through Flower's simulation engine: the deployed ServerApp and ClientApp.

The engine (Ray) runs each hospital in a worker process, as many at a time as there are cores, with
one thread each: threads that share one small computation lose more to waiting for each other, on a
busy machine by far more, than they gain.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from pathlib import Path

from client.site import SITES
from server.app import RUN, STOP
from server.run_folder import RunFolder

# Before Flower is imported: no telemetry, no update check, nothing installed at run time. Threads
# that wait must sleep, or two cores shared with anything else spend their time spinning.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault(
    "RAY_worker_niceness", "0"
)  # 15 otherwise: the least of all on a busy machine
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

from flwr.simulation import run_simulation

from client.app import app as client_app
from server.app import app as server_app

_STOP_S = 10.0  # the ServerApp hears of STOP within a second, unless it is writing a round down


def run_rounds(folder: RunFolder, hospitals: int) -> None:
    """Run the federation's remaining rounds; on return they are all in the run folder.

    Raises RoundFailed as ``server.rounds.federate`` does, and KeyboardInterrupt when interrupted.
    """
    cores = os.cpu_count() or 1
    os.environ[RUN] = str(folder.path.resolve())
    os.environ[SITES] = str((folder.path / "sites").resolve())
    os.environ["OMP_NUM_THREADS"] = "1"
    STOP.clear()
    _log_to(folder.path / "flower.log")
    before = set(threading.enumerate())
    try:
        run_simulation(
            server_app=server_app,
            client_app=client_app,
            num_supernodes=hospitals,
            backend_config={
                "init_args": {
                    "num_cpus": cores,
                    "include_dashboard": False,
                    "log_to_driver": False,
                    "logging_level": "ERROR",
                    "object_store_memory": 200 * 1024 * 1024,
                },
                "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            },
        )
    finally:
        STOP.set()
        # After an interrupt the ServerApp is still ending; a thread that waits for an interrupted
        # worker never does.
        deadline = time.monotonic() + _STOP_S
        for thread in set(threading.enumerate()) - before:
            if not thread.daemon:
                thread.join(max(0.0, deadline - time.monotonic()))


def _log_to(file: Path) -> None:
    """Send Flower's own log into the run folder instead of the terminal."""
    logger = logging.getLogger("flwr")
    logger.handlers.clear()
    logger.propagate = False
    handler = logging.FileHandler(file)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
