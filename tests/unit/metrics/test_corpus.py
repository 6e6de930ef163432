"""Document frequencies, their JSON form, and what they leave out on purpose."""

import json
import math

import pytest

from mmrl_ray.config.reward import RewardSection
from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import DataError
from mmrl_ray.metrics.overlap import CiderD
from mmrl_ray.metrics.text import CorpusStatistics, Tokenizer
from mmrl_ray.rewards.build import build_reward

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
    assert again.tokenizer is Tokenizer.UNICODE


def test_ends_are_counted_once_an_image() -> None:
    ends = CorpusStatistics.from_references([["a cat", "the cat", "cat"], ["one cat"], [""]]).ends
    assert ends == ({"</s>": 3}, {"cat </s>": 2}, {}, {})


OLD = (
    '{"format": 1, "documents": 2, "document_frequency": [{"a": 2, "red": 1, "प": 1, "न": 1}, {"a red": 2}, {}, {}], '
    '"language": [{"": {"a": 1, "</s>": 1}}]}'
)


def test_statistics_from_before_there_were_tokenisers_go_on_as_they_were() -> None:
    """Words are `\\w+` runs for every part of the reward, no end counts, and the file comes out as it was."""
    old = CorpusStatistics.from_json(OLD)
    assert (old.tokenizer, old.ends, old.to_json()) == (Tokenizer.WORD_RUNS, None, OLD)
    kinds = ("caption", "cider_d", "rouge_l", "fluency", "repetition", "length")
    changes = {"fluency": {"order": 1}, "length": {"max_words": 2}, "caption": {"alpha": 1.0, "beta": 1.0}}
    section = RewardSection.model_validate(
        {
            "parts": {kind: {"kind": kind, **changes.get(kind, {})} for kind in kinds},
            "weights": dict.fromkeys(kinds, 1.0),
        }
    )
    sample = Sample("s", (), "", ("पानी",))
    (score,) = build_reward(section, old).score_batch([sample], ["पीना"])  # both are प न
    assert score.parts["rouge_l"] == score.parts["caption/detail"] == 1.0
    assert score.parts["cider_d"] == pytest.approx(10 * 2 / 4)
    assert score.parts["caption/bleu"] == 0.0  # 13a kept the marks, and there is no end that matches
    assert score.parts["length"] == 1.0
    again = CorpusStatistics.from_references([["पानी"], ["cat"]], language_order=1)
    (now,) = build_reward(section, again).score_batch([sample], ["पीना"])
    assert now.parts["rouge_l"] == now.parts["cider_d"] == now.parts["caption/detail"] == 0.0


def test_another_segmenter_is_told(caplog: pytest.LogCaptureFixture) -> None:
    text = CorpusStatistics.from_references([["一只狗"]]).to_json()
    assert CorpusStatistics.from_json(text).to_json() == text
    assert caplog.text == ""
    raw = {**json.loads(text), "segmenter": "ICU 60.1"}
    assert CorpusStatistics.from_json(json.dumps(raw)).segmenter == "ICU 60.1"
    assert "words were found by ICU 60.1, here is ICU" in caplog.text


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"format": 2}', '{"format": 1, "documents": 0, "document_frequency": [{}, {}, {}, {}]}',
     '{"format": 1, "documents": 3, "document_frequency": [{}]}',
     '{"format": 1, "documents": 3, "document_frequency": [1, 2, 3, 4]}',
     '{"format": 2, "documents": 3, "document_frequency": [{}, {}, {}, {}], "tokenizer": "x", "segmenter": null}'],
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
