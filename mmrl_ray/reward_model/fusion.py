"""Fusions of modalities (docs/equations.md 1, 2, 5 and 6), each by itself, and behind one signature by name.

    embeddings {m: [B, L_m, d_m]} ──projections──▶ {m: [B, L_m, out_dim]} ──one of four──▶ Fused(vector [B, out_dim])

`B` batch, `M` modalities, `L_m` tokens of modality m, `d_m` its width. Embeddings are contextual already, each from its
encoder, positions included. Masks are bool, True counts; what is masked (NaN included) reaches no output and no
gradient. A row that has no valid token to attend to or to average is an error, never a vector of zeros.

Heads on a fused vector need a hidden layer: under a linear head an additive fusion would cancel the picture that both
captions of a preference share.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import nn

FusionName = Literal["shared_attention", "coupled_encoders", "attention", "weighted_sum"]
FUSIONS: tuple[str, ...] = get_args(FusionName)

Embeddings = Mapping[str, torch.Tensor]
_MOST_HEADS = 4


class Fused(NamedTuple):
    """What every fusion gives its consumer."""

    vector: torch.Tensor
    """[B, out_dim]."""
    weights: torch.Tensor | None
    """[B, M], rows sum to 1, in the order of the fusion's `modalities`; None where the fusion weighs tokens instead."""


class SharedAttentionFusion(nn.Module):
    """H = softmax((W_q E_all)(W_k E_all)ᵀ / √d_k)(W_v E_all) over all modalities' tokens (docs/equations.md 1)."""

    def __init__(self, dim: int, key_dim: int | None = None) -> None:
        """`dim` is the width of every modality's tokens, `key_dim` (by default `dim`) that of the result."""
        super().__init__()
        key_dim = dim if key_dim is None else key_dim
        self.query = nn.Linear(dim, key_dim, bias=False)
        self.key = nn.Linear(dim, key_dim, bias=False)
        self.value = nn.Linear(dim, key_dim, bias=False)

    def forward(self, embeddings: Embeddings, masks: Embeddings | None = None) -> torch.Tensor:
        """[B, ΣL_m, key_dim], tokens in the order of `embeddings`; 0 at masked positions.

        Raises:
            ValueError: shapes or names that do not fit, or a row without any valid token.
        """
        masks = _checked(embeddings, masks, dict.fromkeys(embeddings, self.query.in_features))
        mask = torch.cat([masks[name] for name in embeddings], dim=1)
        _refuse_empty_rows(mask, "any modality")
        tokens = torch.cat([_zeroed(embeddings[name], masks[name]) for name in embeddings], dim=1)
        scores = self.query(tokens) @ self.key(tokens).transpose(1, 2) / math.sqrt(self.key.out_features)
        attention = scores.masked_fill(~mask[:, None, :], -torch.inf).softmax(dim=-1)
        return _zeroed(attention @ self.value(tokens), mask)


class CoupledEncodersFusion(nn.Module):
    """H_m = Transformer_m(E_m); H = W_f [H_1; …; H_M] + b_f, H_m averaged over its tokens (docs/equations.md 2)."""

    def __init__(self, dims: dict[str, int], out_dim: int, num_layers: int, num_heads: int) -> None:
        """`dims` are the modalities' widths, in the order in which H joins them.

        Raises:
            ValueError: `num_heads` does not divide a width.
        """
        super().__init__()
        uneven = {name: dim for name, dim in dims.items() if dim % num_heads}
        if uneven:
            raise ValueError(f"num_heads={num_heads} must divide every modality's width, got {uneven}")
        self.dims = dict(dims)
        # Without dropout: a reward must not depend on the draw.
        self.encoders = nn.ModuleDict(
            {
                name: nn.TransformerEncoder(
                    nn.TransformerEncoderLayer(dim, num_heads, 4 * dim, dropout=0.0, batch_first=True),
                    num_layers,
                    enable_nested_tensor=False,
                )
                for name, dim in dims.items()
            }
        )
        self.output = nn.Linear(sum(dims.values()), out_dim)

    def forward(self, embeddings: Embeddings, masks: Embeddings | None = None) -> torch.Tensor:
        """[B, out_dim].

        Raises:
            ValueError: shapes or names that do not fit, a missing modality, or a row of one without a valid token.
        """
        masks = _checked(embeddings, masks, self.dims)
        pooled = []
        for name, encoder in self.encoders.items():
            _refuse_empty_rows(masks[name], f"modality {name!r}")
            hidden = encoder(_zeroed(embeddings[name], masks[name]), src_key_padding_mask=~masks[name])
            pooled.append(_mean_of_valid(hidden, masks[name]))
        return self.output(torch.cat(pooled, dim=-1))


