"""`CorpusStatistics`: how common words and n-grams are in the training references.

Made once from the training split and stored with the run (`reward/statistics.json`), so that a caption's score
depends neither on its batch nor on the split that is evaluated.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

from mmrl_ray.errors import DataError
from mmrl_ray.metrics.language import NgramCounter, NgramCounts
from mmrl_ray.metrics.text import MAX_ORDER, ngram_counts, words

_FORMAT = 1


@dataclass(frozen=True)
class CorpusStatistics:
    """Document frequencies of a set of references; a document is one image with all its references."""

    documents: int
    """N, images counted; at least 1."""
    document_frequency: tuple[Mapping[str, int], ...]
    """[n - 1][n-gram] = images that have it in any reference. For n > 1 those with frequency 1 are left out: CIDEr-D
    takes max(1, frequency), so that an absent one counts the same, and the file of a large corpus stays small."""
    language: NgramCounts | None = None
    """Which word follows which; only where a part of the reward asks for it."""

    def __post_init__(self) -> None:
        if self.documents < 1 or len(self.document_frequency) != MAX_ORDER:
            raise DataError(
                f"corpus statistics need at least one document and {MAX_ORDER} n-gram tables, not "
                f"{self.documents} and {len(self.document_frequency)}; make them anew from the training split"
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
        language = NgramCounter(language_order)
        for captions in references:
            documents += 1
            seen: list[dict[str, None]] = [{} for _ in range(MAX_ORDER)]  # ordered sets: files come out the same
            for caption in captions:
                tokens = words(caption)
                language.add(tokens)
                for order, counts in enumerate(ngram_counts(tokens)):
                    seen[order].update(dict.fromkeys(counts))
            for table, ngrams in zip(tables, seen, strict=True):
                table.update(ngrams.keys())
        if not tables[0]:
            raise DataError(
                f"the {documents} training samples hold no reference word; references are needed for this reward"
            )
        kept = [{k: c for k, c in table.items() if order == 0 or c > 1} for order, table in enumerate(tables)]
        return cls(documents, tuple(kept), language.counts() if language_order else None)

    @cached_property
    def idf(self) -> dict[str, float]:
        """Inverse document frequency log(N / df) of every word of the corpus, natural logarithm, at least 0."""
        return {word: math.log(self.documents / count) for word, count in self.document_frequency[0].items()}

    def to_json(self) -> str:
        """One JSON object, the same text for the same corpus."""
        tables = [dict(table) for table in self.document_frequency]
        whole = {"format": _FORMAT, "documents": self.documents, "document_frequency": tables}
        if self.language is not None:
            whole["language"] = self.language.followers
        return json.dumps(whole, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote.

        Raises:
            DataError: the text is not such an object.
        """
        try:
            raw = json.loads(text)
            if raw["format"] != _FORMAT:
                raise DataError(f"corpus statistics have format {raw['format']!r}, this version reads {_FORMAT}")
            tables = tuple({str(k): int(c) for k, c in table.items()} for table in raw["document_frequency"])
            language = _language(raw["language"]) if "language" in raw else None
            return cls(int(raw["documents"]), tables, language)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"corpus statistics cannot be read ({error!r}); make them anew") from error


def _language(tables: Sequence[Mapping[str, Mapping[str, int]]]) -> NgramCounts:
    counts = [{c: {word: int(n) for word, n in seen.items()} for c, seen in table.items()} for table in tables]
    return NgramCounts(tuple(counts))
