"""The round loop over real hospitals: it merges what is good and goes on without what is not."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
import yaml
from flwr.app import ArrayRecord, Error, Message, RecordDict
from safetensors.torch import load_file

from adapters import lora
from adapters.adapter import Adapter
from adapters.base_model import load_base
from adapters.plan import plan_round
from adapters.scoring import score_texts
from adapters.statistics import MeasuredAdapter
from client.privacy.ledger import Ledger
from conf.schema import ModelSettings, TrainingSettings
from server.rounds import RoundFailed, federate
from server.run_folder import RunFolder
from strategies.base import Draw
from strategies.merging import merge
from strategies.registry import create
from transport.wire import pack_refusal, pack_result, pack_task, size_bytes

if TYPE_CHECKING:
    from conftest import LocalGrid

Answer = Callable[[Message], Message | None]
Settings = Callable[..., TrainingSettings]
Grids = type["LocalGrid"]

# Full sampling, because the accountants are quick there.
PRIVATE = {"enabled": True, "clip_norm": 1.0, "sampling_rate": 1.0}

SITES = ("east", "mid", "west")
KEYS = {11: "east", 12: "mid", 13: "west"}  # registered names, where keys are in use


def go(grid: LocalGrid, settings: TrainingSettings, folder: RunFolder) -> Adapter:
    return federate(grid, settings, folder.create(settings), threading.Event(), lambda *_: None)


@pytest.mark.parametrize("name", ["ffa", "fedsvd", "product_mean", "fedavg"])
def test_two_rounds_merge_what_the_hospitals_sent_and_learn_from_it(
    name: str,
    local_grid: Grids,
    honest: dict[int, Answer],
    settings: Settings,
    folder: RunFolder,
    tiny_model: Path,
    notes_file: Path,
) -> None:
    train = "B" if name in ("ffa", "fedsvd") else "both"
    wanted = settings(strategy={"name": name}, adapter={"train": train})
    grid = local_grid(honest)
    merged = go(grid, wanted, folder)
    assert grid.asked == [(1, 11), (1, 12), (1, 13), (2, 11), (2, 12), (2, 13)]

    start, first, last = (Adapter.load(folder.adapter_folder(n)) for n in (0, 1, 2))
    assert not any(layer.B.any() for layer in start.layers.values())
    for number, before in ((1, start), (2, first)):
        own = [Adapter.load(folder.adapter_folder(number, site)) for site in SITES]
        again = merge(create(name), own, [1 / 3] * 3, origin=before)
        on_disk = Adapter.load(folder.adapter_folder(number))
        assert again.adapter.fingerprint() == on_disk.fingerprint()
        if train == "B":  # every hospital trained against the A that the round began with
            for adapter in own:
                assert all(x.A.equal(before.layers[n].A) for n, x in adapter.layers.items())
        record = folder.finished_rounds()[number - 1]
        assert record["round"] == number
        assert record["hospitals"] == ["east", "mid", "west"]
        assert record["left_out"] == {}
        assert record["discrepancy"] == again.discrepancy
        assert (record["discrepancy"] > 0) == (train == "both")
        uploaded = [
            {k: v for k, v in a.tensors().items() if train == "both" or "lora_B" in k} for a in own
        ]
        assert record["bytes_up"] == sum(size_bytes(pack_result(u, {})) for u in uploaded)
        task = pack_task(plan_round(wanted, "run", number, "0" * 64), before)
        assert record["bytes_down"] == 3 * size_bytes(task)
        assert record["facts"]["east"] == {"site": "east", "steps": 2}  # no counts, no scores
    assert merged.fingerprint() == last.fingerprint() != first.fingerprint()

    base = load_base(ModelSettings(source="path", path=str(tiny_model)))
    texts = [json.loads(line)["text"] for line in notes_file.read_text().splitlines()]
    losses = [score_texts(base.model, base.tokenizer, texts, 32).nats]
    for adapter in (first, last):
        with lora.applied(base.model, adapter):
            losses.append(score_texts(base.model, base.tokenizer, texts, 32).nats)
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.parametrize("train", ["B", "A", "alternate", "both", "core"])
def test_half_of_an_adapter_in_the_last_layer_is_trained_and_the_rest_stays_as_it_was(
    train: str, local_grid: Grids, honest: dict[int, Answer], settings: Settings, folder: RunFolder
) -> None:
    name = {"A": "rolora", "alternate": "rolora", "both": "ties"}.get(train, "ffa")
    shape = {"train": train, "layers": "last:1", "freeze_half": True}
    wanted = settings(strategy={"name": name}, adapter=shape)
    go(local_grid(honest), wanted, folder)
    every = {f"model.layers.1.self_attn.{target}_proj" for target in "qv"}
    for number in (1, 2):
        record = folder.finished_rounds()[number - 1]
        assert record["left_out"] == {}
        before = Adapter.load(folder.adapter_folder(number - 1))
        assert set(before.layers) == every
        plan = plan_round(wanted, "run", number, "0" * 64)
        trained = plan.trained_layers(every)
        assert len(trained) == 1
        own = [Adapter.load(folder.adapter_folder(number, site)) for site in SITES]
        after = Adapter.load(folder.adapter_folder(number))
        for adapter in (*own, after):
            for layer, was in before.layers.items():
                now = adapter.layers[layer]
                same = now.B.equal(was.B) and now.A.equal(was.A)
                assert same == (layer not in trained)
        sizes = [size_bytes(pack_result(plan.to_travel(a), {})) for a in own]
        assert record["bytes_up"] == sum(sizes)
        parts, draw = [a.only(trained) for a in own], Draw("run", number)
        again = merge(create(name), parts, [1 / 3] * 3, draw, origin=before.only(trained))
        assert again.adapter.fingerprint() == after.only(trained).fingerprint()
        assert record["mean_cosine"] == again.mean_cosine  # of what was trained, not of the rest


def test_fedsvd_learns_what_ffa_learns_for_plain_sgd_does_not_see_the_rotation(
    local_grid: Grids, honest: dict[int, Answer], settings: Settings, tmp_path: Path
) -> None:
    """A keeps orthonormal rows and their span; gradients, their norms and white noise turn along.

    What FedSVD changes shows under optimizers that look at entries, or from an A that is not
    orthonormal.
    """
    products = []
    for name in ("ffa", "fedsvd"):
        folder = RunFolder(tmp_path / name)
        wanted = settings(
            strategy={"name": name}, federation={"rounds": 3},
            optimizer={"name": "sgd", "learning_rate": 1.0},
        )  # fmt: skip
        merged = go(local_grid(honest), wanted, folder)
        products.append({n: d.to(torch.float64).dense() for n, d in merged.deltas().items()})
    one, other = products
    for layer, product in one.items():
        assert float((product - other[layer]).norm()) < 1e-3 * float(product.norm()) + 1e-9


def test_a_private_run_ends_within_every_hospitals_budget(
    local_grid: Grids,
    honest: dict[int, Answer],
    settings: Settings,
    folder: RunFolder,
    tmp_path: Path,
) -> None:
    merged = go(local_grid(honest), settings(privacy=PRIVATE), folder)
    assert merged.is_finite()
    for site in SITES:
        with Ledger(tmp_path / f"{site}.sqlite", "invented", 8.0, 1e-5) as ledger:
            assert [e.state for e in ledger.entries()] == ["RESERVED", "COMMITTED"] * 2
            spent = ledger.spent()
        assert 7.5 < spent <= 8.0
        assert folder.finished_rounds()[1]["facts"][site]["epsilon_spent"] == spent


# --- strategies that need statistics -----------------------------------------------------------


def share_statistics(sites: Path, *names: str) -> None:
    for name in names:
        policy = yaml.safe_load((sites / f"{name}.yaml").read_text())
        policy["share"] = {"statistics": "noised"}
        (sites / f"{name}.yaml").write_text(yaml.safe_dump(policy))


@pytest.mark.parametrize(
    ("name", "trained"), [("regmean", "B"), ("regmean", "core"), ("fisher", "alternate")]
)
def test_statistics_are_merged_by_and_charged_as_one_more_step(
    name: str,
    trained: str,
    local_grid: Grids,
    honest: dict[int, Answer],
    settings: Settings,
    folder: RunFolder,
    sites: Path,
    tmp_path: Path,
) -> None:
    share_statistics(sites, *SITES)
    wanted = settings(privacy=PRIVATE, strategy={"name": name}, adapter={"train": trained})
    go(local_grid(honest), wanted, folder)
    for number in (1, 2):
        own = []
        for site in SITES:
            at = folder.adapter_folder(number, site)
            plain, statistics = Adapter.load(at), load_file(at / "statistics.safetensors")
            own.append(MeasuredAdapter(plain.spec, plain.layers, statistics))
        again = merge(create(name), own, [1 / 3] * 3)
        on_disk = Adapter.load(folder.adapter_folder(number))
        assert again.adapter.fingerprint() == on_disk.fingerprint()
        mean = merge(create("rolora"), own, [1 / 3] * 3).adapter
        assert mean.fingerprint() != on_disk.fingerprint()
        record = folder.finished_rounds()[number - 1]
        assert record["left_out"] == {}
    for site in SITES:
        with Ledger(tmp_path / f"{site}.sqlite", "invented", 8.0, 1e-5) as ledger:
            assert [m.steps for m in ledger.history()] == [3, 3]  # two steps a round
            assert ledger.entries()[0].body["released"] == ["gradient", "statistics"]
            assert 7.5 < ledger.spent() <= 8.0


def test_a_hospital_that_shares_no_statistics_is_left_out_by_a_reason_that_says_so(
    local_grid: Grids, honest: dict[int, Answer], settings: Settings, folder: RunFolder, sites: Path
) -> None:
    share_statistics(sites, "east", "west")
    go(local_grid(honest), settings(privacy=PRIVATE, strategy={"name": "regmean"}), folder)
    for record in folder.finished_rounds():
        assert record["hospitals"] == ["east", "west"]
        assert record["left_out"] == {"mid": "refused: STATISTICS_NOT_SHARED"}


def test_where_nobody_shares_statistics_the_round_fails_and_nobody_pays(
    local_grid: Grids,
    honest: dict[int, Answer],
    settings: Settings,
    folder: RunFolder,
    tmp_path: Path,
) -> None:
    wanted = settings(privacy=PRIVATE, strategy={"name": "fisher"})
    with pytest.raises(RoundFailed, match="mid: refused: STATISTICS_NOT_SHARED"):
        go(local_grid(honest), wanted, folder)
    assert not list(tmp_path.glob("*.sqlite"))


def test_a_hospital_that_forbids_a_strategy_is_left_out_by_a_reason_that_says_so(
    local_grid: Grids, honest: dict[int, Answer], settings: Settings, folder: RunFolder, sites: Path
) -> None:
    policy = yaml.safe_load((sites / "mid.yaml").read_text())
    policy["adapter"] = {"strategies": ["fedsvd", "rolora"]}
    (sites / "mid.yaml").write_text(yaml.safe_dump(policy))
    go(local_grid(honest), settings(), folder)
    left_out = [record["left_out"] for record in folder.finished_rounds()]
    assert left_out == [{"mid": "refused: STRATEGY_NOT_ALLOWED"}] * 2


# --- hospitals that do not play along ----------------------------------------------------------


def poisoned(honest: Answer, change: Callable[[RecordDict], None], message: Message) -> Message:
    reply = honest(message)
    assert reply is not None
    change(reply.content)
    return reply


def not_a_number(content: RecordDict) -> None:
    bad = {
        n: t * float("nan")
        for n, t in content.array_records["adapter"].to_torch_state_dict().items()
    }
    content["adapter"] = ArrayRecord(bad)


def rubbish(content: RecordDict) -> None:
    for array in content.array_records["adapter"].values():
        array.data = b""


def other_name(content: RecordDict) -> None:
    facts = json.loads(str(content.config_records["facts"]["json"]))
    content.config_records["facts"]["json"] = json.dumps(facts | {"site": "west"})


def refuse_as_west(content: RecordDict) -> None:
    del content["adapter"], content["facts"]
    content["refusal"] = pack_refusal("west", "INTERNAL", "")["refusal"]


def gone(message: Message) -> Message:
    """What the SuperLink answers for a node that it has lost."""
    reply = Message(error=Error(code=5, reason="node unavailable"), reply_to=message)
    reply.metadata.__dict__["_src_node_id"] = 1
    return reply


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (not_a_number, "factors hold NaN or infinity"),
        (rubbish, "malformed reply"),
        (other_name, "calls itself west"),
        (refuse_as_west, "refused: INTERNAL"),
        (None, "no answer (Flower error 5)"),
    ],
)
def test_a_hospital_that_lies_or_vanishes_is_left_out_and_the_rounds_go_on(
    change: Callable[[RecordDict], None] | None,
    reason: str,
    local_grid: Grids,
    honest: dict[int, Answer],
    settings: Settings,
    folder: RunFolder,
    caplog: pytest.LogCaptureFixture,
) -> None:
    first = honest[11]
    hospitals = honest | {11: partial(poisoned, first, change) if change else gone}
    go(local_grid(hospitals, KEYS), settings(), folder)
    for number, record in enumerate(folder.finished_rounds(), start=1):
        assert record["hospitals"] == ["mid", "west"]
        assert record["left_out"] == {"east": reason}
        assert not folder.adapter_folder(number, "east").exists()
        own = [Adapter.load(folder.adapter_folder(number, site)) for site in ("mid", "west")]
        again = merge(create("ffa"), own, [0.5, 0.5]).adapter
        assert again.fingerprint() == Adapter.load(folder.adapter_folder(number)).fingerprint()
    assert f"round 1: east left out: {reason}" in caplog.text


def test_a_site_that_refuses_by_its_own_policy_is_left_out(
    local_grid: Grids, honest: dict[int, Answer], settings: Settings, folder: RunFolder, sites: Path
) -> None:
    policy = yaml.safe_load((sites / "mid.yaml").read_text())
    policy["privacy"]["required"] = True
    (sites / "mid.yaml").write_text(yaml.safe_dump(policy))
    go(local_grid(honest), settings(), folder)
    for record in folder.finished_rounds():
        assert record["hospitals"] == ["east", "west"]
        assert record["left_out"] == {"mid": "refused: PRIVACY_REQUIRED"}


def test_a_hospital_that_never_answers_costs_the_time_limit_and_no_more(
    local_grid: Grids, honest: dict[int, Answer], settings: Settings, folder: RunFolder
) -> None:
    federation = {"rounds": 1, "timeout_s": 0.6}
    began = time.monotonic()
    go(local_grid(honest | {13: lambda _: None}), settings(federation=federation), folder)
    assert 0.6 <= time.monotonic() - began < 10
    (record,) = folder.finished_rounds()
    assert record["hospitals"] == ["east", "mid"]
    assert record["left_out"] == {"node-13": "no answer in time"}


def test_too_few_good_answers_end_the_round_and_say_why(
    local_grid: Grids, honest: dict[int, Answer], settings: Settings, folder: RunFolder
) -> None:
    hospitals = honest | {11: gone, 12: partial(poisoned, honest[12], not_a_number)}
    with pytest.raises(RoundFailed, match="round 1: 1 of at least 2") as failure:
        go(local_grid(hospitals, KEYS), settings(), folder)
    assert "east: no answer (Flower error 5)" in str(failure.value)
    assert "mid: factors hold NaN" in str(failure.value)
    assert folder.finished_rounds() == []
