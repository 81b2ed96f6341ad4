"""How many bits a number has on the way: float32, float16 or int8 with one scale a component.

    x  ~  scale_j q,   scale_j = max |x_j| / limit     limit 127 for int8, 1 for float16

j counts the components of the rank: rows of A and of a core, columns of B. A component has a scale
of its own because components differ in size by orders of magnitude; float16 has one too, because
learned factors lie where float16 has few digits left (below 6e-5). Rounding is to the nearest, so
an entry is off by half a step at most: scale_j / 2 for int8, |x| 2^-11 + scale_j 2^-25 for float16.
A component whose scale would be below 1.2e-38 becomes zero.

What comes in is checked in every respect before it is used: names, types, shapes, scales.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor

from conf.schema import Wire

_SCALE = ".scale"
_KIND = {"float16": torch.float16, "int8": torch.int8}
_LIMIT = {"float16": 1.0, "int8": 127.0}
_LARGEST = 1e6  # scale; no trained factor comes near
_SMALLEST = torch.finfo(torch.float32).tiny


def encode(
    tensors: Mapping[str, Tensor], wire: Wire, exact: Collection[str] = ()
) -> dict[str, Tensor]:
    """What travels in place of ``tensors``, by name; those in ``exact`` as float32.

    A tensor (r, n) or (m, r) becomes one of the same name and shape, and its r scales, float32,
    under NAME.scale. Raises ValueError where an entry is too large for that.
    """
    out = {}
    for name, tensor in tensors.items():
        if wire == "float32" or name in exact:
            out[name] = tensor.float()
            continue
        x = tensor.double()
        scale = (x.abs().amax(1 - _axis(name)) / _LIMIT[wire]).float()
        scale[scale < _SMALLEST] = 1.0  # of nothing else has float32 all its digits
        if not bool((scale <= _LARGEST).all()):  # also where it is not a number
            raise ValueError("factors too large to travel")
        q = (x / _along(scale, name).double()).clamp(-_LIMIT[wire], _LIMIT[wire])
        out[name] = (q.round() if wire == "int8" else q).to(_KIND[wire])
        out[name + _SCALE] = scale
    return out


def decode(
    arrays: Mapping[str, Tensor], wire: Wire, exact: Collection[str] = ()
) -> dict[str, Tensor]:
    """Inverse of ``encode`` up to rounding, float32: the same bits wherever it is done.

    Raises ValueError, in fixed words, unless everything is as ``encode`` would have sent it.
    """
    plain = {name: arrays[name] for name in factor_names(arrays, wire)}
    rounded = [n for n in plain if wire != "float32" and n not in exact]
    if len(arrays) != len(plain) + len(rounded):
        raise ValueError("factors missing or unexpected")
    out = {}
    for name, tensor in plain.items():
        if name not in rounded:
            _require(tensor.dtype == torch.float32, "factors not float32")
            out[name] = tensor
            continue
        _require(name + _SCALE in arrays, "factors missing or unexpected")
        scale = arrays[name + _SCALE]
        _require(tensor.dtype == _KIND[wire], f"factors not {wire}")
        _require(scale.dtype == torch.float32, "scales not float32")
        _require(tensor.ndim == 2, "factors of another shape")
        _require(scale.shape == (tensor.shape[_axis(name)],), "scales of another shape")
        _require(bool(((scale > 0) & (scale <= _LARGEST)).all()), "scales impossible")
        q = tensor.float()
        _require(bool((q.abs() <= _LIMIT[wire]).all()), "factors beyond their scale")
        out[name] = q * _along(scale, name)
    return out


def factor_names(arrays: Iterable[str], wire: Wire) -> list[str]:
    """The names of arrays that are factors, not scales."""
    return [name for name in arrays if wire == "float32" or not name.endswith(_SCALE)]


def _axis(name: str) -> int:
    """Which dimension counts the components of the rank."""
    return 1 if name.endswith("lora_B.weight") else 0


def _along(scale: Tensor, name: str) -> Tensor:
    return scale[None, :] if _axis(name) else scale[:, None]


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)
