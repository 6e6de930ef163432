"""Rewards of the caption as text: no repetition, the asked format, a fitting length, fluent words. No torch.

Rewards of overlap with the references: CIDEr-D and ROUGE-L. Plain Python, no torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import regex

from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import RewardError
from mmrl_ray.metrics.overlap import CiderD, rouge_l
from mmrl_ray.metrics.text import CorpusStatistics, LanguageModel, Tokenizer, ngram_counts, words
from mmrl_ray.rewards.base import RewardBreakdown, RewardFailure, Score, TruncatedCaption, check_pairs, check_references

_MATCH_S = 0.5
"""For one caption at most, of CPU time. A match takes microseconds; one that takes longer tries the same again and
again, and may go on for years."""
_SHOWN = 60
"""Characters of a caption in an error."""


class TextReward(ABC):
    """A reward of one figure that the caption alone decides."""

    figure: str
    """Its name in the breakdown."""
    weight = 1.0
    """-1 for a figure that counts against the caption."""

    def score_batch(self, samples: Sequence[Sample], captions: Sequence[str]) -> Sequence[Score]:
        """One score a caption, in order; see `RewardFn`."""
        check_pairs(samples, captions)
        return [self.score(caption) for caption in captions]

    def score(self, caption: str) -> RewardBreakdown:
        """Score one caption."""
        return self._breakdown(self.value(caption))

    def _breakdown(self, value: float) -> RewardBreakdown:
        return RewardBreakdown(self.weight * value, {self.figure: value}, {self.figure: self.weight})

    @abstractmethod
    def value(self, caption: str) -> float:
        """The figure of one caption."""


class RepetitionReward(TextReward):
    """Minus the share of n-grams that repeat an earlier one: 0 without repetition, towards -1 with nothing else."""

    figure = "repeated"
    weight = -1.0

    def __init__(self, order: int, tokenizer: Tokenizer = Tokenizer.UNICODE) -> None:
        """`order` is n, 1 to 4 words."""
        self._order = order
        self._tokenizer = tokenizer

    def value(self, caption: str) -> float:
        """Repeated n-grams ÷ n-grams; 0 for a caption too short to have any."""
        counts = ngram_counts(words(caption, self._tokenizer), self._order)[-1]
        return 1.0 - len(counts) / counts.total() if counts else 0.0


class FormatReward(TextReward):
    """1 where the whole caption matches a pattern, else 0.

    `.` matches newlines, and white space at the caption's end does not count. Where the chat template itself begins the
    answer, with `<think>` for instance, the caption goes on from there: it matches with that before it, or alone.
    """

    figure = "matches"

    def __init__(self, pattern: str, *, prefix: str = "", timeout_s: float = 60.0) -> None:
        """Prepares a pattern.

        Args:
            pattern: a regular expression of the library `regex`, which reads those of Python's `re`.
            prefix: what the chat template writes before an answer.
            timeout_s: for a batch. Matching takes no more than half of it, so that captions whose match would never
                end cost the others nothing.
        """
        self._pattern = regex.compile(pattern, regex.DOTALL)
        self._prefix = prefix
        self._timeout_s = timeout_s

    def score_batch(self, samples: Sequence[Sample], captions: Sequence[str]) -> Sequence[Score]:
        """One score a caption, in order; see `RewardFn`. One whose match was not over in time has none."""
        check_pairs(samples, captions)
        seconds = min(_MATCH_S, self._timeout_s / 2 / max(1, len(captions)))
        return [self._score_within(caption, seconds) for caption in captions]

    def _score_within(self, caption: str, seconds: float) -> Score:
        try:
            return self._breakdown(self._value(caption, seconds))
        except RewardError as error:
            return RewardFailure(str(error))

    def value(self, caption: str) -> float:
        """Whether the caption matches from its first character to the last that is no white space.

        Raises:
            RewardError: that was not decided in time.
        """
        return self._value(caption, _MATCH_S)

    def _value(self, caption: str, seconds: float) -> float:
        text = str(caption).rstrip()
        candidates = [text, self._prefix + text] if self._prefix else [text]
        try:
            # `concurrent` lets go of the interpreter, which other threads need meanwhile.
            matches = [
                self._pattern.fullmatch(each, timeout=seconds / len(candidates), concurrent=True) for each in candidates
            ]
        except TimeoutError:
            raise RewardError(
                f"pattern {self._pattern.pattern!r} did not come to an end within {seconds:g} s on "
                f"{text[:_SHOWN]!r}: it can match the same text in too many ways; write repetitions inside repetitions "
                "as one, or make them possessive (`++`)"
            ) from None
        return float(any(matches))


class LengthReward(TextReward):
    """1 within bounds; below, words ÷ `min_words`; above, 1 less words too many ÷ `max_words`, at least 0."""

    figure = "within"

    def __init__(self, min_words: int, max_words: int, tokenizer: Tokenizer = Tokenizer.UNICODE) -> None:
        self._min = min_words
        self._max = max_words
        self._tokenizer = tokenizer

    def value(self, caption: str) -> float:
        """The value of the part, in [0, 1]."""
        count = len(words(caption, self._tokenizer))
        if count < self._min:
            return count / self._min
        return max(0.0, 1.0 - max(0, count - self._max) / self._max)


class FluencyReward(TextReward):
    """1 + mean log-probability a word ÷ log of the vocabulary's size; see `LanguageModel.fluency`."""

    figure = "fluency"

    def __init__(self, model: LanguageModel) -> None:
        self._model = model

    def value(self, caption: str) -> float:
        """At most 1; 0 for words that nothing foresaw, below 0 for words that others were expected in place of."""
        return self._model.fluency(caption)


