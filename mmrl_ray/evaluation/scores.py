"""What captions are worth: every measure of an evaluation, with intervals. Pure: no model, no files.

The measures, by name:

    reward, reward/PART         the run's own reward and every part of it
    reward/sigma                its mean standard deviation, where it knows one
                                rewards are of the captions that have one: a reward may fail on some
    cider_d, rouge_l            means of the sentence scores
    bleu_1 … bleu_4             of the corpus
    attributes/precision        for scenes, over all captions: facts that are true ÷ facts claimed
    attributes/recall, /f1      required facts that are covered ÷ required facts; the harmonic mean of the two
    caption/words               length
    caption/distinct            share: distinct captions ÷ captions

And whether captions depend on the picture (`blindness`): held against how much those of the references do.

Of N different pictures, each text counted without case and spacing: the share of pictures that got the most frequent
caption; the largest share for which some single text is among the references; and the effective numbers e^H of
captions and of references (H the entropy in nats; of a picture's references the one that most pictures share), which
say how many equally frequent texts would differ as much. A policy counts as blind on at least `MIN_PICTURES` pictures
where

    one caption goes to 90 % of them or more, and no single text would be right for 70 %, or
    captions differ less than two equally frequent ones would, and references as much as ten do or more.

So a policy that says little but says it of the picture is none, nor one on data whose pictures are all alike.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np

from mmrl_ray.data.images import image_hash
from mmrl_ray.data.samples import Sample
from mmrl_ray.data.scenes.generator import attribute_scores
from mmrl_ray.errors import DataError, RewardError
from mmrl_ray.experience.carriers import RewardBreakdown, RewardFailure, Score
from mmrl_ray.metrics.overlap import CiderD, bleu_counts, corpus_bleu, rouge_l
from mmrl_ray.metrics.statistics import (
    RESAMPLES,
    Counts,
    Figure,
    Interval,
    bootstrap_difference,
    bootstrap_mean,
    figure_difference,
    figure_interval,
)
from mmrl_ray.metrics.text import MAX_ORDER, CorpusStatistics, Tokenizer, words
from mmrl_ray.rewards.base import RewardFn, score_with_retry

_BATCH = 256
_TIMEOUT_S = 60.0
_ATTRIBUTES = ("attributes/correct", "attributes/claimed", "attributes/covered", "attributes/required")
_SCENE_OBJECT = {"shape", "colour", "size", "position"}
BLIND_EVENT = "captions_blind"
MIN_PICTURES = 20
_SAME = 0.9
_ALIKE = 0.7
_FEW, _MANY = 2.0, 10.0
_SHOWN = 80
_REMEDY = (
    "The policy does not see what it describes, and rewards would teach it words alone: see that the data pairs "
    "pictures with their own captions, train the warm start longer, with its vision tower "
    "(sft.train_vision: true) or a lower sft.lr, or start from a model that captions such pictures"
)


@dataclass(frozen=True, slots=True)
class CaptionScore:
    """One caption and what it is worth."""

    sample_id: str
    image_hashes: tuple[str, ...]
    """Of each of the sample's images."""
    prompt: str
    references: tuple[str, ...]
    caption: str
    reward: RewardBreakdown | None
    """None where the reward failed; see `no_reward`."""
    scores: Mapping[str, float]
    """Sentence scores and counts: cider_d, rouge_l, caption/words, and for scenes how many facts were claimed, of these
    are correct, were required, and of those were covered."""
    place: str = ""
    """Of the row in its data set (`Sample.place`): ids may repeat."""
    no_reward: str = ""
    """Why it has no reward, where it has none."""


