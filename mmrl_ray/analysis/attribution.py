"""Importance of a modality (docs/equations.md 9): I_m = ‖∂L/∂E_m‖, the Frobenius norm of a loss's gradient a sample.

`B` samples, `L_m` tokens of modality m, `d` embedding width. Works in the embeddings' dtype.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

Embeddings = Mapping[str, torch.Tensor]
"""By modality, [B, L_m, d]; what the loss was computed of, with gradient."""


def token_importance(
    loss: torch.Tensor, embeddings: Embeddings, *, retain_graph: bool = False
) -> dict[str, torch.Tensor]:
    """‖∂L/∂E_m‖ of every single token: [B, L_m] for each modality; 0 for a modality that the loss does not touch.

    No `.grad` is written.

    Args:
        loss: a scalar, the sum over samples that do not see each other.
        embeddings: leaves (or any tensors) that `loss` was computed of.
        retain_graph: `loss` is asked for further gradients.

    Raises:
        ValueError: `loss` is no scalar with gradient, there is no modality, or an embedding is not [B, L_m, d] with
            gradient and of one B with the others.
    """
    _check(loss, embeddings)
    gradients = torch.autograd.grad(loss, list(embeddings.values()), retain_graph=retain_graph, allow_unused=True)
    return {
        name: each.new_zeros(each.shape[:2]) if gradient is None else torch.linalg.vector_norm(gradient, dim=-1)
        for (name, each), gradient in zip(embeddings.items(), gradients, strict=True)
    }


def modality_importance(loss: torch.Tensor, embeddings: Embeddings) -> dict[str, torch.Tensor]:
    """I_m, [B] for each modality. Padding that the loss does not see adds nothing.

    Raises:
        ValueError: as `token_importance`.
    """
    return {name: torch.linalg.vector_norm(each, dim=-1) for name, each in token_importance(loss, embeddings).items()}


def importance_share(importance: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """I_m ÷ ΣI, [B] for each modality; nan where all are 0. A share grows with a modality's number of tokens."""
    if not importance:
        raise ValueError("a share needs one modality or more, got none")
    shapes = {name: list(each.shape) for name, each in importance.items()}
    if len({tuple(shape) for shape in shapes.values()}) > 1:
        raise ValueError(f"importances of the same samples have one shape [B], got {shapes}")
    total = torch.stack(list(importance.values())).sum(dim=0)
    return {name: torch.where(total > 0, each / total, torch.nan) for name, each in importance.items()}


def importance_rms(importance: Mapping[str, torch.Tensor], embeddings: Embeddings) -> dict[str, torch.Tensor]:
    """I_m ÷ √(L_m d), [B] for each modality: the same for a modality whatever the number of its tokens."""
    rms = {}
    for name, each in importance.items():
        _, tokens, width = embeddings[name].shape
        rms[name] = each / math.sqrt(tokens * width) if tokens * width else torch.full_like(each, torch.nan)
    return rms


def _check(loss: torch.Tensor, embeddings: Embeddings) -> None:
    if loss.ndim != 0 or not loss.requires_grad:
        raise ValueError(f"importance needs a scalar loss with gradient, got shape {list(loss.shape)}")
    shapes = {name: list(each.shape) for name, each in embeddings.items()}
    if not shapes or any(len(shape) != 3 for shape in shapes.values()) or len({s[0] for s in shapes.values()}) > 1:
        raise ValueError(f"embeddings are [B, L, d] of one B, for one modality or more; got {shapes}")
    fixed = [name for name, each in embeddings.items() if not each.requires_grad]
    if fixed:
        raise ValueError(f"embeddings of {', '.join(fixed)} carry no gradient; got {shapes}")
