"""Pairs out of a rollout log, against what the log says."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from mmrl_ray.data.images import image_hash
from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import PreferenceError, RunError
from mmrl_ray.experience.carriers import (
    Completion,
    EncodedPrompt,
    GroupKey,
    RewardBreakdown,
    RewardFailure,
    RolloutGroup,
    SamplingParams,
    Score,
    ScoredGroup,
)
from mmrl_ray.preferences.dataset import sample_pairs
from mmrl_ray.preferences.schema import Pair, Preference
from mmrl_ray.run_records.run_dir import RunDir
from tests.unit.experience.factories import group_table
from tests.unit.preferences.examples import picture

Said = tuple[str, float, float]
"""A caption with its two parts; its total is 2·first − second."""
GROUPS: dict[int, list[Said]] = {
    0: [("x", 0.5, 0.1), ("x", 0.5, 0.1), ("y", 0.5, 0.4), ("z", 0.9, 0.1)],
    1: [("p", 0.2, 0.0), ("q", 0.6, 0.78)],  # what the parts say nearly cancels
    2: [("same", 0.3, 0.3), ("same", 0.3, 0.3)],
    3: [("m", 0.1, 0.2), ("n", 0.1, 0.2)],
    4: [("u", 0.0, 0.9), ("v", 1.0, 0.0)],
}
HALF = RewardBreakdown(0.5, {"first": 0.5, "second": 0.5}, {"first": 2.0, "second": -1.0})
"""What the greedy caption of each group earned."""


def total(said: Said) -> float:
    return 2 * said[1] - said[2]


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir.create(tmp_path / "runs", "again")
    for index, captions in GROUPS.items():
        sample = Sample(f"s{index}", (picture(index),), "describe")
        breakdowns = [
            RewardBreakdown(
                total(each),
                {"all": total(each), "all/gain": each[1], "all/cost": each[2]},
                {"all": 1.0},
            )
            for each in captions
        ]
        completions = [Completion(torch.ones(2, dtype=torch.int64), torch.zeros(2), c, "stop") for c, _, _ in captions]
        prompt = EncodedPrompt(torch.arange(3), {}, "k")
        greedy = Completion(torch.ones(1, dtype=torch.int64), torch.zeros(1), "greedy", "stop")
        group = RolloutGroup(sample, prompt, tuple(completions), 0, SamplingParams(), greedy)
        scored = ScoredGroup(GroupKey(7, index), sample.id, 0, 3, (2,) * len(captions), tuple(breakdowns), HALF)
        table = group_table("again", scored, group)
        run.write_bytes(f"images/{image_hash(sample.images)}.png", picture(index))
        (tmp_path / "runs" / "again" / "rollouts").mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / "runs" / "again" / "rollouts" / f"step-{index}.parquet")
    return run


def pairs(items: list[Pair | Preference]) -> list[Pair]:
    return [item if isinstance(item, Pair) else item.pair for item in items]


def test_pairs_are_two_captions_of_one_group_and_repeat_with_the_seed(run: RunDir) -> None:
    found = pairs(sample_pairs(run, 100, seed=5))
    assert found == pairs(sample_pairs(run, 100, seed=5))
    assert len(found) == 4  # the group that says one thing only has no pair
    for pair in found:
        index = int(pair.source.rpartition("s")[2])
        assert pair.source == f"again@7/s{index}"
        assert {pair.caption_a, pair.caption_b} <= {caption for caption, _, _ in GROUPS[index]}
        assert pair.image == picture(index)
    assert pairs(sample_pairs(run, 2, seed=5)) == found[:2]
    seeds = {tuple(p.id for p in pairs(sample_pairs(run, 2, seed=seed))) for seed in range(20)}
    assert len(seeds) > 5


def test_closest_are_those_whose_rewards_differ_least_but_do(run: RunDir) -> None:
    found = pairs(sample_pairs(run, 100, seed=0, strategy="closest"))
    gaps = [
        min(
            (abs(total(a) - total(b)), {a[0], b[0]})
            for a, b in combinations(captions, 2)
            if a[0] != b[0] and total(a) != total(b)
        )
        for captions in (GROUPS[0], GROUPS[1], GROUPS[4])
    ]
    expected = [names for _, names in sorted(gaps, key=lambda gap: gap[0])]
    assert [{p.caption_a, p.caption_b} for p in found] == expected


def test_disagreement_is_what_cancels_between_the_parts(run: RunDir) -> None:
    """Weights 2 and −1 are found from the log; only group 1 has parts that speak against each other."""
    found = pairs(sample_pairs(run, 100, seed=0, strategy="disagreement"))
    assert {found[0].caption_a, found[0].caption_b} == {"p", "q"}
    # y costs more than z and gains less: no disagreement there; x against y neither. u against v agree.
    assert len(found) == 1


def test_the_runs_reward_may_label_them(run: RunDir) -> None:
    found = sample_pairs(run, 100, seed=0, by_reward=True)
    for each in found:
        assert isinstance(each, Preference)
        assert each.rater == "reward:again"
        rewards = {caption: total((caption, *rest)) for group in GROUPS.values() for caption, *rest in group}  # type: ignore[arg-type]
        a, b = rewards[each.pair.caption_a], rewards[each.pair.caption_b]
        assert each.choice == ("tie" if a == b else "a" if a > b else "b")
    assert {each.choice for each in found if isinstance(each, Preference)} >= {"tie"}


def test_neither_noise_nor_a_missing_part_or_reward_makes_a_pair(tmp_path: Path) -> None:
    """Rewards that differ in the last bit of a float32; captions that a part of weight 0 or the whole reward lacks."""
    near = float(np.nextafter(np.float32(100), np.float32(101)))
    rows: list[tuple[str, Score]] = [
        ("x", RewardBreakdown(100.0, {"a": 99.5, "b": 0.5, "c": 3.0}, {"a": 1.0, "b": 1.0, "c": 0.0})),
        ("y", RewardBreakdown(near, {"a": near - 0.5, "b": 0.5}, {"a": 1.0, "b": 1.0, "c": 0.0})),
        ("z", RewardFailure("it hung")),
    ]
    run = RunDir.create(tmp_path / "runs", "noise")
    sample = Sample("s", (picture(0),), "describe")
    made = tuple(Completion(torch.ones(2, dtype=torch.int64), torch.zeros(2), c, "stop") for c, _ in rows)
    group = RolloutGroup(sample, EncodedPrompt(torch.arange(3), {}, "k"), made, 0, SamplingParams())
    scored = ScoredGroup(GroupKey(7, 0), "s", 0, 3, (2,) * 3, tuple(score for _, score in rows))
    run.write_bytes(f"images/{image_hash(sample.images)}.png", picture(0))
    (tmp_path / "runs" / "noise" / "rollouts").mkdir()
    pq.write_table(group_table("noise", scored, group), tmp_path / "runs" / "noise" / "rollouts" / "s.parquet")
    (labelled,) = sample_pairs(run, 9, seed=0, by_reward=True)
    assert isinstance(labelled, Preference)
    assert ({labelled.pair.caption_a, labelled.pair.caption_b}, labelled.choice) == ({"x", "y"}, "tie")
    for strategy in ("closest", "disagreement"):
        with pytest.raises(PreferenceError, match="two captions to compare"):
            sample_pairs(run, 9, seed=0, strategy=strategy)  # type: ignore[arg-type]


def test_a_run_without_pairs_or_pictures_is_told(run: RunDir, tmp_path: Path) -> None:
    run.delete("images")
    with pytest.raises(PreferenceError, match=r"picture [0-9a-f]{64} is missing"):
        sample_pairs(run, 1, seed=0)
    for name in run.list("rollouts"):
        if name != "step-2.parquet":
            run.delete(f"rollouts/{name}")
    with pytest.raises(PreferenceError, match="no group of its rollout log has two captions to compare"):
        sample_pairs(run, 1, seed=0)
    (tmp_path / "runs" / "again" / "rollouts" / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(RunError, match="cannot be read"):
        sample_pairs(run, 1, seed=0)
    run.delete("rollouts")
    with pytest.raises(RunError, match="has no rollout log"):
        sample_pairs(run, 1, seed=0)