@dataclass(frozen=True)
class Evaluation:
    """The captions of one policy on one split."""

    captions: tuple[CaptionScore, ...]
    seed: int = 0
    """Of the bootstrap."""
    tokenizer: Tokenizer = Tokenizer.UNICODE
    """Of the run's words."""

    @cached_property
    def measures(self) -> dict[str, Interval]:
        """Every measure with its 95 % bootstrap interval, the sample being what is resampled."""
        found = {name: interval for name in self.names if (interval := self.measure(name)) is not None}
        return {name: found[name] for name in _ordered(found)}

    @property
    def names(self) -> list[str]:
        """Of every measure, without taking them."""
        return [*self._means, *_BLEU, *([] if self._facts is None else _OF_FACTS)]

    def measure(self, name: str) -> Interval | None:
        """One of them alone; None where no caption has it."""
        if (found := self._figure(name)) is not None:
            return figure_interval(*found, seed=self.seed)
        present = [value for value in self._means.get(name, ()) if not math.isnan(value)]
        return bootstrap_mean(present, seed=self.seed, resamples=RESAMPLES) if present else None

    def to_json(self) -> dict[str, Any]:
        """How many samples, and each measure's value and interval; captions are in the records."""
        return {
            "samples": len(self.captions),
            **({"without_reward": len(self.unrewarded)} if self.unrewarded else {}),
            "measures": {name: interval_json(interval) for name, interval in self.measures.items()},
        }

    @property
    def unrewarded(self) -> tuple[CaptionScore, ...]:
        """Captions that the reward failed on: they are in every measure but those of the reward."""
        return tuple(c for c in self.captions if c.reward is None)

    def told_unrewarded(self) -> str:
        """How many, and the first reason; only where there are any."""
        missing = self.unrewarded
        return (
            f"{len(missing)} of {len(self.captions)} captions have no reward, and do not count in its figures; "
            f"the first: {missing[0].sample_id}: {missing[0].no_reward}"
        )

    @cached_property
    def _means(self) -> dict[str, list[float]]:
        """Measures that are means: one value a sample, NaN where it has none."""
        multiplicity = Counter(c.caption for c in self.captions)
        rewards = [c.reward for c in self.captions]
        columns: dict[str, list[float]] = {"reward": [math.nan if r is None else r.total for r in rewards]}
        rewarded = [r for r in rewards if r is not None]
        for part in _shared([r.parts for r in rewarded]):
            columns[f"reward/{part}"] = [math.nan if r is None else r.parts[part] for r in rewards]
        if all(r.sigma is not None for r in rewarded):
            columns["reward/sigma"] = [math.nan if r is None or r.sigma is None else r.sigma for r in rewards]
        for name in _shared([c.scores for c in self.captions]):
            if name not in _ATTRIBUTES:
                columns[name] = [c.scores[name] for c in self.captions]
        # The mean of 1 ÷ (captions that read the same) is the share of distinct ones; counting distinct captions among
        # resamples would not do, since drawing with replacement itself repeats captions.
        columns["caption/distinct"] = [1.0 / multiplicity[c.caption] for c in self.captions]
        return columns

    def _figure(self, name: str) -> tuple[Counts, Figure] | None:
        """Of a measure that is a function of summed counts: the counts [N, K], and the function; None of a mean."""
        if name in _BLEU:
            return self._overlaps, _BLEU[name]
        return None if name not in _OF_FACTS or self._facts is None else (self._facts, _OF_FACTS[name])

    @cached_property
    def _overlaps(self) -> Counts:
        return np.array([bleu_counts(c.caption, c.references, tokenizer=self.tokenizer) for c in self.captions])

    @cached_property
    def _facts(self) -> Counts | None:
        """Of scenes, what captions claim and cover."""
        if not all(name in c.scores for c in self.captions for name in _ATTRIBUTES):
            return None
        return np.array([[c.scores[name] for name in _ATTRIBUTES] for c in self.captions], dtype=np.float64)


@dataclass(frozen=True, slots=True)
class Difference:
    """After less before, of one measure."""

    difference: Interval
    """Paired by sample."""
    apart: bool
    """Whether the two measures' own intervals have no point in common: the stricter test."""


