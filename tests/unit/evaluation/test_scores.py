"""Evaluation figures against sacrebleu, hand counts and brute-force resampling."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sacrebleu

from mmrl_ray.config.reward import RewardSection
from mmrl_ray.config.sections import ScenesSection
from mmrl_ray.data.samples import Sample
from mmrl_ray.data.scenes.generator import generate_scenes
from mmrl_ray.errors import DataError, RewardError
from mmrl_ray.evaluation.records import highlights, load_evaluation, save_evaluation
from mmrl_ray.evaluation.scores import Evaluation, compare, comparison_json, in_common, score_captions
from mmrl_ray.experience.carriers import RewardBreakdown, RewardFailure, Score
from mmrl_ray.metrics.statistics import figure_difference, figure_interval, resampled_sums
from mmrl_ray.metrics.text import CorpusStatistics
from mmrl_ray.report.page import write_report
from mmrl_ray.rewards.build import build_reward
from mmrl_ray.run_records.run_dir import RunDir

_, SCENES = generate_scenes(ScenesSection(train=1, eval=40, image_size=32))
STATISTICS = CorpusStatistics.from_references(sample.references for sample in SCENES)
REWARD = build_reward(RewardSection(), STATISTICS)


def terse() -> list[str]:
    return [sample.metadata["terse"][0] for sample in SCENES]


def full() -> list[str]:
    return [sample.references[0] for sample in SCENES]


def score(captions: list[str], samples: list[Sample] | None = None) -> Evaluation:
    return score_captions(samples or SCENES, captions, REWARD, STATISTICS)


def test_corpus_bleu_is_sacrebleus() -> None:
    captions = [f"{text} and a red star" for text in terse()]
    streams = [[sample.references[k] for sample in SCENES] for k in range(5)]
    expected = sacrebleu.corpus_bleu(captions, streams, lowercase=True)
    measures = score(captions).measures
    assert measures["bleu_4"].mean == pytest.approx(expected.score / 100, rel=1e-9)
    order_1 = sacrebleu.metrics.BLEU(lowercase=True, max_ngram_order=1).corpus_score(captions, streams)
    assert measures["bleu_1"].mean == pytest.approx(order_1.score / 100, rel=1e-9)
    assert measures["bleu_4"].low < measures["bleu_4"].mean < measures["bleu_4"].high


def test_a_full_reference_gets_every_attribute_and_a_terse_one_only_its_object() -> None:
    best = score(full()).measures
    assert best["attributes/precision"].mean == best["attributes/recall"].mean == best["attributes/f1"].mean == 1.0
    short = score(terse()).measures
    assert short["attributes/precision"].mean == 1.0
    # A full description has per object its name and its size, and one place or relation.
    facts = sum(2 * len(sample.metadata["objects"]) + 1 for sample in SCENES)
    assert short["attributes/recall"].mean == pytest.approx(len(SCENES) / facts)
    recall = len(SCENES) / facts
    assert short["attributes/f1"].mean == pytest.approx(2 * recall / (1 + recall))


def test_a_reward_that_knows_its_sigma_has_it_measured() -> None:
    class Doubting:
        def score_batch(self, samples: Sequence[Sample], captions: Sequence[str]) -> list[RewardBreakdown]:
            return [RewardBreakdown(1.0, {"seen": 1.0}, {"seen": 1.0}, sigma=0.1 * i) for i in range(len(captions))]

    measures = score_captions(SCENES[:3], terse()[:3], Doubting(), STATISTICS).measures
    assert measures["reward/sigma"].mean == pytest.approx(0.1)
    assert "reward/sigma" not in score(terse()).measures


def test_means_lengths_and_distinct_captions() -> None:
    captions = ["a red circle"] * 30 + ["one two three four five six"] * 6 + ["x", "y", "z", ""]
    measures = score(captions).measures
    assert measures["caption/words"].mean == pytest.approx((30 * 3 + 6 * 6 + 3) / 40)
    assert measures["caption/distinct"].mean == pytest.approx(6 / 40)
    assert 0 < measures["caption/distinct"].low <= 6 / 40 <= measures["caption/distinct"].high < 1
    totals = [r.total for r in REWARD.score_batch(SCENES, captions)]
    assert measures["reward"].mean == pytest.approx(float(np.mean(totals)))
    assert list(measures)[:2] == ["reward", "reward/caption"]


def test_rows_that_are_no_scenes_have_no_attributes() -> None:
    foreign = [replace(sample, metadata={"objects": [{"id": 3}]}) for sample in SCENES]
    measures = score(terse(), foreign).measures
    assert not [name for name in measures if name.startswith("attributes")]
    assert "cider_d" in measures


def test_the_same_seed_gives_the_same_intervals_and_json() -> None:
    once, again = score(terse()).to_json(), score(terse()).to_json()
    assert json.dumps(once, allow_nan=False) == json.dumps(again)
    assert once["samples"] == 40
    assert set(once["measures"]["reward"]) == {"value", "low", "high"}


def test_comparison_is_paired_by_sample() -> None:
    before, after = score(terse()), score(full())
    differences = compare(before, after)
    reward = differences["reward"]
    gains = [a.reward.total - b.reward.total for b, a in zip(before.captions, after.captions, strict=True)]
    assert reward.difference.mean == pytest.approx(float(np.mean(gains)))
    assert reward.difference.low > 0
    assert reward.apart
    recall = differences["attributes/recall"].difference
    expected = after.measures["attributes/recall"].mean - before.measures["attributes/recall"].mean
    assert recall.mean == pytest.approx(expected)
    same = compare(before, before)
    assert all(d.difference.low == d.difference.high == 0.0 and not d.apart for d in same.values())
    assert comparison_json(differences)["reward"]["intervals_apart"] is True


def test_one_sample_has_no_interval_anywhere() -> None:
    before, after = score(terse()[:1], SCENES[:1]), score(full()[:1], SCENES[:1])
    measures = before.to_json()["measures"]
    assert {name: (m["low"], m["high"]) for name, m in measures.items()} == dict.fromkeys(measures, (None, None))
    assert measures["reward"]["value"] == before.captions[0].reward.total
    differences = comparison_json(compare(before, after))
    assert all(d["low"] is None and d["intervals_apart"] is False for d in differences.values())


def test_rows_are_paired_by_their_places() -> None:
    """All have one id, as rows of one picture may; records of before have no places, and are taken in their order."""
    rows = [replace(each, id="x", place=f"a.parquet row {i}") for i, each in enumerate(SCENES)]
    before, after = score(terse(), rows), score(full(), rows)
    gains = [a.reward.total - b.reward.total for b, a in zip(before.captions, after.captions, strict=True)]
    assert compare(before, after)["reward"].difference.mean == pytest.approx(float(np.mean(gains)))
    best = highlights(before.captions, after.captions, 3)["best"]
    assert len(best) == 1
    assert best[0][1].reward.total - best[0][0].reward.total == pytest.approx(max(gains))
    old = Evaluation(tuple(replace(each, place="") for each in before.captions))
    assert compare(old, after)["reward"].difference.mean == pytest.approx(float(np.mean(gains)))
    lacking = Evaluation(after.captions[3:])
    with pytest.raises(DataError, match="different samples"):
        compare(before, lacking)
    both = in_common(before, lacking)
    assert both is not None
    assert compare(*both)["reward"].difference.mean == pytest.approx(float(np.mean(gains[3:])))
    assert in_common(Evaluation(before.captions[:3]), lacking) is None


def test_wrong_input_is_refused() -> None:
    with pytest.raises(DataError, match="39 for 40"):
        score(terse()[1:])
    with pytest.raises(DataError, match="no sample to evaluate"):
        score_captions([], [], REWARD, STATISTICS)
    bare = [replace(SCENES[0], references=()), *SCENES[1:]]
    with pytest.raises(DataError, match=f"'{SCENES[0].id}' has no references"):
        score(terse(), bare)
    with pytest.raises(DataError, match="different samples"):
        compare(score(terse()), score(terse()[::-1], SCENES[::-1]))


def test_a_reward_that_returns_nan_is_an_error() -> None:
    class Broken:
        def score_batch(self, samples: list[Sample], captions: list[str]) -> list[RewardBreakdown]:
            return [RewardBreakdown(float("nan"), {}, {}) for _ in captions]

    with pytest.raises(RewardError, match="total=nan"):
        score_captions(SCENES, terse(), Broken(), STATISTICS)


def test_captions_that_the_reward_fails_on_count_in_every_other_measure(tmp_path: Path) -> None:
    """One alone, and two of which each ends its whole batch, are left out of the reward's figures on both sides."""

    class Picky:
        def score_batch(self, samples: Sequence[Sample], captions: Sequence[str]) -> list[Score]:
            if any(caption.startswith("poison") for caption in captions):
                raise ValueError("poisoned")
            rows = REWARD.score_batch(samples, captions)
            return [RewardFailure("no number") if c == "" else row for c, row in zip(captions, rows, strict=True)]

    said = [*terse()[:-3], "poison one", "", "poison two"]
    before = score_captions(SCENES, said, Picky(), STATISTICS)
    plain, after = score(said), score_captions(SCENES, full(), Picky(), STATISTICS)
    rewards = {name for name in plain.measures if name.startswith("reward")}
    assert {n: m for n, m in before.measures.items() if n not in rewards} == {
        n: m for n, m in plain.measures.items() if n not in rewards
    }
    kept = Evaluation(plain.captions[:-3])
    assert all(before.measures[name] == kept.measures[name] for name in rewards)
    gains = [a.reward.total - b.reward.total for a, b in zip(after.captions, kept.captions, strict=False)]
    assert compare(before, after)["reward"].difference.mean == pytest.approx(float(np.mean(gains)))
    assert [c.no_reward for c in before.unrewarded] == [
        "the reward raised ValueError: poisoned",
        "no number",
        "the reward raised ValueError: poisoned",
    ]
    assert before.to_json()["without_reward"] == 3
    run = RunDir.create(tmp_path, "run")
    for name, evaluation in (("before", before), ("after", after)):
        save_evaluation(run, name, evaluation, SCENES)
    assert load_evaluation(run, "before") == before
    page = write_report(run)
    assert "3 of 40 captions have no reward" in Path(page).read_text()


