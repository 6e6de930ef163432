"""How much of one caption hangs on each modality, and on each image token (docs/equations.md 9, on a real policy).

L = −log π(caption | image, prompt), the sum over the caption's tokens; not the loss of reinforcement learning, which is
0 where the advantage is. E_m are the language model's input embeddings of the modality, made leaves. The caption's own
words are part of what L is of, and no modality.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from mmrl_ray.analysis.attribution import importance_rms, importance_share, modality_importance, token_importance
from mmrl_ray.analysis.rows import IMAGE, MODALITIES, forward_rows, places
from mmrl_ray.experience.carriers import EncodedPrompt, VisionFeatures
from mmrl_ray.policy.load import Policy
from mmrl_ray.policy.logprobs import token_logprobs


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
