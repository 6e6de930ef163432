"""Importance of a modality (docs/equations.md 9): I_m = ‖∂L/∂E_m‖, the Frobenius norm of a loss's gradient a sample.

`B` samples, `L_m` tokens of modality m, `d` embedding width. Works in the embeddings' dtype.

How much of one caption hangs on each modality, and on each image token (docs/equations.md 9, on a real policy).

L = −log π(caption | image, prompt), the sum over the caption's tokens; not the loss of reinforcement learning, which is
0 where the advantage is. E_m are the language model's input embeddings of the modality, made leaves. The caption's own
words are part of what L is of, and no modality.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from mmrl_ray.analysis.states import IMAGE, MODALITIES, forward_rows, places
from mmrl_ray.experience.carriers import EncodedPrompt, VisionFeatures
from mmrl_ray.policy.logits import token_logprobs
from mmrl_ray.policy.model import Policy

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


@dataclass(frozen=True, slots=True)
class Importance:
    """What one caption hangs on."""

    loss: float
    """−log π of the caption, nats."""
    share: Mapping[str, float]
    """I_m ÷ ΣI; nan where all are 0."""
    rms: Mapping[str, float]
    """I_m ÷ √(L_m d), nats a unit of embedding: comparable between modalities of different numbers of tokens."""
    image_tokens: torch.Tensor | None
    """float32 [L_image]: of each image token, in the order of the prompt, on the CPU; when asked for."""


def caption_importance(
    policy: Policy,
    prompt: EncodedPrompt,
    features: VisionFeatures | None,
    caption: torch.Tensor,
    *,
    temperature: float = 1.0,
    by_token: bool = False,
) -> Importance:
    """One forward and backward pass of one prompt with one caption. Parameters get no gradient.

    Args:
        policy: the model.
        prompt: with pixels where `features` is None.
        features: from `vision_features`, or None to run the vision tower inside.
        caption: int64 [T], one token or more.
        temperature: π's.
        by_token: also of each image token, by a second backward pass.

    Raises:
        ValueError: the caption has no token.
        ModelError: the model does not hand embeddings to its language model.
    """
    where = places(policy, [prompt], [caption])
    columns = {name: getattr(where, name)[0].nonzero()[:, 0] for name in MODALITIES}
    leaves: dict[str, torch.Tensor] = {}

    def make_leaves(embeddings: torch.Tensor) -> torch.Tensor:
        embeddings = embeddings.detach()
        for name, index in columns.items():
            leaves[name] = embeddings[:, index].clone().requires_grad_(True)
            embeddings = embeddings.index_copy(1, index, leaves[name])
        return embeddings

    with torch.enable_grad():
        rows = forward_rows(policy, [prompt], None if features is None else [features], [caption], make_leaves)
        logprobs, _ = token_logprobs(
            rows.hidden[rows.mask],
            rows.targets[rows.mask],
            head=policy.logits,
            forbidden=policy.image_token_ids,
            temperature=temperature,
            vocab_size=policy.vocab_size,
        )
        loss = -logprobs.sum()
        tokens = token_importance(loss, {IMAGE: leaves[IMAGE]}, retain_graph=True)[IMAGE][0] if by_token else None
        whole = modality_importance(loss, leaves)
    return Importance(
        loss=float(loss.detach()),
        share={name: float(each) for name, each in importance_share(whole).items()},
        rms={name: float(each) for name, each in importance_rms(whole, leaves).items()},
        image_tokens=None if tokens is None else tokens.float().cpu(),
    )
