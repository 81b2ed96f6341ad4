"""Rounding an upload: the error of many rounds is that of one, and a task has one answer."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from adapters.adapter import Adapter
from adapters.lowrank import LowRank
from adapters.plan import TrainingPlan
from adapters.trained_part import joined, to_travel
from client.privacy.gate import Outgoing
from client.training import train_round
from client.upload import remainders_file, rounded
from conf.policy import SitePolicy
from strategies.merging import merge
from strategies.registry import create
from transport.formats import encode
from transport.wire import pack_result, pack_task, size_bytes, unpack_task, unpack_upload

if TYPE_CHECKING:
    from conftest import Hospital

MakePlan = Callable[..., TrainingPlan]
MakePolicy = Callable[..., SitePolicy]
Install = Callable[..., "Hospital"]
Start = tuple[Adapter, str]
SHAPES = {"a.q": (24, 20), "a.v": (12, 20)}
OPEN = {"required": False}
OFF = {"enabled": False, "clip_norm": 5.0, "sampling_rate": 0.5}
ROUNDS = 24


def orthonormal(shape: tuple[int, int], seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(*shape, generator=g)).Q


def learned(round_: int, site: int) -> dict[str, Tensor]:
    """What a site would learn: mostly the same every time, the worst case for rounding."""
    g, own = torch.Generator().manual_seed(7), torch.Generator().manual_seed(1000 * round_ + site)
    return {
        n: 0.1 * torch.randn(m, 4, generator=g) + 0.01 * torch.randn(m, 4, generator=own)
        for n, (m, _) in SHAPES.items()
    }


def federation(
    wire: str, strategy: str, plan: MakePlan, policies: list[SitePolicy], forget: bool = False
) -> list[dict[str, Tensor]]:
    """The global update after every round, dense. What is learned does not depend on rounding.

    ``forget``: sites lose their remainders.
    """
    directions = {n: orthonormal((w, 4), 3).T for n, (_, w) in SHAPES.items()}
    spec = plan(adapter={"rank": 4}).spec
    model = Adapter(
        spec, {n: LowRank(torch.zeros(m, 4), directions[n]) for n, (m, _) in SHAPES.items()}
    )
    seen = []
    for number in range(1, ROUNDS + 1):
        asked = plan(round=number, rounds=ROUNDS, adapter={"rank": 4}, wire=wire)
        answers = []
        for site, policy in enumerate(policies):
            got_plan, received = unpack_task(pack_task(asked, model))
            layers = {}
            for n, layer in received.layers.items():
                step = learned(number, site)[n] @ directions[n] @ layer.A.T  # dW, whatever A is
                layers[n] = LowRank(layer.B + step, layer.A)
            released = Outgoing(to_travel(Adapter(spec, layers), "B", 3), {"site": policy.site})
            if forget:
                remainders_file(policy).unlink(missing_ok=True)
            sent = rounded(released, got_plan, received, policy)
            trained = unpack_upload(sent.tensors, model, asked)
            answers.append(joined(model, trained, "B", 3))
        model = merge(create(strategy), answers, [1 / len(answers)] * len(answers)).adapter
        seen.append({n: d.to(torch.float64).dense() for n, d in model.deltas().items()})
    return seen


def gap(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float((one[n] - other[n]).square().sum()) for n in one))


@pytest.mark.parametrize("strategy", ["ffa", "fedsvd"])  # A stays; A is turned every round
def test_rounding_does_not_add_up_over_rounds(
    strategy: str, plan: MakePlan, policy: MakePolicy, tmp_path: Path
) -> None:
    sites = [policy(site=s, ledger=tmp_path / f"{s}.sqlite") for s in ("east", "mid", "west")]
    exact = federation("float32", strategy, plan, sites)
    errors = {}
    for forget in (False, True):
        found = federation("int8", strategy, plan, sites, forget)
        errors[forget] = [gap(a, b) for a, b in zip(found, exact, strict=True)]
    size = math.sqrt(sum(float(d.square().sum()) for d in exact[-1].values()))
    first = errors[False][0]
    assert first > 0
    assert max(errors[False]) < 2.5 * first  # of one round, whatever their number
    assert errors[True][-1] > 3 * errors[False][-1]  # and that is what is carried over
    assert errors[False][-1] / size < 5e-4


@pytest.mark.parametrize("train", ["B", "A"])
def test_a_turned_factor_takes_the_remainder_along_and_loses_what_it_does_not_span(
    train: str, plan: MakePlan, policy: MakePolicy
) -> None:
    """Written for a trained B; where A is trained, everything is transposed."""
    adapter = {"rank": 4, "train": train}
    own, spec, name = policy(), plan(adapter={"rank": 4}).spec, f"a.q.lora_{train}.weight"
    A = orthonormal((20, 8), 1).T
    turn = orthonormal((4, 4), 2)

    def ask(number: int, frozen: Tensor, moved: Tensor) -> Tensor:
        asked = plan(round=number, rounds=3, adapter=adapter, upload=train, wire="int8")
        zero = torch.zeros(24, 4)
        layer = LowRank(zero, frozen) if train == "B" else LowRank(frozen.T, zero.T)
        received = Adapter(spec, {"a.q": layer})
        released = Outgoing({name: moved if train == "B" else moved.T}, {})
        sent = rounded(released, asked, received, own)
        found = unpack_upload(sent.tensors, received, asked)[name]
        return found if train == "B" else found.T

    moved = torch.randn(24, 4, generator=torch.Generator().manual_seed(1))
    left = moved - ask(1, A[:4], moved)
    assert left.any()
    # Nothing is learned, so what comes is the remainder, in other coordinates; of a factor that
    # spans half of it, half.
    came = ask(2, turn @ A[:4], torch.zeros(24, 4))
    assert float((came @ turn @ A[:4] - left @ A[:4]).norm()) < 0.01 * float(left.norm())
    still = left @ A[:4] - came @ turn @ A[:4]
    half = torch.cat([A[:2], A[4:6]])
    last = ask(3, half, torch.zeros(24, 4))
    assert float((last @ half - still @ half.T @ half).norm()) < 0.01 * float(still.norm())


def test_a_task_that_comes_again_is_rounded_as_before_and_another_run_begins_anew(
    plan: MakePlan,
    policy: MakePolicy,
    starting_point: Start,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own, received = policy(), starting_point[0]
    g = torch.Generator().manual_seed(1)
    moved = {
        n: t + torch.randn(t.shape, generator=g) for n, t in to_travel(received, "B", 3).items()
    }

    def ask(number: int, site: SitePolicy = own, **others: Any) -> bytes:
        asked = plan(round=number, rounds=4, wire="int8", **others)
        return rounded(Outgoing(moved, {}), asked, received, site).to_bytes()

    first, second = ask(1), ask(2)
    assert first != second  # the same change, with what was left of the first
    assert ask(2) == second  # after a crash before the reply was stored
    assert ask(2, local_steps=3) == second  # another task of that round, in place of the last
    third = ask(3)
    assert ask(3) == third != second
    assert ask(1) == first  # an old task: nothing of later rounds is in it
    for others in (
        {"run": "second"},
        {"site": policy(lineage="another")},
        {"privacy": {"enabled": False}},
    ):
        ask(1)
        assert ask(2) == second
        assert ask(3, **others) == first  # nothing of what is not its own is in it
    remainders_file(own).write_bytes(b"rubbish")
    assert ask(2) == first
    ask(1)

    def broken(*_: object) -> None:
        raise OSError("the disk does not answer")

    with monkeypatch.context() as disk:
        disk.setattr("client.upload.safe_open", broken)
        assert ask(2) == first


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("shape", [(23, 4), (24, 3), (4, 24), (24,), ()])
def test_a_remainder_of_another_shape_is_dropped(
    shape: tuple[int, ...], turned: bool, plan: MakePlan, policy: MakePolicy
) -> None:
    own, spec = policy(), plan(adapter={"rank": 4}).spec
    A = orthonormal((20, 4), 1).T
    name = "a.q.lora_B.weight"
    asked = plan(round=2, rounds=3, adapter={"rank": 4}, wire="int8")
    received = Adapter(spec, {"a.q": LowRank(torch.zeros(24, 4), A)})
    released = Outgoing({name: torch.ones(24, 4)}, {})
    plain = rounded(released, asked, received, own).to_bytes()
    frozen = A.flip(0) if turned else A
    facts = {
        "run": asked.run, "lineage": own.lineage, "private": "True", "round": "1",
    }  # fmt: skip
    for left, changes in ((torch.full((24, 4), 0.1), True), (torch.ones(shape), False)):
        tensors = {f"after/left/{name}": left, f"after/frozen/{name}": frozen.contiguous()}
        save_file(tensors, remainders_file(own), facts)
        assert (rounded(released, asked, received, own).to_bytes() != plain) == changes


@pytest.mark.parametrize("wire", ["float16", "int8"])
@pytest.mark.parametrize("private", [True, False])
def test_a_hospital_sends_what_the_plan_says_and_the_same_again(
    wire: str, private: bool, hospital: Install, plan: MakePlan, starting_point: Start
) -> None:
    east, start = hospital(privacy={} if private else OPEN), starting_point[0]
    asked = plan(wire=wire) if private else plan(wire=wire, privacy=OFF)
    one, two = (east.ask(asked, start).content for _ in range(2))
    assert one == two
    assert len(east.states()) == (2 if private else 0)  # charged once
    arrays = one.array_records["adapter"].to_torch_state_dict()
    kinds = {str(t.dtype).removeprefix("torch.") for n, t in arrays.items() if "scale" not in n}
    assert kinds == {wire}
    plain = unpack_upload(arrays, start, asked)
    assert set(plain) == set(to_travel(start, "B", 3))
    if not private:  # what a plan in float32 would have sent, but for rounding
        exact = train_round(plan(privacy=OFF), start, east.policy).tensors
        for name, tensor in plain.items():
            step = exact[name].abs().max() / (127 if wire == "int8" else 1000)
            assert float((tensor - exact[name]).abs().max()) < float(step)
            assert not tensor.equal(exact[name])


@pytest.mark.parametrize(
    ("train", "part", "strategy"), [("both", "both", "product_mean"), ("core", "core", "ffa"),
                                    ("A", "A", "rolora")],
)  # fmt: skip
def test_every_trained_part_travels_rounded(
    train: str, part: str, strategy: str, hospital: Install, plan: MakePlan, starting_point: Start
) -> None:
    east, start = hospital(privacy=OPEN), starting_point[0]
    if train == "A":
        start = Adapter(
            start.spec,
            {n: LowRank(orthonormal(x.B.shape, 1), x.A * 0.1) for n, x in start.layers.items()},  # type: ignore[arg-type]
        )
    common = {"privacy": OFF, "adapter": {"train": train}, "upload": part, "strategy": strategy}
    for number in (1, 2):
        exact, rough = plan(round=number, **common), plan(round=number, wire="int8", **common)
        got = east.ask(rough, start).content.array_records["adapter"].to_torch_state_dict()
        plain = joined(start, unpack_upload(got, start, rough), part, 3)  # type: ignore[arg-type]
        _, received = unpack_task(pack_task(rough, start))
        true = train_round(exact, received, east.policy).tensors
        wanted = joined(received, true, part, 3)  # type: ignore[arg-type]
        for n, layer in plain.layers.items():
            frozen = {"core": "A", "A": "B"}.get(part)
            if frozen:
                assert getattr(layer, frozen).equal(getattr(start.layers[n], frozen))
            moved = (wanted.layers[n].dense() - start.layers[n].dense()).norm()
            error = (layer.dense() - wanted.layers[n].dense()).norm()
            assert float(error) < 0.03 * float(moved) + 0.01 * float(start.layers[n].dense().norm())
    assert remainders_file(east.policy).exists() == (part != "both")


def test_a_frozen_factor_arrives_exactly_and_less_travels(plan: MakePlan) -> None:
    g = torch.Generator().manual_seed(1)
    layer = LowRank(torch.randn(576, 16, generator=g), torch.randn(16, 576, generator=g))
    down, up = {}, {}
    for wire in ("float32", "float16", "int8"):
        asked = plan(wire=wire, adapter={"rank": 16})
        sent = Adapter(asked.spec, {"a.q": layer})
        content = pack_task(asked, sent)
        received = unpack_task(content)[1].layers["a.q"]
        assert received.A.equal(layer.A)
        assert received.B.equal(layer.B) == (wire == "float32")
        down[wire] = size_bytes(content)
        up[wire] = size_bytes(pack_result(encode(to_travel(sent, "B", 3), asked.wire), {}))
    assert up["float16"] == pytest.approx(up["float32"] / 2, rel=0.02)
    assert up["int8"] == pytest.approx(up["float32"] / 4, rel=0.05)
    assert down["int8"] == pytest.approx(down["float32"] * 5 / 8, rel=0.03)
