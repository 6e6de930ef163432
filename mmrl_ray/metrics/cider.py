"""CIDEr-D (Vedantam, Zitnick and Parikh 2015, arXiv:1411.5726) with document frequencies of the training split.

The usual implementations take document frequencies from the very batch that they score, so that a caption's score
changes with its neighbours; a reward cannot have that. For equal tokens and equal frequencies the figures equal
pycocoevalcap's `cider_scorer` (which is CIDEr-D under the name Cider). Tokeniser: `metrics/text.py`, not Java PTB.

As a reward it may count the end of a text as one more word. Without it a caption that breaks off after "in a" loses
nothing but a word, and a policy learns to break off (Rennie et al. 2017, arXiv:1612.00563, whose reward has it).

    ended    caption           references         frequencies
    None     as it is          as they are        as they are        CIDEr-D as it is reported
    True     and the end       and the end        with ends          a caption that ended by itself
    False    as it is          and the end        with ends          one that was cut off
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from mmrl_ray.metrics.corpus import CorpusStatistics
from mmrl_ray.metrics.language import END
from mmrl_ray.metrics.text import MAX_ORDER, ngram_counts, words

_SIGMA = 6.0
"""Width of the Gaussian penalty on the difference in length, in words."""
_CACHED_SAMPLES = 1024


@dataclass(frozen=True, slots=True)
class _Vector:
    """One text as tf-idf vectors."""

    terms: tuple[dict[str, float], ...]
    """[n - 1][n-gram] = term frequency times inverse document frequency."""
    norms: tuple[float, ...]
    """Euclidean norm by order."""
    length: int
    """Words, the end among them where it counts."""


class CiderD:
    """Scores captions by CIDEr-D, 0 to 10, higher is better; every score is a function of its own arguments only."""

    def __init__(self, statistics: CorpusStatistics) -> None:
        self._statistics = statistics
        self._log_documents = math.log(statistics.documents)
        # A sample's G completions share their references; a run's rewards come back to the same samples.
        self._reference_vectors = lru_cache(maxsize=_CACHED_SAMPLES)(self._vectors)

    def __reduce__(self) -> tuple[type[CiderD], tuple[CorpusStatistics]]:
        return CiderD, (self._statistics,)

    def score(self, caption: str, references: Sequence[str], *, ended: bool | None = None) -> float:
        """CIDEr-D of one caption: 10 times the mean over n = 1…4 and over the references.

        `ended` is None unless ends count; see the top of this file.

        Raises:
            ValueError: there are no references, or ends count and the statistics have none.
        """
        if ended is not None and self._statistics.ends is None:
            raise ValueError("these corpus statistics were counted without the ends of texts; make them anew")
        if not references:
            raise ValueError("CIDEr-D needs at least one reference, got none")
        hypothesis = self._vector(caption, ended is True)
        prepared = self._reference_vectors(tuple(references), ended is not None)
        total = math.fsum(_similarity(hypothesis, reference) for reference in prepared)
        return 10.0 * total / len(references)

    def score_corpus(self, captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
        """One score a caption; the corpus score is their mean."""
        return [self.score(caption, refs) for caption, refs in zip(captions, references, strict=True)]

    def _vectors(self, references: tuple[str, ...], ends: bool) -> tuple[_Vector, ...]:
        return tuple(self._vector(reference, ends) for reference in references)

    def _vector(self, text: str, ends: bool) -> _Vector:
        tokens = [*words(text, self._statistics.tokenizer), *([END] if ends else [])]
        terms = tuple(
            {ngram: count * self._idf(ngram, order) for ngram, count in counts.items()}
            for order, counts in enumerate(ngram_counts(tokens))
        )
        norms = tuple(math.sqrt(math.fsum(weight * weight for weight in t.values())) for t in terms)
        return _Vector(terms, norms, len(tokens))

    def _idf(self, ngram: str, order: int) -> float:
        tables = self._statistics.document_frequency
        if ngram.endswith(END) and self._statistics.ends is not None:  # no word looks like it
            tables = self._statistics.ends
        return self._log_documents - math.log(max(1, tables[order].get(ngram, 0)))


def _similarity(hypothesis: _Vector, reference: _Vector) -> float:
    """Clipped cosine similarity, mean over the orders, with the Gaussian length penalty."""
    total = 0.0
    for order in range(MAX_ORDER):
        norm = hypothesis.norms[order] * reference.norms[order]
        if norm == 0.0:
            continue
        other = reference.terms[order]
        # The clip: repeating an n-gram beyond the reference's own count earns nothing more.
        dot = math.fsum(min(w, other[g]) * other[g] for g, w in hypothesis.terms[order].items() if g in other)
        total += dot / norm
    delta = hypothesis.length - reference.length
    return total / MAX_ORDER * math.exp(-(delta * delta) / (2 * _SIGMA**2))
