"""What makes a policy faster on a CUDA GPU, and changes nothing but rounding. Without this file all else works as it
does; `load.accelerate` looks for it by its name, which is the device's.

`B` rows, `H` heads of queries, `H'` heads of keys, `r = H / H'`, `Q` queries, `K` keys, `d` head width.

**Attention of grouped heads under a mask** (`attend_grouped`). PyTorch's kernels that take a mask want as many heads of
keys as of queries, so transformers repeats keys and values r times: memory that is written, read, and kept for the
backward pass. Here the r heads that share keys become r·Q queries of one head. What a query sees does not depend on
which head it is of, so the mask is repeated along its queries: once a forward pass, not once a layer, and in the dtype
and the alignment in which the kernel reads it, which PyTorch would bring about in every layer otherwise.

    query [B, H, Q, d] → [B, H', r·Q, d]      key, value [B, H', K, d]      mask [B, 1, Q, K] → [B, 1, r·Q, K]

Without a mask transformers leaves keys as they are, and its own function is called.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mmrl_ray.policy.model import OWN_ATTENTION, Acceleration, Policy

_GROUPED = f"{OWN_ATTENTION}grouped"
_ALIGNED = 8
"""Elements of a mask at whose multiples its rows have to begin."""


def accelerate(model: PreTrainedModel) -> Acceleration:
    """Has a model that was just loaded attend by the functions here, and PyTorch leave out cuDNN's attention.

    That one builds a plan, in milliseconds, for every shape it has not seen, and each decode step and each micro-batch
    of ragged rows has one of its own.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    use_grouped_attention(model)
    return Acceleration(forward=autocast)


def autocast(policy: Policy) -> AbstractContextManager[Any]:
    """In bfloat16 the adapter's branch, whose weights are float32, multiplies in bfloat16 as all else does."""
    is_half = policy.dtype == torch.bfloat16
    return torch.autocast(policy.device.type, torch.bfloat16) if is_half else nullcontext()


def use_grouped_attention(model: PreTrainedModel) -> None:
    """Lets the layers of the language model attend by `attend_grouped` where they attend by "sdpa", also in training.

    The vision tower's go on as they are, and so does every other kind of attention.
    """
    config = model.config.get_text_config()
    if config._attn_implementation == "sdpa":
        # The property would change the configs below it too, the tower's where it is one of them.
        config._attn_implementation_internal = _GROUPED


def attend_grouped(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers, for queries under one mask for all heads; "sdpa" takes everything else.

    Args:
        module: the attention layer.
        query: [B, H, Q, d].
        key: [B, H', K, d].
        value: [B, H', K, d].
        attention_mask: [B or 1, 1, Q, K], bool or added to the scores. A query that sees nothing gives some numbers,
            and no NaN.
        scaling: of the scores, 1 / √d by default.
        kwargs: what "sdpa" takes beside these.

    Returns:
        [B, Q, H, d] and None.
    """
    other = any(kwargs.get(name) is not None for name in ("softcap", "position_bias", "cache"))
    if attention_mask is None or attention_mask.shape[1] != 1 or other:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    (batch, heads, queries, width), groups = query.shape, key.shape[1]
    repeats = heads // groups
    mixed = scaled_dot_product_attention(
        query.reshape(batch, groups, repeats * queries, width),
        key,
        value,
        attn_mask=_folded(attention_mask, repeats, query.dtype),
        dropout_p=kwargs.get("dropout", 0.0),
        scale=scaling,
    )
    return mixed.reshape(batch, heads, queries, value.shape[-1]).transpose(1, 2).contiguous(), None


AttentionInterface.register(_GROUPED, attend_grouped)
AttentionMaskInterface.register(_GROUPED, sdpa_mask)

_folded_masks = WeakTensorKeyDictionary()
"""Of masks that are still in use: what it was made for, and what `_folded` made of it."""


def _folded(mask: torch.Tensor, repeats: int, dtype: torch.dtype) -> torch.Tensor:
    """[B, 1, r·Q, K] of `dtype`, to be added to scores, its rows aligned. All layers of a pass are given one tensor."""
    made_for = (repeats, dtype, mask._version)
    known = _folded_masks.get(mask)
    if known is not None and known[0] == made_for:
        return known[1]
    # Far below every score, and far enough from the least number that no scaling inside a kernel makes it infinite: a
    # row without keys, as that of a padding token, would be infinity minus infinity.
    low = torch.finfo(dtype).min / 4
    rows, _, queries, keys = mask.shape
    added = torch.zeros(rows, 1, queries, keys + -keys % _ALIGNED, dtype=dtype, device=mask.device)
    if mask.dtype == torch.bool:
        added[..., :keys].masked_fill_(~mask, low)
    else:
        added[..., :keys] = mask.clamp(min=low)
    folded = added.repeat(1, 1, repeats, 1)[..., :keys]
    _folded_masks[mask] = (made_for, folded)
    return folded
