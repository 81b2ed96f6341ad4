"""A value on its way out says where it comes from; the gate lets nothing else pass.

There are four origins. Three know no note: the plan (the coordinator's own words), the ledger (what
was charged, computed from public numbers), the policy (the hospital's decision to publish). The
fourth is a mechanism: noise was added, and a reservation in the ledger has paid for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Generic, TypeVar

T = TypeVar("T")
Fact = str | int | float

COUNT_GRID = 1.0  # noised numbers are multiples of a public grid: the low bits of a float64 tell
LOSS_GRID = 2.0**-10  # of what was added to the noise


class Source(Enum):
    """Origins that no note has touched, or that the hospital publishes as they are."""

    PLAN = "plan"
    LEDGER = "ledger"
    POLICY_PUBLIC = "policy"


@dataclass(frozen=True)
class Mechanism:
    """Noised by the mechanism of this name, paid for by reservation ``seq`` of the ledger."""

    name: str
    seq: int


@dataclass(frozen=True)
class Released(Generic[T]):
    """A value with its declared provenance."""

    value: T
    provenance: Source | Mechanism


@dataclass(frozen=True)
class Charge:
    """What a round paid for: its reservation, the steps' noise as charged, mechanisms by name."""

    seq: int
    noise_multiplier: float
    mechanisms: frozenset[str]

    def mechanism(self, name: str) -> Mechanism:
        """The provenance of what mechanism ``name`` made. Raises KeyError where it is not paid."""
        if name not in self.mechanisms:
            raise KeyError(f"{name} is not part of reservation {self.seq}")
        return Mechanism(name, self.seq)
