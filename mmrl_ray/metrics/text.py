r"""The one tokeniser of captions. Rewards, metrics and statistics of a run all split texts with it.

A word is a run of letters, digits and underscores with the combining marks on them, lower-cased, in NFC: two spellings
of one text (composed or not, with or without joiners) are the same words. Chinese, Japanese, Thai, Lao, Khmer and
Burmese put no spaces between words; there ICU finds them by its dictionaries (Unicode Standard Annex 29). It is
imported with the first text that has such a script. On plain English the words are those of `\w+`.

It is not the Java PTB tokeniser of the COCO evaluation server (no "n't" split, no punctuation list), so absolute
CIDEr-D and ROUGE-L values differ a little from those of papers that used it; comparisons within this system hold.
BLEU alone keeps sacrebleu's own `13a` tokeniser, so that its figures can be reproduced with sacrebleu; see `spaced`.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from enum import StrEnum

import regex

MAX_ORDER = 4
"""The longest n-gram that CIDEr-D and BLEU count."""

_WORD = re.compile(r"\w+")
# [\p{L}\p{N}_] is `\w` of `re`. Ignorable: joiners, variation selectors, soft hyphens. A zero-width space is a space.
_RUN = regex.compile(r"(?V1)[\p{L}\p{N}_][[\p{L}\p{N}\p{M}\p{Default_Ignorable_Code_Point}_]--\u200b]*")
_IGNORABLE = regex.compile(r"\p{Default_Ignorable_Code_Point}+")
_UNSPACED = regex.compile(r"[\p{scx=Han}\p{scx=Hiragana}\p{scx=Katakana}\p{scx=Bopomofo}\p{Line_Break=SA}]")
_FOREIGN_STOP = regex.compile(r"(?V1)[\p{P}--[\u0000-\u00ff\u2000-\u206f]]")
"""Punctuation of other scripts (।, 。, ،, ።), which `13a` leaves on the word before it."""


class Tokenizer(StrEnum):
    """How texts become words; a run keeps to the one that its statistics were counted with."""

    WORD_RUNS = r"\w+"
    r"""Lower-cased `\w+`: of statistics that name no tokeniser. Combining marks end a word; nothing is segmented."""
    UNICODE = "unicode-1"
    """As the top of this file says."""


def words(text: str, tokenizer: Tokenizer = Tokenizer.UNICODE) -> list[str]:
    """The lower-cased words of a text, in order; none is empty or holds a space or an angle bracket."""
    if text.isascii() or tokenizer is Tokenizer.WORD_RUNS:
        return _WORD.findall(text.lower())
    found = (_IGNORABLE.sub("", word) for run in _RUN.finditer(_composed(text.lower())) for word in _segments(run[0]))
    return [word for word in found if word]


def pieces(text: str) -> list[str]:
    """A text, in NFC, cut where its words begin and end: words as they are written, and what stands between."""
    text = _composed(text)
    found, end = [], 0
    for run in _RUN.finditer(text):
        found += [text[end : run.start()], *_segments(run[0])]
        end = run.end()
    return [piece for piece in [*found, text[end:]] if piece]


def spaced(text: str, tokenizer: Tokenizer = Tokenizer.UNICODE) -> str:
    """A text for tokenisers that split at spaces: NFC, with spaces around words of scripts that write none.

    Punctuation of such scripts, and of others that are not Latin, stands alone, too; nothing ignorable is left. ASCII
    stays as it is.
    """
    if text.isascii() or tokenizer is Tokenizer.WORD_RUNS:
        return text
    text = _IGNORABLE.sub("", _composed(text).replace("\u200b", " "))
    text = _FOREIGN_STOP.sub(r" \g<0> ", text)
    return _RUN.sub(lambda run: f" {' '.join(_segments(run[0]))} " if is_unspaced(run[0]) else run[0], text)


def is_unspaced(text: str) -> bool:
    """Whether a text has a script without spaces between words, so that its words depend on the version of ICU."""
    return not text.isascii() and _UNSPACED.search(text) is not None


def segmenter_version() -> str:
    """The version of ICU, for instance `ICU 78.3`."""
    import icu4py

    return f"ICU {icu4py.icu_version}"


def ngram_counts(tokens: Sequence[str], max_order: int = MAX_ORDER) -> list[Counter[str]]:
    """Counts of n-grams by order: entry `n - 1` maps space-joined n-grams to how often they occur.

    Tokens never contain a space (`words`), so joining loses nothing and the keys are JSON as they are.
    """
    return [Counter(" ".join(tokens[i : i + n]) for i in range(len(tokens) - n + 1)) for n in range(1, max_order + 1)]


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _segments(run: str) -> Iterator[str]:
    """The words of a run of letters: itself, or what ICU makes of it."""
    if not is_unspaced(run):
        yield run
        return
    from icu4py.breakers import WordBreaker

    # The locale changes nothing for words; named, so that the machine's own does not come in.
    yield from WordBreaker(run, "en")
