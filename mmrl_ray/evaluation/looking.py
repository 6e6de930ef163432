"""A look at a loaded policy's sight, without workers: of `mmrl evaluate`, and of a warm start."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mmrl_ray.analysis.sight import Arranged, Eyes, Seen, arrange, look
from mmrl_ray.data.samples import Sample
from mmrl_ray.evaluation.sight import Sight
from mmrl_ray.experience.carriers import Completion, EncodedPrompt, SamplingParams, Score
from mmrl_ray.policy.generation.decode import Decoder, DecodeRequest, decode_groups
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.parity import choose_path
from mmrl_ray.policy.prompts import check_context, encode_caption, encode_prompts
from mmrl_ray.policy.scoring.prefix import score_in_parts
from mmrl_ray.policy.vision import VisionCache, vision_features
from mmrl_ray.rewards.base import RewardFn, score_with_retry

_CACHE_BYTES = 256 << 20
SAMPLES = 48
"""Of an evaluation that are looked at."""


def policy_sight(
    policy: Policy,
    samples: Sequence[Sample],
    *,
    max_new_tokens: int,
    count: int = SAMPLES,
    temperature: float = 1.0,
    reward: RewardFn | None = None,
    timeout_s: float = 60.0,
    retries: int = 0,
    seed: int = 0,
) -> tuple[Sight, Arranged]:
    """What up to `count` of the samples show of a policy, and which they are.

    Raises:
        ModelError: the model gives NaN.
        RewardError: the reward failed.
    """
    arranged = arrange(samples, count, seed)
    cache = VisionCache(_CACHE_BYTES)
    sampling = SamplingParams(greedy=True, temperature=temperature, max_new_tokens=max_new_tokens)

    def encode(sample: Sample) -> EncodedPrompt:
        (prompt,) = encode_prompts(policy, [sample])
        check_context(policy, prompt, max_new_tokens)
        return prompt

    def captions(prompts: Sequence[EncodedPrompt], _: Sequence[Sample]) -> list[Completion]:
        outputs = decode_groups(Decoder(policy, vision_cache=cache), [DecodeRequest(p, 1, sampling) for p in prompts])
        return [output.completions[0] for output in outputs]

    @torch.no_grad()
    def logprobs(
        prompts: Sequence[EncodedPrompt], completions: Sequence[Sequence[torch.Tensor]]
    ) -> list[list[torch.Tensor]]:
        features = vision_features(policy, prompts, cache)
        return score_in_parts(policy, prompts, features, completions, temperature, path=path)

    def score(of: Sequence[Sample], texts: Sequence[str]) -> list[Score]:
        assert reward is not None
        return score_with_retry(reward, of, texts, timeout_s=timeout_s, retries=retries)

    earned = None if reward is None else score
    eyes = Eyes(encode, captions, lambda text: encode_caption(policy, text), logprobs, max_new_tokens, earned)
    pairs = arranged.pairs
    if not pairs:
        return Sight((), seed), arranged
    prompts = [encode(sample) for sample, _ in pairs]
    path = choose_path(policy, prompts[:2], temperature=temperature).path
    said = captions(prompts, [sample for sample, _ in pairs])
    own: Sequence[Score | None] = [None] * len(pairs)
    if reward is not None:
        own = score([sample for sample, _ in pairs], [completion.caption for completion in said])
    rows = zip(pairs, prompts, said, own, strict=True)
    seen = [Seen(sample, other, prompt, caption, given) for (sample, other), prompt, caption, given in rows]
    return Sight(tuple(look(eyes, seen)), seed), arranged
