"""Gradient checkpointing: a layer's activations are made again in the backward pass instead of being kept.

What stays of a layer is its input: of a token, one hidden state instead of some 8 and the width of the MLP four times.
It costs a second forward pass, and the prefix cache: see `packed.py` for the path that goes with it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from mmrl_ray.errors import ModelError
from mmrl_ray.policy.load import Policy


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
        function: Any = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        layer._gradient_checkpointing_func = function
        # A layer checkpoints in train mode only. Its own flag, not `train()`: what is inside stays without dropout.
        layer.training = True
    return len(layers)


def is_checkpointing(policy: Policy) -> bool:
    """Whether some layer makes its activations again, and hence takes no cache."""
    return any(getattr(m, "gradient_checkpointing", False) and m.training for m in policy.hf_model.modules())
