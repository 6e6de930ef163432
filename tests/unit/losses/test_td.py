"""Q-learning's target and update against the formula, written with NumPy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrl_ray.losses.td import q_learning_target, q_learning_update

SEEDS = st.integers(0, 2**31 - 1)


@settings(deadline=None)
@given(SEEDS, st.integers(1, 6), st.integers(1, 5), st.floats(0, 1), st.booleans())
def test_target_equals_the_formula(seed: int, b: int, a: int, gamma: float, masked: bool) -> None:
    rng = np.random.default_rng(seed)
    reward, next_q, terminated = rng.normal(size=b), rng.normal(size=(b, a)) * 10, rng.uniform(size=b) < 0.4
    valid = rng.uniform(size=(b, a)) < 0.5 if masked else np.ones((b, a), dtype=bool)
    valid[~terminated, rng.integers(a)] = True
    expected = np.array(
        [
            r if over else r + gamma * max(q for q, allowed in zip(row, mask, strict=True) if allowed)
            for r, row, over, mask in zip(reward, next_q, terminated, valid, strict=True)
        ]
    )
    rubbish = np.where(valid & ~terminated[:, None], next_q, np.nan)  # what does not count must not show
    got = q_learning_target(
        torch.from_numpy(reward),
        torch.from_numpy(rubbish if masked else next_q),
        torch.from_numpy(terminated),
        gamma,
        torch.from_numpy(valid) if masked else None,
    )
    assert got.dtype == torch.float64
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-12, atol=1e-12)


@settings(deadline=None)
@given(SEEDS, st.integers(1, 6), st.floats(0, 1))
def test_update_equals_the_formula_and_is_a_step_down_its_loss(seed: int, b: int, alpha: float) -> None:
    rng = np.random.default_rng(seed)
    q, target = rng.normal(size=b), rng.normal(size=b)
    values = torch.from_numpy(q).requires_grad_()
    updated = q_learning_update(values, torch.from_numpy(target), alpha)
    np.testing.assert_allclose(updated.detach().numpy(), (1 - alpha) * q + alpha * target, rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad((0.5 * (values - updated.detach()) ** 2).sum(), values)
    np.testing.assert_allclose(q - gradient.numpy(), (1 - alpha) * q + alpha * target, rtol=1e-12, atol=1e-12)


def test_literal() -> None:
    target = q_learning_target(
        torch.tensor([1.0, 2.0]), torch.tensor([[3.0, 5.0], [7.0, 9.0]]), torch.tensor([False, True]), 0.5
    )
    assert target.tolist() == [3.5, 2.0]
    assert q_learning_update(torch.tensor([1.5, 0.0]), target, 0.25).tolist() == [2.0, 0.5]


def test_refusals_name_the_shapes() -> None:
    reward, next_q, ended = torch.zeros(2), torch.zeros(2, 3), torch.zeros(2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"got \[2\], \[2\] and \[2\]"):
        q_learning_target(reward, reward, ended, 0.9)
    with pytest.raises(ValueError, match=r"got \[3\], \[2, 3\]"):
        q_learning_target(torch.zeros(3), next_q, ended, 0.9)
    with pytest.raises(ValueError, match=r"gamma=1\.5"):
        q_learning_target(reward, next_q, ended, 1.5)
    with pytest.raises(ValueError, match=r"next_valid must be bool \[2, 3\], got torch\.float32"):
        q_learning_target(reward, next_q, ended, 0.9, next_q)
    with pytest.raises(ValueError, match="row 1 of next_valid allows no action"):
        q_learning_target(reward, next_q, ended, 0.9, torch.tensor([[True] * 3, [False] * 3]))
    with pytest.raises(ValueError, match=r"must both be \[B\], got \[2\] and \[3\]"):
        q_learning_update(reward, torch.zeros(3), 0.5)
    with pytest.raises(ValueError, match="alpha=2"):
        q_learning_update(reward, reward, 2.0)
