"""`Sample`, one dataset row, and the seeded, resumable cursor over Parquet shards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Sample:
    """One dataset row: a picture (or several), what is asked of it, and what people wrote about it."""

    id: str
    """Unique within its dataset."""
    images: tuple[bytes, ...]
    """Encoded image files, at least one; decoded only by `data/images.py`."""
    prompt: str
    """The user's turn, without image placeholders; the chat template adds those."""
    references: tuple[str, ...] = ()
    """Reference captions; rewards that need them raise when there are none."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """JSON-like facts about the row (for scenes: the objects and their attributes)."""
