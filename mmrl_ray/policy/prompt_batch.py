"""Prompts as one left-padded batch, and what every forward of them needs beside tokens: positions, pixels or features.

`K` prompts, `P` prompt tokens (left-padded), `T` completion tokens (right-padded).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput

from mmrl_ray.experience.carriers import EncodedPrompt, VisionFeatures
from mmrl_ray.policy.load import Policy
from mmrl_ray.policy.positions import completion_positions, prompt_positions
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
    generated: Mapping[str, torch.Tensor]
    """[K, 1] each: what `generate` gives for a token that it adds behind the prompt, by the names of `per_token`.
    It is more than padding: PaliGemma lets tokens of type 0, its prompt's, see everything before and after them."""

    def per_token_with(self, length: int) -> dict[str, torch.Tensor]:
        """[K, P + length] each: `per_token` of rows that have `length` completion tokens behind the prompt."""
        return {
            name: torch.cat([value, self.generated[name].expand(-1, length)], dim=1)
            for name, value in self.per_token.items()
        }


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
    taken = {name: value for name, value in per_token.items() if name in accepted}
    return PromptBatch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        next_position=next_position,
        per_token=taken,
        generated=_of_a_generated_token(policy, taken, input_ids) if taken else {},
    )


def row_arguments(
    policy: Policy, batch: PromptBatch, targets: torch.Tensor, mask: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Arguments of a forward without a cache over rows of a prompt and one completion behind it.

    Args:
        policy: the model.
        batch: K prompts.
        targets: int64 [K, T], each prompt's completion.
        mask: bool [K, T], True at completion tokens.
    """
    length = targets.shape[1]
    positions = completion_positions(policy, batch.next_position, length)
    return {
        "input_ids": torch.cat([batch.input_ids, targets], dim=1),
        "attention_mask": torch.cat([batch.attention_mask, mask.long()], dim=1),
        "position_ids": torch.cat([batch.position_ids, positions], dim=-1),
        **batch.per_token_with(length),
    }


def _of_a_generated_token(
    policy: Policy, per_token: Mapping[str, torch.Tensor], input_ids: torch.Tensor
) -> dict[str, torch.Tensor]:
    """[K, 1] each: what the model's own generation loop gives a new token.

    It goes on from the prompt's last token that is text: some loops repeat the last value, and a completion is no part
    of a picture that happens to end the prompt. What the loop does not carry on is 0, text, in all models that take it.
    """
    last = (input_ids != policy.placeholder_id).long().cumsum(dim=1).argmax(dim=1, keepdim=True)
    before = {name: value.gather(1, last) for name, value in per_token.items()}
    after = policy.hf_model._update_model_kwargs_for_generation(  # type: ignore[operator]
        ModelOutput(), dict(before), is_encoder_decoder=False, num_new_tokens=1
    )
    return {
        name: after[name][:, 1:] if after[name].shape[1] == 2 else torch.zeros_like(value)
        for name, value in before.items()
    }


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
