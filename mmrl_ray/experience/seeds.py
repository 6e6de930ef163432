"""Every random choice of a run derives from its seed and from *what* is drawn, never from who draws it or when."""

from __future__ import annotations

import hashlib


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from any number of integers and names; stable over processes, platforms and Python versions."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def group_seed(seed: int, step: int, index: int) -> int:
    """Seed of the group at place `index` of `step`: the same on whichever worker, at whichever attempt."""
    return derive_seed(seed, "group", step, index)
