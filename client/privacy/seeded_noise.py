"""Noise that can be repeated, for tests: it refuses to work on anything but a test lineage.

Who knows the seed can subtract the noise. So a lineage must say in its own name, which is in every
entry of its ledger, that the data behind it need no protection; no message, option or environment
variable leads here, only the argument ``test_seed`` of ``client.training.train_round``.
"""

from __future__ import annotations

import hashlib

from client.privacy.randomness import SecureRandomness

TEST_LINEAGE = "test:"  # how the name of such a lineage begins


class SeededNoise(SecureRandomness):
    """The generator of a private step with a key that follows from ``key``."""

    name = "seeded, for tests"

    def __init__(self, lineage: str, *key: str | int) -> None:
        if not lineage.startswith(TEST_LINEAGE):
            raise ValueError(f"seeded noise needs a lineage named {TEST_LINEAGE}...: this is real")
        super().__init__()
        self._digest = hashlib.sha256(":".join(map(str, key)).encode()).digest()

    def _key(self) -> bytes:
        self._digest = hashlib.sha256(self._digest).digest()
        return self._digest
