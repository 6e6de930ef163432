"""What an image encoder of a learned reward looks at, and what such a reward is apart from its weights.

A source gives either pixels, for the reward's own encoder, or the frozen vision features of a policy, each made once a
picture and kept in the vision cache under its byte budget. `RewardModelSpec` is `reward_model.json`, read strictly.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol, Self

import numpy as np
import torch
from PIL import Image
from pydantic import Field, model_validator
from torch import nn

from mmrl_ray.config.sections import ModelSection, Section, refuse
from mmrl_ray.data.images import decode_image, encode_png, image_hash
from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import DataError, ModelError
from mmrl_ray.experience.carriers import VisionFeatures
from mmrl_ray.metrics.text import Tokenizer
from mmrl_ray.policy.checkpoint import is_revision
from mmrl_ray.policy.load import dtype_of, load_policy
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.prompts import encode_prompts
from mmrl_ray.policy.vision import VisionCache, vision_features

Picture = tuple[bytes, ...]
"""The encoded files of one sample."""
PictureInputs = tuple[torch.Tensor, torch.Tensor]
"""Pixels uint8 [B, 3, S, S] or features [B, L, d], and a mask bool [B, L] (all True for pixels, [B, 1])."""

_ANY_PROMPT = "."
"""Vision features do not depend on it."""


_shared: list[Policy] = []
"""Of this process, what `share_tower` made."""


def share_tower(policy: Policy) -> None:
    """Has rewards that score in this process look through the tower of `policy`, where it is the one that they were
    trained on, in its dtype and on its device: then its weights are there once.

    They get modules and a processor of their own, since another thread may be in the policy's.
    """
    model, decoder = policy.hf_model, policy.decoder
    memo: dict[int, Any] = {id(each): each for each in (*model.parameters(), *model.buffers())}
    if isinstance(layers := getattr(decoder, "layers", None), nn.ModuleList):
        memo[id(layers)] = nn.ModuleList()
    processor = copy.deepcopy(policy.processor)
    made = replace(
        policy,
        model=copy.deepcopy(model, memo),
        processor=processor,
        tokenizer=processor.tokenizer,
        value_heads={},
        inject_vision=True,
    )
    _shared[:] = [] if policy.vision_trainable else [made]


def _shared_for(cfg: ModelSection, key: str | None, device: str | None) -> Policy | None:
    for policy in _shared:
        there = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        same = cfg.attn_implementation == policy.attention and dtype_of(cfg.dtype, there) == policy.dtype
        if same and there.type == policy.device.type and key == policy.revision_key:
            return policy
    return None


class VisionSource(Protocol):
    """Turns pictures into what the image encoder takes."""

    def inputs(self, pictures: Sequence[Picture], device: torch.device) -> PictureInputs:
        """Inputs of these pictures, in order.

        Raises:
            ImageError: one cannot be decoded.
            DataError: one that the encoder does not take.
        """
        ...


class Pixels:
    """Pictures scaled to a square."""

    def __init__(self, image_size: int, budget_bytes: int) -> None:
        self._size = image_size
        self._cache = VisionCache(budget_bytes)

    def inputs(self, pictures: Sequence[Picture], device: torch.device) -> PictureInputs:
        """uint8 [B, 3, S, S]; see `VisionSource`."""
        pixels = torch.stack([self._pixels(picture) for picture in pictures]).to(device)
        return pixels, pixels.new_ones((len(pictures), 1), dtype=torch.bool)

    def _pixels(self, picture: Picture) -> torch.Tensor:
        if len(picture) != 1:
            raise DataError(f"the reward's own image encoder takes one picture a sample, got {len(picture)}")
        key = image_hash(picture)
        found = self._cache.get(key)
        if found is None:
            image = decode_image(picture[0])
            if image.size != (self._size, self._size):
                image = image.resize((self._size, self._size), Image.Resampling.BICUBIC)
            found = VisionFeatures(torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous())
            self._cache.put(key, found)
        return found.tokens


class PolicyVision:
    """The vision features of a policy's frozen tower."""

    def __init__(self, policy: Policy, budget_bytes: int) -> None:
        """Raises ModelError where features cannot be taken by themselves: the tower trains, or needs its decoder."""
        if policy.vision_trainable or not policy.inject_vision:
            raise ModelError(f"the vision tower of {policy.path} cannot be used alone: it is not frozen")
        self.policy = policy
        self._cache = VisionCache(budget_bytes)

    @classmethod
    def load(
        cls, cfg: ModelSection, budget_bytes: int, key: str | None = None, device: str | None = None
    ) -> PolicyVision:
        """The tower of a checkpoint, or that of `share_tower`; its language model is not kept.

        Args:
            cfg: the checkpoint.
            budget_bytes: for features.
            key: of the weights that are wanted; any by default.
            device: where it goes; as `load_policy` by default.

        Raises:
            ModelError: it cannot be loaded, or is not the one that `key` names.
        """
        if (shared := _shared_for(cfg, key, device)) is not None:
            return cls(shared, budget_bytes)
        policy = load_policy(cfg, device=device)
        settings, revision = policy.processor_settings, policy.revision
        if key is not None and not is_revision(key, policy.revision_key, policy.path, settings, revision):
            raise ModelError(
                f"the reward was trained on the vision features of another {cfg.path} (key {key}, this one has "
                f"{policy.revision_key}): put those weights back, or train the reward again"
            )
        layers = getattr(policy.decoder, "layers", None)
        if isinstance(layers, nn.ModuleList):
            del layers[:]
        return cls(policy, budget_bytes)

    @property
    def feature_dim(self) -> int:
        """Width of the features."""
        grey = Image.new("RGB", (64, 64), (128, 128, 128))
        return int(self.inputs([(encode_png(grey),)], torch.device("cpu"))[0].shape[-1])

    def inputs(self, pictures: Sequence[Picture], device: torch.device) -> PictureInputs:
        """[B, L, d], padded with 0; see `VisionSource`."""
        samples = [Sample(str(i), picture, _ANY_PROMPT) for i, picture in enumerate(pictures)]
        found = vision_features(self.policy, encode_prompts(self.policy, samples), self._cache)
        lengths = torch.tensor([len(features.tokens) for features in found])
        padded = nn.utils.rnn.pad_sequence([features.tokens for features in found], batch_first=True)
        return padded.to(device), (torch.arange(padded.shape[1])[None] < lengths[:, None]).to(device)


