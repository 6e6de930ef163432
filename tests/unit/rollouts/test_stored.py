"""The engine of stored rollouts: what a log says in place of sampling and rewards, on a fake and on a tiny model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmrl_ray.config.reward import RewardSection
from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import AdapterError, ConfigError, DataError
from mmrl_ray.experience.carriers import (
    GroupKey,
    RewardBreakdown,
    RewardFailure,
    RolloutGroup,
    SamplingParams,
    ScoredGroup,
)
from mmrl_ray.experience.schema import group_rows
from mmrl_ray.policy.generation.base import DecodeRequest
from mmrl_ray.policy.generation.local import LocalEngine
from mmrl_ray.policy.heads import LearningHeads, published
from mmrl_ray.policy.lora.adapter import adapter_state
from mmrl_ray.policy.lora.routing import VersionedPolicy
from mmrl_ray.policy.prompts import encode_prompts
from mmrl_ray.policy.vision import VisionCache
from mmrl_ray.rollouts.scorer import Scorer
from mmrl_ray.rollouts.stored import StoredEngine, sample_of, stored_group
from mmrl_ray.rollouts.types import Assignment, AssignmentResult, GroupRequest
from tests.unit.learner.worlds import MAX_NEW_TOKENS, TEMPERATURE, make_groups, make_policy, tiny_folder
from tests.unit.rollouts.test_engine import FakeReward, as_made, assignment
from tests.unit.rollouts.test_engine import engine as faked

SIZES = ((3, 5), (8, 1))
REWARDS = ((0.25, -1.0), (0.5, 0.75))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


def parts_on(folder: Path) -> tuple[LocalEngine, Scorer]:
    versions, cache = VersionedPolicy(make_policy(folder)), VisionCache(2**20)
    return LocalEngine(versions, cache, max_rows=8), Scorer(versions, cache, temperature=TEMPERATURE)


def logged(folder: Path) -> list[tuple[Sample, RolloutGroup]]:
    """Groups, and the samples that their log rows become after a way through JSON, as in a data set."""
    policy = make_policy(folder)
    found = []
    for i, group in enumerate(make_groups(policy, lengths=SIZES)):
        text = [
            replace(c, text=policy.tokenizer.decode(c.token_ids.tolist(), skip_special_tokens=True))
            for c in group.completions
        ]
        group = replace(group, completions=(replace(text[0], finish_reason="length"), text[1]))
        parts = [RewardBreakdown(r, {"all": r, "all/x": 2 * r}, {"all": 1.0}, 0.5, 0.1) for r in REWARDS[i]]
        scored = ScoredGroup(GroupKey(4, i, 1), group.sample.id, 0, 3, SIZES[i], tuple(parts))
        rows = json.loads(json.dumps(group_rows("again", scored, group)))
        sample = sample_of(rows, group.sample.images)
        found.append((replace(sample, metadata=json.loads(json.dumps(dict(sample.metadata)))), group))
    return found


def run(
    parts: tuple[LocalEngine, Scorer], samples: list[Sample], *, limit: int = MAX_NEW_TOKENS, completions: int = 2
) -> AssignmentResult:
    engine = StoredEngine(*parts, FakeReward(), worker="w", reward_cfg=RewardSection(), ship_vision_bytes=2**20)
    sampling = SamplingParams(temperature=TEMPERATURE, max_new_tokens=limit)
    groups = tuple(GroupRequest(GroupKey(0, i), each, sampling, completions) for i, each in enumerate(samples))
    return engine.run(Assignment(1, "train", groups, 0), as_made)


def test_what_was_logged_comes_back_with_its_tokens_and_rewards(tiny: Path) -> None:
    stored = logged(tiny)
    result = run(parts_on(tiny), [sample for sample, _ in stored])
    assert result.failures == ()
    for (sample, group), scored, rewards in zip(stored, result.groups, REWARDS, strict=True):
        assert sample.id == f"4.{group.sample.id[1:]}.1/{group.sample.id}"
        assert scored.masked is None
        assert [r.total for r in scored.rewards] == list(rewards)
        assert [r.adjusted for r in scored.rewards] == pytest.approx([r - 0.05 for r in rewards])
        assert dict(scored.rewards[0].parts) == {"all": rewards[0], "all/x": 2 * rewards[0]}
        assert dict(scored.rewards[0].weights) == {"all": 1.0}
        payload = scored.payload
        assert payload.vision is not None
        assert [c.finish_reason for c in payload.completions] == ["length", "stop"]
        for found, original in zip(payload.completions, group.completions, strict=True):
            assert torch.equal(found.token_ids, original.token_ids)
            assert torch.equal(found.logprobs, original.logprobs)
            assert found.text == original.text
        assert torch.equal(payload.prompt.input_ids, group.prompt.input_ids)


def test_a_completion_that_never_had_a_reward_comes_back_without(tiny: Path) -> None:
    (good, _), _ = logged(tiny)
    rows = json.loads(json.dumps(good.metadata["mmrl_rollouts"]))
    rows[0] |= {"reward": None, "reward_parts": [], "masked": "it hung"}
    (group,) = run(parts_on(tiny), [replace(good, metadata={"mmrl_rollouts": rows})]).groups
    assert group.masked is None
    assert group.failures == ("it hung",)
    assert group.rewards[0] == RewardFailure("it hung")


def test_a_group_that_does_not_fit_is_told_and_the_others_go_on(tiny: Path) -> None:
    (good, _), (other, _) = logged(tiny)
    parts = parts_on(tiny)
    assert "has 8 tokens, and rollout.max_new_tokens=7" in run(parts, [good, other], limit=7).failures[0].reason
    assert "has 2 completions, and rollout.group_size=3" in run(parts, [good], completions=3).failures[0].reason
    rows = json.loads(json.dumps(good.metadata["mmrl_rollouts"]))
    rows[0]["caption"] = "w1 w2 something else"
    strange = replace(good, id="strange", metadata={"mmrl_rollouts": rows})
    result = run(parts, [strange, good])
    assert [g.sample_id for g in result.groups] == [good.id]
    assert "are another tokenizer's" in result.failures[0].reason


def test_a_row_that_nobody_wrote_as_a_group_is_refused(tiny: Path) -> None:
    ((good, _), _) = logged(tiny)
    rows = good.metadata["mmrl_rollouts"]
    for wrong in (3, [{}], [{**rows[0], "token_ids": "no"}], [{**rows[0], "behaviour_logprobs": [0.0]}]):
        with pytest.raises(DataError, match="has no completions under 'mmrl_rollouts'"):
            stored_group(replace(good, metadata={"mmrl_rollouts": wrong}))
    assert stored_group(replace(good, metadata={})) is None


def test_ordinary_samples_are_sampled_and_rewarded_as_ever() -> None:
    engine = faked(kind=StoredEngine)
    assert [[r.total for r in g.rewards] for g in engine.run(assignment(), as_made).groups] == [[0.0, 1.0]] * 3


def test_value_heads_come_and_go_with_the_weights(tiny: Path) -> None:
    generator, scorer = parts_on(tiny)
    policy = scorer.policy
    heads = LearningHeads(policy.hidden_size, policy.vocab_size, 8, 1.0, seed=0)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.normal_()
    prompts = encode_prompts(policy, [sample for sample, _ in logged(tiny)])
    sampling = SamplingParams(greedy=True, max_new_tokens=6, value_beta=3.0)
    asked = [DecodeRequest(prompt, 1, sampling) for prompt in prompts]
    weights = adapter_state(policy.model)
    generator.load(1, {**weights, **published(heads)})
    steered = [o.completions[0].token_ids.tolist() for o in generator.generate(asked)]
    generator.load(2, weights)
    with pytest.raises(ConfigError, match="needs value heads"):
        generator.generate(asked)
    plain = generator.generate([replace(r, sampling=replace(sampling, value_beta=0.0)) for r in asked])
    assert steered != [o.completions[0].token_ids.tolist() for o in plain]
    with pytest.raises(AdapterError, match="value heads"):
        generator.load(3, {**weights, "value_heads.q.0.0.weight": torch.zeros(1)})
