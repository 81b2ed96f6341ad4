"""Privatised statistics: against a plain loop, and the promises that their charge rests on."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import Tensor

from adapters import lora
from adapters.adapter import AdapterSpec
from adapters.base_model import load_base
from adapters.likelihood import note_losses, pad_right
from adapters.statistics import Statistic, require_statistics
from adapters.trained_part import TrainedPart, to_travel
from client.privacy.engine import clip_factor
from client.privacy.per_note import trained_parameters
from client.privacy.randomness import SecureRandomness
from client.privacy.statistics import released_statistics, sensitivity, statistic_sums
from conf.schema import ModelSettings

SPEC = AdapterSpec(3, 6.0, ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj"))
UNITS = [
    [[4, 8, 15, 16, 23, 42, 5, 6], [9, 2, 2, 41]],
    [[7, 7, 3]],
    [[11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22]],
    [[30, 31], [32, 33, 34], list(range(35, 60))],
]
KINDS: tuple[Statistic, ...] = ("fisher", "gram")
Rows = list[list[list[int]]]


@pytest.fixture(scope="module", params=["B", "A", "core"])
def part(request: pytest.FixtureRequest) -> TrainedPart:
    return request.param


@pytest.fixture(scope="module")
def model(part: TrainedPart, tiny_model: Path) -> PeftModel:
    """A model whose LoRA is not at its starting point."""
    base = load_base(ModelSettings(source="path", path=str(tiny_model)))
    live = lora.attach(base.model, SPEC, part)
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in live.named_parameters():
            if "lora_" in name and "frame" not in name:
                p.copy_(torch.randn(p.shape, generator=g) * 0.05)
    return live


def flat(sums: dict[str, Tensor]) -> Tensor:
    return torch.cat([sums[name].flatten() for name in sorted(sums)])


def inputs_of_A(model: PeftModel, row: list[int]) -> dict[str, Tensor]:
    """x (tokens, n) of every adapted layer for one note."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda _, x: seen.update({name: x[0][0]})

    hooks = [A.register_forward_pre_hook(keep(n)) for n, A in lora.projections(model).items()]
    with torch.no_grad():
        model(input_ids=torch.tensor([row]))
    for hook in hooks:
        hook.remove()
    return seen


def loop_grams(model: PeftModel, units: Rows) -> dict[str, Tensor]:
    """One note at a time, no padding; x is caught before A, and z z^T summed token by token."""
    total: dict[str, Tensor] = {}
    for unit in units:
        own: dict[str, Tensor] = {}
        for row in unit:
            seen = inputs_of_A(model, row)
            for name, A in lora.projections(model).items():
                for x in seen[name]:
                    z = A.weight.detach().double() @ x.double()
                    one = torch.outer(z, z) / len(row) / len(unit)
                    own[name] = own.get(name, torch.zeros_like(one)) + one
        for name, gram in own.items():
            total[name] = total.get(name, torch.zeros_like(gram)) + gram / gram.norm()
    return total


def loop_fisher(model: PeftModel, units: Rows, clip: float) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for unit in units:
        model.zero_grad(set_to_none=True)
        for row in unit:
            (note_losses(model, *pad_right([row])).sum() / len(unit)).backward()
        gradient = {n: p.grad.double().clone() for n, p in trained_parameters(model).items()}
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradient.values()))
        for name, g in gradient.items():
            squared = (g * clip_factor(norm, clip)) ** 2
            total[lora.travel_name(name)] = total.get(lora.travel_name(name), 0.0) + squared
    model.zero_grad(set_to_none=True)
    return total


# --- what is computed --------------------------------------------------------------------------


