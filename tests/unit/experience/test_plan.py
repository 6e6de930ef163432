from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmrl_ray.algorithms.base import Algorithm
from mmrl_ray.config.learner import KlSection, LearnerSection
from mmrl_ray.errors import LearnerError
from mmrl_ray.experience.carriers import GroupKey, RewardBreakdown, RewardFailure, ScoredGroup
from mmrl_ray.experience.plan import GroupSize, Selection, build_step_plan, padded_tokens, split_micro_batches
from mmrl_ray.losses.aggregation import StepRewards, StepWeights

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


class TestCompletionsWithoutReward:
    def left(self, failures: int, greedy: bool = True, **keys: object) -> bool:
        """Whether a group of three with so many failures is learned from, beside one without."""
        group = scored(0, 0, totals=(0.0, 1.0, 3.0), lengths=(1, 2, 3), greedy_reward=0.5)
        other = replace(group, key=GroupKey(0, 1))
        rewards = tuple(RewardFailure("NaN") if i < failures else row for i, row in enumerate(group.rewards))
        group = replace(group, rewards=rewards, greedy_reward=group.greedy_reward if greedy else RewardFailure("NaN"))
        normalize = keys.pop("normalize", "none")
        plan = build_step_plan(
            0, [group, other], learner=learner(**keys), max_new_tokens=8, world_size=1, normalize=normalize
        )
        assert plan.metrics["masked_captions"] == failures
        assert plan.metrics["reward/masked"] == failures / 6
        assert plan.metrics["masked"] == 2 - len(plan.groups)
        return len(plan.groups) == 2

    @pytest.mark.parametrize(
        ("advantage", "needs"),
        [("none", 1), ("batch_mean", 1), ("greedy", 1), ("leave_one_out", 2), ("group", 2)],
    )
    def test_a_group_goes_with_too_few_for_its_baseline(self, advantage: str, needs: int) -> None:
        for failures in range(4):
            assert self.left(failures, advantage=advantage) == (3 - failures >= needs)

    def test_parts_normalised_by_the_group_need_two(self) -> None:
        keys = {"advantage": "none", "advantage_std": False, "normalize": "group"}
        assert [self.left(failures, **keys) for failures in range(4)] == [True, True, False, False]

    def test_greedy_needs_the_greedy_completions_own(self) -> None:
        assert not self.left(0, greedy=False, advantage="greedy")
        assert self.left(0, greedy=False, advantage="group")

    def test_the_batch_mean_and_the_figures_are_of_those_that_have_one(self) -> None:
        first, second = (scored(0, i, totals=(0.0, 1.0, 5.0), lengths=(2, 3, 9)) for i in (0, 1))
        first = replace(first, rewards=(*first.rewards[:2], RewardFailure("NaN")), kl1=(0.0, 0.0, float("nan")))
        second = replace(second, kl1=(0.0, 0.0, 0.0))
        kl = KlSection(weight=1.0, estimator="k1")
        plan = build_step_plan(
            0,
            [first, second],
            learner=learner(advantage="batch_mean", aggregation="token_mean", kl=kl),
            max_new_tokens=9,
            world_size=1,
        )
        mean = (0 + 1 + 0 + 1 + 5) / 5
        assert plan.groups[0].advantages == pytest.approx((-mean, 1 - mean, 0.0))
        assert plan.groups[1].advantages == pytest.approx((-mean, 1 - mean, 5 - mean))
        assert plan.groups[0].rewards == (0.0, 1.0, None)
        assert plan.denominator == 2 + 3 + 2 + 3 + 9
        assert plan.metrics["reward/mean"] == pytest.approx(mean)
        assert plan.metrics["reward/std"] == pytest.approx(np.std([0, 1, 0, 1, 5]))
        assert plan.metrics["reward/group_std"] == pytest.approx((0.5 + np.std([0, 1, 5])) / 2)
        assert plan.metrics["reward/with_kl"] == pytest.approx(mean)


class Slips(Algorithm):
    def weigh(self, step: StepRewards) -> StepWeights:
        return {}["advantages"]  # type: ignore[no-any-return]


class Forgets(Algorithm):
    def weigh(self, step: StepRewards) -> StepWeights:
        super().weigh(step)
        return None  # type: ignore[return-value]


class Column(Algorithm):
    def weigh(self, step: StepRewards) -> StepWeights:
        return replace(super().weigh(step), advantages=step.rewards[:, :1])


class ZeroByZero(Algorithm):
    def weigh(self, step: StepRewards) -> StepWeights:
        return replace(super().weigh(step), advantages=step.rewards / step.rewards)


class Nothing(Algorithm):
    def weigh(self, step: StepRewards) -> StepWeights:
        return replace(super().weigh(step), scales=torch.zeros_like(step.rewards))


class NoDenominator(Algorithm):
    def weigh(self, step: StepRewards) -> StepWeights:
        return replace(super().weigh(step), denominator=0.0)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Slips", r"raised KeyError: 'advantages' \(.*test_plan\.py:\d+\)"),
        ("Forgets", "returned NoneType: return StepWeights"),
        ("Column", r"gave advantages \[2, 1\], 2 of them finite numbers: give one to each completion, \[2, 2\]"),
        ("ZeroByZero", r"gave advantages \[2, 2\], 2 of them finite numbers"),
        ("Nothing", "gave scales of 0 to a whole group"),
        ("NoDenominator", "gave the denominator 0.0"),
    ],
)
def test_what_an_algorithm_of_ones_own_does_wrong_is_told_with_its_name(name: str, expected: str) -> None:
    cfg = LearnerSection(steps=1, loss=f"{__name__}:{name}", advantage="group")
    with pytest.raises(LearnerError, match=rf"weigh of the algorithm {__name__}:{name} {expected}"):
        build_step_plan(0, [scored(index=0), scored(index=1)], learner=cfg, max_new_tokens=8, world_size=1)


