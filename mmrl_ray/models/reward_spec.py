"""What a learned reward is, apart from its weights: `reward_model.json`, strict."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from mmrl_ray.config.base import Section, refuse
from mmrl_ray.config.model import ModelSection
from mmrl_ray.metrics.text import Tokenizer


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
