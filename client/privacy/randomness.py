"""Randomness of a private step: ChaCha20 keyed by the operating system.

There is no seed here on purpose. A generator that can be seeded can be replayed, and noise that
can be replayed can be subtracted (for tests there is ``client.privacy.seeded_noise``). Runs without
privacy use ``SeededSampling``, which can choose a batch but cannot make noise.
"""

from __future__ import annotations

import hashlib
import os
from typing import Protocol

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20


class Uniform(Protocol):
    """A source of independent uniform numbers in [0, 1)."""

    def uniform(self, n: int) -> np.ndarray:
        """``n`` float64 numbers, each a multiple of 2^-53."""
        ...


_BYTES_A_KEY = 2**32  # ChaCha20 as it is here ends at 2^38, and how much is drawn depends on notes


class SecureRandomness:
    """Cryptographic generator; a fresh 256-bit key for each 4 GiB. Make one for each round."""

    name = "ChaCha20, keyed by the operating system"

    def __init__(self) -> None:
        self._left = 0  # bytes that the current key may still give

    def uniform(self, n: int) -> np.ndarray:
        """``n`` float64 numbers in [0, 1), each a multiple of 2^-53."""
        words = np.frombuffer(self._bytes(8 * n), dtype="<u8")
        return (words >> np.uint64(11)) * 2.0**-53

    def _bytes(self, n: int) -> bytes:
        parts = []
        while n:
            if not self._left:
                # A fresh key needs no random nonce, and its first four bytes are the block
                # counter, which must not start near its end.
                cipher = Cipher(ChaCha20(self._key(), bytes(16)), mode=None)
                self._stream, self._left = cipher.encryptor(), _BYTES_A_KEY
            take = min(n, self._left)
            parts.append(self._stream.update(bytes(take)))
            n, self._left = n - take, self._left - take
        return b"".join(parts)

    def _key(self) -> bytes:
        return os.urandom(32)

    def normal(self, n: int) -> np.ndarray:
        """``n`` standard normal float64 numbers (Box-Muller transform)."""
        half = (n + 1) // 2
        radius = np.sqrt(-2.0 * np.log1p(-self.uniform(half)))  # 1 - u is in (0, 1]: log is finite
        angle = 2.0 * np.pi * self.uniform(half)
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:n]


class SeededSampling:
    """Reproducible choice of batches for runs WITHOUT privacy; it has no ``normal``."""

    def __init__(self, *key: str | int) -> None:
        digest = hashlib.sha256(":".join(map(str, key)).encode()).digest()
        self._generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest, "big")))

    def uniform(self, n: int) -> np.ndarray:
        """``n`` float64 numbers in [0, 1)."""
        return self._generator.random(n)
