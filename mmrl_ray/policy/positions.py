"""Position ids of padded prompts and of the completions behind them.

`K` prompts, `P` prompt tokens (left-padded), `N` completions, `T` completion tokens. Most decoders count positions on
one axis; Qwen-VL's counts on three (time, height, width), and a completion that inherits wrong ones raises no error,
so both calls of a shared prefix always pass them explicitly.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from mmrl_ray.policy.load import Policy


def has_multi_axis_positions(policy: Policy) -> bool:
    """Whether the decoder counts positions on three axes (M-RoPE)."""
    return hasattr(policy.core, "get_rope_index")


def prompt_positions(
    policy: Policy, input_ids: torch.Tensor, attention_mask: torch.Tensor, inputs: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of left-padded prompts, and of the token after each.

    Args:
        policy: whose decoder counts.
        input_ids: int64 [K, P].
        attention_mask: int64 [K, P], 1 where a token is real.
        inputs: what the processor made of the images, batched (`image_grid_thw`, `mm_token_type_ids`).

    Returns:
        position ids [K, P] or [3, K, P], and the next position [K].
    """
    if not has_multi_axis_positions(policy):
        positions = (attention_mask.cumsum(dim=-1) - 1).clamp_min(0)
        return positions, attention_mask.sum(dim=-1)
    positions, _ = policy.core.get_rope_index(
        input_ids,
        mm_token_type_ids=inputs["mm_token_type_ids"],
        image_grid_thw=inputs.get("image_grid_thw"),
        attention_mask=attention_mask,
    )
    real = attention_mask.bool()
    return positions, positions.masked_fill(~real, -1).amax(dim=(0, 2)) + 1


def completion_positions(policy: Policy, start: torch.Tensor, length: int) -> torch.Tensor:
    """Positions of `length` completion tokens whose first stands at `start` [N]: [N, length] or [3, N, length]."""
    positions = start[:, None] + torch.arange(length, device=start.device)
    return positions.expand(3, -1, -1) if has_multi_axis_positions(policy) else positions