class CiderReward:
    """CIDEr-D in its usual range 0 to 10 (weigh it accordingly beside rewards in [0, 1])."""

    def __init__(self, statistics: CorpusStatistics, *, eos: bool = False) -> None:
        """With `eos` the end of a text counts as one more word, of references and of captions that have one.

        Statistics that were counted without ends have nothing to weigh them by: with these, ends do not count.
        """
        self._metric = CiderD(statistics)
        self._eos = eos and statistics.ends is not None

    def score_batch(self, samples: Sequence[Sample], captions: Sequence[str]) -> list[RewardBreakdown]:
        """One breakdown a caption, with the part `cider_d`; see `RewardFn`."""
        check_pairs(samples, captions)
        return [self._score(sample, caption) for sample, caption in zip(samples, captions, strict=True)]

    def _score(self, sample: Sample, caption: str) -> RewardBreakdown:
        check_references(sample.references, f"CIDEr-D of sample {sample.id!r}")
        ended = not isinstance(caption, TruncatedCaption) if self._eos else None
        value = self._metric.score(caption, sample.references, ended=ended)
        return RewardBreakdown(total=value, parts={"cider_d": value}, weights={"cider_d": 1.0})


class RougeReward:
    """ROUGE-L, in [0, 1]."""

    def __init__(self, tokenizer: Tokenizer = Tokenizer.UNICODE) -> None:
        self._tokenizer = tokenizer

    def score_batch(self, samples: Sequence[Sample], captions: Sequence[str]) -> list[RewardBreakdown]:
        """One breakdown a caption, with the part `rouge_l`; see `RewardFn`."""
        check_pairs(samples, captions)
        return [self._score(sample, caption) for sample, caption in zip(samples, captions, strict=True)]

    def _score(self, sample: Sample, caption: str) -> RewardBreakdown:
        check_references(sample.references, f"ROUGE-L of sample {sample.id!r}")
        value = rouge_l(caption, sample.references, tokenizer=self._tokenizer)
        return RewardBreakdown(total=value, parts={"rouge_l": value}, weights={"rouge_l": 1.0})
