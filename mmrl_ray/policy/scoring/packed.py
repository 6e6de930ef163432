"""A prompt and its completions as one row: one forward call and no cache, where a prefix cache cannot be had.

Gradient checkpointing drops the cache, and FSDP2 shards a layer again after the first of two calls. So:

    prompt | completion 1 | completion 2 | … | completion G        one row a group, R = P + S tokens

Prompt tokens see of the prompt what the model's own mask says, up to themselves in most models, both ways in pictures
(Gemma 3) or everywhere (PaliGemma) in some. A completion's tokens see the whole prompt and their own completion up to
themselves, and are blind to the other completions. Positions start again at the end of the prompt for each of them.

`K` groups, `P` prompt tokens (left-padded), `S` completion tokens of the longest row (right-padded), `N = ΣG`
completions, `T` tokens of the longest, `d` hidden width. No completion's last token is in the row: it predicts nothing.

**Gradient checkpointing** (`checkpoint_layers`): a layer's activations are made again in the backward pass instead of
being kept. What stays of a layer is its input: of a token, one hidden state instead of some 8 and the width of the MLP
four times. It costs a second forward pass, and the prefix cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_layers import GradientCheckpointingLayer

from mmrl_ray.errors import ModelError
from mmrl_ray.experience.carriers import EncodedPrompt, VisionFeatures
from mmrl_ray.policy.lora.variants import has_dropout
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.scoring.collate import PromptBatch, completion_positions, pad_prompts, vision_arguments

_MASKED_ATTENTION = ("sdpa", "eager")
_FULL, _SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, slots=True)
class _Places:
    """Where each token of a row belongs; [K, R] each."""

    segment: torch.Tensor
    """int64: 0 the prompt, 1 … G a completion, −1 padding."""
    order: torch.Tensor
    """int64: the token's index in the row that its completion would make alone behind the prompt."""

    def on(self, policy: Policy) -> _Places:
        """On the policy's device."""
        return _Places(policy.place(self.segment), policy.place(self.order))


def unpackable(policy: Policy) -> str | None:
    """Why this model's attention cannot be told who sees whom, or None."""
    config = policy.hf_model.config.get_text_config()
    attention = policy.attention
    if attention not in _MASKED_ATTENTION:
        return f"attn_implementation={attention} takes no mask of its own; set model.attn_implementation: sdpa"
    for i, kind in enumerate(getattr(config, "layer_types", None) or ()):
        if kind not in (_FULL, _SLIDING):
            return f"layer {i} is a {kind} layer, in which completions of one row would see each other"
    return None


def packed_rows(
    policy: Policy,
    prompts: Sequence[EncodedPrompt],
    features: Sequence[VisionFeatures] | None,
    index: torch.Tensor,
    targets: torch.Tensor,
    mask: torch.Tensor,
) -> torch.Tensor:
    """Hidden states [N, T, d] that predict `targets`; 0 where `mask` is False.

    Args:
        policy: the model.
        prompts: K of them.
        features: K of them, or None to run the vision tower inside.
        index: int64 [N] on the CPU, as the other two; the prompt of each completion, ascending.
        targets: int64 [N, T].
        mask: bool [N, T], True at completion tokens.

    Raises:
        ModelError: the model's attention cannot take such rows (`unpackable`).
    """
    reason = unpackable(policy)
    if reason is not None:
        raise ModelError(f"{policy.path}: prompt and completions cannot share a row: {reason}")
    batch = pad_prompts(policy, prompts)
    width = batch.input_ids.shape[1]
    # A completion's inputs are its tokens but the last: those behind which a target stands.
    inside = mask[:, 1:]
    packed = _packed_columns(index, inside, len(prompts))
    length = packed.shape[1]
    tokens = _pack(targets[:, :-1], inside, packed, policy.pad_token_id)
    positions = _pack(completion_positions(policy, batch.next_position[index], inside.shape[1]), inside, packed, 0)
    places = _places(batch, index, inside, packed)
    on_device = batch.on(policy)
    with vision_arguments(policy, prompts, features) as vision:
        output = policy.core(
            input_ids=policy.place(torch.cat([batch.input_ids, tokens], dim=1)),
            attention_mask=_attention(policy, on_device, places.on(policy), width + inside.shape[1]),
            position_ids=policy.place(torch.cat([batch.position_ids, positions], dim=-1)),
            use_cache=False,
            **on_device.per_token_with(length),
            **vision,
        )
    hidden = output.last_hidden_state
    rows = hidden.new_zeros(*targets.shape, hidden.shape[-1])
    rows[:, 0] = hidden[:, width - 1][policy.place(index)]
    # One order for both (`_packed_columns`). Places instead of the masks: those would wait for a GPU to count them.
    to_row, to_column = map(policy.place, inside.nonzero(as_tuple=True))
    group, column = map(policy.place, packed.nonzero(as_tuple=True))
    rows[:, 1:][to_row, to_column] = hidden[:, width:][group, column]
    return rows


def _packed_columns(index: torch.Tensor, inside: torch.Tensor, groups: int) -> torch.Tensor:
    """bool [K, S]: the columns behind each prompt that hold a token; they fill from the left.

    Row-major, its True entries are those of `inside`: one order for both, so that masked copies go either way.
    """
    lengths = torch.zeros(groups, dtype=torch.int64).index_add_(0, index, inside.sum(dim=1))
    return torch.arange(int(lengths.max())) < lengths[:, None]


