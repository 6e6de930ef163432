"""Prompts and completions as padded tensors, for learner and scorer; positions, pixels and features with them.

`K` groups or prompts, `P` prompt tokens (left-padded), `N = ΣG` completions in group order, `T` completion tokens
(right-padded).

`collate` makes of a micro-batch's groups what the learner's forward takes. An image appears once a group; a completion
that the plan gives no part in learning (its reward failed) not at all.

Positions: most decoders count them on one axis; Qwen-VL's counts on `A` = 3 (time, height, width), HunYuan-VL's on 4.
A completion that inherits wrong ones raises no error, so both calls of a shared prefix always pass them explicitly.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput

from mmrl_ray.experience.carriers import Completion, EncodedPrompt, PlannedGroup, RolloutGroup, VisionFeatures
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.prompts import PER_TOKEN, encode_prompts
from mmrl_ray.policy.vision import VisionCache, image_inputs, injected, vision_features


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
    return LearnerBatch(
        prompts=prompts,
        features=features,
        completions=[[c.token_ids for c in completions] for completions in kept],
        temperature=temperatures.pop(),
        behaviour_logprobs=policy.place(_padded(flat, lambda c: c.logprobs)),
        reference_logprobs=_reference(policy, flat),
        advantages=policy.place(torch.tensor([p.advantages[i] for _, p in groups for i in p.learned]).float()),
        scales=policy.place(torch.tensor([p.scales[i] for _, p in groups for i in p.learned]).float()),
        mask=policy.place(mask),
        sample_ids=tuple(planned.sample_id for _, planned in groups),
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


def _reference(policy: Policy, flat: Sequence[Completion]) -> torch.Tensor | None:
    have = sum(completion.reference_logprobs is not None for completion in flat)
    if have == 0:
        return None
    if have < len(flat):
        raise ValueError(f"{have} of {len(flat)} completions of a micro-batch carry reference log-probs")
    return policy.place(_padded(flat, lambda c: c.reference_logprobs))


def _padded(flat: Sequence[Completion], of: Callable[[Completion], torch.Tensor | None]) -> torch.Tensor:
    """float32 [N, T], padded with 0."""
    rows = [value.float() for value in map(of, flat) if value is not None]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


@dataclass(frozen=True, slots=True)
class PromptBatch:
    """K prompts, left-padded to P tokens."""

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

    def on(self, policy: Policy) -> PromptBatch:
        """On the policy's device."""
        return PromptBatch(
            input_ids=policy.place(self.input_ids),
            attention_mask=policy.place(self.attention_mask),
            position_ids=policy.place(self.position_ids),
            next_position=policy.place(self.next_position),
            per_token={name: policy.place(value) for name, value in self.per_token.items()},
            generated={name: policy.place(value) for name, value in self.generated.items()},
        )


def pad_prompts(policy: Policy, prompts: Sequence[EncodedPrompt]) -> PromptBatch:
    """Tokens, mask, positions and per-token inputs of K prompts, on the CPU: where things stand is found out there, so
    that a GPU is never asked."""
    width = max(prompt.input_ids.numel() for prompt in prompts)
    input_ids = _left_padded([p.input_ids for p in prompts], width, policy.pad_token_id)
    attention_mask = _left_padded([torch.ones_like(p.input_ids) for p in prompts], width, 0)
    per_token = {
        name: _left_padded([p.model_inputs[name] for p in prompts], width, 0)
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
    """Arguments of a forward without a cache over rows of a prompt and one completion behind it, on its device.

    Args:
        policy: the model.
        batch: K prompts, on the CPU as the other two.
        targets: int64 [K, T], each prompt's completion.
        mask: bool [K, T], True at completion tokens.
    """
    length = targets.shape[1]
    positions = completion_positions(policy, batch.next_position, length)
    arguments = {
        "input_ids": torch.cat([batch.input_ids, targets], dim=1),
        "attention_mask": torch.cat([batch.attention_mask, mask.long()], dim=1),
        "position_ids": torch.cat([batch.position_ids, positions], dim=-1),
        **batch.per_token_with(length),
    }
    return {name: policy.place(value) for name, value in arguments.items()}


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
    inputs = {name: policy.place(value) for name, value in image_inputs(prompts).items() if name in accepted}
    yield {name: value.to(policy.dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def accepted_arguments(policy: Policy) -> Mapping[str, inspect.Parameter]:
    """Named arguments of the model's forward: others would end up deep in the attention, unread."""
    return inspect.signature(policy.core.forward).parameters


def position_axes(policy: Policy) -> int | None:
    """A, the axes on which the decoder counts positions (M-RoPE); None where it is the one that all know."""
    if not hasattr(policy.core, "get_rope_index"):
        return None
    rope = getattr(policy.hf_model.config.get_text_config(), "rope_parameters", None) or {}
    return len(rope.get("mrope_section") or (0, 0, 0))


def prompt_positions(
    policy: Policy, prompts: Sequence[EncodedPrompt], attention_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of left-padded prompts, and of the token after each, as `generate` makes them of each alone.

    Args:
        policy: whose decoder counts.
        prompts: K of them.
        attention_mask: int64 [K, P] of the padded batch, 1 where a token is real.

    Returns:
        position ids [K, P] or [A, K, P], and the next position [K], on the CPU as the mask.
    """
    if position_axes(policy) is None:
        return (attention_mask.cumsum(dim=-1) - 1).clamp_min(0), attention_mask.sum(dim=-1)
    width = attention_mask.shape[1]
    # One by one: HunYuan-VL numbers pictures on through a batch. A batch may hold a prompt several times.
    made = {id(prompt): _laid_out(policy, prompt) for prompt in prompts}
    rows = [made[id(prompt)][0] for prompt in prompts]
    positions = torch.stack([nn.functional.pad(row, (width - row.shape[1], 0)) for row in rows], dim=1)
    return positions, torch.tensor([made[id(prompt)][1] for prompt in prompts])


def completion_positions(policy: Policy, start: torch.Tensor, length: int) -> torch.Tensor:
    """Positions of `length` completion tokens whose first stands at `start` [N]: [N, length] or [A, N, length]."""
    positions = start[:, None] + torch.arange(length, device=start.device)
    axes = position_axes(policy)
    return positions if axes is None else positions.expand(axes, -1, -1)


def _laid_out(policy: Policy, prompt: EncodedPrompt) -> tuple[torch.Tensor, int]:
    """Positions int64 [A, tokens] of one prompt, and the next one."""
    ids = prompt.input_ids[None]
    # Which inputs a family lays its pictures out by is its own affair: grids for most, sizes of tiles for MiniCPM-V.
    named = inspect.signature(policy.core.get_rope_index).parameters
    inputs = {n: value[None] if n in PER_TOKEN else value for n, value in prompt.model_inputs.items() if n in named}
    positions, ahead = policy.core.get_rope_index(ids, attention_mask=torch.ones_like(ids), **inputs)
    return positions[:, 0], ids.shape[1] + int(ahead)
