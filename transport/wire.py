"""Messages between coordinator and hospital, as Flower records.

Down: the global adapter ("adapter") and the plan as JSON ("plan"). Up: the uploaded factors
("adapter") and the facts the gate released ("facts"), or a refusal ("refusal"). Tensors travel as
float32.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from adapters.adapter import Adapter
from adapters.plan import TrainingPlan


def pack_task(plan: TrainingPlan, adapter: Adapter) -> RecordDict:
    """Records of a round's task, coordinator to hospital."""
    return RecordDict(
        {
            "plan": ConfigRecord({"json": plan.model_dump_json()}),
            "adapter": ArrayRecord({k: v.float() for k, v in adapter.tensors().items()}),
        }
    )


def unpack_task(content: RecordDict) -> tuple[TrainingPlan, Adapter]:
    """Inverse of ``pack_task``. Raises ValueError when anything is missing or malformed."""
    try:
        plan = TrainingPlan.model_validate_json(str(content.config_records["plan"]["json"]))
        tensors = content.array_records["adapter"].to_torch_state_dict()
    except KeyError as missing:
        raise ValueError(f"record missing: {missing.args[0]}") from None
    except ValueError:
        raise
    except Exception as problem:  # bytes that are no array fail in many ways
        raise ValueError(f"malformed task ({type(problem).__name__})") from None
    adapter = Adapter.from_tensors(tensors, plan.spec)
    if not adapter.is_finite():
        raise ValueError("the adapter holds NaN or infinity")
    return plan, adapter


def pack_result(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> RecordDict:
    """Records of a round's result, hospital to coordinator."""
    return RecordDict(
        {
            "adapter": ArrayRecord(dict(tensors)),
            "facts": ConfigRecord({"json": json.dumps(dict(facts))}),
        }
    )


def pack_refusal(site: str, code: str, reason: str) -> RecordDict:
    """Records of a refusal."""
    return RecordDict({"refusal": ConfigRecord({"site": site, "code": code, "reason": reason})})


def size_bytes(content: RecordDict) -> int:
    """Bytes of all tensors in the records."""
    return sum(record.count_bytes() for record in content.array_records.values())
