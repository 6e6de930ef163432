from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from mmrl_ray.data.samples import Sample
from mmrl_ray.experience.carriers import Completion, GroupKey, PlannedGroup, RolloutGroup, SamplingParams
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.prompts import encode_prompts, without_pixels
from mmrl_ray.policy.scoring.collate import collate
from mmrl_ray.policy.scoring.prefix import score_completions
from mmrl_ray.policy.vision import VisionCache, vision_features
from tests.support.tiny_models import make_completions, make_samples

Load = Callable[..., Policy]
Pair = tuple[RolloutGroup, PlannedGroup]


def completion(token_ids: torch.Tensor, *, reference: bool = True) -> Completion:
    length = token_ids.numel()
    return Completion(
        token_ids=token_ids,
        logprobs=-torch.arange(1.0, length + 1),
        text="",
        finish_reason="stop",
        reference_logprobs=-torch.arange(1.0, length + 1) / 10 if reference else None,
    )


def make_groups(
    policy: Policy, samples: list[Sample], lengths: list[tuple[int, ...]], *, ship: bool = True, reference: bool = True
) -> list[Pair]:
    prompts = encode_prompts(policy, samples)
    features = vision_features(policy, prompts)
    tokens = make_completions(policy, lengths)
    pairs = []
    for i, sample in enumerate(samples):
        payload = RolloutGroup(
            sample=sample,
            prompt=without_pixels(prompts[i]),
            completions=tuple(completion(ids, reference=reference) for ids in tokens[i]),
            policy_version=3,
            sampling=SamplingParams(temperature=0.7),
            vision=features[i] if ship else None,
        )
        planned = PlannedGroup(
            key=GroupKey(0, i),
            sample_id=sample.id,
            staleness=0,
            advantages=tuple(float(10 * i + j) for j in range(len(lengths[i]))),
            scales=tuple(1.0 / length for length in lengths[i]),
            completion_tokens=tuple(lengths[i]),
            prompt_tokens=prompts[i].input_ids.numel(),
            payload=payload,
        )
        pairs.append((payload, planned))
    return pairs


def test_tensors_of_a_micro_batch(load: Load) -> None:
    policy = load()
    batch = collate(policy, make_groups(policy, make_samples()[:2], [(2, 3), (1,)]))
    assert batch.behaviour_logprobs.tolist() == [[-1, -2, 0], [-1, -2, -3], [-1, 0, 0]]
    assert batch.reference_logprobs is not None
    torch.testing.assert_close(batch.reference_logprobs, batch.behaviour_logprobs / 10)
    assert batch.mask.tolist() == [[True, True, False], [True, True, True], [True, False, False]]
    assert batch.advantages.tolist() == [0.0, 1.0, 10.0]
    assert batch.scales.tolist() == pytest.approx([1 / 2, 1 / 3, 1.0])
    assert batch.temperature == 0.7
    assert batch.sample_ids == ("sample-0", "sample-1")
    assert batch.vision_recomputed == 0
    scores = score_completions(policy, batch.prompts, batch.features, batch.completions, batch.temperature)
    assert torch.equal(scores.mask, batch.mask)


def test_a_completion_that_takes_no_part_is_not_there(load: Load) -> None:
    policy = load()
    (first, planned), other = make_groups(policy, make_samples()[:2], [(2, 5, 3), (1,)])
    masked = replace(planned, scales=(0.5, 0.0, 1.0))
    batch = collate(policy, [(first, masked), other])
    assert [[c.numel() for c in group] for group in batch.completions] == [[2, 3], [1]]
    assert batch.mask.shape == (3, 3)
    assert (batch.advantages.tolist(), batch.scales.tolist()) == ([0.0, 2.0, 10.0], [0.5, 1.0, 1.0])


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "smolvlm"])
def test_recomputed_features_are_the_shipped_ones(family: str, load: Load) -> None:
    policy = load(family)
    samples, lengths = make_samples(), [(2, 3), (1,), (4,)]
    shipped = collate(policy, make_groups(policy, samples, lengths))
    groups = pickle.loads(pickle.dumps(make_groups(policy, samples, lengths, ship=False)))
    cache = VisionCache(1 << 20)
    made = collate(policy, groups, cache)
    assert (made.vision_recomputed, cache.misses) == (3, 3)
    for mine, theirs in zip(made.features, shipped.features, strict=True):
        assert torch.equal(mine.tokens, theirs.tokens)
    a = score_completions(policy, shipped.prompts, shipped.features, shipped.completions, 0.7)
    b = score_completions(policy, made.prompts, made.features, made.completions, 0.7)
    assert torch.equal(a.logprobs, b.logprobs)


def test_shipped_features_are_left_alone_while_the_tower_trains(load: Load) -> None:
    policy = load()
    groups = make_groups(policy, make_samples()[:1], [(2,)])
    policy.core.multi_modal_projector.requires_grad_(True)
    batch = collate(policy, groups)
    assert batch.vision_recomputed == 1
    assert batch.features[0].tokens.requires_grad


def test_without_injection_the_pixels_are_made_again(load: Load) -> None:
    policy = load()
    groups = make_groups(policy, make_samples()[:2], [(2,), (3,)])
    expected = collate(policy, groups)
    policy.inject_vision = False
    batch = collate(policy, groups)
    assert all("pixel_values" in prompt.model_inputs for prompt in batch.prompts)
    a = score_completions(policy, batch.prompts, batch.features, batch.completions, 0.7)
    policy.inject_vision = True
    b = score_completions(policy, expected.prompts, expected.features, expected.completions, 0.7)
    torch.testing.assert_close(a.logprobs, b.logprobs)


def test_no_reference_logprobs(load: Load) -> None:
    policy = load()
    assert collate(policy, make_groups(policy, make_samples()[:1], [(2,)], reference=False)).reference_logprobs is None


def test_what_does_not_fit_is_refused(load: Load) -> None:
    policy = load()
    pairs = make_groups(policy, make_samples()[:2], [(2, 3), (1,)])
    (payload, planned), other = pairs
    with pytest.raises(ValueError, match="without groups"):
        collate(policy, [])
    with pytest.raises(ValueError, match=r"completions of \(2, 3\) tokens, its plan says \(2, 4\)"):
        collate(policy, [(payload, replace(planned, completion_tokens=(2, 4)))])
    with pytest.raises(ValueError, match="2 completions, 1 advantages and 2 scales"):
        collate(policy, [(payload, replace(planned, advantages=(1.0,)))])
    with pytest.raises(ValueError, match=r"temperatures \[0\.7, 1\.0\]"):
        collate(policy, [pairs[0], (replace(other[0], sampling=SamplingParams(temperature=1.0)), other[1])])
    bare = replace(payload, completions=(payload.completions[0], completion(torch.tensor([1, 2, 3]), reference=False)))
    with pytest.raises(ValueError, match="1 of 2 completions"):
        collate(policy, [(bare, planned)])