def _pack(values: torch.Tensor, inside: torch.Tensor, packed: torch.Tensor, padding: int) -> torch.Tensor:
    """[.., N, T − 1] → [.., K, S]."""
    out = values.new_full((*values.shape[:-2], *packed.shape), padding)
    out[..., packed] = values[..., inside]
    return out


def _places(batch: PromptBatch, index: torch.Tensor, inside: torch.Tensor, packed: torch.Tensor) -> _Places:
    groups, width = batch.input_ids.shape
    numbers = torch.arange(1, len(index) + 1)[:, None].expand(inside.shape)
    steps = torch.arange(width, width + inside.shape[1]).expand(inside.shape)
    prompt_order = torch.arange(width).expand(groups, width)
    return _Places(
        segment=torch.cat([batch.attention_mask - 1, _pack(numbers, inside, packed, -1)], dim=1),
        order=torch.cat([prompt_order, _pack(steps, inside, packed, width)], dim=1),
    )


def _attention(
    policy: Policy, batch: PromptBatch, places: _Places, longest: int
) -> torch.Tensor | Mapping[str, torch.Tensor]:
    """The mask [K, 1, R, R], or one a kind of layer where some have a sliding window that hides something.

    `longest` is the most tokens that a completion and its prompt would make alone.
    """
    window = getattr(policy.hf_model.config.get_text_config(), "sliding_window", None)
    in_prompt = _prompt_masks(policy, batch)
    visible = _visible(places)
    if window is None or longest <= window:  # all kinds of layers see the same
        return _as_mask(policy, _with_prompt(visible, next(iter(in_prompt.values()))))
    masks = {
        kind: _as_mask(policy, _with_prompt(visible & _near(places, window) if kind == _SLIDING else visible, mask))
        for kind, mask in in_prompt.items()
    }
    return next(iter(masks.values())) if len(masks) == 1 else masks


def _prompt_masks(policy: Policy, batch: PromptBatch) -> dict[str, torch.Tensor | None]:
    """By kind of layer, which prompt token sees which, bool [K, P, P]; None where all are real and attend causally.

    Made by the model's own function, the one that `generate` calls.
    """
    text = policy.hf_model.config.get_text_config()
    make: Any = getattr(policy.hf_model, "create_masks_for_generate", create_masks_for_generate)
    made: Any = make(
        config=policy.hf_model.config,
        inputs_embeds=torch.empty((*batch.input_ids.shape, 0), dtype=policy.dtype, device=policy.device),
        attention_mask=batch.attention_mask,
        past_key_values=None,
        position_ids=None,
        **{"is_first_iteration": True, **batch.per_token},
    )
    if not isinstance(made, Mapping):
        made = {_SLIDING if getattr(text, "sliding_window", None) is not None else _FULL: made}
    kinds = set(getattr(text, "layer_types", None) or made)
    return {kind: None if mask is None else _is_visible(mask[:, 0]) for kind, mask in made.items() if kind in kinds}


def _is_visible(mask: torch.Tensor) -> torch.Tensor:
    """Of a mask as the attention takes it; the inverse of `_as_mask`."""
    return mask if mask.dtype == torch.bool else mask == 0


def _visible(places: _Places) -> torch.Tensor:
    """bool [K, R, R], who (rows) sees whom (columns) where all attention is causal."""
    seen_segment, segment = places.segment[:, None, :], places.segment[:, :, None]
    earlier = places.order[:, None, :] <= places.order[:, :, None]
    return earlier & ((seen_segment == 0) | ((seen_segment == segment) & (segment > 0)))


def _with_prompt(visible: torch.Tensor, in_prompt: torch.Tensor | None) -> torch.Tensor:
    """Puts the prompt's own mask in; padding sees itself, since a row of nothing would make NaN."""
    visible = visible.clone()
    if in_prompt is not None:
        visible[:, : in_prompt.shape[1], : in_prompt.shape[2]] = in_prompt
    visible.diagonal(dim1=1, dim2=2).fill_(True)
    return visible


def _near(places: _Places, window: int) -> torch.Tensor:
    """bool [K, R, R]: less than `window` tokens back."""
    return places.order[:, None, :] > places.order[:, :, None] - window


def _as_mask(policy: Policy, visible: torch.Tensor) -> torch.Tensor:
    """[K, 1, R, R] as the attention takes it: eager attention adds it to its scores."""
    if policy.attention == "sdpa":
        return visible[:, None]
    mask = torch.zeros(visible.shape, dtype=policy.dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(policy.dtype).min)[:, None]


def checkpoint_layers(policy: Policy) -> int:
    """Turns it on for every layer of the language model, and of the vision tower where that trains; returns how many.

    Call it after the adapter is on.

    Raises:
        ModelError: the model's layers are not made for it.
    """
    where: nn.Module = policy.hf_model if policy.vision_trainable else policy.decoder
    layers = [module for module in where.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError(
            f"{policy.path}: the layers of {type(policy.decoder).__name__} cannot be checkpointed; "
            "set learner.gradient_checkpointing: false"
        )
    for layer in layers:
        layer.gradient_checkpointing = True
        # Without dropout a layer draws nothing, so there is no random state to bring back.
        function: Any = partial(checkpoint, use_reentrant=False, preserve_rng_state=has_dropout(policy.model))
        layer._gradient_checkpointing_func = function
        # A layer checkpoints in train mode only. Its own flag, not `train()`: what is inside stays without dropout.
        layer.training = True
    return len(layers)


def is_checkpointing(policy: Policy) -> bool:
    """Whether some layer makes its activations again, and hence takes no cache."""
    return any(getattr(m, "gradient_checkpointing", False) and m.training for m in policy.hf_model.modules())