@pytest.mark.parametrize("micro", [0, 48, 4096])
def test_grams_equal_a_loop_over_tokens(model: PeftModel, micro: int) -> None:
    expected = loop_grams(model, UNITS)
    sums = statistic_sums(model, "gram", UNITS, 1.0, micro_tokens=micro)
    found = released_statistics("gram", sums, 0.0, 1.0, 4, None)
    assert found.keys() == expected.keys()
    for name, gram in found.items():
        assert torch.equal(gram, gram.T)
        torch.testing.assert_close(gram.double() * 4, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("clip", [0.05, 10.0])
@pytest.mark.parametrize("engine", ["fast", "opacus"])
def test_fisher_equals_a_loop_of_squared_clipped_gradients(
    model: PeftModel, engine: str, clip: float
) -> None:
    expected = loop_fisher(model, UNITS, clip)
    sums = statistic_sums(model, "fisher", UNITS, clip, engine, 48)
    found = released_statistics("fisher", sums, 0.0, clip, 2, None)
    assert found.keys() == expected.keys()
    largest = max(float(e.max()) for e in expected.values())
    for name, fisher in found.items():
        assert fisher.shape == expected[name].shape
        assert float((fisher.double() * 2 - expected[name]).abs().max()) < 1e-5 * largest


@pytest.mark.parametrize("kind", KINDS)
def test_what_leaves_is_what_both_sides_expect(
    model: PeftModel, part: TrainedPart, kind: Statistic
) -> None:
    adapter = lora.read(model, SPEC)
    sums = statistic_sums(model, kind, UNITS, 1.0)
    found = released_statistics(kind, sums, 1.5, 1.0, 4, SecureRandomness().normal)
    require_statistics(found, kind, adapter, part, 0)
    if kind == "fisher":
        assert found.keys() == to_travel(adapter, part, 0).keys()


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_as_before_afterwards(model: PeftModel, kind: Statistic) -> None:
    before = note_losses(model, *pad_right([[3, 4, 5]]))
    statistic_sums(model, kind, UNITS, 1.0)
    assert not any(m._forward_hooks for m in model.modules())
    assert not any("forward" in vars(m) for m in model.modules())
    assert torch.equal(note_losses(model, *pad_right([[3, 4, 5]])), before)


# --- what the charge rests on ------------------------------------------------------------------


@settings(deadline=None, max_examples=15)
@given(
    st.lists(
        st.lists(st.lists(st.integers(2, 250), min_size=2, max_size=20), min_size=1, max_size=3),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from([1e-3, 0.05, 1.0]),
    st.sampled_from(KINDS),
    st.sampled_from([0, 48]),
)
def test_one_unit_moves_the_sums_by_its_sensitivity_at_most(
    model: PeftModel, units: Rows, clip: float, kind: Statistic, micro: int
) -> None:
    with_it, without = (
        flat(statistic_sums(model, kind, some, clip, micro_tokens=micro))
        for some in (units, units[1:])
    )
    moved = float((with_it - without).norm())
    bound = sensitivity(kind, clip, len(lora.projections(model)))
    assert moved <= bound
    if kind == "gram":
        assert moved > bound * (1 - 1e-9)  # the bound is reached, not just kept
    # And by the same bits, whoever else is there.
    alone = flat(statistic_sums(model, kind, units[:1], clip, micro_tokens=micro))
    assert torch.equal(without + alone, with_it)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("micro", [0, 20, 64, 4096])
def test_batch_mates_change_nothing_bit_for_bit(
    model: PeftModel, kind: Statistic, micro: int
) -> None:
    def sums(units: Rows) -> Tensor:
        return flat(statistic_sums(model, kind, units, 0.05, micro_tokens=micro))

    expected = sum((sums([unit]) for unit in UNITS[1:]), sums(UNITS[:1]))
    assert torch.equal(sums(UNITS), expected)
    assert torch.equal(sums(UNITS[::-1]), expected)


@pytest.mark.parametrize("clip", [1e-4, 0.01])
def test_the_sensitivity_of_the_fisher_information_is_almost_reached_by_one_entry(
    clip: float, model: PeftModel
) -> None:
    """Its bound C^2 is on the sum of all entries, which a unit that is clipped has exactly."""
    for unit in UNITS:
        own = flat(statistic_sums(model, "fisher", [unit], clip))
        assert float(own.min()) >= 0
        assert clip**2 * (1 - 1e-6) < float(own.sum()) <= clip**2
        assert float(own.norm()) <= clip**2


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_sample_gives_noise_alone(model: PeftModel, kind: Statistic) -> None:
    sums = statistic_sums(model, kind, [], 1.0)
    assert not flat(sums).any()
    released = released_statistics(kind, sums, 1.0, 1.0, 4, SecureRandomness().normal)
    assert all(t.any() for t in released.values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_unit_that_overflows_adds_zero_and_tells_nobody(
    tiny_model: Path, kind: Statistic
) -> None:
    """A coordinator may send an adapter under which one phrase overflows and others do not."""
    base = load_base(ModelSettings(source="path", path=str(tiny_model)))
    model = lora.attach(base.model, AdapterSpec(2, 4.0, ("q_proj",)), "B")
    fine = flat(statistic_sums(model, kind, UNITS[1:], 1.0))
    token = UNITS[0][0][0]  # only the first unit holds it

    def overflow(_: object, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return output.masked_fill((inputs[0] == token)[..., None], float("inf"))

    model.get_input_embeddings().register_forward_hook(overflow)
    assert torch.equal(flat(statistic_sums(model, kind, UNITS, 1.0)), fine)
    assert torch.isfinite(fine).all()


def test_an_A_of_zeros_or_of_any_size_is_no_way_around_the_bound(tiny_model: Path) -> None:
    """The coordinator chooses A: z as large or as small as float32 goes, in one layer of many."""
    base = load_base(ModelSettings(source="path", path=str(tiny_model)))
    model = lora.attach(base.model, AdapterSpec(2, 4.0, ("q_proj", "v_proj")), "B")
    bound = sensitivity("gram", 1.0, len(lora.projections(model)))
    first = next(iter(lora.projections(model).values()))
    start = first.weight.detach().clone()
    norms = []
    for size in (0.0, 1e-36, 1e-20, 1.0, 1e20, 1e36, 1e38):
        with torch.no_grad():
            first.weight.copy_(start * size)
        own = flat(statistic_sums(model, "gram", UNITS[:1], 1.0))
        assert torch.isfinite(own).all()
        norms.append(float(own.norm()))
        assert norms[-1] <= bound
    assert norms[0] == pytest.approx((bound**2 - 1) ** 0.5)  # that layer adds nothing
    assert norms[3] == pytest.approx(bound)


# --- noise -------------------------------------------------------------------------------------


def test_the_noise_of_gram_matrices_is_symmetric_and_of_the_size_that_was_charged() -> None:
    """Off the diagonal an entry and its mirror are one draw, so its share is 1 / sqrt(2)."""
    rank, layers, D = 40, 30, 5
    sums = {str(n): torch.zeros(rank * (rank + 1) // 2, dtype=torch.float64) for n in range(layers)}
    found = released_statistics("gram", sums, 2.0, 1.0, D, SecureRandomness().normal)
    noise = torch.stack([found[name].double() * D for name in sums])
    assert torch.equal(noise, noise.transpose(1, 2))
    expected = 2.0 * math.sqrt(layers)
    off = torch.ones(rank, rank).triu(1) > 0
    diagonal = noise.diagonal(dim1=1, dim2=2)
    assert float(diagonal.std()) == pytest.approx(expected, rel=5 / (2 * diagonal.numel()) ** 0.5)
    above = noise[:, off]
    assert float(above.std()) == pytest.approx(
        expected / 2**0.5, rel=5 / (2 * above.numel()) ** 0.5
    )
    other = released_statistics("gram", sums, 2.0, 1.0, D, SecureRandomness().normal)
    assert not torch.equal(other["0"], found["0"])


def test_the_noise_of_the_fisher_information_is_of_the_size_that_was_charged() -> None:
    sums = {"w": torch.zeros(200, 300, dtype=torch.float64)}
    found = released_statistics("fisher", sums, 2.0, 0.5, 10, SecureRandomness().normal)["w"]
    assert float(found.double().std()) == pytest.approx(2.0 * 0.25 / 10, rel=0.015)


@pytest.mark.parametrize("kind", KINDS)
def test_noise_without_a_source_is_refused(kind: Statistic) -> None:
    with pytest.raises(ValueError, match="go together"):
        released_statistics(kind, {"w": torch.zeros(3, dtype=torch.float64)}, 1.0, 1.0, 4, None)
