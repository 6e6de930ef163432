"""R_cap against an oracle written from its formula, and against attempts to cheat it."""

import math
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.metrics import BLEU

from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import ConfigError, RewardError
from mmrl_ray.rewards.base import RewardFn, TruncatedCaption
from mmrl_ray.rewards.captioning import CaptionReward

IDF = {"red": 1.5, "blue": 1.25, "square": 0.75, "circle": 0.875, "above": 2.0, "small": 1.125, "a": 0.0, "tiny": 3.0}
REFERENCES = ["A small red square.", "a red square above a blue circle"]


def reward(**changes: object) -> CaptionReward:
    arguments: dict = {"alpha": 0.5, "beta": 0.5, "gamma": 0.1, "idf": IDF, "max_words": 20, **changes}
    return CaptionReward(**arguments)


def oracle(caption: str, references: list[str], a: float, b: float, g: float, max_words: int, grounded: bool) -> float:
    def vocabulary(text: str) -> np.ndarray:
        return np.unique(np.array(re.findall(r"\w+", text.lower()), dtype=str))

    def information(vocabulary_: np.ndarray) -> float:
        return float(np.sum(np.array([IDF.get(str(w), 0.0) for w in vocabulary_], dtype=np.float64)))

    own = vocabulary(caption)
    if grounded:
        own = np.intersect1d(own, np.concatenate([vocabulary(r) for r in references]))
    largest = max(information(vocabulary(r)) for r in references)
    detail = float(np.clip(information(own) / largest, 0, 1)) if largest else 0.0
    count = len(re.findall(r"\w+", caption))
    bleu = BLEU(effective_order=True, lowercase=True).sentence_score(caption, references).score / 100 if count else 0.0
    return a * min(bleu, 1.0) + b * detail - g * count / max_words


TEXT = st.lists(st.sampled_from([*IDF, "the", "Red", "square.", "unknown"]), max_size=12).map(" ".join)


@settings(max_examples=150, deadline=None)
@given(TEXT, st.lists(TEXT, min_size=1, max_size=5), st.booleans(), st.floats(0, 2), st.floats(0, 2), st.floats(0, 2))
def test_equals_the_formula(c: str, references: list[str], grounded: bool, a: float, b: float, g: float) -> None:
    scored = reward(alpha=a, beta=b, gamma=g, max_words=7, grounded=grounded).score(c, references)
    assert scored.total == pytest.approx(oracle(c, references, a, b, g, 7, grounded), rel=1e-9, abs=1e-12)
    assert scored.total == pytest.approx(math.fsum(scored.weights[k] * scored.parts[k] for k in scored.parts))


def test_literal() -> None:
    scored = reward().score("a red circle", ["a red square"])
    # Unigrams 2 of 3, bigrams 1 of 2, trigrams 0 -> 1/(2*1), three orders, same length.
    assert scored.parts["bleu"] == pytest.approx((2 / 3 * 1 / 2 * 1 / 2) ** (1 / 3))
    assert scored.parts["detail"] == pytest.approx(1.5 / 2.25)
    assert scored.parts["length"] == pytest.approx(3 / 20)
    assert scored.weights == {"bleu": 0.5, "detail": 0.5, "length": -0.1}
    assert scored.total == pytest.approx(0.5 * (1 / 6) ** (1 / 3) + 0.5 * 2 / 3 - 0.1 * 0.15)


@pytest.mark.parametrize("caption", ["", "   ", ".", "?!, ."])
def test_empty_caption_scores_zero(caption: str) -> None:
    scored = reward().score(caption, REFERENCES)
    assert scored.parts == {"bleu": 0.0, "detail": 0.0, "length": 0.0}
    assert scored.total == 0.0


def test_references_without_information_give_no_detail() -> None:
    assert reward().score("a red square", ["a", "unknown words"]).parts["detail"] == 0.0
    assert reward().score("a red square", ["..."]).parts["detail"] == 0.0


