"""Prompts as one left-padded batch, and what every forward of them needs beside tokens: positions, pixels or features.

`K` prompts, `P` prompt tokens (left-padded).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mmrl_ray.experience.carriers import EncodedPrompt, VisionFeatures
from mmrl_ray.policy.load import Policy
from mmrl_ray.policy.positions import prompt_positions
from mmrl_ray.policy.prompts import PER_TOKEN
from mmrl_ray.policy.vision import image_inputs, injected


@dataclass(frozen=True, slots=True)
class PromptBatch:
    """K prompts on the policy's device, left-padded to P tokens."""

    input_ids: torch.Tensor
    """int64 [K, P]."""
    attention_mask: torch.Tensor
    """int64 [K, P], 1 where a token is real."""
    position_ids: torch.Tensor
    """int64 [K, P] or [A, K, P], see `positions`."""
    next_position: torch.Tensor
    """int64 [K], of the first completion token."""
    per_token: Mapping[str, torch.Tensor]
    """[K, P] each: what the model's forward takes for every token, such as `token_type_ids`."""


def pad_prompts(policy: Policy, prompts: Sequence[EncodedPrompt]) -> PromptBatch:
    """Tokens, mask, positions and per-token inputs of K prompts."""
    width = max(prompt.input_ids.numel() for prompt in prompts)
    input_ids = _left_padded([p.input_ids for p in prompts], width, policy.pad_token_id).to(policy.device)
    attention_mask = _left_padded([torch.ones_like(p.input_ids) for p in prompts], width, 0).to(policy.device)
    per_token = {
        name: _left_padded([p.model_inputs[name] for p in prompts], width, 0).to(policy.device)
        for name in PER_TOKEN
        if name in prompts[0].model_inputs
    }
    position_ids, next_position = prompt_positions(policy, prompts, attention_mask)
    accepted = accepted_arguments(policy)
    return PromptBatch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        next_position=next_position,
        per_token={name: value for name, value in per_token.items() if name in accepted},
    )


def _left_padded(rows: Sequence[torch.Tensor], width: int, value: int) -> torch.Tensor:
    return torch.stack([nn.functional.pad(row, (width - row.numel(), 0), value=value) for row in rows])


@contextmanager
def vision_arguments(
    policy: Policy, prompts: Sequence[EncodedPrompt], features: Sequence[VisionFeatures] | None
) -> Iterator[dict[str, Any]]:
    """Within it, a forward with the yielded arguments takes the features, or runs the vision tower on the pixels."""
    if features is not None and policy.inject_vision:
        with injected(policy, features) as arguments:
            yield arguments
        return
    accepted = accepted_arguments(policy)
    inputs = {name: value.to(policy.device) for name, value in image_inputs(prompts).items() if name in accepted}
    yield {name: value.to(policy.dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def accepted_arguments(policy: Policy) -> Mapping[str, inspect.Parameter]:
    """Named arguments of the model's forward: others would end up deep in the attention, unread."""
    return inspect.signature(policy.core.forward).parameters


def output_head(policy: Policy) -> nn.Module:
    """What makes logits [.., V] of hidden states [.., d]."""
    return policy.hf_model.get_output_embeddings()
