"""Named random streams: each purpose draws from its own, so that changing one never shifts another."""

from __future__ import annotations

import hashlib

import numpy as np


def stream(seed: int, name: str) -> np.random.Generator:
    """The random stream `name` ("arrivals", "output_tokens", …) of a run with this `seed` (any int >= 0).

    The name enters through SHA-256, not through Python's `hash()`, which differs from process to process.
    """
    digest = hashlib.sha256(name.encode()).digest()
    words = [int.from_bytes(digest[at : at + 4], "little") for at in range(0, 16, 4)]
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, *words])))
