"""Settings of the commands other than ``simulate``; ``wardround COMMAND --help`` explains them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from conf.deployment import ClientSettings, ServerSettings
from conf.schema import AlignmentSettings, ModelSettings, NotesSettings, Settings, TrainingSettings


class ServerCommand(TrainingSettings):
    """``wardround server``: one federation with real hospitals."""

    run_dir: Path
    server: ServerSettings


class ClientCommand(Settings):
    """``wardround client``: one hospital."""

    site: Path
    client: ClientSettings


class AlignCommand(Settings):
    """``wardround align``."""

    adapter: Path
    out: Path
    seed: Annotated[int, Field(ge=0)]
    model: ModelSettings
    alignment: AlignmentSettings


class EvaluateCommand(Settings):
    """``wardround evaluate``."""

    adapter: Path
    part: Literal["all", "held_out"]
    most: Annotated[int, Field(ge=1)] | None
    max_tokens: Annotated[int, Field(ge=8, le=8192)]
    model: ModelSettings
    notes: NotesSettings