class AttentionFusion(nn.Module):
    """α = softmax(W_a [E_1; …; E_M]) over modalities, H = Σ_m α_m E_m (docs/equations.md 5).

    W_a sees all modalities at once: it is [M, M·dim], applied to their concatenation on features.
    """

    def __init__(self, dim: int, modalities: Sequence[str]) -> None:
        """`modalities` fixes their order.

        Raises:
            ValueError: no modality, or one named twice.
        """
        super().__init__()
        self.modalities = _distinct(modalities)
        self.dim = dim
        self.score = nn.Linear(len(self.modalities) * dim, len(self.modalities), bias=False)

    def forward(self, pooled: Embeddings) -> tuple[torch.Tensor, torch.Tensor]:
        """(fused [B, dim], alpha [B, M]) of one vector a modality, each [B, dim].

        Raises:
            ValueError: shapes or names that do not fit, or a missing modality.
        """
        stacked = _stacked(pooled, self.modalities, self.dim)
        alpha = self.score(stacked.flatten(1)).softmax(dim=-1)
        return (alpha[:, :, None] * stacked).sum(dim=1), alpha


class WeightedSumFusion(nn.Module):
    """F = Σ_m w_m F_m with learned weights on the simplex: w = softmax of free logits (docs/equations.md 6)."""

    def __init__(self, modalities: Sequence[str]) -> None:
        """Starts from equal weights; raises ValueError for no modality, or one named twice."""
        super().__init__()
        self.modalities = _distinct(modalities)
        self.logits = nn.Parameter(torch.zeros(len(self.modalities)))

    @property
    def weights(self) -> torch.Tensor:
        """[M], above 0, sum 1."""
        return self.logits.softmax(dim=0)

    def forward(self, pooled: Embeddings) -> torch.Tensor:
        """[B, dim] of one vector a modality, each [B, dim].

        Raises:
            ValueError: shapes or names that do not fit, or a missing modality.
        """
        return torch.einsum("m,bmd->bd", self.weights, _stacked(pooled, self.modalities, None))


Core = SharedAttentionFusion | CoupledEncodersFusion | AttentionFusion | WeightedSumFusion


class Fusion(nn.Module):
    """Any of the four with a projection a modality before it and pooling where it needs some: one signature for all.

    Pooling is the mean over valid tokens: of the projected tokens for the fusions of one vector a modality, of the
    attended tokens for shared attention.
    """

    def __init__(self, core: Core, dims: dict[str, int], out_dim: int) -> None:
        super().__init__()
        self.dims = dict(dims)
        self.modalities = tuple(dims)
        self.projections = nn.ModuleDict({name: nn.Linear(dim, out_dim) for name, dim in dims.items()})
        self.core = core

    def forward(self, embeddings: Embeddings, masks: Embeddings | None = None) -> Fused:
        """One vector a row. `embeddings` {m: [B, L_m, d_m]}, `masks` {m: bool [B, L_m]}, all valid without.

        Raises:
            ValueError: shapes or names that do not fit, a missing modality, or a row of one without a valid token.
        """
        masks = _checked(embeddings, masks, self.dims)
        for name, mask in masks.items():
            _refuse_empty_rows(mask, f"modality {name!r}")
        tokens = {
            name: _zeroed(project(_zeroed(embeddings[name], masks[name])), masks[name])
            for name, project in self.projections.items()
        }
        if isinstance(self.core, SharedAttentionFusion):
            joined = torch.cat([masks[name] for name in tokens], dim=1)
            return Fused(_mean_of_valid(self.core(tokens, masks), joined), None)
        if isinstance(self.core, CoupledEncodersFusion):
            return Fused(self.core(tokens, masks), None)
        pooled = {name: _mean_of_valid(each, masks[name]) for name, each in tokens.items()}
        if isinstance(self.core, AttentionFusion):
            return Fused(*self.core(pooled))
        vector = self.core(pooled)
        return Fused(vector, self.core.weights.expand(len(vector), -1))


