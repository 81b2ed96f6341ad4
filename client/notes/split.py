"""Which patients are held out, decided by a keyed hash of the patient's id.

    held out  <=>  HMAC-SHA256(salt, unit id) / 2^256 < holdout

Guarantee: a unit's side depends on nothing but its id, the salt and the share. New notes, new
patients and another order move nobody, so nobody who was held out is ever trained on. The price is
that the share is met on average only; a handful of units may all fall on one side.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping

from client.notes.note import Note, Units


def split_units(
    units: Mapping[str, tuple[Note, ...]], holdout: float, salt: str = ""
) -> tuple[Units, Units]:
    """Units to train on and units held out, each in the order given.

    Sites that may see the same patient need the same ``salt``: it is what keeps the patient on one
    side everywhere. ``holdout`` is a share above 0 and below 1; ValueError otherwise.
    """
    if not 0 < holdout < 1:
        raise ValueError(f"holdout={holdout}: must be above 0 and below 1")
    train: Units = {}
    held_out: Units = {}
    for unit, notes in units.items():
        side = held_out if _position(unit, salt) < holdout else train
        side[unit] = notes
    return train, held_out


def _position(unit: str, salt: str) -> float:
    """A number in [0, 1], uniform over units."""
    digest = hmac.new(salt.encode(), unit.encode(), hashlib.sha256).digest()
    return int.from_bytes(digest, "big") / 2**256
