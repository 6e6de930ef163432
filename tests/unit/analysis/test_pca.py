"""docs/equations.md 11 against the eigenvectors of a covariance matrix, in NumPy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrl_ray.analysis.pca import fit_pca

Array = npt.NDArray[np.float64]


def by_eigenvectors(x: Array, components: int) -> tuple[Array, Array, Array]:
    """Mean, W [D, K], ratios [K]: the oracle."""
    mean = x.sum(axis=0) / len(x)
    covariance = (x - mean).T @ (x - mean) / (len(x) - 1)
    values, vectors = np.linalg.eigh(covariance)
    order = np.argsort(-values)[:components]
    w = vectors[:, order]
    for k in range(components):
        if w[np.argmax(np.abs(w[:, k])), k] < 0:
            w[:, k] = -w[:, k]
    return mean, w, values[order] / np.trace(covariance)


def draw(seed: int, n: int, d: int) -> Array:
    """Samples whose directions have clearly different variances, so that components are determined."""
    rng = np.random.default_rng(seed)
    turned, _ = np.linalg.qr(rng.normal(size=(d, d)))
    centred = rng.normal(size=(n, d))
    axes, _ = np.linalg.qr(centred - centred.mean(axis=0))
    scales = 3.0 ** -np.arange(min(n - 1, d))
    return (axes[:, : len(scales)] * scales) @ turned[: len(scales)] + rng.normal(size=d)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(3, 24), d=st.integers(1, 9), data=st.data())
def test_it_is_the_largest_eigenvectors_of_the_covariance(seed: int, n: int, d: int, data: st.DataObject) -> None:
    x = draw(seed, n, d)
    components = data.draw(st.integers(1, min(n - 1, d, 5)))
    fit = fit_pca(torch.from_numpy(x), components)
    mean, w, ratios = by_eigenvectors(x, components)
    np.testing.assert_allclose(fit.mean.numpy(), mean, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(fit.directions.numpy(), w, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(fit.explained_variance_ratio.numpy(), ratios, rtol=1e-6, atol=1e-10)
    np.testing.assert_allclose(fit.transform(torch.from_numpy(x)).numpy(), (x - mean) @ w, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose((fit.directions.T @ fit.directions).numpy(), np.eye(components), atol=1e-10)


def test_one_fit_serves_other_samples() -> None:
    before, after = (torch.from_numpy(draw(seed, 12, 4)) for seed in (1, 2))
    fit = fit_pca(torch.cat([before, after]), 2)
    both = torch.cat([fit.transform(before), fit.transform(after)])
    torch.testing.assert_close(both, fit.transform(torch.cat([before, after])))
    torch.testing.assert_close(both.mean(dim=0), torch.zeros(2, dtype=torch.float64), atol=1e-12, rtol=0)


def test_the_results_are_of_the_dtype_given_and_without_gradient() -> None:
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    fit = fit_pca(x, 2)
    assert {fit.mean.dtype, fit.directions.dtype, fit.explained_variance_ratio.dtype} == {torch.float32}
    assert not fit.directions.requires_grad


def test_equal_samples_have_no_variance_to_share() -> None:
    fit = fit_pca(torch.ones(4, 3), 1)
    assert torch.isnan(fit.explained_variance_ratio).all()
    assert torch.equal(fit.transform(torch.ones(4, 3)), torch.zeros(4, 1))


@pytest.mark.parametrize(
    ("x", "components", "said"),
    [
        (torch.zeros(5), 1, r"\[5\]"),
        (torch.zeros(1, 4), 1, r"\[1, 4\]"),
        (torch.zeros(5, 2, 2), 1, r"\[5, 2, 2\]"),
        (torch.zeros(5, 2, dtype=torch.int64), 1, r"int64 of shape \[5, 2\]"),
        (torch.zeros(5, 3), 4, r"\[5, 3\] has 1 to 3 components, not 4"),
        (torch.zeros(5, 3), 0, r"\[5, 3\]"),
        (torch.full((5, 3), torch.nan), 1, r"\[5, 3\] holds NaN"),
    ],
)
def test_what_it_cannot_take_is_an_error_with_shapes(x: torch.Tensor, components: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        fit_pca(x, components)


def test_transform_wants_the_same_features() -> None:
    with pytest.raises(ValueError, match=r"\[N, 3\], got x of shape \[2, 4\]"):
        fit_pca(torch.eye(3), 1).transform(torch.zeros(2, 4))
