"""Attention of a decode step in float32 on the CPU: one query a row, over keys that no cache holds any more.

`B` rows, `H` heads of queries, `H'` heads of keys, `r = H / H'`, `K` keys, `d` head width.

PyTorch's kernel reads keys and values at a third of the rate that memory gives, and takes them in blocks that were made
for many queries. As two batches of products, keys by queries and weights by values, the same takes about 0.8 of the
time, from where it is more than a handful of calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mmrl_ray.policy.model import Policy

_NAME = "mmrl_decode_step"
_MANY_KEYS = 1 << 18
"""Elements, B · H' · K · d, from which products are the faster: 1 MiB, what the cache of a core holds."""


@contextmanager
def decode_step_attention(policy: Policy) -> Iterator[None]:
    """Within it, the language model's layers attend by `attend`, where that is the faster way: else nothing changes."""
    config = policy.hf_model.config.get_text_config()
    own = config._attn_implementation_internal
    if own != "sdpa" or policy.device.type != "cpu" or policy.dtype != torch.float32:
        yield
        return
    config._attn_implementation_internal = _NAME
    try:
        yield
    finally:
        config._attn_implementation_internal = own


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers, for one query a row; hands everything else on to "sdpa".

    Args:
        module: the attention layer.
        query: [B, H, 1, d].
        key: [B, H', K, d].
        value: [B, H', K, d].
        attention_mask: [B, 1, 1, K], bool or added to the scores, or None.
        scaling: of the scores, 1 / √d by default.
        kwargs: what "sdpa" takes beside these.

    Returns:
        [B, 1, H, d] and None.
    """
    (batch, heads, queries, width), groups = query.shape, key.shape[1]
    per_head = attention_mask is not None and attention_mask.shape[1] != 1
    other = any(kwargs.get(name) is not None for name in ("softcap", "position_bias"))
    if queries != 1 or key.numel() < _MANY_KEYS or per_head or other:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    scaled = query.reshape(batch, groups, heads // groups, width) * (width**-0.5 if scaling is None else scaling)
    scores = torch.matmul(key, scaled.transpose(2, 3)).transpose(2, 3)  # [B, H', r, K]
    if attention_mask is not None:
        is_bool = attention_mask.dtype == torch.bool
        scores = scores.masked_fill(~attention_mask, -torch.inf) if is_bool else scores + attention_mask
    mixed = torch.matmul(torch.softmax(scores, dim=-1), value)  # [B, H', r, d]
    return mixed.reshape(batch, 1, heads, value.shape[-1]), None


AttentionInterface.register(_NAME, attend)
AttentionMaskInterface.register(_NAME, sdpa_mask)