def score_captions(
    samples: Sequence[Sample],
    captions: Sequence[str],
    reward: RewardFn,
    statistics: CorpusStatistics,
    *,
    progress: Callable[[int, int, Mapping[str, float]], None] | None = None,
    seed: int = 0,
    timeout_s: float = _TIMEOUT_S,
    retries: int = 0,
) -> Evaluation:
    """Scores one caption a sample by the reward and by every measure that the reward does not see.

    Ends of captions count in the reward where it says so, in the measures never. A caption that the reward fails on
    is measured without it.

    Args:
        samples: with references.
        captions: one a sample, in order.
        statistics: of the training references, for CIDEr-D.
        progress: is told how many captions have their reward, of how many.
        timeout_s: of the reward, for a batch; see `score_with_retry`.

    Raises:
        DataError: no samples, or a sample without references.
        RewardError: the reward failed on every caption.
    """
    scores: list[Score] = []
    _refuse_unfit(samples, captions)
    for start in range(0, len(samples), _BATCH):
        batch, said = samples[start : start + _BATCH], captions[start : start + _BATCH]
        scores += score_with_retry(reward, batch, said, timeout_s=timeout_s, retries=retries)
        if progress is not None:
            progress(len(scores), len(samples), {})
    reasons = [score.reason for score in scores if isinstance(score, RewardFailure)]
    if len(reasons) == len(scores):
        raise RewardError(f"none of {len(scores)} captions has a reward; the first: {reasons[0]}")
    return rewarded_captions(samples, captions, scores, CiderD(statistics), statistics.tokenizer, seed=seed)


def rewarded_captions(
    samples: Sequence[Sample],
    captions: Sequence[str],
    rewards: Sequence[Score],
    cider: CiderD,
    tokenizer: Tokenizer,
    *,
    seed: int = 0,
) -> Evaluation:
    """`score_captions` of captions that have their rewards already; all of them may have failed.

    Who evaluates the same samples again keeps `cider`, which knows their references by then.

    Raises:
        DataError: no samples, or a sample without references.
    """
    _refuse_unfit(samples, captions)
    rows = zip(samples, captions, rewards, strict=True)
    return Evaluation(tuple(_score(*row, cider=cider, tokenizer=tokenizer) for row in rows), seed, tokenizer)


def _refuse_unfit(samples: Sequence[Sample], captions: Sequence[str]) -> None:
    if not samples:
        raise DataError("there is no sample to evaluate")
    if len(samples) != len(captions):
        raise DataError(f"an evaluation needs one caption a sample, got {len(captions)} for {len(samples)} samples")
    bare = next((s.id for s in samples if not s.references), None)
    if bare is not None:
        raise DataError(f"sample {bare!r} has no references to evaluate against; add some or leave it out")


def compare(before: Evaluation, after: Evaluation) -> dict[str, Difference]:
    """The difference of every measure that both have, paired by sample.

    Raises:
        DataError: they are of different samples.
    """
    pairs = paired(before.captions, after.captions)
    if [b for b, _ in pairs] != [*before.captions] or [a for _, a in pairs] != [*after.captions]:
        raise DataError("two evaluations of different samples cannot be compared; evaluate both on the same split")
    found: dict[str, Difference] = {}
    for name, interval in before.measures.items():
        if name not in after.measures or (difference := _difference(before, after, name)) is None:
            continue
        found[name] = Difference(difference, not interval.overlaps(after.measures[name]))
    return found


def difference(before: Evaluation, after: Evaluation, name: str) -> Interval | None:
    """Of one measure, after less before, paired by sample over those that both have; None where none has it on both."""
    both = in_common(before, after)
    if both is None or any(name not in side.names for side in both):
        return None
    return _difference(*both, name)


