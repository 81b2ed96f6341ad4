"""Progress for a person at a terminal: what is being done, how far it is, how long it has taken."""

from __future__ import annotations

from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.text import Text


class _Elapsed(ProgressColumn):
    """Time since the start. Rich's own column stops for good when a count is full for once."""

    def render(self, task: Task) -> Text:
        return Text(str(timedelta(seconds=int(task.elapsed or 0))), style="progress.elapsed")


def stage_progress(console: Console) -> Progress:
    """A display with one line a stage; its description and counts change as the stage goes on."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        _Elapsed(),
        console=console,
    )
