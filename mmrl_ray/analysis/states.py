"""What a policy's captions and their samples look like from inside: means over tokens, for docs/equations.md 11, 17.

`N` captions, `R` tokens a row, `d` width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mmrl_ray.analysis.rows import MODALITIES, forward_rows, places
from mmrl_ray.experience.carriers import CaptionState, EncodedPrompt, VisionFeatures
from mmrl_ray.policy.load import Policy

BATCH = 16
"""Rows that go through the model together."""


@torch.no_grad()
def caption_states(
    policy: Policy,
    prompts: Sequence[EncodedPrompt],
    features: Sequence[VisionFeatures] | None,
    captions: Sequence[torch.Tensor],
) -> list[CaptionState]:
    """The state of each caption, in order, on the CPU.

    Args:
        policy: the model.
        prompts: N of them.
        features: N from `vision_features`, or None to run the vision tower inside.
        captions: N of int64 [T], one token or more each.

    Raises:
        ValueError, ModelError: of `forward_rows`.
    """
    states: list[CaptionState] = []
    for start in range(0, len(prompts), BATCH):
        part = slice(start, start + BATCH)
        states += _batch(policy, prompts[part], None if features is None else features[part], captions[part])
    return states


def _batch(
    policy: Policy,
    prompts: Sequence[EncodedPrompt],
    features: Sequence[VisionFeatures] | None,
    captions: Sequence[torch.Tensor],
) -> list[CaptionState]:
    caught: list[torch.Tensor] = []

    def catch(embeddings: torch.Tensor) -> torch.Tensor:
        caught.append(embeddings)
        return embeddings

    rows = forward_rows(policy, prompts, features, captions, catch)
    (embeddings,) = caught
    where = places(policy, prompts, captions)
    said = where.caption.clone()
    said[:, -rows.mask.shape[1] :] &= _words(policy, rows.targets, rows.mask)
    return [
        CaptionState(
            action=_mean(embeddings[i], said[i]),
            modalities={name: _mean(embeddings[i], getattr(where, name)[i]) for name in MODALITIES},
            hidden=_mean(rows.hidden[i], rows.mask[i]),
        )
        for i in range(len(prompts))
    ]


def _words(policy: Policy, targets: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """bool [N, T]: what a caption says, without the end of the turn: with it, a mean would also measure the length.

    A caption of nothing else keeps it.
    """
    ends = torch.tensor(policy.eos_token_ids, device=targets.device)
    words = mask & ~torch.isin(targets, ends)
    return torch.where(words.any(dim=1, keepdim=True), words, mask)


def _mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """float32 [d]: of the rows of [·, d] where the mask is True. Equal tokens give equal means in any batch."""
    return values[mask].float().mean(dim=0).cpu()