def build_fusion(name: str, dims: dict[str, int], out_dim: int) -> Fusion:
    """The fusion of that name (`FUSIONS`) over modalities of these widths; `dims` fixes their order.

    Raises:
        ValueError: an unknown name, no modality, or a width below 1.
    """
    if not dims or min(dims.values()) < 1 or out_dim < 1:
        raise ValueError(f"a fusion needs at least one modality and widths above 0, got {dims} and out_dim={out_dim}")
    if name == "shared_attention":
        return Fusion(SharedAttentionFusion(out_dim), dims, out_dim)
    if name == "coupled_encoders":
        heads = max(n for n in range(1, _MOST_HEADS + 1) if out_dim % n == 0)
        return Fusion(CoupledEncodersFusion(dict.fromkeys(dims, out_dim), out_dim, 1, heads), dims, out_dim)
    if name == "attention":
        return Fusion(AttentionFusion(out_dim, tuple(dims)), dims, out_dim)
    if name == "weighted_sum":
        return Fusion(WeightedSumFusion(tuple(dims)), dims, out_dim)
    raise ValueError(f"unknown fusion {name!r}; choose {', '.join(FUSIONS[:-1])} or {FUSIONS[-1]}")


def _checked(embeddings: Embeddings, masks: Embeddings | None, dims: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """The masks, all True without; ValueError with the shapes received unless all of it fits."""
    _check_names(embeddings, tuple(dims))
    shapes = {name: list(embeddings[name].shape) for name in dims}
    if any(len(s) != 3 or s[2] != dims[name] for name, s in shapes.items()):
        raise ValueError(f"embeddings must be [B, L_m, d_m] with widths {dict(dims)}, got {shapes}")
    if len({shape[0] for shape in shapes.values()}) > 1:
        raise ValueError(f"all modalities must have the same batch size, got {shapes}")
    if masks is None:
        return {name: embeddings[name].new_ones(shapes[name][:2], dtype=torch.bool) for name in dims}
    if set(masks) != set(dims):
        raise ValueError(f"masks {sorted(masks)} must have the names of the embeddings {sorted(dims)}")
    for name in dims:
        if list(masks[name].shape) != shapes[name][:2] or masks[name].dtype != torch.bool:
            raise ValueError(
                f"mask of modality {name!r} must be bool {shapes[name][:2]}, got {masks[name].dtype} "
                f"{list(masks[name].shape)}"
            )
    return {name: masks[name] for name in dims}


def _stacked(pooled: Embeddings, modalities: tuple[str, ...], dim: int | None) -> torch.Tensor:
    """[B, M, dim] in the modalities' order; ValueError with the shapes received unless all of it fits."""
    _check_names(pooled, modalities)
    shapes = {name: list(pooled[name].shape) for name in modalities}
    first = shapes[modalities[0]]
    wanted = first[:1] + ([dim] if dim is not None else first[1:])
    if len(wanted) != 2 or any(shape != wanted for shape in shapes.values()):
        raise ValueError(f"pooled modalities must all be [B, {'dim' if dim is None else dim}], got {shapes}")
    return torch.stack([pooled[name] for name in modalities], dim=1)


def _check_names(given: Embeddings, modalities: tuple[str, ...]) -> None:
    if not modalities:
        raise ValueError("a fusion needs at least one modality, got none")
    missing = [name for name in modalities if name not in given]
    unknown = [name for name in given if name not in modalities]
    if missing or unknown:
        problem = f"lacks modality {missing[0]!r}" if missing else f"has unknown modality {unknown[0]!r}"
        raise ValueError(f"the batch {problem}: the fusion is of {list(modalities)}, got {list(given)}")


def _refuse_empty_rows(mask: torch.Tensor, what: str) -> None:
    empty = (~mask.any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"row {empty[0]} of the batch has no valid token of {what} (mask {list(mask.shape)})")


def _distinct(modalities: Sequence[str]) -> tuple[str, ...]:
    if not modalities or len(set(modalities)) != len(modalities):
        raise ValueError(f"modalities must be at least one and distinct, got {list(modalities)}")
    return tuple(modalities)


def _zeroed(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """0 where masked; a selection and not a product, for NaN · 0 is NaN."""
    return torch.where(mask[:, :, None], tokens, torch.zeros_like(tokens))


def _mean_of_valid(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[B, d] of [B, L, d]; every row has a valid token."""
    return _zeroed(tokens, mask).sum(dim=1) / mask.sum(dim=1, keepdim=True).to(tokens.dtype)
