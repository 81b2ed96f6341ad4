"""Small exports and files, written by hand in the shapes that real systems produce."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from conf.schema import NotesSettings

Json = dict[str, Any]
Write = Callable[[Mapping[str, list[Json]]], Path]


@pytest.fixture
def settings() -> Callable[..., NotesSettings]:
    """Settings with short notes allowed; keywords override."""

    def make(source: str, path: Path, **others: Any) -> NotesSettings:
        values = {"source": source, "path": path, "min_chars": 5, "max_chars": 1000} | others
        return NotesSettings.model_validate(values)

    return make


@pytest.fixture
def export(tmp_path: Path) -> Write:
    """Write an export: file name -> resources, one a line."""

    def write(files: Mapping[str, list[Json]]) -> Path:
        folder = tmp_path / "export"
        folder.mkdir(exist_ok=True)
        for name, resources in files.items():
            (folder / name).write_text("".join(json.dumps(r) + "\n" for r in resources))
        return folder

    return write


@pytest.fixture
def document() -> Callable[..., Json]:
    """A DocumentReference whose attachment holds the text; keywords replace elements."""

    def make(
        name: str, text: str = "Seen in clinic today.", patient: str = "p1", **others: Any
    ) -> Json:
        data = base64.b64encode(text.encode()).decode()
        return {
            "resourceType": "DocumentReference",
            "id": name,
            "status": "current",
            "type": {"coding": [{"system": "http://loinc.org", "code": "11506-3"}]},
            "subject": {"reference": f"Patient/{patient}"},
            "content": [{"attachment": {"contentType": "text/plain", "data": data}}],
            "context": {"encounter": [{"reference": "Encounter/e1"}]},
        } | others

    return make


@pytest.fixture
def composition() -> Callable[..., Json]:
    """A Composition with the given sections."""

    def make(name: str, sections: list[Json], patient: str = "p1", **others: Any) -> Json:
        return {
            "resourceType": "Composition",
            "id": name,
            "status": "final",
            "title": "Discharge summary",
            "type": {"coding": [{"code": "18842-5"}], "text": "Discharge summary note"},
            "subject": {"reference": f"Patient/{patient}"},
            "encounter": {"reference": "Encounter/e1"},
            "section": sections,
        } | others

    return make


@pytest.fixture
def section() -> Callable[..., Json]:
    """A section of a Composition, its narrative given as the inside of the XHTML div."""

    def make(title: str, inside: str, *inner: Json) -> Json:
        div = f"<div xmlns='http://www.w3.org/1999/xhtml'>{inside}</div>"
        nested = {"section": list(inner)} if inner else {}
        return {"title": title, "text": {"status": "generated", "div": div}} | nested

    return make
