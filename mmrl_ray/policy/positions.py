"""Position ids of padded prompts and of the completions behind them.

`K` prompts, `P` prompt tokens (left-padded), `N` completions, `T` completion tokens. Most decoders count positions on
one axis; Qwen-VL's counts on `A` = 3 (time, height, width), HunYuan-VL's on 4, and a completion that inherits wrong
ones raises no error, so both calls of a shared prefix always pass them explicitly.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import nn

from mmrl_ray.experience.carriers import EncodedPrompt
from mmrl_ray.policy.load import Policy
from mmrl_ray.policy.prompts import PER_TOKEN


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
        position ids [K, P] or [A, K, P], and the next position [K], on the mask's device.
    """
    if position_axes(policy) is None:
        return (attention_mask.cumsum(dim=-1) - 1).clamp_min(0), attention_mask.sum(dim=-1)
    width, device = attention_mask.shape[1], attention_mask.device
    # One by one: HunYuan-VL numbers pictures on through a batch. A batch may hold a prompt several times.
    made = {id(prompt): _laid_out(policy, prompt) for prompt in prompts}
    rows = [made[id(prompt)][0] for prompt in prompts]
    positions = torch.stack([nn.functional.pad(row, (width - row.shape[1], 0)) for row in rows], dim=1)
    return positions.to(device), torch.tensor([made[id(prompt)][1] for prompt in prompts], device=device)


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
