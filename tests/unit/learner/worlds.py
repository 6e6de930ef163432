"""A tiny policy, groups that it never sampled, and what plain transformers and autograd say about a step of them."""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from mmrl_ray.config.learner import LearnerSection
from mmrl_ray.config.sections import LoraSection, ModelSection
from mmrl_ray.data.samples import Sample
from mmrl_ray.experience.carriers import (
    Completion,
    GroupKey,
    PlannedGroup,
    RewardBreakdown,
    RewardFailure,
    RolloutGroup,
    SamplingParams,
    ScoredGroup,
    StepPlan,
)
from mmrl_ray.experience.plan import build_step_plan
from mmrl_ray.policy.load import load_policy
from mmrl_ray.policy.lora.adapter import add_adapter
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.prompts import encode_prompts
from mmrl_ray.policy.tiny import build_tiny_llava

WORDS = [f"w{i}" for i in range(24)]
TEMPERATURE = 0.7
MAX_NEW_TOKENS = 8
LENGTHS = ((3, 1, 6, 4), (2, 8, 5, 1), (4, 4, 7, 2))


def tiny_folder(folder: Path) -> Path:
    return build_tiny_llava(
        folder,
        vocabulary=WORDS,
        image_size=16,
        patch_size=8,
        hidden=32,
        layers=2,
        heads=2,
        vision_hidden=16,
        vision_layers=1,
        vision_heads=2,
        context_length=64,
    )


def make_policy(folder: Path, *, fresh: bool = False, dtype: Literal["float32", "bfloat16"] = "float32") -> Policy:
    """With an adapter that does something already (unless `fresh`), so that every gradient is other than 0."""
    return copy.deepcopy(_policy(folder, fresh, dtype))


@functools.cache
def _policy(folder: Path, fresh: bool, dtype: Literal["float32", "bfloat16"]) -> Policy:
    policy = load_policy(ModelSection(path=str(folder), dtype=dtype), device="cpu")
    model = add_adapter(policy, LoraSection(r=4, alpha=8.0), seed=0)
    if not fresh:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return policy


def sample(index: int) -> Sample:
    pixels = np.random.default_rng(index).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    prompt = " ".join(WORDS[: 1 + index % 3])  # of different lengths, so that prompts are padded
    return Sample(id=f"s{index}", images=(buffer.getvalue(),), prompt=prompt, references=("w1 w2",))


def reference_logprobs(policy: Policy, group: RolloutGroup, tokens: torch.Tensor) -> torch.Tensor:
    """log π of one completion by the model's own forward on one whole row; nothing padded, shared or injected."""
    prompt = encode_prompts(policy, [group.sample])[0]
    row = torch.cat([prompt.input_ids, tokens])[None]
    logits = policy.model(input_ids=row, pixel_values=prompt.model_inputs["pixel_values"], use_cache=False).logits[0]
    logits = logits[prompt.input_ids.numel() - 1 : -1] / TEMPERATURE
    forbidden = torch.zeros(logits.shape[-1], dtype=torch.bool)
    forbidden[list(policy.image_token_ids)] = True
    logits = logits.masked_fill(forbidden, float("-inf"))
    return torch.log_softmax(logits, dim=-1)[torch.arange(tokens.numel()), tokens]


def make_groups(
    policy: Policy, *, lengths: Sequence[Sequence[int]] = LENGTHS, noise: float = 0.0, reference: bool = True
) -> list[RolloutGroup]:
    """One group for each entry of `lengths`: random tokens, μ = π times lognormal `noise`, π_ref some way off."""
    generator = torch.Generator().manual_seed(5)
    allowed = [i for i in range(policy.vocab_size) if i not in policy.image_token_ids]
    groups = []
    for index, sizes in enumerate(lengths):
        bare = RolloutGroup(
            sample=sample(index),
            prompt=encode_prompts(policy, [sample(index)])[0],
            completions=(),
            policy_version=0,
            sampling=SamplingParams(temperature=TEMPERATURE, max_new_tokens=MAX_NEW_TOKENS),
        )
        completions = []
        for size in sizes:
            tokens = torch.tensor(allowed)[torch.randint(len(allowed), (size,), generator=generator)]
            with torch.no_grad():
                logprobs = reference_logprobs(policy, bare, tokens)
            shift = noise * torch.randn(size, generator=generator)
            off = 0.3 * torch.randn(size, generator=generator)
            completions.append(
                Completion(
                    token_ids=tokens,
                    logprobs=logprobs + shift,
                    text="",
                    finish_reason="stop",
                    reference_logprobs=logprobs + off if reference else None,
                )
            )
        groups.append(replace(bare, completions=tuple(completions)))
    return groups


def make_rewards(groups: Sequence[RolloutGroup]) -> np.ndarray:
    return np.random.default_rng(3).uniform(0, 1, (len(groups), len(groups[0].completions)))


