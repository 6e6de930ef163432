"""GDPO: parts by their group, then the sum by the step."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrl_ray.losses.advantages import decoupled_rewards


def test_literal() -> None:
    # Group 1: a = 0, 2 (mean 1, std √2: z = -1/√2, 1/√2), b = 4, 4 (equal: 0).
    # Group 2: a = 1, 1 (0), b = 0, 8 (z = -1/√2, 1/√2).
    parts = torch.tensor([[[0.0, 2.0], [1.0, 1.0]], [[4.0, 4.0], [0.0, 8.0]]], dtype=torch.float64)
    found = decoupled_rewards(parts, torch.tensor([1.0, 3.0]))
    # s = ∓1/√2 and ∓3/√2, of mean 0 and variance (½ + ½ + 9/2 + 9/2) / 3 = 10/3.
    std = math.sqrt(10 / 3)
    expected = [[-(0.5**0.5) / std, 0.5**0.5 / std], [-3 * 0.5**0.5 / std, 3 * 0.5**0.5 / std]]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def test_mixtures_that_a_sum_confuses_stay_apart() -> None:
    """Two parts of 0 or 1: as sums, (0, 1), (0, 2) and (1, 2) become the same advantages; by parts they do not."""
    a = torch.tensor([[0.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    b = torch.tensor([[1.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    found = decoupled_rewards(torch.stack([a, b]), torch.ones(2))
    assert found[1, 1] == pytest.approx(2 * found[0, 1].item(), rel=1e-12)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(2, 6), st.integers(0, 2**31))
def test_equals_numpy_and_no_scale_of_a_part_matters(k: int, m: int, g: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    parts, weights = rng.normal(size=(k, m, g)), rng.uniform(0.1, 2.0, size=k)
    z = (parts - parts.mean(-1, keepdims=True)) / (parts.std(-1, ddof=1, keepdims=True))
    s = np.einsum("k,kmg->mg", weights, z)
    expected = (s - s.mean()) / (s.std(ddof=1))
    found = decoupled_rewards(torch.from_numpy(parts), torch.from_numpy(weights)).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
    scaled = decoupled_rewards(torch.from_numpy(parts * 1000.0 + 5.0), torch.from_numpy(weights)).numpy()
    np.testing.assert_allclose(scaled, expected, rtol=1e-9, atol=1e-9)


def test_what_is_equal_is_exactly_zero() -> None:
    parts = torch.full((2, 3, 4), 0.1, dtype=torch.float64)
    assert torch.equal(decoupled_rewards(parts, torch.ones(2)), torch.zeros(3, 4, dtype=torch.float64))


def test_noise_is_equal_and_parts_that_cancel_leave_nothing() -> None:
    near = [float(np.nextafter(np.float32(100), np.float32(101))), 100.0, 100.0]
    assert decoupled_rewards(torch.tensor([[near]], dtype=torch.float64), torch.ones(1)).eq(0).all()
    a = torch.tensor([[0.1, 0.7, 0.2]], dtype=torch.float64)
    assert decoupled_rewards(torch.stack([a, 1.0 / 3.0 - a]), torch.ones(2)).eq(0).all()


def test_masked_completions_take_no_part() -> None:
    """As if they were not there: groups of 3 of which 2 count are groups of 2."""
    parts = torch.tensor([[[0.0, math.nan, 2.0], [1.0, 1.0, math.nan]]], dtype=torch.float64)
    parts = torch.cat([parts, torch.tensor([[[4.0, 7.0, 4.0], [0.0, 8.0, 9.0]]], dtype=torch.float64)])
    mask = torch.tensor([[True, False, True], [True, True, False]])
    found = decoupled_rewards(parts, torch.tensor([1.0, 3.0]), mask)
    kept = torch.stack([part[mask].reshape(2, 2) for part in parts])
    torch.testing.assert_close(found[mask].reshape(2, 2), decoupled_rewards(kept, torch.tensor([1.0, 3.0])))
    assert found[~mask].eq(0).all()


@pytest.mark.parametrize(
    ("parts", "weights", "said"),
    [
        (torch.zeros(2, 3), torch.ones(2), r"\[K, M, G\]"),
        (torch.zeros(2, 3, 4), torch.ones(3), r"weights \[K\]"),
        (torch.zeros(2, 3, 1), torch.ones(2), "2 completions"),
        (torch.full((1, 1, 2), math.nan), torch.ones(1), "finite"),
    ],
)
def test_refuses(parts: torch.Tensor, weights: torch.Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        decoupled_rewards(parts, weights)
