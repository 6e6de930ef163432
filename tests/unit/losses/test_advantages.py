"""Advantages against NumPy loops written from their definitions, literal values, and masks."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrl_ray.losses.advantages import advantages, overlong_penalty

NAMES = ["none", "batch_mean", "greedy", "leave_one_out", "group", "group/std"]


def call(name: str, rewards: torch.Tensor, mask: torch.Tensor | None, greedy: torch.Tensor) -> torch.Tensor:
    base, _, std = name.partition("/")
    return advantages(base, rewards, mask=mask, greedy=greedy, divide_by_std=bool(std))


def oracle(name: str, rewards: np.ndarray, mask: np.ndarray, greedy: np.ndarray) -> np.ndarray:
    out = np.zeros_like(rewards)
    for m, g in zip(*np.nonzero(mask), strict=True):
        r, mine = rewards[m, g], rewards[m][mask[m]]
        if name == "none":
            out[m, g] = r
        elif name == "batch_mean":
            out[m, g] = r - np.mean(rewards[mask])
        elif name == "greedy":
            out[m, g] = r - greedy[m]
        elif len(mine) < 2 or np.ptp(mine) == 0:
            out[m, g] = 0
        elif name == "leave_one_out":
            others = [rewards[m, k] for k in range(rewards.shape[1]) if mask[m, k] and k != g]
            out[m, g] = r - np.mean(others)
        else:
            out[m, g] = r - np.mean(mine)
            if name == "group/std":
                out[m, g] /= np.std(mine, ddof=1)
    return out


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None)
@given(st.integers(1, 4), st.integers(2, 6), st.integers(0, 2**31 - 1), st.sampled_from(["none", "groups", "ragged"]))
def test_equals_the_definition(name: str, m: int, g: int, seed: int, masked: str) -> None:
    rng = np.random.default_rng(seed)
    rewards, greedy = rng.normal(0.3, 2.0, size=(m, g)), rng.normal(size=m)
    if masked == "groups":
        mask = rng.uniform(size=m) < 0.6
        full = np.repeat(mask[:, None], g, axis=1)
    else:
        mask = full = rng.uniform(size=(m, g)) < 0.6 if masked == "ragged" else np.ones((m, g), dtype=bool)
    rewards[~full] = np.nan  # a masked reward must not leak
    argument = None if masked == "none" else torch.from_numpy(mask)
    got = call(name, torch.from_numpy(rewards), argument, torch.from_numpy(greedy))
    np.testing.assert_allclose(got.numpy(), oracle(name, rewards, full, greedy), rtol=1e-9, atol=1e-12)
    assert (got.numpy()[~full] == 0).all()


def test_literal() -> None:
    rewards, greedy = torch.tensor([[1.0, 3.0], [0.0, 8.0]]), torch.tensor([2.0, 10.0])
    expected = {
        "none": [[1.0, 3.0], [0.0, 8.0]],
        "batch_mean": [[-2.0, 0.0], [-3.0, 5.0]],
        "greedy": [[-1.0, 1.0], [-10.0, -2.0]],
        "leave_one_out": [[-2.0, 2.0], [-8.0, 8.0]],
        "group": [[-1.0, 1.0], [-4.0, 4.0]],
        "group/std": [[-math.sqrt(0.5), math.sqrt(0.5)]] * 2,
    }
    for name, values in expected.items():
        torch.testing.assert_close(call(name, rewards, None, greedy), torch.tensor(values), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["batch_mean", "leave_one_out", "group", "group/std"])
@pytest.mark.parametrize("value", [0.1, 1 / 3, -7.7, 1e6 + 0.1])
@pytest.mark.parametrize("g", [3, 7])
def test_equal_rewards_give_exactly_zero(name: str, value: float, g: int) -> None:
    rewards = torch.full((5, g), value)
    assert call(name, rewards, None, torch.zeros(5)).eq(0).all()


@pytest.mark.parametrize("name", ["batch_mean", "greedy", "leave_one_out", "group", "group/std"])
@pytest.mark.parametrize("value", [100.0, 1.0, 1000.0, 1e-3, 1e-30, -100.0, -0.7])
def test_the_next_float32_is_no_spread(name: str, value: float) -> None:
    """Found by NumPy's own `nextafter`; in float64, as rewards come, and in float32."""
    following = float(np.nextafter(np.float32(value), np.float32(np.inf)))
    rewards = torch.tensor([[following, value, value, value]], dtype=torch.float64)
    greedy = torch.tensor([value], dtype=torch.float64)
    for dtype in (torch.float64, torch.float32):
        assert call(name, rewards.to(dtype), None, greedy.to(dtype)).eq(0).all()


