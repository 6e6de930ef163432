"""ε-greedy, Boltzmann and their schedules, against the formulas in NumPy; and that no masked action is ever taken."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrl_ray.algorithms.dqn.exploration import boltzmann_probabilities, epsilon_greedy, scheduled

SEEDS = st.integers(0, 2**31 - 1)


def case(seed: int, b: int, a: int) -> tuple[np.ndarray, np.ndarray]:
    """Q [B, A] and valid [B, A], at least one a row."""
    rng = np.random.default_rng(seed)
    valid = rng.uniform(size=(b, a)) < 0.6
    valid[np.arange(b), rng.integers(a, size=b)] = True
    return rng.normal(size=(b, a)), valid


@settings(deadline=None)
@given(SEEDS, st.integers(1, 5), st.integers(1, 6), st.floats(0.05, 20))
def test_boltzmann_equals_the_formula(seed: int, b: int, a: int, temperature: float) -> None:
    q, valid = case(seed, b, a)
    exps = np.where(valid, np.exp(q / temperature), 0)
    rubbish = torch.from_numpy(np.where(valid, q, np.nan))
    got = boltzmann_probabilities(rubbish, temperature, torch.from_numpy(valid)).numpy()
    np.testing.assert_allclose(got, exps / exps.sum(axis=1, keepdims=True), rtol=1e-9, atol=1e-15)
    assert (got[~valid] == 0).all()


@settings(deadline=None)
@given(
    st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=6),
    st.floats(1e-6, 1e30),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_boltzmann_is_finite_and_sums_to_1(values: list[float], temperature: float, dtype: torch.dtype) -> None:
    got = boltzmann_probabilities(torch.tensor([values], dtype=dtype), temperature)
    assert got.dtype == dtype
    assert torch.isfinite(got).all()
    assert got.min() >= 0
    assert got.sum().item() == pytest.approx(1, abs=1e-6)


def test_boltzmann_of_the_extremes() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        q = torch.tensor([[1e30, -1e30], [-1e30, -1e30]], dtype=dtype)
        for temperature in (1e-6, 1e-300):
            assert boltzmann_probabilities(q, temperature).tolist() == [[1, 0], [0.5, 0.5]]


@settings(deadline=None)
@given(SEEDS, st.integers(1, 5), st.integers(1, 6))
def test_epsilon_0_is_greedy(seed: int, b: int, a: int) -> None:
    q, valid = case(seed, b, a)
    expected = [max(np.flatnonzero(mask), key=lambda i: row[i]) for row, mask in zip(q, valid, strict=True)]
    rubbish = torch.from_numpy(np.where(valid, q, np.nan))
    assert epsilon_greedy(rubbish, 0.0, valid=torch.from_numpy(valid)).tolist() == expected


def test_epsilon_1_is_uniform_over_valid_actions_and_masked_ones_are_never_taken() -> None:
    rows, valid = 30_000, torch.tensor([True, False, True, True])
    q = torch.tensor([0.0, 9.0, 5.0, -torch.inf]).expand(rows, 4)
    draws = torch.Generator().manual_seed(0)
    counts = torch.bincount(epsilon_greedy(q, 1.0, draws, valid.expand(rows, 4)), minlength=4)
    assert counts[1] == 0
    # Five standard deviations of a binomial.
    assert (counts[valid] - rows / 3).abs().max() < 5 * math.sqrt(rows * 2 / 9)
    half = torch.bincount(epsilon_greedy(q, 0.5, draws, valid.expand(rows, 4)), minlength=4)
    assert abs(half[2].item() - rows * (0.5 + 0.5 / 3)) < 5 * math.sqrt(rows * 2 / 9)
    assert half[1] == 0


def test_an_infinitely_bad_action_is_no_masked_one() -> None:
    q, valid = torch.full((1, 3), -torch.inf), torch.tensor([[False, True, False]])
    assert epsilon_greedy(q, 0.0, valid=valid).tolist() == [1]


def test_the_generator_decides() -> None:
    q = torch.zeros(50, 6)
    one, two = (epsilon_greedy(q, 0.7, torch.Generator().manual_seed(3)) for _ in range(2))
    assert one.tolist() == two.tolist()
    assert one.dtype == torch.int64


def test_refusals() -> None:
    q, stuck = torch.zeros(2, 3), torch.tensor([[True, False, True], [False, False, False]])
    for refuse in (lambda: epsilon_greedy(q, 0.5, valid=stuck), lambda: boltzmann_probabilities(q, 1.0, stuck)):
        with pytest.raises(ValueError, match="row 1 of valid allows no action"):
            refuse()
    with pytest.raises(ValueError, match=r"valid must be bool \[2, 3\], got torch\.bool \[1, 3\]"):
        boltzmann_probabilities(q, 1.0, stuck[:1])
    with pytest.raises(ValueError, match=r"\[B, A\] with at least one action, got torch\.float32 \[3\]"):
        epsilon_greedy(torch.zeros(3), 0.5)
    with pytest.raises(ValueError, match="is NaN"):
        epsilon_greedy(torch.tensor([[0.0, torch.nan]]), 0.0)
    for epsilon in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="epsilon="):
            epsilon_greedy(q, epsilon)
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="temperature="):
            boltzmann_probabilities(q, temperature)


def test_schedules() -> None:
    assert [scheduled("linear", t, 4, 1.0, 0.2) for t in (0, 1, 4, 9)] == pytest.approx([1.0, 0.8, 0.2, 0.2])
    assert [scheduled("cosine", t, 4, 1.0, 0.2) for t in (0, 2, 4, 9)] == pytest.approx([1.0, 0.6, 0.2, 0.2])
    assert scheduled("constant", 9, 4, 0.3, 0.1) == 0.3
    with pytest.raises(ValueError, match="unknown schedule 'step'; choose constant, linear or cosine"):
        scheduled("step", 0, 4, 1.0, 0.2)
    with pytest.raises(ValueError, match=r"end=0\.5"):
        scheduled("linear", 0, 4, 0.2, 0.5)


def test_it_is_pure() -> None:
    code = "import sys, mmrl_ray.value_based.exploration; sys.exit(any(m in sys.modules for m in ('ray', 'gymnasium')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
