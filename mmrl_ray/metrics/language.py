"""An n-gram language model with add-k smoothing (Lidstone): how likely words are after those before them.

Counts come from the training references and are stored with the run (`CorpusStatistics`). Words are those of
`metrics/text.py`, so that punctuation is neither counted nor foreseen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mmrl_ray.errors import DataError
from mmrl_ray.metrics.text import Tokenizer, words

BEGIN, END, UNKNOWN = "<s>", "</s>", "<unk>"
"""No word can look like these: words have no angle brackets."""

Followers = Mapping[str, Mapping[str, int]]
"""[context][word] = how often the word followed the context, whose words are joined by spaces."""


@dataclass(frozen=True)
class NgramCounts:
    """How often each word followed which context in a set of texts."""

    followers: tuple[Followers, ...]
    """[n - 1] for contexts of n - 1 words. Texts begin with BEGIN and end with END; for n = 1 the context is ""."""

    @property
    def order(self) -> int:
        """The longest n-gram counted."""
        return len(self.followers)


class NgramCounter:
    """Counts texts one by one."""

    def __init__(self, order: int) -> None:
        self._followers: list[dict[str, dict[str, int]]] = [{} for _ in range(order)]

    def add(self, tokens: Sequence[str]) -> None:
        """Counts one text, given as words."""
        for n, table in enumerate(self._followers, start=1):
            for context, word in _ngrams(tokens, n):
                seen = table.setdefault(context, {})
                seen[word] = seen.get(word, 0) + 1

    def counts(self) -> NgramCounts:
        """What was counted so far."""
        return NgramCounts(tuple(self._followers))


@dataclass(frozen=True)
class LanguageModel:
    """P(word | context) = (count(context, word) + k) / (count(context) + k·V); sums to 1 over the vocabulary.

    The vocabulary of V entries is every word of the training references, END, and UNKNOWN for all others.
    """

    counts: NgramCounts
    order: int
    """n; a word is foreseen from the n - 1 before it."""
    smoothing: float
    """k, above 0."""
    tokenizer: Tokenizer = Tokenizer.UNICODE
    """What the counts were made with."""
    _totals: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Raises DataError where n-grams of this order were not counted."""
        if not 1 <= self.order <= self.counts.order:
            raise DataError(
                f"n-grams of {self.order} words were not counted (up to {self.counts.order} were): make the "
                "statistics anew from the training references"
            )
        followers = self.counts.followers[self.order - 1]
        object.__setattr__(self, "_totals", {context: sum(seen.values()) for context, seen in followers.items()})

    @property
    def vocabulary_size(self) -> int:
        """V."""
        return len(self.counts.followers[0].get("", {})) + 1  # END was counted among the words

    def log_probability(self, tokens: Sequence[str]) -> float:
        """Natural log of the probability of a whole text, its end included."""
        known = self.counts.followers[0].get("", {})
        kept = [token if token in known else UNKNOWN for token in tokens]
        return math.fsum(self._log_probability(context, word) for context, word in _ngrams(kept, self.order))

    def fluency(self, text: str) -> float:
        """1 + (mean log-probability of its words and its end) ÷ log V: 1 is certain, 0 is a guess among V."""
        tokens = words(text, self.tokenizer)
        return 1.0 + self.log_probability(tokens) / (len(tokens) + 1) / math.log(self.vocabulary_size)

    def _log_probability(self, context: str, word: str) -> float:
        seen = self.counts.followers[self.order - 1].get(context, {})
        k = self.smoothing
        return math.log((seen.get(word, 0) + k) / (self._totals.get(context, 0) + k * self.vocabulary_size))


def _ngrams(tokens: Sequence[str], order: int) -> list[tuple[str, str]]:
    """(context, word) of each word and of END; the first words have BEGIN before them."""
    padded = [*[BEGIN] * (order - 1), *tokens, END]
    return [(" ".join(padded[i : i + order - 1]), padded[i + order - 1]) for i in range(len(tokens) + 1)]
