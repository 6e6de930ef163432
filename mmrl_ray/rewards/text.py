"""Rewards of the caption as text: no repetition, the asked format, a fitting length, fluent words. No torch."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence

from mmrl_ray.data.samples import Sample
from mmrl_ray.metrics.language import LanguageModel
from mmrl_ray.metrics.text import Tokenizer, ngram_counts, words
from mmrl_ray.rewards.base import RewardBreakdown
from mmrl_ray.rewards.checks import check_pairs


class TextReward(ABC):
    """A reward of one figure that the caption alone decides."""

    figure: str
    """Its name in the breakdown."""
    weight = 1.0
    """-1 for a figure that counts against the caption."""

    def score_batch(self, samples: Sequence[Sample], captions: Sequence[str]) -> list[RewardBreakdown]:
        """One breakdown a caption, in order; see `RewardFn`."""
        check_pairs(samples, captions)
        return [self.score(caption) for caption in captions]

    def score(self, caption: str) -> RewardBreakdown:
        """Score one caption."""
        value = self.value(caption)
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
    """1 where the whole caption matches a pattern, else 0."""

    figure = "matches"

    def __init__(self, pattern: str) -> None:
        """`pattern` is a regular expression of Python."""
        self._pattern = re.compile(pattern)

    def value(self, caption: str) -> float:
        """Whether the caption, as it is, matches from its first character to its last."""
        return float(self._pattern.fullmatch(caption) is not None)


class LengthReward(TextReward):
    """1 within bounds; below, words ÷ `min_words`; above, 1 less words too many ÷ `max_words`, at least 0."""

    figure = "within"

    def __init__(self, min_words: int, max_words: int, tokenizer: Tokenizer = Tokenizer.UNICODE) -> None:
        self._min = min_words
        self._max = max_words
        self._tokenizer = tokenizer

    def value(self, caption: str) -> float:
        """In [0, 1]."""
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
