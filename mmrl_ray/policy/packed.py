"""A prompt and its completions as one row: one forward call and no cache, where a prefix cache cannot be had.

Gradient checkpointing drops the cache, and FSDP2 shards a layer again after the first of two calls. So:

    prompt | completion 1 | completion 2 | … | completion G        one row a group, R = P + S tokens

Prompt tokens see the prompt up to themselves; a completion's tokens see the whole prompt and their own completion up to
themselves, and are blind to the other completions. Positions start again at the end of the prompt for each of them.

`K` groups, `P` prompt tokens (left-padded), `S` completion tokens of the longest row (right-padded), `N = ΣG`
completions, `T` tokens of the longest, `d` hidden width. No completion's last token is in the row: it predicts nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from mmrl_ray.errors import ModelError
from mmrl_ray.experience.carriers import EncodedPrompt, VisionFeatures
from mmrl_ray.policy.load import Policy
from mmrl_ray.policy.positions import completion_positions
from mmrl_ray.policy.prompt_batch import PromptBatch, pad_prompts, vision_arguments

_MASKED_ATTENTION = ("sdpa", "eager")
_KNOWN_LAYERS = ("full_attention", "sliding_attention")
_IMAGE_TYPE = 1


@dataclass(frozen=True, slots=True)
class _Places:
    """Where each token of a row belongs; [K, R] each."""

    segment: torch.Tensor
    """int64: 0 the prompt, 1 … G a completion, −1 padding."""
    order: torch.Tensor
    """int64: the token's index in the row that its completion would make alone behind the prompt."""
    block: torch.Tensor
    """int64: the block of image tokens that see each other both ways (Gemma 3), −1 outside."""


def unpackable(policy: Policy) -> str | None:
    """Why this model's attention cannot be told who sees whom, or None."""
    config = policy.hf_model.config.get_text_config()
    attention = config._attn_implementation
    if attention not in _MASKED_ATTENTION:
        return f"attn_implementation={attention} takes no mask of its own; set model.attn_implementation: sdpa"
    for i, kind in enumerate(getattr(config, "layer_types", None) or ()):
        if kind not in _KNOWN_LAYERS:
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
        index: int64 [N], the prompt of each completion, ascending.
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
    with vision_arguments(policy, prompts, features) as vision:
        output = policy.core(
            input_ids=torch.cat([batch.input_ids, tokens], dim=1),
            attention_mask=_attention(policy, _places(batch, index, inside, packed)),
            position_ids=torch.cat([batch.position_ids, positions], dim=-1),
            use_cache=False,
            **{name: nn.functional.pad(value, (0, length)) for name, value in batch.per_token.items()},
            **vision,
        )
    hidden = output.last_hidden_state
    rows = hidden.new_zeros(*targets.shape, hidden.shape[-1])
    rows[:, 0] = hidden[:, width - 1][index]
    rows[:, 1:][inside] = hidden[:, width:][packed]
    return rows


def _packed_columns(index: torch.Tensor, inside: torch.Tensor, groups: int) -> torch.Tensor:
    """bool [K, S]: the columns behind each prompt that hold a token; they fill from the left.

    Row-major, its True entries are those of `inside`: one order for both, so that masked copies go either way.
    """
    lengths = torch.zeros(groups, dtype=torch.int64, device=index.device).index_add_(0, index, inside.sum(dim=1))
    return torch.arange(int(lengths.max()), device=index.device) < lengths[:, None]


def _pack(values: torch.Tensor, inside: torch.Tensor, packed: torch.Tensor, padding: int) -> torch.Tensor:
    """[.., N, T − 1] → [.., K, S]."""
    out = values.new_full((*values.shape[:-2], *packed.shape), padding)
    out[..., packed] = values[..., inside]
    return out


def _places(batch: PromptBatch, index: torch.Tensor, inside: torch.Tensor, packed: torch.Tensor) -> _Places:
    groups, width = batch.input_ids.shape
    numbers = torch.arange(1, len(index) + 1, device=index.device)[:, None].expand(inside.shape)
    steps = torch.arange(width, width + inside.shape[1], device=index.device).expand(inside.shape)
    prompt_order = torch.arange(width, device=index.device).expand(groups, width)
    block = _image_blocks(batch.per_token.get("token_type_ids"), batch.attention_mask)
    return _Places(
        segment=torch.cat([batch.attention_mask - 1, _pack(numbers, inside, packed, -1)], dim=1),
        order=torch.cat([prompt_order, _pack(steps, inside, packed, width)], dim=1),
        block=torch.cat([block, torch.full_like(packed, -1, dtype=torch.int64)], dim=1),
    )


def _image_blocks(types: torch.Tensor | None, attention_mask: torch.Tensor) -> torch.Tensor:
    """int64 [K, P]: the number of each run of image tokens, −1 elsewhere and in models that do not tell types."""
    if types is None:
        return torch.full_like(attention_mask, -1)
    image = types == _IMAGE_TYPE
    begins = image & ~nn.functional.pad(image, (1, 0))[:, :-1]
    return torch.where(image, begins.long().cumsum(dim=1) - 1, -1)


def _attention(policy: Policy, places: _Places) -> torch.Tensor | Mapping[str, torch.Tensor]:
    """The mask [K, 1, R, R], or one a kind of layer where some have a sliding window."""
    config = policy.hf_model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    visible = _visible(places)
    near = visible if window is None else visible & _near(places, window)
    if not kinds:  # one kind of layers, with the window if there is one
        return _as_mask(policy, near)
    masks = {"full_attention": _as_mask(policy, visible)}
    if kinds == {"full_attention"}:
        return masks["full_attention"]
    return {**masks, "sliding_attention": _as_mask(policy, near)}


def _visible(places: _Places) -> torch.Tensor:
    """bool [K, R, R], who (rows) sees whom (columns); padding sees itself, since a row of nothing would make NaN."""
    seen_segment, segment = places.segment[:, None, :], places.segment[:, :, None]
    earlier = places.order[:, None, :] <= places.order[:, :, None]
    block = places.block[:, :, None]
    together = (places.block[:, None, :] == block) & (block >= 0)
    causal = earlier & ((seen_segment == 0) | ((seen_segment == segment) & (segment > 0)))
    itself = torch.eye(places.order.shape[1], dtype=torch.bool, device=places.order.device)
    return causal | together | itself


def _near(places: _Places, window: int) -> torch.Tensor:
    """bool [K, R, R]: less than `window` tokens back."""
    return places.order[:, None, :] > places.order[:, :, None] - window


def _as_mask(policy: Policy, visible: torch.Tensor) -> torch.Tensor:
    """[K, 1, R, R] as the attention takes it: eager attention adds it to its scores."""
    if policy.hf_model.config.get_text_config()._attn_implementation == "sdpa":
        return visible[:, None]
    mask = torch.zeros(visible.shape, dtype=policy.dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(policy.dtype).min)[:, None]
