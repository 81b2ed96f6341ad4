"""Why a hospital says no. Only these codes and fixed sentences ever leave the site.

The text of an exception may quote a note, a path or a patient id, so it stays in the local log.
"""

from __future__ import annotations

import traceback
from enum import Enum
from pathlib import Path


class Reason(Enum):
    """Code and sentence; public by construction."""

    PLAN_INVALID = "the plan could not be read"
    ADAPTER_INVALID = "the adapter sent does not fit the plan"
    MODEL_MISMATCH = "the base model is not the one installed at this site"
    RUN_NOT_ALLOWED = "this site does not take part in runs of this name"
    QUIET_HOURS = "this site does not train at this time of day"
    PRIVACY_REQUIRED = "this site trains only under differential privacy"
    LINEAGE_PRIVATE = "this site keeps a privacy ledger of these notes; nothing leaves beside it"
    LINEAGE_UNPROTECTED = "these notes were trained on without privacy; no ledger covers them"
    UNIT_TOO_WEAK = "the plan's privacy unit is weaker than the site policy's"
    LIMIT_EXCEEDED = "the plan exceeds a limit of the site policy"
    STRATEGY_NOT_ALLOWED = "the site policy does not allow this way of merging"
    STATISTICS_NOT_SHARED = "the site policy lets out none of the statistics that the plan asks for"
    BUDGET_EXHAUSTED = "the privacy budget does not allow the plan"
    NOTES_UNUSABLE = "the notes of this site could not be read"
    TRAINING_FAILED = "training failed; the charge is kept"
    OUTBOUND_REFUSED = "the gate refused the result"
    AUDIT_FAILED = "the site's audit log cannot be written"
    INTERNAL = "internal error; see the log at the site"


class Refusal(Exception):
    """A round that this site will not or cannot do. ``detail`` is for the local log only."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(reason.value)
        self.reason = reason
        self.detail = detail


def failure_site(problem: BaseException) -> str:
    """Type and place of an exception, without its text: the text may quote a note."""
    frames = traceback.extract_tb(problem.__traceback__)
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "unknown place"
    return f"{type(problem).__name__} at {place}"
