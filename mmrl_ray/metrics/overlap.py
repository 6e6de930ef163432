"""Overlap of a caption with its references: BLEU, ROUGE-L and CIDEr-D.

**BLEU** (Papineni et al. 2002) through sacrebleu: sentence BLEU for the reward, corpus BLEU-1…4 for evaluation.

Tokeniser: sacrebleu's default `13a`, lower-cased, so that sacrebleu itself gives the same figures. `13a` splits at
spaces: what has scripts that write none comes to it as `text.spaced` leaves it; English comes as it is.

    ended    caption           references
    None     as it is          as they are        sacrebleu's figures
    True     and the end       and the end        a caption that ended by itself, where ends count
    False    as it is          and the end        one that was cut off

**ROUGE-L** (Lin 2004) as the COCO caption evaluation computes it.

**CIDEr-D** (Vedantam, Zitnick and Parikh 2015, arXiv:1411.5726) with document frequencies of the training split.

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

from sacrebleu.metrics import BLEU

from mmrl_ray.metrics.text import END, MAX_ORDER, CorpusStatistics, Tokenizer, ngram_counts, spaced, words

_CACHED_SAMPLES = 1024
"""Samples whose prepared references are kept: the G completions of a sample share them."""
_END = "\uffff"
"""The end of a text as a word of its own: no character, so that no text means it, and one that `13a` leaves whole."""
_BETA = 1.2
"""Weight of recall against precision, from the COCO evaluation."""
_SIGMA = 6.0
"""Width of the Gaussian penalty on the difference in length, in words."""


@lru_cache(maxsize=_CACHED_SAMPLES)
def _sentence_scorer(references: tuple[str, ...], ends: bool, tokenizer: Tokenizer) -> BLEU:
    streams = [[_prepared(reference, ends, tokenizer)] for reference in references]
    return BLEU(effective_order=True, smooth_method="exp", lowercase=True, references=streams)


def sentence_bleu(
    caption: str,
    references: Sequence[str],
    *,
    ended: bool | None = None,
    tokenizer: Tokenizer = Tokenizer.UNICODE,
) -> float:
    """Sentence BLEU over all references, in [0, 1]: effective order, `exp` smoothing, lower-cased.

    Equals sacrebleu's `sentence_score(...).score / 100` where `ended` is None; for the rest see the top of this file.

    Raises:
        ValueError: there are no references.
    """
    if not references:
        raise ValueError("BLEU needs at least one reference, got none")
    scorer = _sentence_scorer(tuple(references), ended is not None, tokenizer)
    score = scorer.corpus_score([_prepared(caption, ended is True, tokenizer)], None).score
    return min(1.0, score / 100.0)  # a perfect match comes out as 100.00000000000004


@lru_cache(maxsize=_CACHED_SAMPLES)
def _corpus_scorer(references: tuple[str, ...], tokenizer: Tokenizer) -> BLEU:
    """A run is evaluated on the same samples again and again."""
    return BLEU(lowercase=True, references=[[spaced(reference, tokenizer)] for reference in references])


def bleu_counts(caption: str, references: Sequence[str], *, tokenizer: Tokenizer = Tokenizer.UNICODE) -> list[float]:
    """[correct 1…4, total 1…4, words said, words of the closest reference]; their sums are the corpus' own counts.

    Raises:
        ValueError: there are no references.
    """
    if not references:
        raise ValueError("BLEU needs at least one reference, got none")
    score = _corpus_scorer(tuple(references), tokenizer).corpus_score([spaced(caption, tokenizer)], None)
    return [*map(float, score.counts), *map(float, score.totals), float(score.sys_len), float(score.ref_len)]


def corpus_bleu(sums: Sequence[float], order: int) -> float:
    """Corpus BLEU up to `order`, in [0, 1], from the captions' summed `bleu_counts`; 4 is sacrebleu's corpus score."""
    score = BLEU.compute_bleu(
        correct=[int(c) for c in sums[:order]],
        total=[int(t) for t in sums[MAX_ORDER : MAX_ORDER + order]],
        sys_len=int(sums[-2]),
        ref_len=int(sums[-1]),
        smooth_method="exp",
        max_ngram_order=order,
    )
    return min(1.0, float(score.score) / 100.0)


def _prepared(text: str, ends: bool, tokenizer: Tokenizer) -> str:
    text = spaced(text, tokenizer)
    return f"{text.replace(_END, ' ')} {_END}" if ends else text


def lcs_length(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence, by bit-parallel dynamic programming (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for i, token in enumerate(first):
        places[token] = places.get(token, 0) | (1 << i)
    full = (1 << len(first)) - 1
    row = full  # bit i is 0 where taking first[i] lengthened the subsequence
    for token in second:
        matches = row & places.get(token, 0)
        row = ((row + matches) | (row - matches)) & full
    return len(first) - row.bit_count()


@lru_cache(maxsize=_CACHED_SAMPLES)
def _reference_words(references: tuple[str, ...], tokenizer: Tokenizer) -> tuple[list[str], ...]:
    return tuple(words(reference, tokenizer) for reference in references)


def rouge_l(caption: str, references: Sequence[str], *, tokenizer: Tokenizer = Tokenizer.UNICODE) -> float:
    """ROUGE-L F-measure in [0, 1] with beta = 1.2; precision and recall each take their best reference.

    Words are those of `metrics/text.py`. A caption without words scores 0.

    Raises:
        ValueError: there are no references.
    """
    if not references:
        raise ValueError("ROUGE-L needs at least one reference, got none")
    tokens = words(caption, tokenizer)
    if not tokens:
        return 0.0
    precision = recall = 0.0
    for other in _reference_words(tuple(references), tokenizer):
        common = lcs_length(tokens, other)
        if common:
            precision = max(precision, common / len(tokens))
            recall = max(recall, common / len(other))
    if precision == 0.0:
        return 0.0
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


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
