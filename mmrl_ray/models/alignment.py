"""Aligns the tokens of pictures and captions while a reward trains; no part of the reward itself.

Which of two captions somebody liked better is one noisy bit, and the bits alone take very long to teach what words look
like: on the generated scenes a reward trained on them stays at chance for thousands of captions. That a caption
belongs to its picture rather than to the others of the step says much more, and comes for nothing.
"""

from __future__ import annotations

import torch
from torch import nn

_FIRST_LOG_TEMPERATURE = 2.0


class Alignment(nn.Module):
    """Token-wise contrast of captions with pictures (FILIP, Yao et al. 2022, arXiv:2111.07783), one direction of it.

    The similarity of a caption and a picture is the mean over the caption's tokens of the largest cosine to one of the
    picture's tokens, each after a projection, times a learned scale.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.image = nn.Linear(dim, dim, bias=False)
        self.text = nn.Linear(dim, dim, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(_FIRST_LOG_TEMPERATURE))

    def similarity(
        self, image: torch.Tensor, image_mask: torch.Tensor, text: torch.Tensor, text_mask: torch.Tensor
    ) -> torch.Tensor:
        """[n, B] of tokens [B, L, d] and [n, T, d] with their masks."""
        pictures = nn.functional.normalize(self.image(image), dim=-1)
        captions = nn.functional.normalize(self.text(text), dim=-1)
        cosines = torch.einsum("ntd,bld->nbtl", captions, pictures)
        best = cosines.masked_fill(~image_mask[None, :, None, :], -2.0).amax(dim=-1)
        counts = text_mask[:, None, :].to(best.dtype)
        return (best * counts).sum(dim=-1) / counts.sum(dim=-1) * self.log_scale.exp()

    def forward(
        self,
        image: torch.Tensor,
        image_mask: torch.Tensor,
        text: torch.Tensor,
        text_mask: torch.Tensor,
        of: torch.Tensor,
        liked: torch.Tensor,
    ) -> torch.Tensor:
        """Mean −log of the chances that a liked caption is given to its own picture, and is it that its picture takes.

        Args:
            image: [B, L, d].
            image_mask: bool [B, L].
            text: [n, T, d].
            text_mask: bool [n, T].
            of: int64 [n], each caption's picture.
            liked: bool [n]; one at least. A picture chooses among the one and those of its own that are not liked.
        """
        similarity = self.similarity(image, image_mask, text, text_mask)
        to_picture = nn.functional.cross_entropy(similarity[liked], of[liked])
        own = similarity.gather(1, of[:, None])[:, 0]
        others = (of[liked][:, None] == of[None, :]) & ~liked[None, :]
        rivals = own[None, :].expand(len(others), -1).masked_fill(~others, -torch.inf)
        to_caption = torch.logsumexp(torch.cat([own[liked][:, None], rivals], dim=1), dim=1) - own[liked]
        return to_picture + to_caption.mean()
