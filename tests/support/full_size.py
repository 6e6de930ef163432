"""A step of a config at full size, by fake tensors (`counted.py`): a model in the shape of Qwen2.5-VL-3B.

All layers do the same but the first and the last, so two short models are counted and what a further layer adds is
added for each that is missing.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch

from mmrl_ray.config import Config
from mmrl_ray.experience.carriers import EncodedPrompt, SamplingParams, VisionFeatures
from mmrl_ray.learner.step import LearnerStep
from mmrl_ray.planning.estimate import PROCESS, batch_plan, learner_memory, rollout_memory
from mmrl_ray.policy.generation.decode import Decoder
from mmrl_ray.policy.lora.adapter import add_adapter, reference_policy
from mmrl_ray.policy.memory import ModelShape, model_shape
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.prompts import encode_prompts
from mmrl_ray.policy.scoring.packed import checkpoint_layers
from mmrl_ray.policy.scoring.prefix import ScorePath, score_completions
from tests.support import qwen_3b
from tests.support.counted import Counted, fake, fake_tensor

Figures = dict[str, dict[str, int]]
PICTURE = {"width": 644, "height": 476}
"""Of 391 tokens: a photograph of COCO."""
_COUNTED = (3, 4)
"""Layers of the two models."""


def count(cfg: Config, layers: int, device: str) -> Figures:
    """All figures of a model of so many layers; `device` names whose acceleration it gets.

    Of "meta", which has none, a learner keeps more than one under autocast, which is `policy/cuda.py`'s affair, does:
    PEFT casts what an adapted layer takes in to the adapter's float32, and autograd keeps that. Of the 3 B shape and 4
    groups it is 0.74 GiB a layer, about half of it in float32; under autocast 0.53.
    """
    few, more = (_count(cfg, number, device) for number in _COUNTED)
    return {
        name: {key: value + (layers - _COUNTED[0]) * (more[name][key] - value) for key, value in figures.items()}
        for name, figures in few.items()
    }


def shape_of(cfg: Config, layers: int) -> ModelShape:
    """What the estimate is made from."""
    policy = qwen_3b.make_policy("meta", torch.bfloat16, {"text": {"num_hidden_layers": layers}})
    return model_shape(policy.hf_model, cfg.model.lora, policy.dtype)


def estimates(cfg: Config, layers: int, found: Figures) -> dict[str, tuple[int, int]]:
    """Bytes of a learner and of a rollout worker at their peak: what the dry run says, and what was counted.

    What a process has beside its tensors and what was cached of other pictures is in neither.
    """
    shape = shape_of(cfg, layers)
    policy = qwen_3b.make_policy("meta", torch.bfloat16, qwen_3b.SMALL)
    prompt, image_tokens = prompt_of(policy)
    tokens = prompt.input_ids.numel()
    learner = learner_memory(cfg, shape, batch_plan(cfg, tokens), tokens, image_tokens)
    rollout = rollout_memory(cfg, shape, tokens, image_tokens, images=0)
    merged = shape.adapted_parameters * shape.itemsize
    weights = found["weights"]["bytes"]
    sampling = found["decode step, adapter merged"]["peak_bytes"]
    pictures = rollout["vision features"]  # made outside of what was counted
    return {
        "learner": (sum(learner.values()) - PROCESS, weights + found["learner"]["peak_bytes"]),
        "rollout": (
            sum(rollout.values()) - PROCESS,
            weights + merged + pictures + max(sampling, found["reference"]["peak_bytes"]),
        ),
    }


def prompt_of(policy: Policy) -> tuple[EncodedPrompt, int]:
    """A prompt, and how many of its tokens are a picture's."""
    (prompt,) = encode_prompts(policy, qwen_3b.samples(1, **PICTURE))
    return prompt, int((prompt.input_ids == policy.placeholder_id).sum())


