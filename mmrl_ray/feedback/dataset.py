"""From the store to what a run trains on: pairs with one label each, as the data sets that every run reads.

Several raters of a pair become one probability, the mean of their votes (a 1, b 0, a tie ½). A row is a sample whose
captions travel in its metadata, so that the one reader of data sets, with its seeded order, its quarantine and its
exact resume, reads pairs, too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeGuard

from mmrl_ray.data.row import Sample
from mmrl_ray.data.writing import ShardWriter
from mmrl_ray.errors import DataError, PreferenceError
from mmrl_ray.feedback.schema import Pair, Preference

_KEY = "mmrl_pair"
_VOTES = {"a": 1.0, "b": 0.0, "tie": 0.5}


@dataclass(frozen=True, slots=True)
class LabelledPair:
    """Two captions, and how likely it is that the first is the better one."""

    captions: tuple[str, str]
    preferred: tuple[float, float]
    """Of each; they add to 1."""


@dataclass(frozen=True, slots=True)
class SplitSizes:
    """Pairs that were written."""

    train: int
    held_out: int


def write_split(preferences: Iterable[Preference], train: str, held_out: str, *, share: float) -> SplitSizes:
    """Writes two data sets of pairs, apart by picture, so that no picture is in both; the same pictures every time.

    Args:
        preferences: with their pictures, those of a pair one after the other.
        train: where the pairs to train on go.
        held_out: where those of `share` of the pictures go; there is nothing where that is no picture at all.
        share: at least 0, below 1.

    Raises:
        PreferenceError: there is nothing to train on.
        DataError: a place is taken or cannot be written.
    """
    sizes = [0, 0]
    with ExitStack() as stack:
        # The first to come is the last to be moved into place: where `train` is, both are.
        writers: list[ShardWriter | None] = [stack.enter_context(ShardWriter(train)), None]
        for pair, label in labelled(preferences):
            side = int(is_held_out(pair.image_hash, share))
            if (writer := writers[side]) is None:
                writer = writers[side] = stack.enter_context(ShardWriter(held_out))
            writer.write(sample_of(pair, label))
            sizes[side] += 1
        if not sizes[0]:
            raise PreferenceError(
                f"there is no pair to train on ({sizes[1]} are held out): label some, or lower "
                f"data.preferences.held_out={share:g}"
            )
    return SplitSizes(*sizes)


def is_held_out(image_hash: str, share: float) -> bool:
    """Whether a picture is among the `share` of all whose pairs are kept from training; by the picture alone."""
    return _fraction(image_hash) < share


def labelled(preferences: Iterable[Preference]) -> Iterator[tuple[Pair, LabelledPair]]:
    """Each pair once, with the mean of its raters' votes; the preferences of a pair come one after the other."""
    for _, group in groupby(preferences, key=lambda each: each.pair.id):
        votes = list(group)
        pair = votes[0].pair
        p = sum(_VOTES[each.choice] for each in votes) / len(votes)
        yield pair, LabelledPair((pair.caption_a, pair.caption_b), (p, 1.0 - p))


def sample_of(pair: Pair, label: LabelledPair) -> Sample:
    """A pair as a row of a data set."""
    assert pair.image is not None
    metadata = {_KEY: {"captions": list(label.captions), "preferred": list(label.preferred)}, "source": pair.source}
    return Sample(pair.id, (pair.image,), pair.prompt, metadata=metadata)


def pair_of(sample: Sample) -> LabelledPair | None:
    """The pair in a row; None where it is an ordinary sample.

    Raises:
        DataError: it is no pair that `sample_of` wrote.
    """
    if _KEY not in sample.metadata:
        return None
    found: Any = sample.metadata[_KEY]
    captions, preferred = (
        (found.get("captions"), found.get("preferred")) if isinstance(found, Mapping) else (None, None)
    )
    if not _is_pair(captions, str):
        raise DataError(f"sample {sample.id!r} has no two captions under {_KEY!r}")
    if not _is_pair(preferred, float) or abs(sum(preferred) - 1.0) > 1e-9:
        raise DataError(f"sample {sample.id!r} has no two probabilities under {_KEY!r}")
    return LabelledPair((captions[0], captions[1]), (preferred[0], preferred[1]))


def _is_pair(value: Any, kind: type) -> TypeGuard[list[Any]]:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(each, kind) for each in value)


def _fraction(image_hash: str) -> float:
    """Evenly over [0, 1), by the picture alone."""
    return int.from_bytes(hashlib.blake2b(image_hash.encode(), digest_size=8).digest(), "big") / 2**64
