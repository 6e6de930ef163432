"""CIDEr-D against pycocoevalcap with the same tokens and the same document frequencies."""

import math
import pickle
import random
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import pytest
from pycocoevalcap.cider.cider_scorer import CiderScorer

from mmrl_ray.metrics.overlap import CiderD
from mmrl_ray.metrics.text import CorpusStatistics

WORDS = ["a", "red", "blue", "square", "circle", "above", "left", "of", "the", "small"]


def sentence(rng: random.Random, shortest: int = 1) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(shortest, 10)))


def corpus(rng: random.Random, size: int) -> list[list[str]]:
    return [[sentence(rng) for _ in range(rng.randint(1, 5))] for _ in range(size)]


def oracle(
    captions: Sequence[str], references: Sequence[Sequence[str]], training: Sequence[Sequence[str]]
) -> list[float]:
    scorer = CiderScorer(n=4, sigma=6.0)
    for caption, refs in zip(captions, references, strict=True):
        scorer += (caption, refs)
    # pycocoevalcap knows the frequencies of its own batch only: hand it those of the training references instead.
    frequency: dict[tuple[str, ...], float] = defaultdict(float)
    for refs in training:
        for ngram in {
            tuple(r.split()[i : i + n]) for r in refs for n in range(1, 5) for i in range(len(r.split()) - n + 1)
        }:
            frequency[ngram] += 1
    scorer.document_frequency = frequency
    log_documents = np.log(float(len(training)))

    class Sized(list):
        def __len__(self) -> int:
            return len(training)

    scorer.crefs = Sized(scorer.crefs)  # its N is len(crefs)
    scores = scorer.compute_cider()
    assert scorer.ref_len == pytest.approx(log_documents)
    return [float(s) for s in scores]


def test_equals_pycocoevalcap() -> None:
    rng = random.Random(0)
    training = corpus(rng, 30)
    metric = CiderD(CorpusStatistics.from_references(training))
    references = corpus(rng, 60)
    captions = [sentence(rng, shortest=0) for _ in references]
    captions[:3] = [references[0][0], references[1][0] + " unseen words here", ""]
    expected = oracle(captions, references, training)
    assert max(expected) > 1
    np.testing.assert_allclose(list(map(metric.score, captions, references)), expected, rtol=1e-9, atol=1e-12)


END = "endofcaption"


def ended(texts: Sequence[str]) -> list[str]:
    return [f"{text} {END}".strip() for text in texts]


@pytest.mark.parametrize("stopped", [True, False])
def test_with_ends_equals_pycocoevalcap_of_texts_that_end_with_one_more_word(stopped: bool) -> None:
    rng = random.Random(1)
    training = corpus(rng, 30)
    metric = CiderD(CorpusStatistics.from_references(training))
    references = corpus(rng, 60)
    captions = [sentence(rng, shortest=0) for _ in references]
    captions[:2] = [references[0][0], ""]
    said = ended(captions) if stopped else captions
    expected = oracle(said, [ended(refs) for refs in references], [ended(refs) for refs in training])
    found = [metric.score(c, refs, ended=stopped) for c, refs in zip(captions, references, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    assert found != list(map(metric.score, captions, references))


def test_a_caption_that_breaks_off_is_worth_less_where_ends_count() -> None:
    references = ["a little girl in a red dress", "a little girl in a garden"]
    corpora = [references, ["a dog on a beach"], ["a boy in a red shirt"], ["a man in a garden"]]
    metric = CiderD(CorpusStatistics.from_references(corpora))
    broken, whole = "a little girl in a", "a little girl in a garden"
    standard, with_end = metric.score(broken, references), metric.score(broken, references, ended=True)
    assert with_end < standard
    full = metric.score(whole, references, ended=True)
    assert full / with_end > metric.score(whole, references) / standard > 1
    # By hand, one reference of two words, N = 2: "red" and "square" have an idf of log 2, the end has none, and the
    # bigrams of both texts have it, too. Said "red": unigrams 1/√2, bigrams red-end against red-square, square-end: 0.
    small = CiderD(CorpusStatistics.from_references([["red square"], ["blue circle"]]))
    penalty = math.exp(-1 / 72)
    assert small.score("red", ["red square"], ended=True) == pytest.approx(10 * penalty / math.sqrt(2) / 4)
    # Of "square", which ends as the reference does, one of the two bigrams, too.
    assert small.score("square", ["red square"], ended=True) == pytest.approx(10 * penalty * 2 / math.sqrt(2) / 4)
    # Cut off, it has no end to match.
    assert small.score("square", ["red square"], ended=False) == pytest.approx(
        10 * math.exp(-4 / 72) / math.sqrt(2) / 4
    )


def test_literal() -> None:
    # Every n-gram of the caption is in one of the two documents, so each idf is log 2 and cancels in the cosine.
    statistics = CorpusStatistics.from_references([["red square here now"], ["blue circle"]])
    metric = CiderD(statistics)
    assert metric.score("red square here now", ["red square here now"]) == pytest.approx(10.0)
    # Of 2 unigrams and 1 bigram, one unigram matches: cosine 1/2 for n = 1, 0 for the others, equal lengths.
    assert metric.score("red circle", ["red square"]) == pytest.approx(10 * (1 / 2) / 4)
    # The same without the second word: cosine 1/sqrt(2), lengths differ by 1.
    assert metric.score("red", ["red square"]) == pytest.approx(10 * math.exp(-1 / 72) / math.sqrt(2) / 4)


def test_score_does_not_depend_on_neighbours_or_word_form() -> None:
    metric = CiderD(CorpusStatistics.from_references([["a red square"], ["a blue circle"]]))
    alone = metric.score("a red square", ["a red square", "one square"])
    assert metric.score("A red, square!", ["a red square", "one square"]) == alone
    assert pickle.loads(pickle.dumps(metric)).score("a red square", ["a red square", "one square"]) == alone


def test_repetition_is_clipped() -> None:
    metric = CiderD(CorpusStatistics.from_references([["red square"], ["blue circle"]]))
    assert metric.score("red red red red", ["red square"]) < metric.score("red", ["red square"])


def test_no_references() -> None:
    with pytest.raises(ValueError, match="reference"):
        CiderD(CorpusStatistics.from_references([["a"]])).score("a", [])


def test_statistics_without_ends_are_refused_where_ends_count() -> None:
    with pytest.raises(ValueError, match="without the ends of texts"):
        CiderD(CorpusStatistics(1, ({"a": 1}, {}, {}, {}))).score("a", ["a"], ended=True)
