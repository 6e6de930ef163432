"""BLEU (Papineni et al. 2002) through sacrebleu: sentence BLEU for the reward, corpus BLEU-1…4 for evaluation.

Tokeniser: sacrebleu's default `13a`, lower-cased, so that sacrebleu itself gives the same figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from sacrebleu.metrics import BLEU

from mmrl_ray.metrics.text import MAX_ORDER

_CACHED_SAMPLES = 1024
"""Samples whose prepared references are kept: the G completions of a sample share them."""


@lru_cache(maxsize=_CACHED_SAMPLES)
def _sentence_scorer(references: tuple[str, ...]) -> BLEU:
    streams = [[reference] for reference in references]
    return BLEU(effective_order=True, smooth_method="exp", lowercase=True, references=streams)


def sentence_bleu(caption: str, references: Sequence[str]) -> float:
    """Sentence BLEU over all references, in [0, 1]: effective order, `exp` smoothing, lower-cased.

    Equals sacrebleu's `sentence_score(...).score / 100`.

    Raises:
        ValueError: there are no references.
    """
    if not references:
        raise ValueError("BLEU needs at least one reference, got none")
    score = _sentence_scorer(tuple(references)).corpus_score([caption], None).score
    return min(1.0, score / 100.0)  # a perfect match comes out as 100.00000000000004


def corpus_bleu(captions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Corpus BLEU over N captions, each with its own references: `{"bleu_1": …, …, "bleu_4": …}`, in [0, 1].

    All four come from the same counts; `bleu_4` equals sacrebleu's corpus score (lower-cased, `exp` smoothing).

    Raises:
        ValueError: there are no captions, a caption has no references, or the lengths differ.
    """
    if len(captions) != len(references) or not captions:
        raise ValueError(
            f"corpus BLEU needs one list of references a caption, got {len(captions)} and {len(references)}"
        )
    if not all(references):
        missing = next(i for i, refs in enumerate(references) if not refs)
        raise ValueError(f"corpus BLEU needs references for every caption, caption {missing} has none")
    most = max(len(refs) for refs in references)
    streams = [[refs[k] if k < len(refs) else None for refs in references] for k in range(most)]
    # None marks a missing reference: sacrebleu documents it, its annotations do not.
    counts = BLEU(lowercase=True).corpus_score(list(captions), streams)  # type: ignore[arg-type]
    return {
        f"bleu_{n}": min(1.0, _from_counts(counts.counts, counts.totals, counts.sys_len, counts.ref_len, n) / 100.0)
        for n in range(1, MAX_ORDER + 1)
    }


def _from_counts(correct: list[int], total: list[int], sys_len: int, ref_len: int, order: int) -> float:
    """BLEU up to one order, 0 to 100, from corpus counts."""
    score = BLEU.compute_bleu(
        correct=correct[:order],
        total=total[:order],
        sys_len=sys_len,
        ref_len=ref_len,
        smooth_method="exp",
        max_ngram_order=order,
    )
    return float(score.score)
