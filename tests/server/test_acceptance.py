"""A reply is merged only when every part of it is in order, and nothing in it can raise."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from torch import Tensor

from adapters.adapter import Adapter
from adapters.lowrank import LowRank
from adapters.plan import TrainingPlan, plan_round
from adapters.statistics import MeasuredAdapter
from conf.load import load
from conf.schema import RunSettings
from server.acceptance import Accepted, LeftOut, accept, one_reply_each
from server.run_folder import RunFolder
from transport.formats import encode
from transport.wire import pack_refusal, pack_result

OPTIONS = ["strategy=ffa", "adapter.rank=2"]
PRIVATE = RunFolder.training_of(load("simulate", OPTIONS, RunSettings))
SETTINGS = RunFolder.training_of(load("simulate", [*OPTIONS, "privacy=none"], RunSettings))
PLAN = plan_round(SETTINGS, "run", 1, "0" * 64)
BOTH = PLAN.model_copy(update={"upload": "both"})
SENT = Adapter(
    PLAN.spec,
    {
        "layer.q": LowRank(torch.zeros(3, 2), torch.eye(2, 4)),
        "layer.v": LowRank(torch.zeros(5, 2), torch.eye(2, 4) * 2),
    },
)
GOOD = {"layer.q.lora_B.weight": torch.ones(3, 2), "layer.v.lora_B.weight": torch.full((5, 2), 0.5)}
B = "layer.q.lora_B.weight"


def answer(content: RecordDict | Error) -> Message:
    asked = Message(RecordDict(), dst_node_id=7, message_type="train")
    if isinstance(content, Error):
        return Message(error=content, reply_to=asked)
    return Message(content, reply_to=asked)


def result(tensors: dict[str, Tensor] | ArrayRecord, facts: Any = None) -> Message:
    """A reply with these tensors; ``facts`` as JSON text, or what to make JSON of."""
    content = pack_result({}, {})
    content["adapter"] = tensors if isinstance(tensors, ArrayRecord) else ArrayRecord(tensors)
    text = facts if isinstance(facts, str) else json.dumps(facts or {"site": "east"})
    content["facts"] = ConfigRecord({"json": text})
    return answer(content)


def reason(reply: Message, plan: TrainingPlan = PLAN, registered: str = "") -> str:
    outcome = accept(reply, plan, SENT, 7, registered)
    assert isinstance(outcome, LeftOut), outcome
    assert outcome.site in (registered or "node-7", "east")
    return outcome.reason


def accepted(reply: Message, plan: TrainingPlan = PLAN, registered: str = "") -> Accepted:
    outcome = accept(reply, plan, SENT, 7, registered)
    assert isinstance(outcome, Accepted), outcome
    return outcome


# --- what is accepted --------------------------------------------------------------------------


def test_uploaded_factors_join_the_frozen_ones_that_were_sent() -> None:
    one = accepted(result(GOOD, {"site": "east", "steps": 4, "epsilon_spent": 3.5}))
    assert one.site == "east"
    assert one.facts == {"site": "east", "steps": 4, "epsilon_spent": 3.5}
    assert 4 * 16 < one.bytes_up < 1000  # the numbers, and a little around them
    assert one.adapter.spec == SENT.spec
    for name, tensor in one.adapter.tensors().items():
        assert tensor.equal(GOOD.get(name, SENT.tensors()[name]))


def test_both_factors_are_taken_where_both_were_asked_for() -> None:
    moved = {name: tensor + 1 for name, tensor in SENT.tensors().items()}
    one = accepted(result(moved), BOTH)
    assert all(tensor.equal(moved[name]) for name, tensor in one.adapter.tensors().items())


@pytest.mark.parametrize(
    "stated", [None, 0.0, -1.0, "0.7", True, 0.009, 1e-160, 1.1e4, 1e160, 10**100]
)
def test_a_private_round_is_left_without_a_hospital_that_states_no_possible_noise(
    stated: object,
) -> None:
    plan = plan_round(PRIVATE, "run", 1, "0" * 64)
    facts = {"site": "east"} | ({} if stated is None else {"noise_multiplier": stated})
    assert reason(result(GOOD, facts), plan) == "no possible noise multiplier stated"
    for possible in (0.01, 0.7, 5, 1e4):
        assert accepted(result(GOOD, {"site": "east", "noise_multiplier": possible}), plan)


# --- tensors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({B: torch.full((3, 2), float("nan"))}, "factors hold NaN or infinity"),
        ({B: torch.full((3, 2), -float("inf"))}, "factors hold NaN or infinity"),
        ({B: torch.full((3, 2), 1e7)}, "factors impossibly large"),
        ({B: torch.full((3, 2), 3e38)}, "factors impossibly large"),
        ({B: torch.full((3, 2), 1e300, dtype=torch.float64)}, "factors not float32"),
        ({B: torch.ones(3, 2, dtype=torch.complex64)}, "factors not float32"),
        ({B: torch.ones(3, 2, dtype=torch.bool)}, "factors not float32"),
        ({B: torch.ones(2, 3)}, "factors of another shape"),
        ({B: torch.ones(3, 3)}, "factors of another shape"),
        ({B: torch.ones(6)}, "factors of another shape"),
        ({"layer.x.lora_B.weight": torch.ones(3, 2)}, "factors missing or unexpected"),
        ({"layer.q.lora_A.weight": torch.eye(2, 4)}, "factors missing or unexpected"),
        ({"lm_head.weight": torch.ones(3, 2)}, "factors missing or unexpected"),
    ],
)
def test_factors_that_do_not_fit_are_left_out(change: dict[str, Tensor], expected: str) -> None:
    assert reason(result(GOOD | change)) == expected


def test_missing_factors_are_left_out() -> None:
    assert reason(result({B: GOOD[B]})) == "factors missing or unexpected"
    assert reason(result({})) == "factors missing or unexpected"
    assert reason(result(GOOD), BOTH) == "factors missing or unexpected"


def test_one_bad_entry_among_many_is_found() -> None:
    for name, tensor in GOOD.items():
        for value in (float("nan"), float("inf"), 2e6, -2e6):
            bad = tensor.clone()
            bad[-1, -1] = value
            assert "factors" in reason(result(GOOD | {name: bad}))


def npy(shape: tuple[int, ...], kind: str = "<f4", data: bytes = b"") -> bytes:
    """A NumPy file that claims a shape and a type."""
    file = io.BytesIO()
    header = {"descr": kind, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + data


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"rubbish",
        b"PK\x03\x04 no archive",
        npy((3, 2)),  # no numbers follow
        npy((10**12, 2)),  # 8 TB are announced
        npy((-1, 2)),
        npy((3, 2), "|O", b"cos\nsystem\n."),  # a pickle
        npy((3, 2), "<U2", bytes(48)),
        npy((3, 2))[:40],
    ],
)
def test_bytes_that_are_no_tensor_cost_only_their_sender(data: bytes) -> None:
    array = Array(dtype="float32", shape=(3, 2), stype="numpy.ndarray", data=data)
    assert reason(result(ArrayRecord({B: array}))) == "malformed reply"


@pytest.mark.parametrize("wire", ["float32", "float16", "int8"])
def test_what_was_not_asked_for_is_not_even_decoded(
    wire: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = PLAN.model_copy(update={"wire": wire})
    good = encode(GOOD, wire)
    assert accepted(result(good), plan)
    reached: list[object] = []
    monkeypatch.setattr("transport.wire.decode", lambda *a: reached.append(a))
    for change, expected in (
        ({B: torch.ones(3000, 2).to(good[B].dtype)}, "factors of another shape"),
        ({"layer.x.lora_B.weight": good[B]}, "factors missing or unexpected"),
    ):
        assert reason(result(good | change), plan) == expected
    assert not reached


@pytest.mark.parametrize("shortage", [MemoryError, RuntimeError])
def test_a_reply_that_takes_too_much_memory_costs_only_its_sender(
    shortage: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(*_: object) -> None:
        raise shortage("not enough memory: you tried to allocate 9 GB")

    monkeypatch.setattr("transport.wire.decode", short)
    assert reason(result(GOOD)) == "malformed reply"


# --- facts and names ---------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '"site"', '["site"]', "{}", "5", "null"])
def test_facts_that_cannot_be_read_are_left_out(text: str) -> None:
    assert reason(result(GOOD, text)) == "malformed reply"


@pytest.mark.parametrize(
    "facts",
    [
        {"epsilon_spent": float("nan")},
        {"epsilon_spent": float("inf")},
        {"note": {"text": "nested"}},
        {"notes": ["a", "b"]},
        {"unit": None},
        {"unit": "x" * 200},
        {"x" * 200: 1},
        {"steps": 10**200},
        {f"fact{i}": i for i in range(40)},
    ],
)
def test_facts_that_are_not_a_few_short_values_are_left_out(facts: dict[str, Any]) -> None:
    assert reason(result(GOOD, {"site": "east"} | facts)) == "malformed facts"


@pytest.mark.parametrize(
    "name",
    ["global", "Global", "", ".", "..", "../west", "a/b", "-x", "east\n", "a b", "x" * 64, "ö", 5],
)
def test_a_name_that_cannot_be_a_folder_of_its_own_is_left_out(name: str | int) -> None:
    assert reason(result(GOOD, {"site": name})) == "invalid site name"


def test_a_hospital_cannot_speak_under_anothers_registered_name() -> None:
    assert accepted(result(GOOD), registered="east").site == "east"
    assert reason(result(GOOD, {"site": "west"}), registered="east") == "calls itself west"
    refusal = answer(pack_refusal("west", "INTERNAL", "internal error"))
    assert accept(refusal, PLAN, SENT, 7, "east") == LeftOut(
        "east", "refused: INTERNAL", lied=False
    )


def test_a_reply_without_its_records_is_left_out() -> None:
    for missing in ("adapter", "facts"):
        content = pack_result(GOOD, {"site": "east"})
        del content[missing]
        assert reason(answer(content)) == "malformed reply"
    swapped = RecordDict({"facts": ArrayRecord(GOOD), "adapter": ConfigRecord({"json": "{}"})})
    assert reason(answer(swapped)) == "malformed reply"
    assert reason(answer(RecordDict())) == "malformed reply"
    other = answer(RecordDict())
    other.__dict__["_content"] = ArrayRecord(GOOD)  # as Flower makes of bytes that say so
    assert reason(other) == "malformed reply"


# --- statistics --------------------------------------------------------------------------------

GRAM = PLAN.model_copy(update={"statistics": "gram"})
FISHER = PLAN.model_copy(update={"statistics": "fisher"})
GRAMS = {"layer.q": torch.eye(2), "layer.v": torch.tensor([[2.0, 0.5], [0.5, -1.0]])}


def measured(statistics: dict[str, Tensor] | ArrayRecord) -> Message:
    """A good reply with these statistics."""
    content = pack_result(GOOD, {"site": "east"})
    record = statistics if isinstance(statistics, ArrayRecord) else ArrayRecord(statistics)
    content["statistics"] = record
    return answer(content)


def test_statistics_that_were_asked_for_come_with_the_adapter() -> None:
    one = accepted(measured(GRAMS), GRAM)
    assert isinstance(one.adapter, MeasuredAdapter)
    assert all(one.adapter.statistics[name].equal(gram) for name, gram in GRAMS.items())
    assert one.bytes_up > accepted(result(GOOD)).bytes_up
    assert isinstance(accepted(measured(GOOD), FISHER).adapter, MeasuredAdapter)
    assert not isinstance(accepted(result(GOOD)).adapter, MeasuredAdapter)


@pytest.mark.parametrize(
    ("statistics", "plan", "said"),
    [
        (GRAMS, PLAN, "statistics missing or unexpected"),
        (GRAMS, FISHER, "statistics missing or unexpected"),
        ({"layer.q": torch.eye(2)}, GRAM, "statistics missing or unexpected"),
        (GRAMS | {"layer.q": torch.eye(3)}, GRAM, "statistics of another shape"),
        (GRAMS | {"layer.q": torch.eye(2).double()}, GRAM, "statistics not float32"),
        (GRAMS | {"layer.q": torch.eye(2) * float("inf")}, GRAM, "statistics hold NaN or infinity"),
        (GRAMS | {"layer.q": torch.eye(2) * 1e7}, GRAM, "statistics impossibly large"),
        (GRAMS | {"layer.q": torch.ones(2, 2).triu()}, GRAM, "statistics not symmetric"),
        (ArrayRecord({"x": Array("f", (1,), "numpy", b"?")}), GRAM, "malformed reply"),
    ],
)
def test_statistics_that_cannot_be_used_leave_the_hospital_out(
    statistics: Any, plan: TrainingPlan, said: str
) -> None:
    assert reason(measured(statistics), plan) == said


def test_a_reply_without_the_statistics_is_left_out() -> None:
    assert reason(result(GOOD), GRAM) == "statistics missing or unexpected"


# --- no result ---------------------------------------------------------------------------------


def test_an_error_is_named_by_its_number_and_its_text_is_not_repeated() -> None:
    error = answer(Error(code=2, reason="<class 'ValueError'>: 'John Smith was seen today'"))
    assert reason(error) == "no answer (Flower error 2)"
    assert accept(error, PLAN, SENT, 7, "east") == LeftOut(
        "east", "no answer (Flower error 2)", lied=False
    )


def test_a_refusal_is_recorded_by_its_code_alone() -> None:
    refusal = answer(pack_refusal("east", "BUDGET_EXHAUSTED", "free text with a name in it"))
    assert accept(refusal, PLAN, SENT, 7) == LeftOut(
        "east", "refused: BUDGET_EXHAUSTED", lied=False
    )
    odd = answer(pack_refusal("../west", "see John Smith: " + "A" * 99, ""))
    outcome = accept(odd, PLAN, SENT, 7)
    assert isinstance(outcome, LeftOut)
    assert outcome.site == "node-7"
    assert outcome.reason == "refused: JS" + "A" * 38


def test_a_name_used_twice_counts_for_nobody() -> None:
    def from_site(name: str) -> Accepted:
        return accepted(result(GOOD, {"site": name}))

    west, east, mid = map(from_site, ("west", "east", "mid"))
    merged, left_out = one_reply_each([west, east, mid, from_site("west")])
    assert [one.site for one in merged] == ["east", "mid"]  # in name order, whoever came first
    assert left_out == {"west": "two hospitals under one name"}
    merged, left_out = one_reply_each([mid, LeftOut("mid", "refused: INTERNAL"), east])
    assert [one.site for one in merged] == ["east"]
    assert set(left_out) == {"mid"}
    merged, left_out = one_reply_each([east, west, from_site("East"), LeftOut("WEST", "late")])
    assert merged == []  # which may be one folder on disk
    assert set(left_out) == {"east", "East", "west", "WEST"}
