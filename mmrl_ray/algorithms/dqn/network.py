"""The Q network: picture and words, each through an encoder of its own, fused by name, then a head or two.

    image [B, L, d] ──encoder──▶ [B, L, h] ─┐
                                            fusion ──▶ [B, h] ──head──▶ Q [B, A]
    words [B, T]    ──encoder──▶ [B, T+1, h]┘

Plain torch, without Ray. `h` is the width. Encoders know positions: without, "red above blue" would equal "blue above
red" once tokens are pooled.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from mmrl_ray.reward_model.fusion import Fused, build_fusion

MODALITIES = ("image", "words")


class QShape(NamedTuple):
    """Sizes that follow from the environment."""

    image_tokens: int
    image_dim: int
    words: int
    """V, without the end."""
    max_words: int

    @property
    def actions(self) -> int:
        """A."""
        return self.words + 1


class FusedEncoder(nn.Module):
    """An observation as one vector, by one of the four fusions."""

    def __init__(self, shape: QShape, fusion: str, width: int) -> None:
        super().__init__()
        self.image = nn.Linear(shape.image_dim, width)
        self.image_place = nn.Parameter(torch.randn(shape.image_tokens, width) * 0.5)
        # Row 0 stands for the beginning, so that an empty caption has a token.
        self.word = nn.Embedding(shape.words + 1, width)
        self.word_place = nn.Parameter(torch.randn(shape.max_words + 1, width) * 0.5)
        self.encoders = nn.ModuleDict({name: _TokenEncoder(width) for name in MODALITIES})
        self.fusion = build_fusion(fusion, dict.fromkeys(MODALITIES, width), width)

    def forward(self, observation: Mapping[str, torch.Tensor]) -> Fused:
        """The fused vector [B, h], and the modalities' weights [B, 2] where the fusion has some."""
        words = observation["words"].long()
        begun = torch.cat([words.new_zeros(len(words), 1), words], dim=1)
        tokens = {
            "image": self.image(observation["image"]) + self.image_place,
            "words": self.word(begun) + self.word_place,
        }
        said = begun > 0
        said[:, 0] = True
        masks = {"image": torch.ones_like(tokens["image"][..., 0], dtype=torch.bool), "words": said}
        return self.fusion({name: encode(tokens[name]) for name, encode in self.encoders.items()}, masks)


class _TokenEncoder(nn.Module):
    """Each token by itself, with its place: what it takes for a mean over tokens to tell where something is."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.GELU(), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.norm(tokens + self.layers(tokens))


def q_head(width: int, outputs: int) -> nn.Module:
    """From a fused vector [B, h] to [B, outputs], with a hidden layer: only behind one do picture and words interact
    where the fusion is a sum."""
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, outputs))


def q_values(fused: torch.Tensor, advantage: nn.Module, value: nn.Module | None) -> torch.Tensor:
    """Q [B, A]: of one head, or V + A − mean A of two (dueling, Wang et al. 2016)."""
    scores = advantage(fused)
    if value is None:
        return scores
    return value(fused) + scores - scores.mean(dim=1, keepdim=True)


class QNetwork(nn.Module):
    """Q [B, A] of observations; `encoder`, `af` and, where it is dueling, `vf` are those of RLlib's DQN module."""

    def __init__(self, shape: QShape, fusion: str, width: int, *, dueling: bool) -> None:
        super().__init__()
        self.encoder = FusedEncoder(shape, fusion, width)
        self.af = q_head(width, shape.actions)
        self.vf = q_head(width, 1) if dueling else None

    def forward(self, observation: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """[B, A]; what an observation does not allow has a value, too, and is for the caller to leave out."""
        return q_values(self.encoder(observation).vector, self.af, self.vf)
