"""BLEU (Papineni et al. 2002) through sacrebleu: sentence BLEU for the reward, corpus BLEU-1…4 for evaluation.

Tokeniser: sacrebleu's default `13a`, lower-cased, so that sacrebleu itself gives the same figures. `13a` splits at
spaces: what has scripts that write none comes to it as `text.spaced` leaves it; English comes as it is.

    ended    caption           references
    None     as it is          as they are        sacrebleu's figures
    True     and the end       and the end        a caption that ended by itself, where ends count
    False    as it is          and the end        one that was cut off
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from sacrebleu.metrics import BLEU

from mmrl_ray.metrics.text import MAX_ORDER, Tokenizer, spaced

_CACHED_SAMPLES = 1024
"""Samples whose prepared references are kept: the G completions of a sample share them."""
_END = "\uffff"
"""The end of a text as a word of its own: no character, so that no text means it, and one that `13a` leaves whole."""


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


def bleu_counts(caption: str, references: Sequence[str], *, tokenizer: Tokenizer = Tokenizer.UNICODE) -> list[float]:
    """[correct 1…4, total 1…4, words said, words of the closest reference]; their sums are the corpus' own counts.

    Raises:
        ValueError: there are no references.
    """
    if not references:
        raise ValueError("BLEU needs at least one reference, got none")
    streams = [[spaced(reference, tokenizer)] for reference in references]
    score = BLEU(lowercase=True).corpus_score([spaced(caption, tokenizer)], streams)
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
