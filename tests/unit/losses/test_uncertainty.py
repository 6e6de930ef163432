"""Noise-aware likelihoods against float64 NumPy and SciPy, with their gradients and their limits."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from mmrl_ray.losses.uncertainty import gaussian_nll, preference_nll


def case(seed: int, n: int, count: int) -> list[torch.Tensor]:
    return list(torch.from_numpy(np.random.default_rng(seed).normal(size=(count, n))))


@settings(deadline=None)
@given(st.integers(0, 2**31 - 1), st.integers(1, 20))
def test_gaussian_nll_is_the_formula(seed: int, n: int) -> None:
    mean, log_variance, target = case(seed, n, 3)
    sigma = np.exp(log_variance.numpy() / 2)
    expected = np.mean((target.numpy() - mean.numpy()) ** 2 / (2 * sigma**2) + np.log(sigma**2) / 2)
    np.testing.assert_allclose(gaussian_nll(mean, log_variance, target).item(), expected, rtol=1e-9)
    density = -norm.logpdf(target.numpy(), mean.numpy(), sigma).mean() - math.log(2 * math.pi) / 2
    np.testing.assert_allclose(gaussian_nll(mean, log_variance, target).item(), density, rtol=1e-7, atol=1e-9)


def test_gaussian_nll_literal() -> None:
    """Both terms under the mean: (4/8 + ½ log 4 + 0 + 0) ÷ 2."""
    got = gaussian_nll(torch.tensor([1.0, 5.0]), torch.tensor([math.log(4.0), 0.0]), torch.tensor([3.0, 5.0]))
    assert got.item() == pytest.approx((0.5 + math.log(2)) / 2, rel=1e-6)


def test_gaussian_nll_is_least_at_the_true_noise() -> None:
    log_variance = torch.tensor([math.log(9.0)], dtype=torch.float64, requires_grad=True)
    gaussian_nll(torch.zeros(1).double(), log_variance, torch.full((1,), 3.0).double()).backward()
    assert log_variance.grad.item() == pytest.approx(0, abs=1e-12)


@settings(deadline=None)
@given(st.integers(0, 2**31 - 1), st.integers(1, 20))
def test_preference_nll_is_the_formula(seed: int, n: int) -> None:
    given_ = case(seed, n, 4)
    mean, log_variance, other, other_log_variance = (x.numpy() for x in given_)
    z = (mean - other) / np.sqrt(np.exp(log_variance) + np.exp(other_log_variance))
    np.testing.assert_allclose(preference_nll(*given_).numpy(), -norm.logcdf(z), rtol=1e-9)


def test_preferences_are_symmetric_and_stay_finite() -> None:
    mean, log_variance, other, other_log_variance = case(1, 8, 4)
    one = preference_nll(mean, log_variance, other, other_log_variance)
    two = preference_nll(other, other_log_variance, mean, log_variance)
    torch.testing.assert_close(torch.exp(-one) + torch.exp(-two), torch.ones(8).double())
    far = torch.full((1,), -1e4, requires_grad=True)
    loss = preference_nll(far, torch.zeros(1), torch.zeros(1), torch.zeros(1)).sum()
    loss.backward()
    assert math.isfinite(loss.item())
    assert math.isfinite(far.grad.item())


def test_gradients() -> None:
    for function, count in ((gaussian_nll, 3), (preference_nll, 4)):
        assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in case(5, 4, count)])


def test_refuses() -> None:
    x = torch.zeros(3)
    with pytest.raises(ValueError, match=r"'target': \[2\]"):
        gaussian_nll(x, x, x[:2])
    with pytest.raises(ValueError, match=r"\[3, 1\]"):
        gaussian_nll(x[:, None], x[:, None], x[:, None])
    with pytest.raises(ValueError, match="at least 1"):
        gaussian_nll(x[:0], x[:0], x[:0])
    with pytest.raises(ValueError, match=r"'other_mean': \[2\]"):
        preference_nll(x, x, x[:2], x)
