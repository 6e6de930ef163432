"""BLEU against sacrebleu's own public calls and against values worked out by hand."""

import math
import random

import pytest
from sacrebleu.metrics import BLEU

from mmrl_ray.metrics.overlap import bleu_counts, corpus_bleu, sentence_bleu

WORDS = ["a", "red", "blue", "square", "circle", "above", "left", "of", "the", "Small", "disc.", "two,"]


def sentence(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(0, 9)))


def test_sentence_bleu_equals_sacrebleu() -> None:
    rng = random.Random(0)
    oracle = BLEU(effective_order=True, smooth_method="exp", lowercase=True)
    for _ in range(300):
        references = [sentence(rng) for _ in range(rng.randint(1, 5))]
        for caption in (sentence(rng), references[0].upper(), ""):
            expected = oracle.sentence_score(caption, references).score / 100
            assert sentence_bleu(caption, references) == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_sentence_bleu_literal() -> None:
    # 2 of 2 unigrams and 1 of 1 bigrams match, brevity penalty exp(1 - 4/2); orders 3 and 4 do not count.
    assert sentence_bleu("red square", ["a red square below"]) == pytest.approx(math.exp(-1), rel=1e-12)
    # Unigrams 3/4, bigrams 1/3, trigrams 0 -> 1/(2*2), 4-grams 0 -> 1/(4*1).
    expected = (3 / 4 * 1 / 3 * 1 / 4 * 1 / 4) ** 0.25
    assert sentence_bleu("a red big square", ["a red small square"]) == pytest.approx(expected, rel=1e-12)


def test_sentence_bleu_with_ends_literal() -> None:
    # a red </s> against a red square </s>: unigrams 3/3, bigrams 1/2, trigrams 0 -> 1/(2*1), 3 words of 4.
    expected = (1 * 1 / 2 * 1 / 2) ** (1 / 3) * math.exp(1 - 4 / 3)
    assert sentence_bleu("a red", ["a red square"], ended=True) == pytest.approx(expected, rel=1e-12)
    # Cut off, it has no end: all of its two words and of its one bigram match, 2 words of 4.
    assert sentence_bleu("a red", ["a red square"], ended=False) == pytest.approx(math.exp(-1), rel=1e-12)
    assert sentence_bleu("A red square", ["a red square"], ended=True) == 1.0
    # Nobody can write the end.
    assert sentence_bleu("a red \uffff", ["a red square"], ended=False) < 1.0


def test_sentence_bleu_stays_within_bounds() -> None:
    assert sentence_bleu("a red square above a blue circle", ["a red square above a blue circle"]) == 1.0
    assert sentence_bleu("", ["a red square"]) == 0.0
    with pytest.raises(ValueError, match="reference"):
        sentence_bleu("a", [])


def summed(captions: list[str], references: list[list[str]]) -> dict[str, float]:
    counts = [bleu_counts(caption, own) for caption, own in zip(captions, references, strict=True)]
    sums = [sum(column) for column in zip(*counts, strict=True)]
    return {f"bleu_{n}": corpus_bleu(sums, n) for n in range(1, 5)}


def test_corpus_bleu_equals_sacrebleu_at_every_order() -> None:
    rng = random.Random(1)
    captions = [sentence(rng) or "a" for _ in range(40)]
    references = [[sentence(rng) or "a" for _ in range(rng.randint(1, 5))] for _ in captions]
    ours = summed(captions, references)
    streams = [[r[k] if k < len(r) else None for r in references] for k in range(5)]
    for n in range(1, 5):
        expected = BLEU(lowercase=True, max_ngram_order=n).corpus_score(captions, streams).score / 100
        assert ours[f"bleu_{n}"] == pytest.approx(expected, rel=1e-12)
    assert ours["bleu_1"] > ours["bleu_4"] > 0


def test_corpus_bleu_literal() -> None:
    scores = summed(["red square", "blue circle"], [["red square"], ["blue disc", "a circle"]])
    assert scores["bleu_1"] == pytest.approx(1.0)
    assert scores["bleu_2"] == pytest.approx(math.sqrt(1 / 2))


def test_a_caption_without_references_is_refused() -> None:
    with pytest.raises(ValueError, match="reference"):
        bleu_counts("a", [])
