"""The Flower ServerApp of the coordinator: opens the run folder and runs the rounds in it.

The run folder comes from the coordinator's own environment, never from Flower's run config, which
anyone who can reach the control port can override.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from rich.console import Console

from server.progress import stage_progress
from server.rounds import federate
from server.run_folder import RunFolder

RUN = "WARDROUND_RUN_DIR"

STOP = threading.Event()  # set by whoever started this app in its own process, to end it early

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation of the folder named by ``WARDROUND_RUN_DIR``."""
    folder = RunFolder(Path(os.environ[RUN]))
    with stage_progress(Console(stderr=True)) as progress:
        task = progress.add_task("starting", total=1)

        def report(what: str, done: int, total: int) -> None:
            progress.update(task, description=what, completed=done, total=total)

        federate(grid, folder.training(), folder, STOP, report)
