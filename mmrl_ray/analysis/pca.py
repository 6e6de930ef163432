"""Principal components (docs/equations.md 11): Z = XW, W the directions of largest variance.

`N` samples, `D` features, `K` components.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class PCAResult:
    """One fit, for any number of sets of samples: points of two fits cannot be compared."""

    mean: torch.Tensor
    """[D]."""
    directions: torch.Tensor
    """W, [D, K]: orthonormal columns, most variance first. Of each, the loading of largest magnitude is positive."""
    explained_variance_ratio: torch.Tensor
    """[K], shares of the whole variance; nan where there is none."""

    def transform(self, x: torch.Tensor) -> torch.Tensor:
        """Z = (x − mean) W, [N, K], of x [N, D].

        Raises:
            ValueError: x is not [N, D] of this fit's D.
        """
        if x.ndim != 2 or x.shape[1] != self.mean.shape[0]:
            raise ValueError(f"this PCA is of [N, {self.mean.shape[0]}], got x of shape {list(x.shape)}")
        return (x - self.mean.to(x)) @ self.directions.to(x)


def fit_pca(x: torch.Tensor, components: int) -> PCAResult:
    """The `components` directions of largest variance of x [N, D], by a full SVD in float64.

    The results are in x's dtype and on its device.

    Raises:
        ValueError: x is not finite numbers [N, D] with N of 2 or more, or has not so many components.
    """
    if x.ndim != 2 or x.shape[0] < 2 or not x.is_floating_point():
        raise ValueError(f"a PCA needs floating-point x [N, D] with N >= 2, got {x.dtype} of shape {list(x.shape)}")
    if not 1 <= components <= min(x.shape):
        raise ValueError(f"x of shape {list(x.shape)} has 1 to {min(x.shape)} components, not {components}")
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"a PCA needs finite numbers; x of shape {list(x.shape)} holds NaN or infinity")
    rows = x.detach().to("cpu", torch.float64)
    mean = rows.mean(dim=0)
    _, singular, found = torch.linalg.svd(rows - mean, full_matrices=False)
    variance = singular.square()
    directions = found[:components].T
    largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))
    return PCAResult(
        mean=mean.to(x),
        directions=(directions * torch.where(largest < 0, -1.0, 1.0)).to(x),
        explained_variance_ratio=(variance / variance.sum())[:components].to(x),  # of no variance nan
    )
