r"""Words of captions: the one tokeniser, a language model over words, and how common words and n-grams are.

Rewards, metrics and statistics of a run all split texts with the tokeniser.

A word is a run of letters, digits and underscores with the combining marks on them, lower-cased, in NFC: two spellings
of one text (composed or not, with or without joiners) are the same words. Chinese, Japanese, Thai, Lao, Khmer and
Burmese put no spaces between words; there ICU finds them by its dictionaries (Unicode Standard Annex 29). It is
imported with the first text that has such a script. On plain English the words are those of `\w+`.

It is not the Java PTB tokeniser of the COCO evaluation server (no "n't" split, no punctuation list), so absolute
CIDEr-D and ROUGE-L values differ a little from those of papers that used it; comparisons within this system hold. BLEU
alone keeps sacrebleu's own `13a` tokeniser, so that its figures can be reproduced with sacrebleu; see `spaced`.

`LanguageModel` is an n-gram model with add-k smoothing (Lidstone): how likely words are after those before them. Counts
come from the training references and are stored with the run (`CorpusStatistics`). Words are the tokeniser's, so
that punctuation is neither counted nor foreseen.

`CorpusStatistics` are made once from the training split and stored with the run (`reward/statistics.json`), so that a
caption's score depends neither on its batch nor on the split that is evaluated.
"""

from __future__ import annotations

import json
import logging
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any, Self

import regex

from mmrl_ray.errors import DataError

MAX_ORDER = 4
"""The longest n-gram that CIDEr-D and BLEU count."""

_WORD = re.compile(r"\w+")
# [\p{L}\p{N}_] is `\w` of `re`. Ignorable: joiners, variation selectors, soft hyphens. A zero-width space is a space.
_RUN = regex.compile(r"(?V1)[\p{L}\p{N}_][[\p{L}\p{N}\p{M}\p{Default_Ignorable_Code_Point}_]--\u200b]*")
_IGNORABLE = regex.compile(r"\p{Default_Ignorable_Code_Point}+")
_UNSPACED = regex.compile(r"[\p{scx=Han}\p{scx=Hiragana}\p{scx=Katakana}\p{scx=Bopomofo}\p{Line_Break=SA}]")
_FOREIGN_STOP = regex.compile(r"(?V1)[\p{P}--[\u0000-\u00ff\u2000-\u206f]]")
"""Punctuation of other scripts (।, 。, ،, ።), which `13a` leaves on the word before it."""
BEGIN, END, UNKNOWN = "<s>", "</s>", "<unk>"
"""No word can look like these: words have no angle brackets."""

logger = logging.getLogger(__name__)

_FORMAT = 2
"""1 names no tokeniser and has no ends: words were lower-cased `\\w+`, and the end of a text was not counted."""
Tables = tuple[Mapping[str, int], ...]


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


@dataclass(frozen=True)
class NgramCounts:
    """How often each word followed which context in a set of texts."""

    followers: tuple[dict[str, dict[str, int]], ...]
    """[n - 1][context][word] for contexts of n - 1 words, joined by spaces. Texts begin with BEGIN and end with END;
    for n = 1 the context is ""."""

    @classmethod
    def empty(cls, order: int) -> Self:
        """Of no text yet, for n-grams up to `order`."""
        return cls(tuple({} for _ in range(order)))

    @property
    def order(self) -> int:
        """The longest n-gram counted."""
        return len(self.followers)

    def add(self, tokens: Sequence[str]) -> None:
        """Counts one more text, given as words."""
        for n, table in enumerate(self.followers, start=1):
            for context, word in _ngrams(tokens, n):
                seen = table.setdefault(context, {})
                seen[word] = seen.get(word, 0) + 1


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
        """V, the number of words."""
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


