from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch

from mmrl_ray.experience.breakdown import RewardFailure
from mmrl_ray.experience.carriers import EncodedPrompt, RolloutGroup, SamplingParams, VisionFeatures
from mmrl_ray.rollouts.group_codec import decode_groups, encode_groups
from tests.unit.experience.factories import rollout_group, scored


def same(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))  # type: ignore[arg-type]
    return one == other


def whole(reference: bool, greedy: bool) -> RolloutGroup:
    wide = torch.arange(24, dtype=torch.bfloat16).reshape(4, 6)
    return replace(
        rollout_group((2, 3), reference=reference, greedy=greedy),
        prompt=EncodedPrompt(
            torch.arange(5), {"grid": torch.tensor([[1, 2, 2]]), "pixel_values": torch.ones(1, 3)}, "k"
        ),
        sampling=SamplingParams(temperature=0.7, stop=("\n",), seed=2**62 + 1),
        vision=VisionFeatures(wide[:, ::2], (wide[1:3], wide[:1])),
    )


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("greedy", [False, True])
def test_groups_come_back_as_they_were(reference: bool, greedy: bool) -> None:
    pairs = [
        (replace(scored(2, 0, attempt=1, kl1=(0.1, 0.2), greedy_reward=0.3), payload=None), whole(reference, greedy)),
        (replace(scored(2, 1, masked="no references"), payload=None), rollout_group((4, 1))),
    ]
    some = scored(2, 2)
    failed = replace(some, rewards=(some.rewards[0], RewardFailure("it hung")), greedy_reward=RewardFailure("too"))
    missing = replace(some.rewards[0], missing={"c": "no number"})
    pairs += [(replace(failed, payload=None), whole(reference, greedy))]
    pairs += [(replace(some, rewards=(missing, missing), payload=None), whole(reference, greedy))]
    decoded = decode_groups(encode_groups(pairs))
    assert [s for s, _ in decoded] == [s for s, _ in pairs]
    for (_, group), (_, original) in zip(decoded, pairs, strict=True):
        assert same(asdict(group), asdict(original))


def test_nothing_is_something_too() -> None:
    assert decode_groups(encode_groups([])) == []


def test_a_view_does_not_drag_its_whole_tensor_along() -> None:
    big = torch.zeros(1_000_000)
    group = replace(rollout_group(), vision=VisionFeatures(big[:10].reshape(2, 5)))
    assert len(encode_groups([(scored(), group)])) < 100_000
