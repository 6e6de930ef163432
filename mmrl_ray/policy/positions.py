"""Position ids of padded prompts and of the completions behind them.

`K` prompts, `P` prompt tokens (left-padded), `N` completions, `T` completion tokens. Most decoders count positions on
one axis; Qwen-VL's counts on three (time, height, width), and a completion that inherits wrong ones raises no error,
so both calls of a shared prefix always pass them explicitly.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import torch

from mmrl_ray.policy.load import Policy


def position_axes(policy: Policy) -> int | None:
    """A, the axes on which the decoder counts positions (M-RoPE); None where it is the one that all know."""
    if not hasattr(policy.core, "get_rope_index"):
        return None
    rope = getattr(policy.hf_model.config.get_text_config(), "rope_parameters", None) or {}
    return len(rope.get("mrope_section") or (0, 0, 0))


def prompt_positions(
    policy: Policy, input_ids: torch.Tensor, attention_mask: torch.Tensor, inputs: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of left-padded prompts, and of the token after each, as `generate` makes them.

    Args:
        policy: whose decoder counts.
        input_ids: int64 [K, P].
        attention_mask: int64 [K, P], 1 where a token is real.
        inputs: what the processor made of the images, batched (`image_grid_thw`, `mm_token_type_ids`, …).

    Returns:
        position ids [K, P] or [A, K, P], and the next position [K].
    """
    if position_axes(policy) is None:
        positions = (attention_mask.cumsum(dim=-1) - 1).clamp_min(0)
        return positions, attention_mask.sum(dim=-1)
    # Which of them a family lays its canvas out by is its own affair: grids for most, sizes of tiles for MiniCPM-V.
    named = inspect.signature(policy.core.get_rope_index).parameters
    known = {name: value for name, value in inputs.items() if name in named}
    positions, _ = policy.core.get_rope_index(input_ids, attention_mask=attention_mask, **known)
    real = attention_mask.bool()
    return positions, positions.masked_fill(~real, -1).amax(dim=(0, 2)) + 1


def completion_positions(policy: Policy, start: torch.Tensor, length: int) -> torch.Tensor:
    """Positions of `length` completion tokens whose first stands at `start` [N]: [N, length] or [A, N, length]."""
    positions = start[:, None] + torch.arange(length, device=start.device)
    axes = position_axes(policy)
    return positions if axes is None else positions.expand(axes, -1, -1)
