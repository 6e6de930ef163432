"""Encoders of a learned reward: pictures and captions to contextual tokens of one width, padding masked.

`B` pictures or captions, `L` tokens, `S` pixels a side, `d` the width. Positions are part of every encoder: without,
"red above blue" would equal "blue above red".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from mmrl_ray.metrics.text import Tokenizer, words

PATCH = 16
"""Pixels a side that one token of the own image encoder stands for."""
PAD, UNKNOWN = 0, 1
"""Ids before those of words."""
_NEIGHBOURS = 5
"""Words that a convolution of the text encoder sees at once."""
_CONVOLUTIONS = 2

Tokens = tuple[torch.Tensor, torch.Tensor]
"""[B, L, d] and its mask, bool [B, L]."""


class PixelEncoder(nn.Module):
    """A small image encoder of its own: convolutions down to a token for each 16 × 16 pixels, then attention.

    The convolutions overlap, so that a shape looks alike wherever it lies; without norms between them, few steps of
    training reach the first.
    """

    def __init__(self, image_size: int, dim: int, layers: int, heads: int) -> None:
        super().__init__()
        half = max(dim // 2, 8)
        self.stem = nn.Sequential(
            nn.Conv2d(3, half, 5, stride=2, padding=2),
            nn.GroupNorm(1, half),
            nn.GELU(),
            nn.Conv2d(half, dim, 3, stride=2, padding=1),
            nn.GroupNorm(1, dim),
            nn.GELU(),
            nn.Conv2d(dim, dim, 3, stride=2, padding=1),
            nn.GroupNorm(1, dim),
            nn.GELU(),
            nn.Conv2d(dim, dim, 3, stride=2, padding=1),
        )
        self.contextual = Contextual((image_size // PATCH) ** 2, dim, layers, heads)

    def forward(self, pixels: torch.Tensor, mask: torch.Tensor) -> Tokens:
        """`pixels` uint8 [B, 3, S, S]; `mask` is not looked at, every token of a picture is valid."""
        scaled = pixels.to(self.contextual.positions.dtype) / 127.5 - 1
        tokens = self.stem(scaled).flatten(2).transpose(1, 2)
        valid = tokens.new_ones(tokens.shape[:2], dtype=torch.bool)
        return self.contextual(tokens, valid), valid


class FeatureEncoder(nn.Module):
    """Frozen vision features of a policy, brought to the width of the reward. They bring positions of their own."""

    def __init__(self, feature_dim: int, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(feature_dim)
        self.project = nn.Sequential(nn.Linear(feature_dim, dim), nn.GELU(), nn.Linear(dim, dim))

    def forward(self, features: torch.Tensor, mask: torch.Tensor) -> Tokens:
        """`features` [B, L, feature_dim], padded with 0 where `mask` is False."""
        return self.project(self.norm(features.to(self.norm.weight.dtype))), mask


class TextEncoder(nn.Module):
    """Word ids to contextual tokens: convolutions over neighbours, then attention.

    Which noun an adjective belongs to, and on which side of a relation a noun stands, is said by the words beside it;
    attention over absolute positions alone learns that late.
    """

    def __init__(self, vocabulary: int, max_words: int, dim: int, layers: int, heads: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, dim, padding_idx=PAD)
        self.beside = nn.ModuleList(
            nn.Conv1d(dim, dim, _NEIGHBOURS, padding=_NEIGHBOURS // 2) for _ in range(_CONVOLUTIONS)
        )
        self.contextual = Contextual(max_words, dim, layers, heads)

    def forward(self, ids: torch.Tensor) -> Tokens:
        """`ids` int64 [B, L], at least one word a row, PAD behind."""
        mask = ids != PAD
        tokens = self.words(ids)
        for convolution in self.beside:
            seen = nn.functional.gelu(convolution(tokens.transpose(1, 2))).transpose(1, 2)
            # Padding stays 0: a caption must not depend on how long the others of its batch are.
            tokens = (tokens + seen) * mask[:, :, None]
        return self.contextual(tokens, mask), mask


class Contextual(nn.Module):
    """Learned positions, then a transformer (norm first, no dropout: a reward must not depend on the draw)."""

    def __init__(self, length: int, dim: int, layers: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.positions = nn.Parameter(torch.randn(length, dim) * 0.5)
        layer = nn.TransformerEncoderLayer(dim, heads, 2 * dim, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, nn.LayerNorm(dim), enable_nested_tensor=False)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[B, L, d] of [B, L, d]."""
        return self.layers(self.norm(tokens) + self.positions[: tokens.shape[1]], src_key_padding_mask=~mask)


class Vocabulary:
    """Words to ids, words being those that rewards of words see; any other word is unknown."""

    def __init__(self, known: Sequence[str], tokenizer: Tokenizer = Tokenizer.UNICODE) -> None:
        self.words = tuple(known)
        self._tokenizer = tokenizer
        self._ids = {word: i + 2 for i, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words) + 2

    def encode(self, texts: Sequence[str], max_words: int) -> torch.Tensor:
        """int64 [B, L], cut to `max_words`; a text without a word is one unknown word, so that no row is empty."""
        split = (words(text, self._tokenizer)[:max_words] for text in texts)
        rows = [[self._ids.get(word, UNKNOWN) for word in each] or [UNKNOWN] for each in split]
        ids = torch.full((len(rows), max((len(row) for row in rows), default=1)), PAD)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
        return ids
