"""Add-k n-grams: against counts by hand, and as a probability distribution."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrl_ray.errors import DataError
from mmrl_ray.metrics.text import UNKNOWN, CorpusStatistics, LanguageModel, NgramCounts

TEXTS = ["A red circle.", "a red square", "a blue circle"]


def model(order: int = 2, smoothing: float = 0.5, texts: list[str] = TEXTS) -> LanguageModel:
    statistics = CorpusStatistics.from_references([[text] for text in texts], language_order=3)
    assert statistics.language is not None
    return LanguageModel(statistics.language, order, smoothing)


def test_literal_bigrams() -> None:
    # Vocabulary: a red circle square blue </s> <unk>: 7. After <s>: a 3. After a: red 2, blue 1. After red: circle 1,
    # square 1. After circle: </s> 2.
    found = model().log_probability(["a", "red", "circle"])
    chances = [(3 + 0.5) / (3 + 3.5), (2 + 0.5) / (3 + 3.5), (1 + 0.5) / (2 + 3.5), (2 + 0.5) / (2 + 3.5)]
    assert found == pytest.approx(math.log(math.prod(chances)), rel=1e-12)
    assert model().fluency("A red, circle!") == pytest.approx(
        1 + math.log(math.prod(chances)) / 4 / math.log(7), rel=1e-12
    )


def test_a_guess_is_worth_nothing_and_order_counts() -> None:
    one = model(order=3)
    assert one.fluency("zebra zebra zebra zebra") < 0.05  # nearly all contexts are unseen
    assert one.fluency("a red circle") > one.fluency("circle red a")
    assert model(order=1).fluency("a red circle") == pytest.approx(model(order=1).fluency("circle red a"))


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.lists(st.sampled_from("abcd"), max_size=4), min_size=1, max_size=5).filter(any),
    st.integers(1, 3),
    st.floats(0.01, 5),
)
def test_sums_to_one_over_all_texts_of_a_length(texts: list[list[str]], order: int, smoothing: float) -> None:
    """Texts of one word at most, and those that go on after it, are all there is."""
    counts = NgramCounts.empty(3)
    for text in texts:
        counts.add(text)
    language = LanguageModel(counts, order, smoothing)
    vocabulary = [*sorted(set(itertools.chain(*texts))), UNKNOWN]
    assert language.vocabulary_size == len(vocabulary) + 1
    ended = [
        math.exp(language.log_probability(list(words)))
        for n in (0, 1)
        for words in itertools.product(vocabulary, repeat=n)
    ]
    # P(two words or more) = Σ over two words of P(both) ÷ P(end after them) · … : count it by the end's own chance.
    longer = 0.0
    for first, second in itertools.product(vocabulary, repeat=2):
        whole = math.exp(language.log_probability([first, second]))
        context = " ".join(["<s>", first, second][-(order - 1) :] if order > 1 else [])
        seen = language.counts.followers[order - 1].get(context, {})
        end = (seen.get("</s>", 0) + smoothing) / (sum(seen.values()) + smoothing * language.vocabulary_size)
        longer += whole / end
    assert math.fsum(ended) + longer == pytest.approx(1.0, rel=1e-9)


def test_is_stored_with_the_statistics_only_where_it_is_asked_for() -> None:
    plain = CorpusStatistics.from_references([[t] for t in TEXTS])
    assert plain.language is None
    assert "language" not in plain.to_json()
    with_it = CorpusStatistics.from_references([[t] for t in TEXTS], language_order=2)
    again = CorpusStatistics.from_json(with_it.to_json())
    assert again == with_it
    assert again.language is not None
    assert again.language.order == 2
    with pytest.raises(DataError, match="n-grams of 3 words were not counted"):
        LanguageModel(again.language, 3, 0.1)
