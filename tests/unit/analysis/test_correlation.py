"""docs/equations.md 17 against the formula in NumPy."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrl_ray.analysis.correlation import absolute_correlation, combined_state, correlations, modality_correlation

from .test_pca import by_eigenvectors, draw

Array = npt.NDArray[np.float64]


def scores(side: Array) -> Array:
    if side.ndim == 1:
        return side
    mean, w, _ = by_eigenvectors(side, 1)
    return ((side - mean) @ w)[:, 0]


def oracle(actions: Array, state: Array) -> float:
    """ρ = Cov(A, S) / √(Var(A) Var(S))."""
    a, s = scores(actions), scores(state)
    covariance = np.mean((a - a.mean()) * (s - s.mean()))
    return float(covariance / np.sqrt(np.mean((a - a.mean()) ** 2) * np.mean((s - s.mean()) ** 2)))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), n=st.integers(4, 30), da=st.integers(0, 6), ds=st.integers(0, 6))
def test_it_is_the_formula_of_the_first_components(seed: int, n: int, da: int, ds: int) -> None:
    """D = 0 stands for numbers instead of vectors."""
    rng = np.random.default_rng(seed)
    actions = draw(seed, n, da) if da else rng.normal(size=n)
    state = draw(seed + 1, n, ds) if ds else rng.normal(size=n) + 0.5 * (actions if not da else actions[:, 0])
    found = modality_correlation(torch.from_numpy(actions), torch.from_numpy(state))
    assert found == pytest.approx(oracle(actions, state), rel=1e-6, abs=1e-9)
    absolute = absolute_correlation(torch.from_numpy(actions), torch.from_numpy(state), permutations=1)
    assert absolute.rho == pytest.approx(abs(found), rel=1e-9)


def test_literal_values() -> None:
    a = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert modality_correlation(a, 3 * a - 7) == pytest.approx(1.0)
    assert modality_correlation(a, -a) == pytest.approx(-1.0)
    assert modality_correlation(a, torch.tensor([1.0, -1.0, -1.0, 1.0])) == pytest.approx(0.0, abs=1e-12)
    # Cov = 1.25 · 0.8, both variances 1.25
    assert modality_correlation(a, torch.tensor([2.0, 1.0, 4.0, 3.0])) == pytest.approx(0.6)


@pytest.mark.parametrize("shape", [(5,), (5, 3)])
def test_a_constant_side_is_nan_and_a_warning(shape: tuple[int, ...]) -> None:
    constant = torch.full(shape, 0.1)  # its mean in binary is not 0.1 exactly
    varying = torch.arange(5.0)
    with pytest.warns(RuntimeWarning, match="the actions do not vary over 5 samples"):
        assert math.isnan(modality_correlation(constant, varying))
    with pytest.warns(RuntimeWarning, match="the state does not vary"):
        assert math.isnan(modality_correlation(varying, constant))


def test_the_p_value_is_the_share_of_pairings_that_reach_it() -> None:
    """Of four different numbers, 2 of 24 orders give |ρ| = 1; and noise is not found to be anything."""
    a = torch.arange(4.0)
    assert absolute_correlation(a, a, permutations=6000).p_value == pytest.approx(2 / 24, abs=0.02)
    rng = torch.Generator().manual_seed(5)
    p_values = [
        absolute_correlation(
            torch.randn(20, 3, generator=rng), torch.randn(20, 4, generator=rng), permutations=200
        ).p_value
        for _ in range(200)
    ]
    assert 0.4 < sum(p_values) / len(p_values) < 0.6
    assert sum(p < 0.05 for p in p_values) < 24
    same = absolute_correlation(torch.arange(40.0), torch.arange(40.0), permutations=999)
    assert (same.rho, same.p_value) == (pytest.approx(1.0), pytest.approx(1 / 1000))


def test_the_combined_state_is_standardised_and_side_by_side() -> None:
    image, text = torch.tensor([[1.0, 5.0], [3.0, 5.0]]), torch.tensor([2.0, 8.0])
    expected = [[-1.0, 0.0, -1.0], [1.0, 0.0, 1.0]]
    assert combined_state({"image": image, "text": text}).tolist() == expected


def test_every_modality_and_all_of_them() -> None:
    a = torch.arange(12.0)
    found = correlations(a, {"image": torch.stack([a, -a], dim=1), "text": torch.ones(12, 3)}, permutations=99)
    assert list(found) == ["image", "text", "combined"]
    assert found["image"].rho == pytest.approx(1.0)
    assert found["combined"].rho == pytest.approx(1.0)
    assert math.isnan(found["text"].rho)
    assert math.isnan(found["text"].p_value)


@pytest.mark.parametrize(
    ("actions", "state", "said"),
    [
        (torch.zeros(3, 2, 2), torch.zeros(3), r"actions \[3, 2, 2\] and state \[3\]"),
        (torch.zeros(3), torch.zeros(4), r"\[3\] and state \[4\]"),
        (torch.zeros(1), torch.zeros(1), r"\[1\] and state \[1\]"),
        (torch.zeros(3, 0), torch.zeros(3), r"\[3, 0\]"),
        (torch.tensor([1.0, torch.inf]), torch.zeros(2), r"\[2\]"),
        (torch.tensor(1.0), torch.zeros(2), r"actions \[\]"),
    ],
)
def test_what_it_cannot_take_is_an_error_with_shapes(actions: torch.Tensor, state: torch.Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        modality_correlation(actions, state)


@pytest.mark.parametrize(
    "states", [{}, {"a": torch.zeros(2, 1), "b": torch.zeros(3, 1)}, {"a": torch.zeros(2, 1, 1)}, {"a": torch.ones(())}]
)
def test_states_that_cannot_be_combined(states: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match=r"shape"):
        combined_state(states)