def make_plan(
    groups: Sequence[RolloutGroup],
    cfg: LearnerSection,
    *,
    step: int = 0,
    world_size: int = 1,
    rewards: np.ndarray | None = None,
    staleness: int = 1,
) -> StepPlan:
    """Stale by default: what `make_groups` makes was sampled from no policy that learns.

    With a NaN in the place of a completion's reward it has none.
    """
    rewards = make_rewards(groups) if rewards is None else rewards
    scored = [
        ScoredGroup(
            key=GroupKey(step, i),
            sample_id=group.sample.id,
            policy_version=step - staleness,
            prompt_tokens=group.prompt.input_ids.numel(),
            completion_tokens=tuple(c.token_ids.numel() for c in group.completions),
            rewards=tuple(
                RewardFailure("NaN") if np.isnan(r) else RewardBreakdown(float(r), {"r": float(r)}, {"r": 1.0})
                for r in rewards[i]
            ),
            greedy_reward=RewardBreakdown(0.4, {"r": 0.4}, {"r": 1.0}),
            kl1=tuple(
                float((c.logprobs - c.reference_logprobs).sum()) if c.reference_logprobs is not None else 0.0
                for c in group.completions
            ),
            payload=group,
        )
        for i, group in enumerate(groups)
    ]
    return build_step_plan(step, scored, learner=cfg, max_new_tokens=MAX_NEW_TOKENS, world_size=world_size)


def payloads(planned: Sequence[PlannedGroup]) -> list[RolloutGroup]:
    return [group.payload for group in planned]


def gradient(policy: Policy) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.requires_grad and p.grad is not None])


def weights(policy: Policy) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in policy.model.parameters() if p.requires_grad])


@dataclass(frozen=True)
class Truth:
    """A step as its formulas say, in one batch, by plain autograd."""

    loss: float
    policy: float
    kl: float
    gradient: torch.Tensor
    logprobs: list[list[torch.Tensor]]


def truth(
    policy: Policy,
    groups: Sequence[RolloutGroup],
    cfg: LearnerSection,
    rewards: np.ndarray,
    proximal: Sequence[Sequence[torch.Tensor]] | None = None,
) -> Truth:
    """Loss and gradient of a step; `proximal` log-probs by group and completion, or π_θ itself."""
    totals = rewards.copy()
    if cfg.kl.estimator == "k1":
        for i, group in enumerate(groups):
            for j, c in enumerate(group.completions):
                assert c.reference_logprobs is not None
                totals[i, j] -= cfg.kl.weight * float((c.logprobs.double() - c.reference_logprobs.double()).sum())
    advantages = _advantages(cfg, totals)
    lengths = [[c.token_ids.numel() for c in group.completions] for group in groups]
    count = sum(len(row) for row in lengths)
    policy_sum, kl_sum = torch.zeros(()), torch.zeros(())
    logprobs = []
    for i, group in enumerate(groups):
        logprobs.append([reference_logprobs(policy, group, c.token_ids) for c in group.completions])
        for j, completion in enumerate(group.completions):
            theta = logprobs[i][j]
            prox = theta.detach() if proximal is None else proximal[i][j].detach()
            terms = _token_losses(cfg, theta, prox, completion.logprobs, float(advantages[i, j]))
            scale = 1.0 / lengths[i][j] if cfg.aggregation == "sequence_mean" else 1.0
            policy_sum = policy_sum + scale * terms.sum()
            if cfg.kl.weight and cfg.kl.estimator != "k1":
                assert completion.reference_logprobs is not None
                d = theta - completion.reference_logprobs
                kl = 0.5 * d**2 if cfg.kl.estimator == "k2" else torch.exp(-d) - 1 + d
                kl_sum = kl_sum + scale * kl.sum()
    denominator = {
        "token_mean": sum(map(sum, lengths)),
        "sequence_mean": count,
        "sequence_sum": count,
        "constant": count * MAX_NEW_TOKENS,
    }[cfg.aggregation]
    policy_term, kl_term = policy_sum / denominator, cfg.kl.weight * kl_sum / denominator
    loss = policy_term + kl_term
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    flat = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
    return Truth(
        loss.item(), policy_term.item(), float(kl_term.detach()), flat, [[t.detach() for t in g] for g in logprobs]
    )


def _advantages(cfg: LearnerSection, rewards: np.ndarray) -> np.ndarray:
    if cfg.advantage == "none":
        return rewards
    if cfg.advantage == "batch_mean":
        return rewards - rewards.mean()
    if cfg.advantage == "greedy":
        return rewards - 0.4
    if cfg.advantage == "leave_one_out":
        others = (rewards.sum(axis=1, keepdims=True) - rewards) / (rewards.shape[1] - 1)
        return rewards - others
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    return centred / np.maximum(rewards.std(axis=1, ddof=1, keepdims=True), 1e-12) if cfg.advantage_std else centred


def _token_losses(
    cfg: LearnerSection, theta: torch.Tensor, prox: torch.Tensor, mu: torch.Tensor, advantage: float
) -> torch.Tensor:
    low, high = 1 - cfg.clip_low, 1 + cfg.clip_high
    if cfg.loss == "reward_guided":
        return -torch.clamp(torch.exp(theta.detach() - mu), max=cfg.off_policy_cap) * advantage * theta
    off_policy = torch.clamp(torch.exp(prox - mu), max=cfg.off_policy_cap)
    ratio = torch.exp(theta - prox)
    if cfg.loss == "gspo":  # the sequence form, spread evenly over the tokens: for `sequence_mean` only
        off_policy = torch.clamp(torch.exp((prox - mu).mean()), max=cfg.off_policy_cap)
        ratio = torch.exp((theta - prox).mean()).expand(theta.shape)
    if cfg.loss == "cispo":
        return -torch.clamp(ratio, low, high).detach() * off_policy * advantage * theta
    surrogate = torch.minimum(ratio * advantage, torch.clamp(ratio, low, high) * advantage)
    return -surrogate * off_policy
