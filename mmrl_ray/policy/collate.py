"""Groups of a micro-batch to what the learner's forward takes.

`K` groups, `N = ΣG` completions in group order, `T` tokens of the longest. An image appears once a group; a completion
that the plan gives no part in learning (its reward failed) not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from mmrl_ray.experience.carriers import (
    Completion,
    EncodedPrompt,
    PlannedGroup,
    RolloutGroup,
    VisionFeatures,
)
from mmrl_ray.policy.load import Policy
from mmrl_ray.policy.prompts import encode_prompts
from mmrl_ray.policy.vision import VisionCache, vision_features


@dataclass(frozen=True, slots=True)
class LearnerBatch:
    """One micro-batch. `prompts`, `features`, `completions` and `temperature` are `score_completions`' arguments."""

    prompts: list[EncodedPrompt]
    features: list[VisionFeatures]
    completions: list[list[torch.Tensor]]
    """K groups of int64 [T]."""
    temperature: float
    behaviour_logprobs: torch.Tensor
    """float32 [N, T], of the policy that sampled; 0 where `mask` is False."""
    reference_logprobs: torch.Tensor | None
    """float32 [N, T], or None when the run has no KL term."""
    advantages: torch.Tensor
    """float32 [N]."""
    scales: torch.Tensor
    """float32 [N], per-token weight of each completion before the step's denominator."""
    mask: torch.Tensor
    """bool [N, T], True at completion tokens."""
    sample_ids: tuple[str, ...]
    """[K], for messages."""
    vision_shipped: int
    """Groups whose vision features came with them."""
    vision_recomputed: int
    """Groups whose vision features were made here (or taken from this process's cache)."""


def collate(
    policy: Policy, groups: Sequence[tuple[RolloutGroup, PlannedGroup]], cache: VisionCache | None = None
) -> LearnerBatch:
    """Tensors of a micro-batch, on the policy's device.

    Raises:
        ValueError: there is no group, a payload does not fit its plan, temperatures differ, or only some completions
            carry reference log-probs.
    """
    if not groups:
        raise ValueError("a micro-batch without groups")
    for payload, planned in groups:
        _check(payload, planned)
    temperatures = {payload.sampling.temperature for payload, _ in groups}
    if len(temperatures) > 1:
        raise ValueError(f"groups of one micro-batch were sampled at temperatures {sorted(temperatures)}")
    payloads = [payload for payload, _ in groups]
    prompts, features, recomputed = prompts_and_features(policy, payloads, cache)
    kept = [[payload.completions[i] for i in planned.learned] for payload, planned in groups]
    flat = [completion for completions in kept for completion in completions]
    lengths = torch.tensor([completion.token_ids.numel() for completion in flat])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    device = policy.device
    return LearnerBatch(
        prompts=prompts,
        features=features,
        completions=[[c.token_ids for c in completions] for completions in kept],
        temperature=temperatures.pop(),
        behaviour_logprobs=_padded(flat, lambda c: c.logprobs).to(device),
        reference_logprobs=_reference(flat, device),
        advantages=torch.tensor([p.advantages[i] for _, p in groups for i in p.learned]).to(device, torch.float32),
        scales=torch.tensor([p.scales[i] for _, p in groups for i in p.learned]).to(device, torch.float32),
        mask=mask.to(device),
        sample_ids=tuple(planned.sample_id for _, planned in groups),
        vision_shipped=len(groups) - recomputed,
        vision_recomputed=recomputed,
    )


def _check(payload: RolloutGroup, planned: PlannedGroup) -> None:
    lengths = tuple(completion.token_ids.numel() for completion in payload.completions)
    if lengths != tuple(planned.completion_tokens) or not lengths:
        raise ValueError(
            f"group of sample {planned.sample_id!r} has completions of {lengths} tokens, "
            f"its plan says {tuple(planned.completion_tokens)}"
        )
    if len(planned.advantages) != len(lengths) or len(planned.scales) != len(lengths):
        raise ValueError(
            f"group of sample {planned.sample_id!r} has {len(lengths)} completions, {len(planned.advantages)} "
            f"advantages and {len(planned.scales)} scales"
        )


def prompts_and_features(
    policy: Policy, payloads: Sequence[RolloutGroup], cache: VisionCache | None
) -> tuple[list[EncodedPrompt], list[VisionFeatures], int]:
    """Prompts, features, and how many of the features did not come with their group."""
    shippable = policy.inject_vision and not policy.vision_trainable
    shipped = {i: p.vision for i, p in enumerate(payloads) if shippable and p.vision is not None}
    prompts = [payload.prompt for payload in payloads]
    missing = [i for i in range(len(payloads)) if i not in shipped]
    for i in missing:
        # Groups may travel without their pixels: the picture itself is smaller.
        if not any(name.startswith("pixel") for name in prompts[i].model_inputs):
            prompts[i] = encode_prompts(policy, [payloads[i].sample])[0]
    made = dict(zip(missing, vision_features(policy, [prompts[i] for i in missing], cache), strict=True))
    return prompts, [shipped[i] if i in shipped else made[i] for i in range(len(payloads))], len(missing)


def _reference(flat: Sequence[Completion], device: torch.device) -> torch.Tensor | None:
    have = sum(completion.reference_logprobs is not None for completion in flat)
    if have == 0:
        return None
    if have < len(flat):
        raise ValueError(f"{have} of {len(flat)} completions of a micro-batch carry reference log-probs")
    return _padded(flat, lambda c: c.reference_logprobs).to(device)


def _padded(flat: Sequence[Completion], of: Callable[[Completion], torch.Tensor | None]) -> torch.Tensor:
    """float32 [N, T], padded with 0."""
    rows = [value.float() for value in map(of, flat) if value is not None]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)
