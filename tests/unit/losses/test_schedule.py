"""Cosine annealing against NumPy, and torch's scheduler following it across a resume."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrl_ray.losses.schedule import cosine_annealing, cosine_scheduler


def oracle(total: int, high: float, low: float, warmup: int, steps: int) -> np.ndarray:
    t = np.arange(steps, dtype=np.float64)
    span = total - warmup
    cosine = low + 0.5 * (high - low) * (1 + np.cos(np.clip(t - warmup, 0, span) * np.pi / span))
    return np.where(t < warmup, high * t / max(warmup, 1), cosine)


@st.composite
def schedules(draw: st.DrawFn) -> tuple[int, float, float, int]:
    total = draw(st.integers(1, 60))
    high = draw(st.floats(1e-6, 1.0))
    return total, high, high * draw(st.floats(0, 1)), draw(st.integers(0, total - 1))


@settings(deadline=None)
@given(schedules())
def test_equals_the_formula(schedule: tuple[int, float, float, int]) -> None:
    total, high, low, warmup = schedule
    got = [cosine_annealing(t, total, high, low, warmup) for t in range(total + 5)]
    np.testing.assert_allclose(got, oracle(total, high, low, warmup, total + 5), rtol=1e-9, atol=1e-15)


def test_literal() -> None:
    assert cosine_annealing(0, 10, 1.0, 0.0) == 1.0
    assert cosine_annealing(5, 10, 1.0, 0.2) == pytest.approx(0.6)
    assert cosine_annealing(10, 10, 1.0, 0.2) == cosine_annealing(99, 10, 1.0, 0.2) == 0.2
    assert [cosine_annealing(t, 12, 0.8, 0.0, 4) for t in range(5)] == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8])
    assert cosine_annealing(8, 12, 0.8, 0.0, 4) == pytest.approx(0.4)


@pytest.mark.parametrize(
    "arguments", [(0, 10, 1.0, 0.0, 10), (0, 0, 1.0, 0.0), (0, 5, 1.0, 0.0, -1), (-1, 5, 1.0, 0.0), (0, 5, 0.1, 0.2)]
)
def test_refuses(arguments: tuple) -> None:
    with pytest.raises(ValueError, match=r"warmup_steps|lr_min"):
        cosine_annealing(*arguments)


def make(
    lrs: tuple[float, ...] = (0.5,), **schedule: float
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    groups = [{"params": [torch.nn.Parameter(torch.ones(2))], "lr": lr} for lr in lrs]
    optimizer = torch.optim.AdamW(groups)
    return optimizer, cosine_scheduler(optimizer, **schedule)  # type: ignore[arg-type]


def advance(optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LRScheduler, steps: int) -> list:
    used = []
    for _ in range(steps):
        used.append([group["lr"] for group in optimizer.param_groups])
        for group in optimizer.param_groups:
            group["params"][0].grad = torch.ones(2)
        optimizer.step()
        scheduler.step()
    return used


def test_scheduler_sets_the_rates_of_the_formula() -> None:
    used = advance(*make((0.5, 0.1), total_steps=20, lr_min=0.01, warmup_steps=3), 24)
    expected = np.stack([oracle(20, lr, 0.01, 3, 24) for lr in (0.5, 0.1)], axis=1)
    np.testing.assert_allclose(used, expected, rtol=1e-12, atol=1e-15)


def test_state_dict_round_trip() -> None:
    settings = {"total_steps": 20, "lr_min": 0.01, "warmup_steps": 3}
    whole_optimizer, whole = make((0.5, 0.1), **settings)
    expected = advance(whole_optimizer, whole, 20)

    optimizer, scheduler = make((0.5, 0.1), **settings)
    assert advance(optimizer, scheduler, 7) == expected[:7]
    saved = json.loads(json.dumps(scheduler.state_dict()))  # numbers only: any checkpoint format can hold it
    saved_optimizer = optimizer.state_dict()

    resumed_optimizer, resumed = make((0.5, 0.1), **settings)
    resumed_optimizer.load_state_dict(saved_optimizer)
    resumed.load_state_dict(saved)
    assert advance(resumed_optimizer, resumed, 13) == expected[7:]
    assert resumed.get_last_lr() == whole.get_last_lr() == [0.01, 0.01]


def test_scheduler_refuses_at_once() -> None:
    with pytest.raises(ValueError, match="warmup_steps=9"):
        make(total_steps=9, warmup_steps=9)
    with pytest.raises(ValueError, match=r"lr_min=0\.6"):
        make(total_steps=9, lr_min=0.6)
    with pytest.raises(ValueError, match="above 0"):
        make((0.0,), total_steps=9)
