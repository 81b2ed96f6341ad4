"""One simulated hospital: clinosim's exports, merged into one FHIR R4 bulk export.

Run as a process of its own (``python -m simulation.clinosim_export ORDER.json FOLDER``): clinosim
prints freely, keeps its reference data in memory and is bound to one core. All commands of a
hospital share the process, so that the reference data is read once; the results are the same, byte
for byte, as of separate ``clinosim`` calls.

clinosim numbers its patients from one in every call and derives every id from that number, so two
calls give the same ids to different patients. ``qualify`` makes them distinct.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from simulation.profiles import END

TYPES = (
    "Patient",
    "Encounter",
    "Condition",
    "MedicationRequest",
    "DocumentReference",
    "Composition",
)
MANIFEST = "manifest.json"


def qualify(node: Any, prefix: str) -> Any:
    """A copy of a FHIR resource in which every id, identifier and reference starts with ``prefix``.

    Ids become ``prefix-id``, business identifiers likewise, references ``Type/prefix-id``.
    """
    if isinstance(node, list):
        return [qualify(item, prefix) for item in node]
    if not isinstance(node, dict):
        return node
    copy = {key: qualify(value, prefix) for key, value in node.items()}
    if isinstance(reference := copy.get("reference"), str) and "/" in reference:
        kind, _, target = reference.partition("/")
        copy["reference"] = f"{kind}/{prefix}-{target}"
    if "resourceType" in copy:
        copy["id"] = f"{prefix}-{copy['id']}"
    for identifier in _identifiers(copy):
        identifier["value"] = f"{prefix}-{identifier['value']}"
    return copy


def _identifiers(resource: dict[str, Any]) -> list[dict[str, Any]]:
    several = resource.get("identifier", [])
    own = several if isinstance(several, list) else [several]
    master = resource.get("masterIdentifier")
    return [item for item in (*own, master) if isinstance(item, dict) and "value" in item]


def merge(exports: Iterable[Path], folder: Path, name: str) -> None:
    """Write the union of ``exports`` to ``folder``: one NDJSON file a type, and a manifest.

    Only the types that notes and instructions are made from are kept. Nothing in the result
    depends on when or where it was made. The manifest has the form of a FHIR bulk export's, with
    ``count`` and ``sha256`` of each file; it is written last.
    """
    folder.mkdir()
    lines: dict[str, list[str]] = {kind: [] for kind in TYPES}
    for number, export in enumerate(exports):
        for kind in TYPES:
            source = export / f"{kind}.ndjson"
            for line in source.open(encoding="utf-8") if source.exists() else ():
                lines[kind].append(json.dumps(qualify(json.loads(line), f"{name}-{number}")))
    output = []
    for kind, rows in lines.items():
        content = "".join(f"{row}\n" for row in rows).encode()
        (folder / f"{kind}.ndjson").write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        output.append({"type": kind, "url": f"{kind}.ndjson", "count": len(rows), "sha256": digest})
    manifest = {
        "transactionTime": f"{END}T23:59:59Z",
        "request": f"simulated hospital {name}",
        "requiresAccessToken": False,
        "output": output,
        "error": [],
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def run_clinosim(commands: Sequence[Sequence[str]], scratch: Path) -> list[Path]:
    """Run ``clinosim`` command lines one after the other; return the folder of each export.

    Raises
    ------
    RuntimeError
        A command wrote no patients (clinosim reports some errors without an exit status).
    """
    (program,) = entry_points(group="console_scripts", name="clinosim")
    clinosim = program.load()
    exports = []
    for number, command in enumerate(commands):
        output = scratch / str(number)
        sys.argv = ["clinosim", *command, "-o", str(output)]
        clinosim()
        exports.append(output / "fhir_r4")
        if not (exports[-1] / "Patient.ndjson").exists():
            raise RuntimeError(f"no patients from: clinosim {' '.join(command)}")
    return exports


def main() -> None:
    """Carry out the order ``{"name": ..., "commands": [[...], ...]}`` into a new folder."""
    os.nice(10)
    order = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    folder = Path(sys.argv[2])
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        merge(run_clinosim(order["commands"], Path(scratch)), folder, order["name"])


if __name__ == "__main__":
    main()
