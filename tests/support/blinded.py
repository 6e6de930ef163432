"""Ways in which a policy does not see its pictures: planted by the unit tests, and by `benchmarks/blind.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mmrl_ray.experience.carriers import VisionFeatures
from mmrl_ray.policy.generation import decode
from mmrl_ray.policy.model import Policy
from mmrl_ray.rollouts import scorer


@contextmanager
def features(change: Callable[[list[VisionFeatures]], list[VisionFeatures]]) -> Iterator[None]:
    """Sampling and scoring see what `change` makes of the features of a batch."""
    real = decode.vision_features

    def changed(*args: Any, **options: Any) -> list[VisionFeatures]:
        return change(real(*args, **options))

    decode.vision_features = scorer.vision_features = changed
    try:
        yield
    finally:
        decode.vision_features = scorer.vision_features = real


@contextmanager
def positions(policy: Policy) -> Iterator[None]:
    """The patches of a picture come to its tower in the opposite order: each token stands for another place."""
    (embedding,) = (m for name, m in policy.model.named_modules() if name.endswith("patch_embedding"))
    handle = embedding.register_forward_hook(lambda module, args, output: output.flip(-1).flip(-2))
    try:
        yield
    finally:
        handle.remove()


def zeroed(found: list[VisionFeatures]) -> list[VisionFeatures]:
    return [VisionFeatures(torch.zeros_like(each.tokens)) for each in found]


def swapped(found: list[VisionFeatures]) -> list[VisionFeatures]:
    return [*found[1:], *found[:1]]