class TestCheating:
    def test_invented_attributes_earn_nothing(self) -> None:
        honest = reward().score("a red square", REFERENCES)
        stuffed = reward().score("a red square tiny", REFERENCES)
        assert stuffed.parts["detail"] == honest.parts["detail"]
        assert stuffed.total < honest.total
        assert reward().score("tiny", REFERENCES).parts["detail"] == 0.0
        assert reward(grounded=False).score("tiny", REFERENCES).parts["detail"] > 0

    @settings(deadline=None)
    @given(st.lists(st.sampled_from(["tiny", "the", "zzz", "qqq"]), min_size=1, max_size=40))
    def test_longer_without_content_never_pays(self, filler: list[str]) -> None:
        caption = "a red square above a blue circle"
        assert (
            reward().score(" ".join([caption, *filler]), REFERENCES).total < reward().score(caption, REFERENCES).total
        )

    def test_repetition_does_not_pay(self) -> None:
        once = reward().score("a red square above a blue circle", REFERENCES)
        for times in (2, 3, 10):
            again = reward().score(" ".join(["a red square above a blue circle"] * times), REFERENCES)
            assert again.parts["detail"] == once.parts["detail"] == 1.0
            assert again.total < once.total

    def test_length_penalty_is_not_clipped(self) -> None:
        assert reward().score(" ".join(["zzz"] * 400), REFERENCES).parts["length"] == 20.0

    def test_listing_all_reference_words_pays_less_than_a_reference(self) -> None:
        words = sorted({w.strip(".").lower() for r in REFERENCES for w in r.split()})
        assert reward().score(" ".join(words), REFERENCES).total < reward().score(REFERENCES[1], REFERENCES).total


def test_score_batch_is_score_of_each() -> None:
    samples = [Sample("x", (b"",), "", ("a red square",)), Sample("y", (b"",), "", tuple(REFERENCES))]
    scorer = reward()
    assert isinstance(scorer, RewardFn)
    assert scorer.score_batch(samples, ["a square", "a circle"]) == [
        scorer.score("a square", ["a red square"]),
        scorer.score("a circle", REFERENCES),
    ]
    assert scorer.score_batch([], []) == []


def test_ends_count_in_bleu_alone_and_in_batches_alone() -> None:
    sample = Sample("x", (b"",), "", ("a red square",))
    scorer = pickle.loads(pickle.dumps(reward(eos=True)))
    assert scorer.score("a red", ["a red square"]) == reward().score("a red", ["a red square"])
    whole, cut = scorer.score_batch([sample, sample], ["a red", TruncatedCaption("a red")])
    # a red </s> against a red square </s>, see the tests of BLEU.
    assert whole.parts["bleu"] == pytest.approx((1 / 4) ** (1 / 3) * math.exp(-1 / 3))
    assert cut.parts["bleu"] == pytest.approx(math.exp(-1))
    for name in ("detail", "length"):
        assert whole.parts[name] == cut.parts[name] == scorer.score("a red", ["a red square"]).parts[name]
    assert scorer.score_batch([sample], [" . "])[0].total == 0.0


def test_missing_references_are_an_error() -> None:
    with pytest.raises(RewardError, match="reference"):
        reward().score("a", [])
    with pytest.raises(RewardError, match="list"):
        reward().score("a", "a red square")  # type: ignore[arg-type]
    with pytest.raises(RewardError, match="'lonely'"):
        reward().score_batch([Sample("lonely", (b"",), "")], ["a"])
    with pytest.raises(RewardError, match="1 samples for 2 captions"):
        reward().score_batch([Sample("x", (b"",), "", ("a",))], ["a", "b"])


@pytest.mark.parametrize(
    "changes", [{"alpha": -1.0}, {"beta": math.nan}, {"gamma": -0.1}, {"max_words": 0}, {"idf": {"a": -1.0}}]
)
def test_bad_settings_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="caption reward"):
        reward(**changes)


def test_pickles_with_its_settings() -> None:
    original = reward(grounded=False, gamma=0.3)
    again = pickle.loads(pickle.dumps(original))
    assert again.score("tiny red thing", REFERENCES) == original.score("tiny red thing", REFERENCES)


def test_bitwise_equal_in_every_process() -> None:
    code = (
        "import sys\n"
        "from mmrl_ray.rewards.captioning import CaptionReward\n"
        "idf = {f'w{i}': 1.0 / (i + 3) for i in range(40)}\n"
        "text = ' '.join(idf)\n"
        "print(CaptionReward(0.5, 0.5, 0.1, idf, 20).score(' '.join(list(idf)[:29]), [text]).total.hex())\n"
        "assert 'torch' not in sys.modules\n"
    )
    totals = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, check=True, capture_output=True, timeout=60
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(totals) == 1
