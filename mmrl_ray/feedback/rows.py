"""Rows of the database as pairs, and what contradicts them."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Row

from mmrl_ray.errors import ConflictError
from mmrl_ray.feedback.schema import Pair, Preference


def pair_of(item: Pair | Preference) -> Pair:
    """What it is about."""
    return item if isinstance(item, Pair) else item.pair


def pair_from(row: Row[Any]) -> Pair:
    """With its picture where the row has it."""
    pair = Pair(row.image_hash, row.prompt, row.caption_a, row.caption_b, row.source)
    return replace(pair, image=row.data) if "data" in row._fields else pair


def conflict(preference: Preference, before: tuple[Any, ...], flipped: bool = False) -> ConflictError:
    """An error that tells what the rater said now, and `before`; both with the captions exchanged if so asked."""
    choice, *ratings = before
    if flipped:
        preference, ratings = preference.flipped(), ratings[::-1]
        choice = {"a": "b", "b": "a"}.get(choice, choice)
    pair = preference.pair
    problem = (
        f"{preference.rater!r} says {preference.choice!r} (ratings {preference.rating_a}, {preference.rating_b}) of "
        f"{pair.caption_a!r:.60} against {pair.caption_b!r:.60}, but said {choice!r} "
        f"(ratings {', '.join(map(str, ratings))}) before: leave it out, or ask for the new one to replace the old"
    )
    return ConflictError(f"{pair.where}: {problem}" if pair.where else problem)


def utc(moment: datetime) -> datetime:
    """SQLite keeps no time zone; what was written is UTC."""
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
