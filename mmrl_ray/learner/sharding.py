"""FSDP2 over the frozen base, for one that does not fit one device: every learner keeps a part of each decoder layer.

    layer i:  gather its weights ─▶ forward ─▶ free them          backward: gather ─▶ gradients of activations ─▶ free

FSDP manages the frozen weights of the decoder's layers, nine tenths of a model and more, and nothing else:

- Adapters stay whole on each learner. They are a few MB, so splitting them would save nothing; and whole ones keep what
  a replicated learner has: one flat gradient buffer summed once a step, plain tensors in the optimiser, checkpoints and
  published weights in the same format. Frozen weights have no gradient, so FSDP has nothing to reduce.
- Embeddings, head and vision tower stay whole, too: they are called outside the decoder, and how often differs between
  learners (chunks of logits, features that came with their group), where a gather has to be called by all of them.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from mmrl_ray.errors import ConfigError
from mmrl_ray.policy.load import Policy


def shard_layers(policy: Policy, device: torch.device) -> None:
    """Splits the decoder's layers over the process group and puts the rest of the policy on `device`.

    The policy's weights may still be in host memory: they go to the device layer by layer. From here on every learner
    must make the same number of forward and backward passes.

    Args:
        policy: with its adapter on.
        device: this learner's; the mesh is of its kind.

    Raises:
        ConfigError: the model's decoder has no list of layers.
    """
    decoder = policy.decoder
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ConfigError(
            f"{policy.path}: {type(decoder).__name__} has no list of layers to split; set learner.sharding: none"
        )
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for layer in layers:
        adapters = {p for p in layer.parameters() if p.requires_grad}
        fully_shard(layer, mesh=mesh, ignored_params=adapters)
    # The decoder is the root that the layers share, so that a layer is gathered while the one before computes.
    whole = {p for p in policy.model.parameters() if not isinstance(p, DTensor)}
    fully_shard(decoder, mesh=mesh, ignored_params=whole)
    policy.model.to(device)
    policy.device = device
