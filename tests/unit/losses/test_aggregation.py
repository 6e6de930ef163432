"""Scales and denominators: literal values, and the formula of each paper as a loop over completions."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrl_ray.losses.aggregation import completion_scales


def test_literal() -> None:
    lengths = [1, 4, 5]
    expected = {
        "token_mean": ([1, 1, 1], 10),
        "sequence_mean": ([1, 0.25, 0.2], 3),
        "sequence_sum": ([1, 1, 1], 3),
        "constant": ([1, 1, 1], 24),
    }
    for name, (scales, denominator) in expected.items():
        got, over = completion_scales(name, lengths, max_new_tokens=8)
        assert got.tolist() == scales
        assert over == denominator


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(0, 2**31 - 1))
def test_equals_the_papers(lengths: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    losses = [rng.normal(size=n) for n in lengths]
    papers = {
        "token_mean": np.concatenate(losses).mean(),
        "sequence_mean": np.mean([x.mean() for x in losses]),
        "sequence_sum": np.mean([x.sum() for x in losses]),
        "constant": np.mean([x.sum() / 9 for x in losses]),
    }
    for name, expected in papers.items():
        scales, denominator = completion_scales(name, torch.tensor(lengths), max_new_tokens=9)
        got = sum(s * x.sum() for s, x in zip(scales.tolist(), losses, strict=True)) / denominator
        np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12)


def test_an_empty_completion_counts_as_a_completion() -> None:
    scales, denominator = completion_scales("sequence_mean", [2, 0])
    assert scales.tolist() == [0.5, 0.0]
    assert denominator == 2


@pytest.mark.parametrize("lengths", [[], [0, 0], [-1, 3], [[1, 2]]])
def test_refuses_lengths(lengths: list) -> None:
    with pytest.raises(ValueError, match="lengths must be"):
        completion_scales("token_mean", lengths)


def test_refuses_settings() -> None:
    with pytest.raises(ValueError, match="unknown aggregation 'mean'"):
        completion_scales("mean", [1])
    for longest in (None, 3):
        with pytest.raises(ValueError, match="max_new_tokens"):
            completion_scales("constant", [4], max_new_tokens=longest)


@pytest.mark.parametrize("name", ["token_mean", "sequence_mean", "sequence_sum", "constant"])
def test_a_masked_completion_counts_nowhere(name: str) -> None:
    kept, over = completion_scales(name, [2, 5], max_new_tokens=8)
    mask = torch.tensor([True, False, True])
    scales, denominator = completion_scales(name, [2, 3, 5], max_new_tokens=8, mask=mask)
    assert (scales[mask].tolist(), scales[1].item(), denominator) == (kept.tolist(), 0.0, over)
    with pytest.raises(ValueError, match="mask must be bool"):
        completion_scales(name, [2, 3, 5], max_new_tokens=8, mask=mask[:2])
