"""`CorpusStatistics`: how common words and n-grams are in the training references.

Made once from the training split and stored with the run (`reward/statistics.json`), so that a caption's score
depends neither on its batch nor on the split that is evaluated.
"""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

from mmrl_ray.errors import DataError
from mmrl_ray.metrics.text import (
    END,
    MAX_ORDER,
    NgramCounter,
    NgramCounts,
    Tokenizer,
    is_unspaced,
    ngram_counts,
    segmenter_version,
    words,
)

logger = logging.getLogger(__name__)

_FORMAT = 2
"""1 names no tokeniser and has no ends: words were lower-cased `\\w+`, and the end of a text was not counted."""
Tables = tuple[Mapping[str, int], ...]


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
        language = NgramCounter(language_order)
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
            language.counts() if language_order else None,
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
