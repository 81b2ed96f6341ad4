"""Rounded tensors: how far off they are, how many bytes they take, and what is not taken."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from conf.schema import Wire
from transport.formats import decode, encode

B, A, CORE = "l.q.lora_B.weight", "l.q.lora_A.weight", "l.q.lora_core.weight"
ROUNDED: tuple[Wire, ...] = ("float16", "int8")


def tensors(seed: int, size: float = 1.0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    grades = torch.logspace(0, -6, 4)  # components differ by orders of magnitude
    return {
        B: torch.randn(30, 4, generator=g) * grades * size,
        A: torch.randn(4, 20, generator=g) * grades[:, None] * size,
        CORE: torch.randn(4, 4, generator=g) * grades[:, None] * size,
    }


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.sampled_from([1e-20, 1e-5, 1.0, 1e5]))
def test_an_entry_is_off_by_half_a_step_of_its_component_at_most(seed: int, size: float) -> None:
    given = tensors(seed, size)
    for wire in ROUNDED:
        found = decode(encode(given, wire), wire)
        assert set(found) == set(given)
        for name, x in given.items():
            along = 0 if name == B else 1
            top = x.abs().amax(along, keepdim=True)
            error = (found[name].double() - x.double()).abs()
            half = top / 254 if wire == "int8" else x.abs() * 2**-11 + top * 2**-25
            assert bool((error <= half.double() * (1 + 1e-5)).all()), (wire, name)


def test_float32_and_what_is_exact_come_out_bit_for_bit() -> None:
    given = tensors(1)
    assert all(t.equal(given[n]) for n, t in decode(encode(given, "float32"), "float32").items())
    for wire in ROUNDED:
        sent = encode(given, wire, {A})
        found = decode(sent, wire, {A})
        assert found[A].equal(given[A])
        assert not found[B].equal(given[B])


def test_rounding_again_changes_nothing() -> None:
    for wire in ROUNDED:
        once = decode(encode(tensors(2), wire), wire)
        again = decode(encode(once, wire), wire)
        assert all(torch.allclose(again[n], t, rtol=3e-7, atol=0) for n, t in once.items())


def test_zero_stays_zero_and_what_cannot_travel_is_said() -> None:
    for wire in ROUNDED:
        zero = decode(encode({B: torch.zeros(3, 2)}, wire), wire)[B]
        assert zero.equal(torch.zeros(3, 2))
        for bad in (float("nan"), float("inf"), 1e30):
            with pytest.raises(ValueError, match="too large"):
                encode({B: torch.tensor([[bad, 1.0]])}, wire)


@pytest.mark.parametrize("wire", ["int8", "float16"])
def test_no_component_is_too_small_to_be_rounded_rightly(wire: Wire) -> None:
    sizes = torch.tensor([10.0**-k for k in range(30, 46)], dtype=torch.float64)
    sent = {"l.lora_A.weight": (sizes[:, None] * torch.tensor([[1.0, 0.61]])).float()}
    error = (decode(encode(sent, wire), wire)["l.lora_A.weight"] - sent["l.lora_A.weight"]).abs()
    step = sizes / (127 if wire == "int8" else 1000)
    assert (error.double() <= step.clamp(min=127 * 1.2e-38)[:, None]).all()
    assert not decode(encode(sent, wire), wire)["l.lora_A.weight"][-5:].any()


def test_int8_takes_a_quarter_of_the_bytes() -> None:
    given = {B: torch.randn(576, 16), A: torch.randn(16, 576)}

    def size(wire: Wire) -> int:
        return sum(t.numel() * t.element_size() for t in encode(given, wire).values())

    assert size("float32") == 4 * 2 * 576 * 16
    assert size("float16") == size("float32") / 2 + 2 * 16 * 4
    assert size("int8") == size("float32") / 4 + 2 * 16 * 4


Change = Callable[[dict[str, Tensor]], object]
SCALE = B + ".scale"


def scaled_by(value: float) -> Change:
    return lambda sent: sent[SCALE].__setitem__(0, value)


@pytest.mark.parametrize("wire", ROUNDED)
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (scaled_by(float("nan")), "scales impossible"),
        (scaled_by(float("inf")), "scales impossible"),
        (scaled_by(0.0), "scales impossible"),
        (scaled_by(-1.0), "scales impossible"),
        (scaled_by(1e7), "scales impossible"),
        (lambda sent: sent.update({SCALE: sent[SCALE].double()}), "scales not float32"),
        (lambda sent: sent.update({SCALE: sent[SCALE][:1]}), "scales of another shape"),
        (lambda sent: sent.update({SCALE: sent[SCALE][None]}), "scales of another shape"),
        (lambda sent: sent.pop(SCALE), "missing or unexpected"),
        (lambda sent: sent.pop(B), "missing or unexpected"),
        (lambda sent: sent.update({"x.scale": sent[SCALE]}), "missing or unexpected"),
        (lambda sent: sent.update({B: sent[B].float()}), "factors not "),
        (lambda sent: sent.update({B: sent[B].to(torch.int32)}), "factors not "),
        (lambda sent: sent.update({B: sent[B][0]}), "factors of another shape"),
    ],
)  # fmt: skip
def test_what_encode_would_not_have_sent_is_refused(wire: Wire, change: Change, said: str) -> None:
    sent = encode({B: tensors(3)[B]}, wire)
    decode(sent, wire)
    change(sent)
    with pytest.raises(ValueError, match=said):
        decode(sent, wire)


@pytest.mark.parametrize(
    ("wire", "value"), [("int8", -128), ("float16", 1.5), ("float16", float("nan"))]
)
def test_a_number_beyond_its_scale_is_refused(wire: Wire, value: float) -> None:
    sent = encode({B: tensors(3)[B]}, wire)
    sent[B][0, 0] = value
    with pytest.raises(ValueError, match="beyond their scale"):
        decode(sent, wire)