def test_rewards_that_differ_by_rounding_give_no_advantage() -> None:
    """Parts of 0.3 that cancel leave 5e-17 or nothing."""
    rows = [RewardBreakdown(a - b, {"a": a, "b": -b}, {"a": 1.0, "b": 1.0}) for a, b in ((0.1 + 0.2, 0.3), (0.3, 0.3))]
    group = replace(scored(), rewards=tuple(rows))
    assert rows[0].total != rows[1].total
    plan = build_step_plan(0, [group], learner=learner(), max_new_tokens=8, world_size=1)
    assert plan.groups[0].advantages == (0.0, 0.0)
    assert plan.metrics["reward/zero_variance_groups"] == 1


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


def cut(index: int, truncated: tuple[bool, ...], **keys: object) -> ScoredGroup:
    return replace(scored(0, index, **keys), truncated=truncated)  # type: ignore[arg-type]


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "sequence_sum", "constant"])
def test_what_was_cut_off_counts_in_the_baseline_and_in_no_denominator(aggregation: str) -> None:
    groups = [
        cut(0, (False, True, False), totals=(0.0, 1.0, 5.0), lengths=(2, 8, 4)),
        cut(1, (False, False, False), totals=(1.0, 0.0, 2.0), lengths=(3, 1, 2)),
        cut(2, (True, True, True), totals=(1.0, 0.0, 2.0), lengths=(8, 8, 8)),
    ]
    cfg = learner(mask_truncated=True, aggregation=aggregation, advantage_std=False)
    plan = build_step_plan(0, groups, learner=cfg, max_new_tokens=8, world_size=1)
    assert [g.advantages for g in plan.groups] == [(-2.0, 0.0, 3.0), (0.0, -1.0, 1.0)]
    kept = np.array([2, 4, 3, 1, 2])
    shares = {"sequence_mean": 1 / kept, "constant": np.ones(5), "token_mean": np.ones(5), "sequence_sum": np.ones(5)}
    denominators = {"token_mean": kept.sum(), "sequence_mean": 5, "sequence_sum": 5, "constant": 5 * 8}
    assert plan.denominator == denominators[aggregation]
    assert [s for g in plan.groups for s in g.scales if s] == pytest.approx(shares[aggregation].tolist())
    assert plan.groups[0].learned == (0, 2)
    assert plan.metrics["truncated/masked"] == pytest.approx(4 / 9)
    assert plan.metrics["completion/length_max"] == 8, "lengths are those of whole captions, whatever is learnt"
    assert plan.metrics["masked"] == 1


def test_a_step_of_nothing_but_what_was_cut_off_learns_nothing_and_goes_on() -> None:
    groups = [cut(i, (True, True), totals=(0.0, 1.0), lengths=(8, 8)) for i in range(2)]
    cfg = learner(mask_truncated=True)
    plan = build_step_plan(0, groups, learner=cfg, max_new_tokens=8, world_size=2)
    assert plan.micro_batches == ((), ())
    assert all(not group.has_signal for group in plan.groups)
    assert plan.metrics["masked"] == 2
    assert plan.metrics["truncated/masked"] == 1.0


def test_overlong_captions_earn_less_before_the_baseline_and_spread_is_the_rewards_own() -> None:
    cfg = learner(advantage="none", overlong={"penalty": 2.0, "buffer": 0.5})
    groups = [scored(totals=(1.0, 1.0), lengths=(4, 7))]
    plan = build_step_plan(0, groups, learner=cfg, max_new_tokens=8, world_size=1)
    assert plan.groups[0].advantages == (1.0, 1.0 - 2.0 * 3 / 4)
    assert plan.metrics["overlong/penalty"] == pytest.approx(0.75)
    assert plan.metrics["overlong/share"] == 0.5
    assert plan.metrics["reward/mean"] == 1.0
    assert plan.metrics["reward/zero_variance_groups"] == 1


@given(st.lists(st.sampled_from("s-mf"), min_size=80, max_size=80), st.integers(1, 6), st.floats(1, 9))
def test_a_step_keeps_the_first_groups_with_spread(stream: list[str], wanted: int, most: float) -> None:
    """Against the list of kinds itself: with spread, without, without rewards, failed."""
    cfg = learner(groups_per_step=wanted, dynamic_sampling=True, max_oversampling=most)
    made = {
        "s": scored(totals=(0.0, 1.0)),
        "-": scored(totals=(0.5, 0.5)),
        "m": scored(masked="no references"),
        "f": None,
    }
    selection, drawn, more = Selection(cfg, "none"), 0, wanted
    while more:
        assert 0 < more <= wanted
        kinds = stream[drawn : drawn + more]
        drawn += more
        more = selection.judge([made[kind] for kind in kinds])
    spread = [place for place, kind in enumerate(stream) if kind == "s"]
    bound = int(wanted * most)
    assert drawn == selection.drawn <= bound
    if len([place for place in spread if place < drawn]) >= wanted:
        assert selection.kept == spread[:wanted]
        assert not selection.figures["sampled/at_bound"]
    else:
        assert drawn == bound
        order = [place for kind in "s-m" for place in range(drawn) if stream[place] == kind]
        assert selection.kept == sorted(order[:wanted])
        assert selection.figures["sampled/at_bound"]
    assert selection.figures["sampled/with_spread"] == sum(place < drawn for place in spread)
