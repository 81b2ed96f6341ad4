"""An audit as JSON: every number of the report, unrounded, and nothing from a note."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from server.run_folder import write_atomically
from simulation.audit.checks import Finding, Verdict
from simulation.audit.run import Audit


def as_record(audit: Audit) -> dict[str, Any]:
    """What ``audit.json`` holds."""
    game, settings = audit.honest.game, audit.settings
    kept = {"adapter", "privacy", "optimizer", "white_box", "black_box", "seed"}
    return {
        "created": audit.created,
        "seconds": audit.seconds,
        "passed": not audit.problems,
        "problems": list(audit.problems),
        "model": audit.model,
        "settings": settings.model_dump(mode="json", include=kept),
        "white_box": {
            "claimed_epsilon": game.claimed,
            "delta": settings.privacy.delta,
            "canaries": len(game.scores),
            "included": int(game.included.sum()),
            "proved_epsilon": {"steinke": game.steinke, "gaussian": game.gaussian},
        },
        "engines": [_verdict(v) for v in audit.verdicts],
        "whole_rounds": _findings(audit.rounds),
        "black_box": {
            "with_privacy": asdict(audit.private),
            "without_privacy": asdict(audit.without),
            "findings": _findings(audit.notes),
        },
    }


def write_record(audit: Audit, folder: Path) -> Path:
    """Write ``audit.json`` into ``folder``, which is made if absent, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "audit.json"
    write_atomically(path, json.dumps(as_record(audit), indent=1) + "\n")
    return path


def _verdict(verdict: Verdict) -> dict[str, Any]:
    return {
        "engine": verdict.engine,
        "defect": verdict.defect,
        "caught_by": list(verdict.failed),
        "proved_epsilon": verdict.game.proved,
        "findings": _findings(verdict.findings),
    }


def _findings(findings: tuple[Finding, ...]) -> list[dict[str, Any]]:
    return [{**asdict(finding), "passed": finding.passed} for finding in findings]
