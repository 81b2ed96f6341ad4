"""Messages: what goes in comes out bit for bit, and what is malformed is one kind of error."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.adapter import Adapter, AdapterSpec
from adapters.lowrank import LowRank
from adapters.plan import TrainingPlan, plan_round
from conf.load import load
from conf.schema import RunSettings
from transport.wire import (
    digest,
    pack_refusal,
    pack_result,
    pack_task,
    size_bytes,
    unpack_task,
)

SETTINGS = load("simulate", ["adapter.rank=2"], RunSettings)
PLAN = plan_round(SETTINGS, "run", 1, "0" * 64)


def adapter(seed: int = 0, rank: int = 2) -> Adapter:
    g = torch.Generator().manual_seed(seed)
    spec = AdapterSpec(rank, PLAN.adapter.alpha, PLAN.adapter.targets)
    layers = {
        f"model.layers.{i}.q_proj": LowRank(
            torch.randn(m, rank, generator=g), torch.randn(rank, 7, generator=g)
        )
        for i, m in enumerate((5, 3))
    }
    return Adapter(spec, layers)


def task(plan: TrainingPlan = PLAN) -> RecordDict:
    return pack_task(plan, adapter())


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31), st.integers(1, 3))
def test_a_task_comes_out_as_it_went_in(seed: int, number: int) -> None:
    sent = plan_round(SETTINGS, "run-1", min(number, SETTINGS.federation.rounds), "ab" * 32)
    plan, received = unpack_task(pack_task(sent, adapter(seed)))
    assert plan == sent
    assert received.spec == adapter(seed).spec
    assert received.fingerprint() == adapter(seed).fingerprint()


def test_factors_of_another_type_are_no_task() -> None:
    content = task()
    wide = {k: v.double() for k, v in adapter().tensors().items()}
    content["adapter"] = ArrayRecord(wide)
    with pytest.raises(ValueError, match="not float32"):
        unpack_task(content)


def test_tensors_travel_as_float32_whatever_they_were() -> None:
    for kind in (torch.float64, torch.bfloat16, torch.float16):
        layers = {n: layer.to(kind) for n, layer in adapter().layers.items()}
        _, received = unpack_task(pack_task(PLAN, Adapter(adapter().spec, layers)))
        assert {t.dtype for t in received.tensors().values()} == {torch.float32}
        for name, tensor in received.tensors().items():
            assert tensor.equal(adapter().tensors()[name].to(kind).float())


def test_what_is_done_to_the_received_adapter_does_not_reach_the_message() -> None:
    content = task()
    for _ in range(2):
        _, received = unpack_task(content)
        assert received.fingerprint() == adapter().fingerprint()
        for tensor in received.tensors().values():
            tensor.zero_()


def with_plan(**changes: Any) -> RecordDict:
    wished = PLAN.model_dump(mode="json") | changes
    content = task()
    content["plan"] = ConfigRecord({"json": json.dumps(wished)})
    return content


def with_tensors(**changes: torch.Tensor) -> RecordDict:
    content = task()
    tensors = adapter().tensors() | {k.replace("__", "."): v for k, v in changes.items()}
    content["adapter"] = ArrayRecord(tensors)
    return content


def with_bytes(data: bytes) -> RecordDict:
    content = task()
    next(iter(content.array_records["adapter"].values())).data = data
    return content


def without(name: str) -> RecordDict:
    content = task()
    del content[name]
    return content


A = "model__layers__0__q_proj__lora_A__weight"


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        without("plan"),
        without("adapter"),
        RecordDict({"plan": ConfigRecord({"text": "{}"}), "adapter": task()["adapter"]}),
        RecordDict({"plan": ConfigRecord({"json": "{"}), "adapter": task()["adapter"]}),
        RecordDict({"plan": ConfigRecord({"json": b"\xff"}), "adapter": task()["adapter"]}),
        with_plan(rounds=0),
        with_plan(run="../other"),
        with_plan(notes="/srv/notes"),  # a plan names no notes
        with_plan(adapter=PLAN.adapter.model_dump() | {"rank": 3}),
        with_tensors(**{A: torch.full((2, 7), float("nan"))}),
        with_tensors(**{A: torch.full((2, 7), float("inf"))}),
        with_tensors(**{A: torch.zeros(3, 7)}),
        with_bytes(b""),
        with_bytes(b"rubbish"),
        with_bytes(b"PK\x03\x04 no archive"),
        with_tensors(extra=torch.zeros(2, 2)),
        with_tensors(lm_head__weight=torch.zeros(2, 2)),
        with_tensors(model__layers__9__q_proj__lora_A__weight=torch.zeros(2, 7)),
    ],
)
def test_what_is_malformed_is_a_value_error(content: RecordDict) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  pydantic's and our own messages differ
        unpack_task(content)


def test_results_and_refusals_hold_what_they_were_given_and_no_more() -> None:
    tensors = {"layer.lora_B.weight": torch.ones(3, 2)}
    content = pack_result(tensors, {"site": "east", "steps": 2})
    assert set(content) == {"adapter", "facts"}
    assert json.loads(str(content.config_records["facts"]["json"])) == {"site": "east", "steps": 2}
    (received,) = content.array_records["adapter"].to_torch_state_dict().values()
    assert received.equal(torch.ones(3, 2))
    measured = pack_result(tensors, {"site": "east"}, {"layer": torch.eye(2)})
    assert measured["adapter"] == content["adapter"]
    assert measured.array_records["statistics"].to_torch_state_dict()["layer"].equal(torch.eye(2))
    refusal = pack_refusal("east", "INTERNAL", "see the log")
    assert set(refusal) == {"refusal"}
    assert dict(refusal.config_records["refusal"]) == {
        "site": "east",
        "code": "INTERNAL",
        "reason": "see the log",
    }


def test_size_is_that_of_the_tensors() -> None:
    assert size_bytes(pack_refusal("east", "INTERNAL", "x" * 10_000)) == 0
    small, large = (size_bytes(pack_result({"w": torch.zeros(n)}, {})) for n in (1000, 3000))
    assert large - small == pytest.approx(4 * 2000, abs=64)
    assert small >= 4 * 1000


def test_a_digest_is_of_everything_a_reader_sees() -> None:
    tensors = {"w": torch.arange(4.0), "v": torch.zeros(2)}
    packed = pack_result(tensors, {"site": "east"})
    assert digest(packed) == digest(pack_result(dict(reversed(tensors.items())), {"site": "east"}))
    assert len(digest(packed)[0]) == 64
    assert digest(packed)[1] > size_bytes(packed) - 200  # raw bytes, without the packing's headers
    others = [
        pack_result(tensors, {"site": "west"}),
        pack_result(tensors | {"w": torch.arange(4.0) + 1e-6}, {"site": "east"}),
        pack_result(tensors | {"w": torch.arange(4.0).view(2, 2)}, {"site": "east"}),
        pack_result({"u": tensors["w"], "v": tensors["v"]}, {"site": "east"}),
        pack_result({"w": tensors["w"]}, {"site": "east"}),
        RecordDict({"adapter": packed["adapter"]}),
        RecordDict(),
        RecordDict({"x": ConfigRecord({"ab": "c"})}),
        RecordDict({"x": ConfigRecord({"a": "bc"})}),
        RecordDict({"x": ConfigRecord({"a": 1})}),
        RecordDict({"x": ConfigRecord({"a": 1.0})}),
        RecordDict({"x": MetricRecord({"a": 1.0})}),
    ]
    digests = [digest(content)[0] for content in (packed, *others)]
    assert len(set(digests)) == len(digests)
