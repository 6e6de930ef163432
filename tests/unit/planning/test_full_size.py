"""The memory estimate at the size of Qwen2.5-VL-3B, against what fake tensors count of a real step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from mmrl_ray.config.load import load_config
from mmrl_ray.experience.plan import GroupSize
from mmrl_ray.policy.memory import fitting_tokens
from tests.support.counted import Counted, fake_tensor
from tests.support.full_size import count, estimates, shape_of

CONFIG = "configs/qwen2.5-vl-3b-coco.yaml"
LAYERS = 36


def test_what_is_counted_of_two_layers() -> None:
    """By hand: x is kept for no gradient of its own, the first product for the rectifier's, its result for the next."""
    x, first, second = (fake_tensor(shape, torch.float32) for shape in ((100, 64), (256, 64), (64, 256)))
    first, second = nn.Parameter(first), nn.Parameter(second)
    with Counted() as counted:
        made = (x @ first.t()).relu() @ second.t()
        # The product itself is gone once its rectified copy is there.
        assert counted.live_bytes == 100 * 256 * 4 + 100 * 64 * 4
        assert counted.peak_bytes == 2 * 100 * 256 * 4
        assert counted.by_name == {"mm": 2, "relu": 1}
        counted.restart()
        made.sum().backward()
        assert counted.by_name["mm"] == 3  # two weights' gradients and one input's
    assert counted.peak_bytes >= counted.live_bytes == 100 * 64 * 4 + 2 * 64 * 256 * 4


def test_estimates_are_near_what_a_gpu_would_hold_and_its_free_memory_is_used() -> None:
    """With the largest micro-batch that 40 GiB are planned for."""
    free = 40 << 30
    cfg = load_config(CONFIG)
    size = GroupSize(404, cfg.rollout.group_size, cfg.rollout.max_new_tokens)
    budget = fitting_tokens(shape_of(cfg, LAYERS), free, size, packed=False, checkpointed=False)
    cfg = load_config(CONFIG, (f"learner.micro_batch_tokens={budget}",))
    found = count(cfg, LAYERS, "cuda")
    hold_against(estimates(cfg, LAYERS, found))
    assert 0.7 * free < found["learner"]["peak_bytes"] < free


def test_estimates_are_near_with_checkpointed_layers() -> None:
    overrides = ("learner.micro_batch_tokens=16384", "learner.gradient_checkpointing=true")
    cfg = load_config(CONFIG, (*overrides, "rollout.groups_per_assignment=4"))
    hold_against(estimates(cfg, LAYERS, count(cfg, LAYERS, "cuda")))


def hold_against(compared: Mapping[str, tuple[int, int]]) -> None:
    assert compared.keys() == {"learner", "rollout"}
    for name, (estimated, counted) in compared.items():
        assert abs(estimated / counted - 1) < 0.15, f"{name}: {estimated / 2**30:.2f} of {counted / 2**30:.2f} GiB"
