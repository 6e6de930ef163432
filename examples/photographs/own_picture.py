"""A reward for captions that tell their picture from others (Luo et al. 2018, arXiv:1803.04376), by words alone.

CIDEr-D pays for what most references of a picture say, so that a policy comes to say the same of all dogs on grass.
Here a caption is compared, as tf-idf of its words and pairs of words, with the references of its own picture and with
those of all training pictures: it earns its likeness to its own, less the mean of those to the nearest others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import pairwise

import numpy as np
import pyarrow.parquet as pq
from scipy.sparse import csr_array

from mmrl_ray.metrics.text import words


def told_apart(captions: Sequence[str], states: Sequence[Sequence[str]], *, data: str, nearest: int = 5) -> list[float]:
    """One number a caption, from -1 to 1.

    Args:
        captions: what the policy said.
        states: for each caption the references of its picture.
        data: training pictures with references, as `mmrl data import` writes them.
        nearest: pictures that a caption is held against: those of which it says most.
    """
    pictures = _pictures(data)
    said = pictures.vectors(map(_terms, captions))
    references = [" ".join(state) for state in states]
    own = said.multiply(pictures.vectors(map(_terms, references))).sum(1)
    others = (said @ pictures.known.T).toarray()
    for row, text in enumerate(references):
        if text in pictures.places:
            others[row, pictures.places[text]] = -1.0
    return (own - np.partition(others, -nearest, axis=1)[:, -nearest:].mean(1)).tolist()


class _Pictures:
    """All of a data set by the words of their references."""

    def __init__(self, data: str) -> None:
        texts = [" ".join(row) for row in pq.read_table(data, columns=["references"])["references"].to_pylist()]
        found = [_terms(text) for text in texts]
        pictures = Counter(term for terms in found for term in set(terms))
        self._weights = {term: np.log(len(texts) / count) for term, count in pictures.items() if count > 1}
        self._columns = {term: column for column, term in enumerate(self._weights)}
        self.places = {text: row for row, text in enumerate(texts)}
        self.known = self.vectors(found)

    def vectors(self, texts: Iterable[Sequence[str]]) -> csr_array:
        """[texts, terms] of texts that are taken apart, each of length 1, or 0 where nothing in it is known."""
        values: list[float] = []
        columns: list[int] = []
        ends = [0]
        for terms in texts:
            counts = Counter(term for term in terms if term in self._columns)
            row = [(1 + np.log(count)) * self._weights[term] for term, count in counts.items()]
            length = float(np.linalg.norm(row)) or 1.0
            values += [value / length for value in row]
            columns += [self._columns[term] for term in counts]
            ends.append(len(values))
        return csr_array((values, columns, ends), shape=(len(ends) - 1, len(self._columns)))


_pictures = cache(_Pictures)


def _terms(text: str) -> list[str]:
    found = words(text)
    return [*found, *(" ".join(pair) for pair in pairwise(found))]
