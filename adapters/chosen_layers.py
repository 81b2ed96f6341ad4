"""Which layers of the base model get an adapter, and which of the adapted ones a round trains.

Both follow from public numbers alone, so that coordinator and hospital agree without asking.

Layers: an adapter in the upper part of the model, or in every second block, costs less time and
less traffic, and under privacy less noise, which grows with what is trained (layers left out a
priori: arXiv 2305.08285).

Half fine-tuning (HFT, arXiv 2404.18466): each round trains a random half of what is adapted and
leaves the other half as it was received, so less is forgotten of what earlier rounds and other
tasks put there. The half is balanced as in the paper: in every block, of each kind (attention,
feed-forward) half of the matrices; where their number is odd, one more in half of the blocks.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from itertools import groupby

from conf.schema import Layers

_NUMBER = re.compile(r"^((?:.*\.)?[^.]+)\.(\d+)\.(.*)$")  # of the innermost numbered block


def chosen_layers(rule: Layers, depth: int) -> tuple[int, ...]:
    """Numbers (from 0) of the blocks that ``rule`` chooses of ``depth``; None chooses all.

    Raises ValueError, saying which, for a rule that asks for more than there is.
    """
    if rule is None:
        return tuple(range(depth))
    if depth < 1:
        raise ValueError("adapter.layers: the base model does not say how many layers it has")
    if rule == "half":
        return tuple(range(depth - 1, -1, -2))[::-1]  # the last one, and every second below
    if isinstance(rule, str):
        end, _, count = rule.partition(":")
        wanted = int(count)
        if wanted > depth:
            raise ValueError(f"adapter.layers={rule}: the base model has {depth} layers")
        return tuple(range(wanted) if end == "first" else range(depth - wanted, depth))
    beyond = [number for number in rule if number >= depth]
    if beyond:
        raise ValueError(f"adapter.layers: {beyond[0]} is not one of 0 to {depth - 1}")
    return tuple(sorted(rule))


def layer_number(module: str) -> int | None:
    """Number of the block that a module path lies in; None outside of all."""
    found = _NUMBER.match(module)
    return int(found[2]) if found else None


def half_of(modules: Iterable[str], seed: int, number: int) -> frozenset[str]:
    """The modules that round ``number`` trains; of one module alone, that one.

    Halves come in the order of hashes, not from a generator whose draws a version could change.
    """

    def order(what: str) -> bytes:
        return hashlib.sha256(f"half:{seed}:{number}:{what}".encode()).digest()

    names = sorted(modules, key=_kind)
    trained: set[str] = set()
    for kind, alike in groupby(names, key=_kind):
        blocks: dict[int | None, list[str]] = {}
        for name in alike:
            blocks.setdefault(layer_number(name), []).append(name)
        one_more = sorted(blocks, key=lambda block: order(f"{kind}:{block}"))
        extra = len(blocks) // 2 + order(kind)[0] % 2 * (len(blocks) % 2)
        for place, block in enumerate(one_more):
            own = sorted(blocks[block], key=order)
            trained |= set(own[: (len(own) + (place < extra)) // 2])
    return frozenset(trained or sorted(names, key=order)[:1])


def _kind(module: str) -> str:
    """What a module is part of, without its block's number: ``model.layers.mlp``."""
    found = _NUMBER.match(module)
    path = module if found is None else f"{found[1]}.{found[3]}"
    return path.rpartition(".")[0]
