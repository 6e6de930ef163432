"""Correlation between what a policy says and what it was shown (docs/equations.md 17).

ρ = Cov(A, S) / √(Var(A) Var(S)); a side of vectors is reduced to its first principal component's scores. The sign of a
component is a convention, so what is reported of vectors is |ρ|, with a p-value by permutation.

`N` samples, `D` features.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from mmrl_ray.analysis.pca import fit_pca
from mmrl_ray.metrics.statistics import resolution

COMBINED = "combined"
"""The name of all modalities together."""
PERMUTATIONS = 2000
"""The smallest p-value that can come out is 1 ÷ (this + 1)."""

_CONSTANT = "no correlation: "
_ROUNDING = 1e-12
_CHUNK = 1 << 22


@dataclass(frozen=True, slots=True)
class Correlation:
    """The correlation of captions with one modality's state."""

    rho: float
    """|ρ|; nan where one side does not vary."""
    p_value: float
    """Share of random pairings that correlate at least as much; nan with `rho`."""


def modality_correlation(actions: torch.Tensor, state: torch.Tensor) -> float:
    """ρ between `actions` and `state`, [N] or [N, D] each, in −1 … 1; nan, with a warning, where a side is constant.

    Raises:
        ValueError: other ranks, different N, fewer than two samples, or numbers that are not finite.
    """
    a, s = _sides(actions, state)
    variances = float(a @ a), float(s @ s)
    if 0.0 in variances:
        which = "the actions do" if variances[0] == 0.0 else "the state does"
        warnings.warn(f"{_CONSTANT}{which} not vary over {a.numel()} samples", RuntimeWarning, stacklevel=2)
        return math.nan
    return max(-1.0, min(1.0, float(a @ s) / math.sqrt(variances[0]) / math.sqrt(variances[1])))


def absolute_correlation(
    actions: torch.Tensor, state: torch.Tensor, *, permutations: int = PERMUTATIONS, seed: int = 0
) -> Correlation:
    """|ρ|, and how often random pairings of the same samples reach it: (1 + reached) ÷ (1 + permutations).

    Raises:
        ValueError: as `modality_correlation`.
    """
    a, s = _sides(actions, state)
    rho = abs(modality_correlation(a, s))
    if math.isnan(rho):
        return Correlation(math.nan, math.nan)
    # A component does not depend on the pairing, so that its scores can be permuted instead of the vectors.
    a, s = (side / torch.linalg.vector_norm(side) for side in (a, s))
    generator = torch.Generator().manual_seed(seed)
    reached, rows = 0, max(1, _CHUNK // a.numel())
    for start in range(0, permutations, rows):
        count = min(rows, permutations - start)
        shuffled = a[torch.rand(count, a.numel(), generator=generator).argsort(dim=1)]
        reached += int(((shuffled @ s).abs() >= rho - _ROUNDING).sum())
    return Correlation(rho, (1 + reached) / (1 + permutations))


def combined_state(states: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """S_combined, float64 [N, ΣD]: the states side by side, every feature less its mean ÷ its standard deviation.

    A feature that never changes becomes 0.

    Raises:
        ValueError: no state, or states that are not [N] or [N, D] of one N.
    """
    shapes = {name: list(state.shape) for name, state in states.items()}
    if not states or len({shape[0] if shape else 0 for shape in shapes.values()}) > 1:
        raise ValueError(f"states of the same samples are combined, got shapes {shapes}")
    columns = []
    for name, state in states.items():
        if state.ndim not in (1, 2):
            raise ValueError(f"a state is [N] or [N, D]; {name!r} has shape {shapes[name]}")
        x = state.detach().to("cpu", torch.float64).reshape(state.shape[0], -1)
        centred = _centred(x)
        deviation = centred.square().mean(dim=0).sqrt()
        columns.append(centred / torch.where(deviation > 0, deviation, 1.0))
    return torch.cat(columns, dim=1)


def correlations(
    actions: torch.Tensor, states: Mapping[str, torch.Tensor], *, permutations: int = PERMUTATIONS
) -> dict[str, Correlation]:
    """|ρ| of each modality and, last, of all of them together; a constant side is nan here, without a warning.

    Raises:
        ValueError: as `modality_correlation` and `combined_state`.
    """
    sides = {**states, COMBINED: combined_state(states)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_CONSTANT, category=RuntimeWarning)
        return {name: absolute_correlation(actions, state, permutations=permutations) for name, state in sides.items()}


def _sides(actions: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as centred scores, float64 [N]."""
    shapes = f"actions {list(actions.shape)} and state {list(state.shape)}"
    if actions.ndim not in (1, 2) or state.ndim not in (1, 2) or 0 in (*actions.shape, *state.shape):
        raise ValueError(f"a correlation is of [N] or [N, D] on either side, got {shapes}")
    if actions.shape[0] != state.shape[0] or actions.shape[0] < 2:
        raise ValueError(f"a correlation needs the same two samples or more on both sides, got {shapes}")
    if not bool(torch.isfinite(actions).all() and torch.isfinite(state).all()):
        raise ValueError(f"a correlation needs finite numbers; NaN or infinity in {shapes}")
    return _scores(actions), _scores(state)


def _scores(side: torch.Tensor) -> torch.Tensor:
    x = _centred(side.detach().to("cpu", torch.float64).reshape(side.shape[0], -1))
    return x[:, 0] if side.ndim == 1 else fit_pca(x, 1).transform(x)[:, 0]


def _centred(x: torch.Tensor) -> torch.Tensor:
    """Less its column means; a column that only rounding tells from a constant one becomes 0."""
    centred = x - x.mean(dim=0)
    constant = centred.abs().amax(dim=0) <= resolution(x.abs().amax(dim=0))
    return torch.where(constant, 0.0, centred)