def paired(before: Sequence[CaptionScore], after: Sequence[CaptionScore]) -> list[tuple[CaptionScore, CaptionScore]]:
    """(before, after) of each row that both have, in the order of `after`.

    Rows are known by their places; records from before those were written by their ids, the n-th of an id being that
    of the other side.
    """
    by_place = all(c.place for c in (*before, *after))
    known = dict(zip(_row_keys(before, by_place), before, strict=True))
    return [(known[key], c) for key, c in zip(_row_keys(after, by_place), after, strict=True) if key in known]


def in_common(before: Evaluation, after: Evaluation) -> tuple[Evaluation, Evaluation] | None:
    """Both, of the rows that both have; None where there is none. A sample may fail on one side alone."""
    pairs = paired(before.captions, after.captions)
    if not pairs:
        return None
    if len(pairs) == len(before.captions) == len(after.captions):
        return before, after
    first, second = zip(*pairs, strict=True)
    return Evaluation(first, before.seed), Evaluation(second, after.seed)


def _row_keys(captions: Sequence[CaptionScore], by_place: bool) -> list[tuple[str, int]]:
    if by_place:
        return [(c.place, 0) for c in captions]
    seen: Counter[str] = Counter()
    keys = []
    for c in captions:
        keys.append((c.sample_id, seen[c.sample_id]))
        seen[c.sample_id] += 1
    return keys


def comparison_json(differences: Mapping[str, Difference]) -> dict[str, Any]:
    """`compare`'s answer for `summary.json`."""
    return {name: {**interval_json(d.difference), "intervals_apart": d.apart} for name, d in differences.items()}


def interval_json(interval: Interval) -> dict[str, float | None]:
    """An interval as it stands in JSON files; null ends where a single sample has none."""
    low, high = (interval.low, interval.high) if interval.known else (None, None)
    return {"value": interval.mean, "low": low, "high": high}


def _difference(before: Evaluation, after: Evaluation, name: str) -> Interval | None:
    """None where no sample has the measure on both sides."""
    if name in before._means:
        pairs = zip(before._means[name], after._means[name], strict=True)
        both = [(old, new) for old, new in pairs if not math.isnan(old) and not math.isnan(new)]
        if not both:
            return None
        return bootstrap_difference(*zip(*both, strict=True), seed=before.seed, resamples=RESAMPLES)
    first, second = before._figure(name), after._figure(name)
    if first is None or second is None:
        return None
    return figure_difference(first[0], second[0], first[1], seed=before.seed)


def _score(sample: Sample, caption: str, reward: Score, *, cider: CiderD, tokenizer: Tokenizer) -> CaptionScore:
    scores = {
        "cider_d": cider.score(caption, sample.references),
        "rouge_l": rouge_l(caption, sample.references, tokenizer=tokenizer),
        "caption/words": float(len(words(caption, tokenizer))),
    }
    if _is_scene(sample):
        facts = attribute_scores(caption, sample.metadata)
        counts = (facts.correct, facts.claimed, facts.covered, facts.required)
        scores.update(zip(_ATTRIBUTES, map(float, counts), strict=True))
    return CaptionScore(
        sample_id=sample.id,
        image_hashes=tuple(image_hash([image]) for image in sample.images),
        prompt=sample.prompt,
        references=sample.references,
        caption=str(caption),
        reward=reward if isinstance(reward, RewardBreakdown) else None,
        scores=scores,
        place=sample.place,
        no_reward=reward.reason if isinstance(reward, RewardFailure) else "",
    )


def _bleu(sums: Counts, *, order: int) -> float:
    return corpus_bleu(sums.tolist(), order)


def _precision(sums: Counts) -> float:
    correct, claimed, _, _ = sums
    return float(correct / claimed) if claimed else 0.0


def _recall(sums: Counts) -> float:
    _, _, covered, required = sums
    return float(covered / required) if required else 0.0


def _f1(sums: Counts) -> float:
    precision, recall = _precision(sums), _recall(sums)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


