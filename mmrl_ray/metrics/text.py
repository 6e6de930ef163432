r"""The one tokeniser of captions: lower-cased `\w+`.

It is not the Java PTB tokeniser of the COCO evaluation server (no "n't" split, no punctuation list), so absolute
CIDEr-D and ROUGE-L values differ a little from those of papers that used it; comparisons within this system hold.
BLEU alone keeps sacrebleu's own `13a` tokeniser, so that its figures can be reproduced with sacrebleu.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

MAX_ORDER = 4
"""The longest n-gram that CIDEr-D and BLEU count."""

_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    r"""The lower-cased `\w+` runs of a text, in order."""
    return _WORD.findall(text.lower())


def ngram_counts(tokens: Sequence[str], max_order: int = MAX_ORDER) -> list[Counter[str]]:
    """Counts of n-grams by order: entry `n - 1` maps space-joined n-grams to how often they occur.

    Tokens never contain a space (`words`), so joining loses nothing and the keys are JSON as they are.
    """
    return [Counter(" ".join(tokens[i : i + n]) for i in range(len(tokens) - n + 1)) for n in range(1, max_order + 1)]
