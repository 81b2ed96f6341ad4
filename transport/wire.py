"""Messages between coordinator and hospital, as Flower records.

Down: the global adapter ("adapter") and the plan as JSON ("plan"). Up: the uploaded factors
("adapter"), the facts the gate released ("facts") and statistics where the plan asks for them
("statistics"), or a refusal ("refusal").

The plan says how factors travel (``transport.formats``). In another format than float32 the upload
is the change of the trained part since the task arrived, rounded. Down, a frozen factor is exact,
because all hospitals must share it; of the trained one each hospital gets a rounded copy to start
from, and the coordinator adds the changes to its own exact one: no rounding of it ever stays.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from pydantic import ValidationError
from torch import Tensor

from adapters.adapter import Adapter
from adapters.plan import TrainingPlan
from transport.formats import decode, encode, factor_names


def pack_task(plan: TrainingPlan, adapter: Adapter) -> RecordDict:
    """Records of a round's task, coordinator to hospital."""
    return RecordDict(
        {
            "plan": ConfigRecord({"json": plan.model_dump_json()}),
            "adapter": ArrayRecord(
                encode(adapter.tensors(), plan.wire, plan.travels_exactly(adapter.tensors()))
            ),
        }
    )


def unpack_task(content: RecordDict) -> tuple[TrainingPlan, Adapter]:
    """Inverse of ``pack_task``. Raises ValueError when anything is missing or malformed."""
    try:
        plan = TrainingPlan.model_validate_json(str(content.config_records["plan"]["json"]))
        tensors = content.array_records["adapter"].to_torch_state_dict()
    except KeyError as missing:
        raise ValueError(f"record missing: {missing.args[0]}") from None
    except ValidationError as problem:
        first = problem.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, ("plan", *first["loc"])))
        raise ValueError(f"{place}: {first['msg']}") from None
    except ValueError:
        raise
    except Exception as problem:  # bytes that are no array fail in many ways
        raise ValueError(f"malformed task ({type(problem).__name__})") from None
    decoded = decode(tensors, plan.wire, plan.travels_exactly(factor_names(tensors, plan.wire)))
    adapter = Adapter.from_tensors(decoded, plan.spec)
    if not adapter.is_finite():
        raise ValueError("the adapter holds NaN or infinity")
    return plan, adapter


def pack_result(
    tensors: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    statistics: Mapping[str, Tensor] | None = None,
) -> RecordDict:
    """Records of a round's result, hospital to coordinator."""
    records = RecordDict(
        {
            "adapter": ArrayRecord(dict(tensors)),
            "facts": ConfigRecord({"json": json.dumps(dict(facts))}),
        }
    )
    if statistics:
        records["statistics"] = ArrayRecord(dict(statistics))
    return records


def change(
    trained: Mapping[str, Tensor], received: Adapter, plan: TrainingPlan
) -> dict[str, Tensor]:
    """By how much the trained part, as ``to_travel`` names it, differs from what was received."""
    before = plan.to_travel(received)
    return {name: tensor.double() - before[name].double() for name, tensor in trained.items()}


def unpack_upload(
    arrays: Mapping[str, Tensor], sent: Adapter, plan: TrainingPlan
) -> dict[str, Tensor]:
    """The trained part that a hospital's arrays stand for, float32.

    ``sent`` is the coordinator's own, exact adapter. Raises ValueError, in fixed words, when
    something is missing, of another type or shape, or has no sound scale; names and shapes are
    looked at first, so what is not as asked for is not even copied.
    """
    before = plan.to_travel(sent)
    if set(factor_names(arrays, plan.wire)) != set(before):
        raise ValueError("factors missing or unexpected")
    if any(arrays[name].shape != tensor.shape for name, tensor in before.items()):
        raise ValueError("factors of another shape")
    decoded = decode(arrays, plan.wire)
    if plan.wire == "float32":
        return decoded
    return {n: (before[n].double() + moved.double()).float() for n, moved in decoded.items()}


def pack_refusal(site: str, code: str, reason: str) -> RecordDict:
    """Records of a refusal."""
    return RecordDict({"refusal": ConfigRecord({"site": site, "code": code, "reason": reason})})


def size_bytes(content: RecordDict) -> int:
    """Bytes of all tensors in the records."""
    return sum(record.count_bytes() for record in content.array_records.values())


def digest(content: RecordDict) -> tuple[str, int]:
    """SHA-256 (hex) over all records, names and types included, and how many bytes were hashed.

    Two contents of equal digest are equal for all that a reader can see; the order of records does
    not count.
    """
    hashed, size = hashlib.sha256(), 0

    def feed(*parts: bytes) -> None:
        nonlocal size
        for part in parts:
            hashed.update(len(part).to_bytes(8, "big"))
            hashed.update(part)
            size += len(part)

    for name, record in sorted(content.items()):
        feed(type(record).__name__.encode(), name.encode())
        for key, value in sorted(record.items()):
            if isinstance(value, Array):
                shape = json.dumps([value.dtype, list(value.shape), value.stype])
                feed(key.encode(), shape.encode(), value.data)
            else:
                feed(key.encode(), repr(value).encode())
    return hashed.hexdigest(), size