@dataclass(frozen=True)
class CorpusStatistics:
    """Document frequencies of a set of references; a document is one image with all its references."""

    documents: int
    """N, images counted; at least 1."""
    document_frequency: Tables
    """[n - 1][n-gram] = images that have it in any reference. For n > 1 those with frequency 1 are left out: CIDEr-D
    takes max(1, frequency), so that an absent one counts the same, and the file of a large corpus stays small."""
    language: NgramCounts | None = None
    """Which word follows which; only where a part of the reward asks for it."""
    ends: Tables | None = None
    """[n - 1][n-gram] = images where a reference ends so; each n-gram ends with END. Those with frequency 1 are left
    out in the same way. None where they were not counted, as before there was a use for them."""
    tokenizer: Tokenizer = Tokenizer.UNICODE
    """What the words were made with; whoever uses the statistics makes its words with the same."""
    segmenter: str | None = None
    """The version of ICU, where a reference has a script that it was needed for."""

    def __post_init__(self) -> None:
        sizes = [len(tables) for tables in (self.document_frequency, self.ends) if tables is not None]
        if self.documents < 1 or set(sizes) != {MAX_ORDER}:
            raise DataError(
                f"corpus statistics need at least one document and {MAX_ORDER} n-gram tables, not {self.documents} and "
                f"{' and '.join(map(str, sizes))}; make them anew from the training split"
            )

    @classmethod
    def from_references(cls, references: Iterable[Sequence[str]], *, language_order: int = 0) -> Self:
        """Count a corpus, given as one list of references an image.

        With a `language_order` also which word follows which, in n-grams up to that length.

        Raises:
            DataError: there is no image, or no reference has a word.
        """
        documents = 0
        tables: tuple[Counter[str], ...] = tuple(Counter() for _ in range(MAX_ORDER))
        ends: tuple[Counter[str], ...] = tuple(Counter() for _ in range(MAX_ORDER))
        language = NgramCounts.empty(language_order)
        segmented = False
        for captions in references:
            documents += 1
            seen: list[dict[str, None]] = [{} for _ in range(MAX_ORDER)]  # ordered sets: files come out the same
            ended: list[dict[str, None]] = [{} for _ in range(MAX_ORDER)]
            for caption in captions:
                tokens = words(caption)
                segmented = segmented or is_unspaced(caption)
                language.add(tokens)
                for order, counts in enumerate(ngram_counts(tokens)):
                    seen[order].update(dict.fromkeys(counts))
                for order in range(min(MAX_ORDER, len(tokens) + 1)):
                    ended[order][" ".join([*tokens[len(tokens) - order :], END])] = None
            for table, ngrams in zip((*tables, *ends), (*seen, *ended), strict=True):
                table.update(ngrams.keys())
        if not tables[0]:
            raise DataError(
                f"the {documents} training samples hold no reference word; references are needed for this reward"
            )
        return cls(
            documents,
            _kept(tables),
            language if language_order else None,
            _kept(ends),
            segmenter=segmenter_version() if segmented else None,
        )

    @cached_property
    def idf(self) -> dict[str, float]:
        """Inverse document frequency log(N / df) of every word of the corpus, natural logarithm, at least 0."""
        return {word: math.log(self.documents / count) for word, count in self.document_frequency[0].items()}

    def to_json(self) -> str:
        """One JSON object, the same text for the same corpus."""
        tables = [dict(table) for table in self.document_frequency]
        whole: dict[str, Any] = {"format": 1, "documents": self.documents, "document_frequency": tables}
        if self.tokenizer is not Tokenizer.WORD_RUNS:
            whole |= {"format": _FORMAT, "tokenizer": self.tokenizer.value, "segmenter": self.segmenter}
        if self.ends is not None:
            whole["ends"] = [dict(table) for table in self.ends]
        if self.language is not None:
            whole["language"] = self.language.followers
        return json.dumps(whole, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote, now or before there were tokenisers to choose from.

        Warns where words of scripts without spaces were found by another version of ICU than is installed.

        Raises:
            DataError: the text is not such an object.
        """
        try:
            raw = json.loads(text)
            if raw["format"] not in (1, _FORMAT):
                raise DataError(f"corpus statistics have format {raw['format']!r}, this version reads 1 and {_FORMAT}")
            documents, tables = int(raw["documents"]), _tables(raw["document_frequency"])
            language = _language(raw["language"]) if "language" in raw else None
            if raw["format"] == 1:
                return cls(documents, tables, language, tokenizer=Tokenizer.WORD_RUNS)
            tokenizer, segmenter = Tokenizer(raw["tokenizer"]), raw["segmenter"]
            if segmenter is not None and segmenter != (here := segmenter_version()):
                logger.warning("corpus statistics: words were found by %s, here is %s", segmenter, here)
            ends = _tables(raw["ends"]) if "ends" in raw else None
            return cls(documents, tables, language, ends, tokenizer, segmenter)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"corpus statistics cannot be read ({error!r}); make them anew") from error


def _kept(tables: Sequence[Mapping[str, int]]) -> Tables:
    """Without the n-grams that count the same when they are absent."""
    return tuple({k: c for k, c in table.items() if order == 0 or c > 1} for order, table in enumerate(tables))


def _tables(raw: Sequence[Mapping[str, int]]) -> Tables:
    return tuple({str(k): int(c) for k, c in table.items()} for table in raw)


def _language(tables: Sequence[Mapping[str, Mapping[str, int]]]) -> NgramCounts:
    counts = [{c: {word: int(n) for word, n in seen.items()} for c, seen in table.items()} for table in tables]
    return NgramCounts(tuple(counts))