@pytest.mark.parametrize("name", ["leave_one_out", "group/std"])
def test_sums_of_large_parts_that_cancel_are_as_exact_as_the_parts(name: str) -> None:
    rewards = torch.tensor([[0.0, 0.1 + 0.2 - 0.3, 0.0]], dtype=torch.float64)
    assert rewards[0, 1] != 0
    base, _, _ = name.partition("/")
    assert advantages(base, rewards, magnitude=torch.full_like(rewards, 0.6)).eq(0).all()


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(-50, 50), min_size=3, max_size=8),
    st.floats(1e-6, 1e6),
    st.floats(-100.0, 100.0),
    st.floats(1.0, 1e12),
)
def test_a_true_spread_has_neither_scale_nor_offset(steps: list[int], scale: float, offset: float, tiny: float) -> None:
    """Spreads of at least 1/200 of the magnitude, and of any size with offset 0."""
    plain = torch.tensor([steps], dtype=torch.float64)
    expected = call("group/std", plain, None, torch.zeros(1))
    assert expected.eq(0).all() == (len(set(steps)) == 1)
    for moved in (scale * (plain + offset), plain / tiny):
        torch.testing.assert_close(call("group/std", moved, None, torch.zeros(1)), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["leave_one_out", "group", "group/std"])
def test_groups_do_not_see_each_other(name: str) -> None:
    rewards = torch.tensor([[1.0, 2.0, 4.0], [5.0, 5.0, 5.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    whole = call(name, rewards, None, torch.zeros(3))
    for i in range(3):
        torch.testing.assert_close(whole[i], call(name, rewards[i : i + 1], None, torch.zeros(1))[0])
    torch.testing.assert_close(whole.sum(dim=1), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_all_masked_is_all_zero(name: str) -> None:
    rewards = torch.full((2, 3), math.nan)
    assert call(name, rewards, torch.zeros(2, dtype=torch.bool), torch.full((2,), math.nan)).eq(0).all()


def test_what_is_overlong_loses_as_in_the_paper() -> None:
    """DAPO's equation 13 with its own numbers, 16,384 tokens and a cache of 4,096, branch by branch in float64."""
    limit, cache = 16384 + 4096, 4096
    lengths = np.array([[1, 16383, 16384, 16385], [17000, 20000, 20479, 20480]])
    shaped = np.where(lengths <= limit - cache, 0.0, ((limit - cache) - lengths) / cache)
    assert shaped.min() == -1.0
    found = overlong_penalty(torch.tensor(lengths), limit, 0.2, 3.0)
    np.testing.assert_allclose(found.numpy(), -3.0 * shaped, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="lengths at most 8, got up to 9"):
        overlong_penalty(torch.tensor([9]), 8, 0.2, 1.0)


def test_refuses() -> None:
    rewards = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="unknown advantage 'gae'"):
        advantages("gae", rewards)
    with pytest.raises(ValueError, match="greedy completions"):
        advantages("greedy", rewards)
    with pytest.raises(ValueError, match=r"\[2\], got \[3\]"):
        advantages("greedy", rewards, greedy=torch.zeros(3))
    with pytest.raises(ValueError, match="greedy rewards"):
        advantages("greedy", rewards, greedy=torch.tensor([math.nan, 0.0]))
    with pytest.raises(ValueError, match=r"\[6\]"):
        advantages("none", rewards.reshape(-1))
    with pytest.raises(ValueError, match=r"mask must be bool.*\[3\]"):
        advantages("none", rewards, mask=torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="finite"):
        advantages("none", torch.full((1, 2), math.inf))
    for name in ("leave_one_out", "group"):
        with pytest.raises(ValueError, match="at least 2"):
            advantages(name, torch.zeros(4, 1))
