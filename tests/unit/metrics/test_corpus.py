"""Document frequencies, their JSON form, and what they leave out on purpose."""

import json
import math

import pytest

from mmrl_ray.errors import DataError
from mmrl_ray.metrics.cider import CiderD
from mmrl_ray.metrics.corpus import CorpusStatistics

REFERENCES = [["A red square.", "a square, red"], ["a blue square"], ["two circles", "a a a"]]


def test_counts_images_not_captions() -> None:
    statistics = CorpusStatistics.from_references(iter(REFERENCES))
    assert statistics.documents == 3
    assert statistics.document_frequency[0] == {
        "a": 3, "red": 1, "square": 2, "blue": 1, "two": 1, "circles": 1,
    }  # fmt: skip
    assert statistics.idf["a"] == 0.0
    assert statistics.idf["square"] == pytest.approx(math.log(3 / 2))
    assert statistics.idf["two"] == pytest.approx(math.log(3))
    assert "green" not in statistics.idf


def test_rare_ngrams_left_out_change_no_score() -> None:
    references = [*REFERENCES, ["a red square"]]
    statistics = CorpusStatistics.from_references(references)
    assert statistics.document_frequency[1] == {"a red": 2, "red square": 2}
    full = CorpusStatistics(
        statistics.documents,
        (
            statistics.document_frequency[0],
            {**statistics.document_frequency[1], "blue square": 1, "two circles": 1, "a blue": 1},
            statistics.document_frequency[2],
            statistics.document_frequency[3],
        ),
    )
    for caption in ("a blue square", "two circles", "a red square"):
        assert CiderD(full).score(caption, ["a blue square"]) == CiderD(statistics).score(caption, ["a blue square"])


def test_json_round_trip() -> None:
    statistics = CorpusStatistics.from_references([*REFERENCES, ["ein großes Quadrat"]])
    text = statistics.to_json()
    again = CorpusStatistics.from_json(text)
    assert again == statistics
    assert again.to_json() == text
    assert again.idf == statistics.idf


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"format": 2}', '{"format": 1, "documents": 0, "document_frequency": [{}, {}, {}, {}]}',
     '{"format": 1, "documents": 3, "document_frequency": [{}]}',
     '{"format": 1, "documents": 3, "document_frequency": [1, 2, 3, 4]}'],
)  # fmt: skip
def test_broken_json_is_a_data_error(text: str) -> None:
    with pytest.raises(DataError, match="corpus statistics"):
        CorpusStatistics.from_json(text)


@pytest.mark.parametrize("references", [[], [[]], [["..."]]])
def test_a_corpus_without_words_is_refused(references: list[list[str]]) -> None:
    with pytest.raises(DataError, match="no reference word"):
        CorpusStatistics.from_references(references)


def test_json_is_an_object_of_plain_counts() -> None:
    raw = json.loads(CorpusStatistics.from_references(REFERENCES).to_json())
    assert raw["documents"] == 3
    assert [len(t) for t in raw["document_frequency"]] == [6, 0, 0, 0]
