"""What the learners of one group share: collectives (`Ranks`), and the layers of a base that does not fit one device.

`Ranks` works in the process group that Ray Train made. `shard_layers` is FSDP2 over the frozen base: every learner
keeps a part of each decoder layer.

    layer i:  gather its weights ─▶ forward ─▶ free them          backward: gather ─▶ gradients of activations ─▶ free

FSDP manages the frozen weights of the decoder's layers, nine tenths of a model and more, and nothing else:

- Adapters stay whole on each learner. They are small, so splitting them would save nothing; and whole ones keep what
  a replicated learner has: one flat gradient buffer summed once a step, plain tensors in the optimiser, checkpoints and
  published weights in the same format. Frozen weights have no gradient, so FSDP has nothing to reduce.
- Embeddings, head and vision tower stay whole, too: they are called outside the decoder, and how often differs between
  learners (chunks of logits, features that came with their group), where a gather has to be called by all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from mmrl_ray.errors import MMRLError
from mmrl_ray.policy.checkpoint import decoder_layers
from mmrl_ray.policy.model import Policy

T = TypeVar("T")


class Ranks:
    """The learners of a group. Every method is a collective: all ranks call it, in the same order.

    Without a process group there is one rank, and nothing is sent. Waits end at the process group's time-out.
    """

    def __init__(self) -> None:
        self._together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1

    @property
    def rank(self) -> int:
        """This learner's place, from 0."""
        return dist.get_rank() if self._together else 0

    @property
    def size(self) -> int:
        """How many learners there are."""
        return dist.get_world_size() if self._together else 1

    def sum_(self, values: torch.Tensor) -> None:
        """Replaces `values` by their sum over all ranks."""
        if self._together:
            dist.all_reduce(values)

    def max_(self, values: torch.Tensor) -> None:
        """Replaces `values` by their largest over all ranks."""
        if self._together:
            dist.all_reduce(values, op=dist.ReduceOp.MAX)

    def any(self, flag: bool) -> bool:
        """Whether it is true on some rank."""
        if not self._together:
            return flag
        count = torch.tensor([float(flag)], device=self._device)
        self.sum_(count)
        return count.item() > 0

    def least(self, value: int) -> int:
        """The smallest over all ranks."""
        negative = torch.tensor([-value], device=self._device)
        self.max_(negative)
        return -int(negative)

    def from_first(self, value: T | None) -> T:
        """What rank 0 gave; the others' values do not matter."""
        box = [value]
        if self._together:
            dist.broadcast_object_list(box, src=0)
        return box[0]  # type: ignore[return-value]

    @property
    def _device(self) -> str:
        """Of tensors that the process group takes."""
        return "cuda" if self._together and dist.get_backend() == "nccl" else "cpu"

    def raise_first(self, error: MMRLError | None) -> None:
        """Raises, on every rank, the error of the lowest rank that has one."""
        errors: list[MMRLError | None] = [error]
        if self._together:
            errors = [None] * self.size
            dist.all_gather_object(errors, error)
        for found in errors:
            if found is not None:
                raise found

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is done inside is done on all ranks or has failed on all: an error of the project in it is met by all
        behind it, as by `raise_first`."""
        error: MMRLError | None = None
        try:
            yield
        except MMRLError as failed:
            error = failed
        self.raise_first(error)


def split_layer(layer: nn.Module, mesh: DeviceMesh) -> None:
    """Splits the frozen weights of one layer over `mesh`; it may be on the meta device. No rank waits for another."""
    adapters = {p for p in layer.parameters() if p.requires_grad}
    fully_shard(layer, mesh=mesh, ignored_params=adapters)


def learner_mesh(device: torch.device) -> DeviceMesh:
    """All learners in a row. A collective."""
    return init_device_mesh(device.type, (dist.get_world_size(),))


def shard_layers(policy: Policy, device: torch.device, mesh: DeviceMesh | None = None) -> None:
    """Splits the decoder's layers over the process group and puts the rest of the policy on `device`.

    Layers that were split while they were read are left as they are. From here on every learner must make the same
    number of forward and backward passes.

    Args:
        policy: with its adapter on.
        device: this learner's.
        mesh: what layers are split over, of the device's kind; made here by default.

    Raises:
        ConfigError: the model's decoder has no list of layers.
    """
    decoder = policy.decoder
    layers = decoder_layers(decoder, policy.path)
    mesh = mesh or learner_mesh(device)
    for layer in layers:
        if not isinstance(layer, FSDPModule):
            split_layer(layer, mesh)
    # The decoder is the root that the layers share, so that a layer is gathered while the one before computes.
    whole = {p for p in policy.model.parameters() if not isinstance(p, DTensor)}
    fully_shard(decoder, mesh=mesh, ignored_params=whole)
    policy.model.to(device)
    policy.device = device