def source_of(spec: RewardModelSpec, budget_bytes: int, device: str | None = None) -> VisionSource:
    """What the image encoder of a trained reward looks at; a policy's tower on `device`, as `load_policy` by default.

    Raises:
        ModelError: the policy whose features it takes cannot be loaded, or is another one now.
    """
    if spec.vision is None:
        return Pixels(spec.image_size, budget_bytes)
    return PolicyVision.load(spec.vision, budget_bytes, spec.vision_key, device)


class RewardModelSpec(Section):
    """Everything but the weights: what `reward_model.json` in a reward's folder holds."""

    format: Literal[2] = 2
    """Raised when the same folder comes to mean another model."""
    fusion: Literal["shared_attention", "coupled_encoders", "attention", "weighted_sum"]
    """How picture and caption are joined."""
    vision: ModelSection | None = None
    """The policy whose vision features it takes; None: its own image encoder."""
    vision_key: str | None = None
    """Names that policy's weights and processor."""
    feature_dim: int | None = Field(None, ge=1)
    """Width of those features."""
    image_size: int = Field(..., ge=16, multiple_of=16)
    """Pixels a side that the own image encoder looks at."""
    width: int = Field(..., ge=8, multiple_of=4)
    """Of tokens and of the fused vector."""
    layers: int = Field(..., ge=1)
    """Of each encoder."""
    heads: int = Field(..., ge=1)
    """K."""
    ensemble: Literal["heads", "members"]
    """What each has of its own: nothing, or encoders and a fusion."""
    prior: float = Field(..., ge=0)
    """Scale of a random function of the caption that each member adds to its mean."""
    max_words: int = Field(..., ge=1)
    """Of a caption that are read."""
    vocabulary: tuple[str, ...] = Field(..., strict=False)
    """The words it knows."""
    tokenizer: Tokenizer = Field(Tokenizer.WORD_RUNS, strict=False)
    """What made them; a folder that names none is from before there was a choice."""
    center: float = 0.0
    """A mean of 0 inside stands for this rating."""
    spread: float = Field(1.0, gt=0)
    """A mean of 1 inside stands for this much above it."""
    sigma_trained: bool
    """Whether σ was learned from the labels' noise; otherwise it is a constant."""
    data: dict[str, Any] = Field(default_factory=dict)
    """What it was trained on, for people: files, fingerprints, counts."""

    @model_validator(mode="after")
    def _vision_is_whole(self) -> Self:
        given = {self.vision is None, self.vision_key is None, self.feature_dim is None}
        refuse({"vision, vision_key and feature_dim must be given together, or none of them": len(given) > 1})
        return self
