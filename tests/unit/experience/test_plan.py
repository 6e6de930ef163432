from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmrl_ray.config.learner import KlSection, LearnerSection
from mmrl_ray.errors import LearnerError
from mmrl_ray.experience.plan import GroupSize, build_step_plan, padded_tokens, split_micro_batches

from .factories import scored


def learner(**keys: object) -> LearnerSection:
    return LearnerSection.model_validate({"steps": 1, **keys})


def test_group_advantages_over_token_mean() -> None:
    groups = [scored(7, 0, totals=(0.0, 1.0), lengths=(2, 4), version=6), scored(7, 1, totals=(3.0, 3.0))]
    plan = build_step_plan(
        7, groups, learner=learner(advantage_std=False, aggregation="token_mean"), max_new_tokens=8, world_size=1
    )
    assert plan.denominator == 2 + 4 + 2 + 3
    assert [g.advantages for g in plan.groups] == [(-0.5, 0.5), (0.0, 0.0)]
    assert [g.has_signal for g in plan.groups] == [True, False]
    assert [g.staleness for g in plan.groups] == [1, 0]
    assert plan.groups[0].payload == "payload-7-0"
    assert plan.metrics["reward/mean"] == pytest.approx(7 / 4)
    assert plan.metrics["reward/zero_variance_groups"] == 1
    assert plan.metrics["reward/a"] == pytest.approx(7 / 8)
    assert plan.metrics["completion/length_mean"] == pytest.approx(11 / 4)


def test_sequence_mean_gives_each_completion_its_own_length() -> None:
    plan = build_step_plan(
        0, [scored(lengths=(2, 4))], learner=learner(aggregation="sequence_mean"), max_new_tokens=8, world_size=1
    )
    assert plan.groups[0].scales == (0.5, 0.25)
    assert plan.denominator == 2


def test_greedy_baseline() -> None:
    plan = build_step_plan(
        0,
        [scored(totals=(0.0, 1.0), greedy_reward=0.25)],
        learner=learner(advantage="greedy"),
        max_new_tokens=8,
        world_size=1,
    )
    assert plan.groups[0].advantages == (-0.25, 0.75)
    with pytest.raises(LearnerError, match="no greedy reward"):
        build_step_plan(0, [scored()], learner=learner(advantage="greedy"), max_new_tokens=8, world_size=1)


def test_k1_comes_off_the_reward_before_the_baseline_and_k3_does_not() -> None:
    for estimator, expected in (("k1", (-0.2, 0.2)), ("k3", (-0.5, 0.5))):
        settings = learner(advantage_std=False, kl=KlSection(weight=0.1, estimator=estimator))
        plan = build_step_plan(
            0, [scored(totals=(0.0, 1.0), kl1=(-1.0, 5.0))], learner=settings, max_new_tokens=8, world_size=1
        )
        assert plan.groups[0].advantages == pytest.approx(expected)
        assert plan.metrics["reward/mean"] == 0.5


def test_masked_groups_take_no_part_and_a_step_of_nothing_else_is_an_error() -> None:
    masked = scored(0, 1, masked="reward timed out", totals=(9.0, 9.0), lengths=(50, 50))
    settings = learner(aggregation="token_mean")
    plan = build_step_plan(0, [scored(lengths=(2, 3)), masked], learner=settings, max_new_tokens=8, world_size=1)
    assert plan.denominator == 5
    assert len(plan.groups) == 1
    with pytest.raises(LearnerError, match="reward timed out"):
        build_step_plan(0, [masked], learner=settings, max_new_tokens=8, world_size=1)


sizes = st.lists(
    st.builds(GroupSize, st.integers(1, 400), st.integers(1, 16), st.integers(1, 64)), min_size=1, max_size=40
)


@given(sizes, st.integers(1, 3000), st.integers(1, 4))
def test_every_group_lands_in_one_micro_batch_under_the_budget(
    groups: list[GroupSize], budget: int, world_size: int
) -> None:
    split = split_micro_batches(groups, budget, world_size)
    assert len(split) == world_size
    flat = [i for rank in split for batch in rank for i in batch]
    assert sorted(flat) == list(range(len(groups)))
    for rank in split:
        for batch in rank:
            assert batch
            positions = len(batch) * max(groups[i].prompt_tokens for i in batch)
            positions += sum(groups[i].completions for i in batch) * max(groups[i].longest_completion for i in batch)
            assert positions <= budget or len(batch) == 1
    loads = [sum(padded_tokens([groups[i]]) for batch in rank for i in batch) for rank in split]
    largest = max(padded_tokens([g]) for g in groups)
    assert max(loads) - min(loads) <= largest, "ranks are balanced to within one group"


@given(st.integers(1, 4), st.integers(0, 2**16))
def test_the_split_changes_neither_weights_nor_denominator(world_size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups = [scored(0, i, totals=rng.random(3), lengths=rng.integers(1, 9, 3)) for i in range(6)]
    one = build_step_plan(0, groups, learner=learner(), max_new_tokens=8, world_size=1)
    many = build_step_plan(0, groups, learner=learner(micro_batch_tokens=30), max_new_tokens=8, world_size=world_size)
    assert one.groups == many.groups
    assert one.denominator == many.denominator
