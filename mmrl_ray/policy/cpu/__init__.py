"""What makes a policy faster on a CPU, and changes nothing but rounding. Without this folder all else works as it does.

`load.accelerate` looks for it by its name, which is the device's; nothing else knows of it.
"""

from __future__ import annotations

from torch import nn

from mmrl_ray.policy.cpu.attention import decode_step_attention
from mmrl_ray.policy.cpu.linear import pack_weights, use_onednn
from mmrl_ray.policy.model import Acceleration


def accelerate(model: nn.Module) -> Acceleration:
    """Has the linear layers of a model that was just loaded computed by oneDNN, and decode steps attend by `attend`."""
    use_onednn(model)
    return Acceleration(decode_step=decode_step_attention, pack_weights=pack_weights)
