"""ROUGE-L (Lin 2004) as the COCO caption evaluation computes it."""

from __future__ import annotations

from collections.abc import Sequence

from mmrl_ray.metrics.text import Tokenizer, words

_BETA = 1.2
"""Weight of recall against precision, from the COCO evaluation."""


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
    for reference in references:
        other = words(reference, tokenizer)
        common = lcs_length(tokens, other)
        if common:
            precision = max(precision, common / len(tokens))
            recall = max(recall, common / len(other))
    if precision == 0.0:
        return 0.0
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)
