"""Decoding a model whose cache holds recurrent states (Qwen3.5: linear attention beside full attention)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mmrl_ray.experience.carriers import SamplingParams
from mmrl_ray.policy.generation.decode import Decoder, DecodeRequest, decode_groups
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.prompts import encode_prompts
from mmrl_ray.policy.scoring.prefix import score_completions
from mmrl_ray.policy.vision import vision_features
from tests.support.tiny_models import make_samples


@pytest.fixture
def policy(load: Callable[..., Policy]) -> Policy:
    return load("qwen3_5")


def test_rows_of_a_recurrent_model_decode_in_batches_of_their_own(policy: Policy) -> None:
    policy.eos_token_ids = (*policy.eos_token_ids, *range(policy.vocab_size - 6, policy.vocab_size))
    prompts = encode_prompts(policy, make_samples())
    sampling = SamplingParams(temperature=1.3, max_new_tokens=12)
    decoder = Decoder(policy)
    outs = decode_groups(decoder, [DecodeRequest(prompt, 6, sampling) for prompt in prompts])
    assert decoder.counters["unmerged_rows"] == decoder.counters["rows"] == 18
    assert decoder.counters["compactions"] > 0
    completions = [[c.token_ids for c in out.completions] for out in outs]
    with torch.no_grad():
        scores = score_completions(policy, prompts, vision_features(policy, prompts), completions, 1.3, path="naive")
    flat = [completion for out in outs for completion in out.completions]
    for i, completion in enumerate(flat):
        torch.testing.assert_close(completion.logprobs, scores.logprobs[i][scores.mask[i]], rtol=0, atol=1e-5)
    alone = decode_groups(Decoder(policy), [DecodeRequest(prompts[1], 6, sampling)])[0]
    assert [c.token_ids.tolist() for c in alone.completions] == [t.tolist() for t in completions[1]]
