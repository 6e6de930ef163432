"""From the store to what a run trains on: pairs with one label each, as the data sets that every run reads.

Several raters of a pair become one probability, the mean of their votes (a 1, b 0, a tie ½). A row is a sample whose
captions travel in its metadata, so that the one reader of data sets, with its seeded order, its quarantine and its
exact resume, reads pairs, too.

**Pairs out of a run's rollout log** (`sample_pairs`): two different captions of one group, to be labelled by people or
by the reward.

| strategy       | of each group the pair …                                   | and of these the groups …       |
|----------------|------------------------------------------------------------|---------------------------------|
| `random`       | that the seed draws                                        | that the seed draws             |
| `closest`      | whose rewards differ least, but do differ                  | with the least difference       |
| `disagreement` | about which the parts of the reward disagree most          | with the most disagreement      |

Two parts disagree about a pair where one speaks for this caption and one for the other: the disagreement is what
cancels, min(Σ max(Δ, 0), Σ max(−Δ, 0)) over the parts' contributions to the difference of rewards. A total is linear in
its innermost parts, so least squares over the log finds what each contributes, signs and all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import combinations, groupby
from typing import Any, Literal, TypeGuard

import numpy as np

from mmrl_ray.data.row import Sample
from mmrl_ray.data.writing import ShardWriter
from mmrl_ray.errors import DataError, PreferenceError, RunError
from mmrl_ray.metrics.statistics import resolution
from mmrl_ray.preferences.schema import Pair, Preference, run_source
from mmrl_ray.run_records.rollout_log import LoggedPictures, logged_groups
from mmrl_ray.run_records.run_dir import RunDir

_KEY = "mmrl_pair"
_VOTES = {"a": 1.0, "b": 0.0, "tie": 0.5}
Strategy = Literal["random", "closest", "disagreement"]
_COLUMNS = ("run", "sample_id", "image_hash", "prompt", "caption", "reward_parts")


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
    digest = hashlib.blake2b(image_hash.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 < share


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


@dataclass(frozen=True, slots=True)
class _Caption:
    text: str
    reward: float
    parts: dict[str, float]


@dataclass(frozen=True, slots=True)
class _Candidate:
    pair: Pair
    rewards: tuple[float, float]
    rank: tuple[float, bytes]
    """The smallest first."""


def sample_pairs(
    run: RunDir, count: int, *, seed: int, strategy: Strategy = "random", by_reward: bool = False
) -> list[Pair | Preference]:
    """At most `count` pairs with their pictures, no two of one group, none twice; the same for the same arguments.

    Args:
        run: a run with a rollout log.
        count: pairs wanted; a log of few groups gives fewer.
        by_reward: label each by the run's own reward, as the rater `reward:RUN`; equal rewards are a tie.

    Raises:
        PreferenceError: the log has no group with two different captions that got a reward.
        RunError: the run has no rollout log, or it cannot be read.
    """
    groups = [_group(rows) for rows in logged_groups(run, _COLUMNS)]
    rank = _ranking(strategy, seed, groups)
    best = [min(_candidates(group, rank), key=lambda c: c.rank, default=None) for group in groups]
    chosen: dict[str, _Candidate] = {}
    for candidate in sorted((c for c in best if c is not None), key=lambda c: c.rank):
        if len(chosen) == count:
            break
        chosen.setdefault(candidate.pair.id, candidate)
    if not chosen:
        raise PreferenceError(f"{run.location}: no group of its rollout log has two captions to compare ({strategy})")
    pictures = LoggedPictures(run)
    return [
        _item(replace(c.pair, image=_picture(pictures, c.pair.image_hash, run)), c, run, by_reward)
        for c in chosen.values()
    ]


def _picture(pictures: LoggedPictures, digest: str, run: RunDir) -> bytes:
    try:
        found = pictures[digest]
    except RunError as error:
        raise PreferenceError(str(error)) from error
    if len(found) != 1:
        raise PreferenceError(f"{run.location}: picture {digest} stands for several, which a pair cannot have")
    return found[0]


def _item(pair: Pair, candidate: _Candidate, run: RunDir, by_reward: bool) -> Pair | Preference:
    if not by_reward:
        return pair
    a, b = candidate.rewards
    return Preference(pair, "tie" if not _differ(a, b) else "a" if a > b else "b", f"reward:{run.name}")


def _differ(a: float, b: float) -> bool:
    return abs(a - b) > resolution(max(abs(a), abs(b)))


@dataclass(frozen=True, slots=True)
class _Group:
    source: str
    image_hash: str
    prompt: str
    captions: tuple[_Caption, ...]
    """Different ones, with a reward each."""


def _group(rows: Sequence[dict[str, Any]]) -> _Group:
    first = rows[0]
    captions: dict[str, _Caption] = {}
    for row in (row for row in rows if row["reward"] is not None):
        text = row["caption"].strip()
        parts = {part["name"]: part["value"] for part in row["reward_parts"]}
        captions.setdefault(text, _Caption(text, row["reward"], parts))
    source = run_source(first["run"], first["step"], first["sample_id"])
    return _Group(source, first["image_hash"], first["prompt"], tuple(captions.values()))


Ranking = Callable[[_Caption, _Caption, bytes], tuple[float, bytes] | None]
"""Where a pair stands, the smallest first; None where it is not wanted. The bytes draw among equals."""


def _candidates(group: _Group, rank: Ranking) -> Iterator[_Candidate]:
    for a, b in combinations(group.captions, 2):
        pair = Pair(group.image_hash, group.prompt, a.text, b.text, group.source)
        place = rank(a, b, pair.id.encode())
        if place is not None:
            yield _Candidate(pair, (a.reward, b.reward), place)


def _ranking(strategy: Strategy, seed: int, groups: Sequence[_Group]) -> Ranking:
    def drawn(pair_id: bytes) -> bytes:
        return hashlib.blake2b(f"{seed}/".encode() + pair_id, digest_size=8).digest()

    if strategy == "random":
        return lambda a, b, pair_id: (0.0, drawn(pair_id))
    if strategy == "closest":
        return lambda a, b, pair_id: (abs(a.reward - b.reward), drawn(pair_id)) if _differ(a.reward, b.reward) else None
    names, weights = _contributions([caption for group in groups for caption in group.captions])

    def disagreement(a: _Caption, b: _Caption, pair_id: bytes) -> tuple[float, bytes] | None:
        both = weights * np.array([[each.parts[n] for n in names] for each in (a, b)])
        difference = both[0] - both[1]
        cancelled = min(difference.clip(min=0).sum(), -difference.clip(max=0).sum())
        # Weights found by least squares carry the rounding of all parts, those that are the same in both included.
        return (-float(cancelled), drawn(pair_id)) if cancelled > resolution(np.abs(both).sum()) else None

    return disagreement


def _contributions(captions: Sequence[_Caption]) -> tuple[list[str], np.ndarray]:
    """The innermost parts' names, and the weight with which each enters the total.

    A part that some caption lacks has weight 0, and says nothing.
    """
    names = sorted(set.intersection(*(set(caption.parts) for caption in captions))) if captions else []
    innermost = [n for n in names if not any(other.startswith(f"{n}/") for other in names)]
    values = np.array([[caption.parts[n] for n in innermost] for caption in captions])
    totals = np.array([caption.reward for caption in captions])
    if not innermost:
        return [], np.zeros(0)
    weights, *_ = np.linalg.lstsq(values, totals, rcond=None)
    return innermost, weights