def _count(cfg: Config, layers: int, device: str) -> Figures:
    policy, prompt, features = make(cfg, {"text": {"num_hidden_layers": layers}}, device)
    found = {"weights": {"bytes": sum(p.nbytes for p in policy.model.parameters())}}
    groups = min(cfg.rollout.groups_per_assignment, cfg.learner.groups_per_step)
    for name, without in (("decode step", False), ("decode step, adapter merged", True)):
        found[name] = decode_step(policy, prompt, features, groups, cfg, without_adapter=without)
    found["reference"] = reference_scores(policy, prompt, features, groups, cfg)
    return {**found, "learner": learner_step(policy, prompt, features, cfg)}


def make(cfg: Config, sizes: dict[str, dict[str, int]], device: str) -> tuple[Policy, EncodedPrompt, VisionFeatures]:
    """A fake policy with its adapter, a prompt, and the prompt's features."""
    policy = qwen_3b.make_policy("meta", torch.bfloat16, sizes, accelerated_for=device)
    add_adapter(policy, cfg.model.lora, 0)
    fake(policy)
    prompt, tokens = prompt_of(policy)
    return policy, prompt, VisionFeatures(fake_tensor((tokens, policy.hidden_size), policy.dtype))


def decode_step(
    policy: Policy,
    prompt: EncodedPrompt,
    features: VisionFeatures,
    groups: int,
    cfg: Config,
    *,
    without_adapter: bool,
) -> dict[str, int]:
    """Of `groups` × G rows: kernels of one token each, and the peak beside the weights, prompts included."""
    with Counted() as counted, reference_policy(policy.model) if without_adapter else nullcontext():
        decoder = Decoder(policy)
        for seed in range(groups):
            sampling = SamplingParams(max_new_tokens=cfg.rollout.max_new_tokens, seed=seed)
            decoder.admit(prompt, cfg.rollout.group_size, sampling, features=features)
        decoder.step()  # the prompts
        decoder.step()
        peak = counted.peak_bytes
        counted.restart()
        decoder.step()
        return {"kernels": counted.kernels, "peak_bytes": max(peak, counted.peak_bytes)}


def learner_step(policy: Policy, prompt: EncodedPrompt, features: VisionFeatures, cfg: Config) -> dict[str, int]:
    """One update over as many groups as one micro-batch takes: kernels, what a forward pass keeps for its backward
    pass, and the peak beside the weights, optimiser and gradients included."""
    size, tokens = cfg.rollout.group_size, cfg.rollout.max_new_tokens
    if cfg.learner.gradient_checkpointing:
        checkpoint_layers(policy)
    path: ScorePath = "packed" if cfg.learner.wants_packed_rows else "shared_prefix"
    count = groups_of_a_micro_batch(prompt, cfg)
    (sample,) = qwen_3b.samples(1, **PICTURE)
    groups = qwen_3b.groups_of(sample, [prompt] * count, features, size=size, tokens=tokens)
    plan = qwen_3b.plan_of(groups, cfg.learner)
    with Counted() as forward:
        completions = [[c.token_ids for c in group.completions] for group in groups]
        scores = score_completions(policy, [prompt] * count, [features] * count, completions, 1.0, path=path)
        kept = forward.live_bytes
    del scores
    with Counted() as counted:
        learner = LearnerStep(policy, cfg.learner, path=path)
        learner.run(plan, lambda planned: [group.payload for group in planned])
        return {"kernels": counted.kernels, "kept_bytes": kept, "peak_bytes": counted.peak_bytes}


def groups_of_a_micro_batch(prompt: EncodedPrompt, cfg: Config) -> int:
    """At least one."""
    each = prompt.input_ids.numel() + cfg.rollout.group_size * cfg.rollout.max_new_tokens
    return max(1, cfg.learner.micro_batch_tokens // each)


def reference_scores(
    policy: Policy, prompt: EncodedPrompt, features: VisionFeatures, groups: int, cfg: Config
) -> dict[str, int]:
    """Of one assignment, beside the weights."""
    completions = [[torch.ones(cfg.rollout.max_new_tokens, dtype=torch.int64)] * cfg.rollout.group_size] * groups
    with reference_policy(policy.model), torch.no_grad(), Counted() as counted:
        score_completions(policy, [prompt] * groups, [features] * groups, completions, 1.0)
        return {"kernels": counted.kernels, "peak_bytes": counted.peak_bytes}
