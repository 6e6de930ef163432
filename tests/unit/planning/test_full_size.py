"""The memory estimate at the size of Qwen2.5-VL-3B, against what fake tensors count of a real step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmrl_ray.config.load import load_config
from tests.support.counted import Counted, fake_tensor
from tests.support.full_size import count, estimates

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


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("learner.micro_batch_tokens=16384", "learner.gradient_checkpointing=true", "rollout.groups_per_assignment=4"),
    ],
)
def test_estimate_is_near_what_a_gpu_would_hold(overrides: tuple[str, ...]) -> None:
    cfg = load_config(CONFIG, overrides)
    compared = estimates(cfg, LAYERS, count(cfg, LAYERS, "cuda"))
    assert compared.keys() == {"learner", "rollout"}
    for name, (estimated, counted) in compared.items():
        assert abs(estimated / counted - 1) < 0.15, f"{name}: {estimated / 2**30:.2f} of {counted / 2**30:.2f} GiB"