def test_resampling_draws_whole_rows_with_replacement() -> None:
    counts = np.array([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]])
    sums = resampled_sums(counts, seed=1, resamples=500)
    assert sums.shape == (500, 2)
    assert np.array_equal(sums[:, 1], 10 * sums[:, 0])
    # Every sum of three rows out of {1, 2, 4}, and on average that of the rows themselves.
    possible = {a + b + c for a in (1, 2, 4) for b in (1, 2, 4) for c in (1, 2, 4)}
    assert set(sums[:, 0].tolist()) == possible
    assert sums[:, 0].mean() == pytest.approx(7.0, abs=0.25)


def test_ratio_interval_agrees_with_brute_force() -> None:
    rng = np.random.default_rng(3)
    said = rng.integers(1, 6, size=60).astype(float)
    right = np.minimum(said, rng.integers(0, 6, size=60))
    counts = np.stack([right, said], axis=1)
    interval = figure_interval(counts, lambda s: float(s[0] / s[1]), seed=0)
    draws = np.random.default_rng(99)
    brute = []
    for _ in range(4000):
        picks = draws.integers(0, 60, size=60)
        brute.append(right[picks].sum() / said[picks].sum())
    low, high = np.quantile(brute, [0.025, 0.975])
    assert interval.mean == pytest.approx(right.sum() / said.sum())
    assert interval.low == pytest.approx(low, abs=0.01)
    assert interval.high == pytest.approx(high, abs=0.01)
    difference = figure_difference(counts, counts * [0.5, 1.0], lambda s: float(s[0] / s[1]))
    assert difference.mean == pytest.approx(-interval.mean / 2)
    assert difference.high < 0


def test_resampling_refuses_what_it_cannot_use() -> None:
    with pytest.raises(ValueError, match=r"\(0, 2\)"):
        resampled_sums(np.zeros((0, 2)))
    with pytest.raises(ValueError, match="equal shapes"):
        figure_difference(np.zeros((2, 1)), np.zeros((3, 1)), lambda s: 0.0)
