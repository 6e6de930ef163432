"""What an engine has sampled, held against transformers' own `generate` and against the learner's log-probs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from mmrl_ray.data.samples import Sample
from mmrl_ray.experience.carriers import EncodedPrompt, SamplingParams
from mmrl_ray.policy.generation.base import DecodeRequest, GenerationEngine, GroupOutput
from mmrl_ray.policy.lora.adapter import adapter_state, load_adapter_state
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.prompts import encode_prompts
from mmrl_ray.policy.scoring.prefix import score_completions
from tests.support.tiny_models import make_samples
from tests.unit.policy.generation.test_decode_families import TOKENS, generated
from tests.vllm.models import adapter_of

TEMPERATURE = 0.7
BOUND = 1e-3
"""Nats, in float32."""


def long_samples(count: int = 3) -> list[Sample]:
    """Prompts of more than a block of the prefix cache, which begins with their pictures."""
    return [replace(each, prompt=" ".join([each.prompt] * 12)) for each in make_samples()[:count]]


def prepared(policy: Policy, engine: GenerationEngine, samples: Sequence[Sample]) -> list[EncodedPrompt]:
    return [engine.prepared(*each) for each in zip(encode_prompts(policy, samples), samples, strict=True)]


def requests(
    prompts: Sequence[EncodedPrompt], *, seed: int = 0, n: int = 4, tokens: int = 12, temperature: float = TEMPERATURE
) -> list[DecodeRequest]:
    sampling = [
        SamplingParams(temperature=temperature, max_new_tokens=tokens, seed=1000 * seed + i)
        for i in range(len(prompts))
    ]
    return [DecodeRequest(prompt, n, each) for prompt, each in zip(prompts, sampling, strict=True)]


def load(policy: Policy, engine: GenerationEngine, version: int) -> None:
    """The same version on both sides."""
    engine.load(version, adapter_of(policy, version))
    wear(policy, version)


def wear(policy: Policy, version: int) -> None:
    weights = adapter_of(policy, version)
    zero = {name: torch.zeros_like(tensor) for name, tensor in adapter_state(policy.model).items()}
    load_adapter_state(policy.model, weights or zero)


def gap(policy: Policy, prompts: Sequence[EncodedPrompt], outputs: Sequence[GroupOutput]) -> float:
    """Largest |Δ log-prob| to what the learner computes with the weights that it has."""
    tokens = [[c.token_ids for c in output.completions] for output in outputs]
    with torch.no_grad():
        scores = score_completions(policy, prompts, None, tokens, TEMPERATURE, path="naive")
    recorded = torch.cat([c.logprobs for output in outputs for c in output.completions])
    return float((scores.logprobs[scores.mask] - recorded).abs().max())


def says_what_generate_says(policy: Policy, engine: GenerationEngine, prompts: Sequence[EncodedPrompt]) -> None:
    """Greedily, beside samples, under the version that both have."""
    outputs = engine.generate(
        [DecodeRequest(p, 2, SamplingParams(max_new_tokens=TOKENS), greedy_extra=True) for p in prompts]
    )
    expected = [generated(policy, prompt) for prompt in prompts]
    assert [output.greedy.token_ids.tolist() for output in outputs if output.greedy] == expected
    assert all(len(output.completions) == 2 for output in outputs)


def is_of_one_version(
    policy: Policy,
    prompts: Sequence[EncodedPrompt],
    outputs: Sequence[GroupOutput],
    version: int,
    versions: Iterable[int],
) -> None:
    """Samples are those of `version` and of none of the other `versions`; the policy has the last of them then."""
    gaps = {}
    for other in versions:
        wear(policy, other)
        gaps[other] = gap(policy, prompts, outputs)
    assert [other for other, found in gaps.items() if found < BOUND] == [version], gaps