_BLEU: Mapping[str, Figure] = {f"bleu_{n}": partial(_bleu, order=n) for n in range(1, MAX_ORDER + 1)}
_OF_FACTS: Mapping[str, Figure] = {
    "attributes/precision": _precision,
    "attributes/recall": _recall,
    "attributes/f1": _f1,
}


def _is_scene(sample: Sample) -> bool:
    """Whether the row was made by `data/scenes/generator.py`: another data set may well have `objects` of its own."""
    objects = sample.metadata.get("objects")
    return (
        isinstance(objects, list)
        and bool(objects)
        and all(isinstance(each, dict) and set(each) == _SCENE_OBJECT for each in objects)
    )


def _shared(rows: Sequence[Mapping[str, float]]) -> Iterator[str]:
    """Names that every row has, in the first row's order."""
    return (name for name in (rows[0] if rows else ()) if all(name in row for row in rows))


def _ordered(names: Mapping[str, Any]) -> list[str]:
    """Rewards first, then what no reward need have seen."""
    leading = ["cider_d", "bleu_4", "bleu_3", "bleu_2", "bleu_1", "rouge_l"]
    rewards = [n for n in names if n == "reward" or n.startswith("reward/")]
    rest = [n for n in names if n not in rewards and n not in leading]
    return [*rewards, *leading, *rest]


@dataclass(frozen=True, slots=True)
class Blindness:
    """Captions that do not depend on the picture."""

    pictures: int
    share: float
    """Of the pictures, with the most frequent caption."""
    caption: str
    """That caption."""
    effective: float
    """Number of equally frequent captions that would differ as much."""
    effective_references: float

    def told(self, what: str) -> str:
        """For people; `what` names whose captions they are, "evaluation before training" say."""
        caption = self.caption if len(self.caption) <= _SHOWN else f"{self.caption[: _SHOWN - 1]}…"
        return (
            f"captions do not depend on the picture ({what}): {self.share:.0%} of {self.pictures} different pictures "
            f"got {caption!r}; captions differ as {self.effective:.1f} equally frequent ones do, references as "
            f"{self.effective_references:.1f}. {_REMEDY}"
        )

    def to_json(self) -> dict[str, Any]:
        """The figures as an event has them."""
        return {
            "pictures": self.pictures,
            "share": round(self.share, 4),
            "caption": self.caption,
            "effective_captions": round(self.effective, 2),
            "effective_references": round(self.effective_references, 2),
        }


def blindness(rows: Iterable[tuple[Sequence[str], Sequence[str], str]]) -> Blindness | None:
    """From (image hashes, references, greedy caption) a sample; None where they depend on pictures or are too few."""
    by_picture = {tuple(images): (references, caption) for images, references, caption in rows}
    pictures = len(by_picture)
    if pictures < MIN_PICTURES:
        return None
    said = Counter(_plain(caption) for _, caption in by_picture.values())
    right = Counter(text for references, _ in by_picture.values() for text in {_plain(r) for r in references})
    likeliest = Counter(
        max({_plain(r) for r in references}, key=lambda text: (right[text], text))
        for references, _ in by_picture.values()
        if references
    )
    (most, count), alike = said.most_common(1)[0], max(right.values(), default=0) / pictures
    effective, effective_references = _effective(said), _effective(likeliest)
    same = count / pictures >= _SAME and alike <= _ALIKE
    if not likeliest or not (same or (effective < _FEW and effective_references >= _MANY)):
        return None
    shown = next(caption for _, caption in by_picture.values() if _plain(caption) == most)
    return Blindness(pictures, count / pictures, " ".join(shown.split()), effective, effective_references)


def evaluation_blindness(evaluation: Evaluation) -> Blindness | None:
    """`blindness` of an evaluation's captions."""
    return blindness((c.image_hashes, c.references, c.caption) for c in evaluation.captions)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _effective(counts: Counter[str]) -> float:
    total = sum(counts.values())
    return math.exp(-sum(n / total * math.log(n / total) for n in counts.values())) if total else 0.0
