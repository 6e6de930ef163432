"""Everything a user writes for one learned reward: `mmrl reward train CONFIG`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from mmrl_ray.config.sections import ModelSection, Section, refuse


class RewardDataSection(Section):
    """Preferences and ratings in Parquet: the columns of `mmrl preferences export`, see `preferences/schema.py`."""

    train: str
    """Folder or file of Parquet, on any pyarrow.fs location."""
    eval: str | None = None
    """Held-out split; without it a share of the training pictures is held out."""
    held_out: float = Field(0.1, gt=0, lt=1)
    """That share."""
    rating_scale: tuple[float, float] = Field((0.0, 1.0), strict=False)
    """Least and greatest rating; one outside is a bad row."""
    max_quarantined: int = Field(20, ge=0)
    """Broken rows that are left out, each with its reason, before the data is refused."""


class RewardNetSection(Section):
    """Two encoders, a fusion, and K heads of a mean and a log-variance each."""

    fusion: Literal["shared_attention", "coupled_encoders", "attention", "weighted_sum"] = "shared_attention"
    """Joins picture and caption."""
    vision: ModelSection | None = None
    """Take the frozen vision features of this policy; by default the reward has a small image encoder of its own."""
    image_size: int = Field(64, ge=16, le=512, multiple_of=16)
    """Pixels a side that the own image encoder looks at; pictures are scaled to it."""
    width: int = Field(64, ge=8, multiple_of=4)
    """Of tokens and of the fused vector."""
    layers: int = Field(1, ge=1)
    """Transformer layers of each encoder."""
    heads: int = Field(1, ge=1)
    """K: the variance of their means is what the model does not know."""
    ensemble: Literal["heads", "members"] = "heads"
    """`heads`: they share encoders and fusion, and each learns from its own resample of the data; on what training
    never showed they agree. `members`: each has encoders and a fusion of its own, and batches in its own order, for K
    times the cost."""
    prior: float = Field(0.0, ge=0)
    """Members alone: each adds to its mean a random function of the caption that is never trained, of this size in
    standard deviations of the ratings. It is learned away on captions like those of training and keeps members apart on
    others; about 3 does."""
    sigma: bool = True
    """Train the log-variances. Without, every caption's σ is the same constant and a risk-averse reward is refused."""
    max_words: int = Field(48, ge=1)
    """Of a caption that are read."""
    vocabulary: int = Field(8000, ge=1)
    """The most frequent words of the training captions that are known."""

    @model_validator(mode="after")
    def _priors_differ(self) -> Self:
        alone = self.ensemble != "members" or self.heads < 2
        refuse(
            {
                f"prior={self.prior:g} needs ensemble=members and heads of at least 2, got {self.ensemble} and "
                f"{self.heads}: a single one would be a bias": self.prior > 0 and alone
            }
        )
        return self


class RewardOptimiserSection(Section):
    """AdamW with a cosine."""

    steps: int = Field(..., ge=1)
    """Optimiser steps."""
    images_per_step: int = Field(32, ge=1)
    """Pictures a step, each with all its captions."""
    lr: float = Field(1e-3, gt=0)
    """Peak learning rate."""
    lr_min: float = Field(0.0, ge=0)
    """Learning rate at the end of the cosine."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear warm-up."""
    weight_decay: float = Field(0.01, ge=0)
    """AdamW's decoupled decay."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are clipped to this norm."""
    alignment: float = Field(1.0, ge=0)
    """Weight of a contrastive term beside the likelihoods: captions that were liked, against the step's other pictures.
    It teaches the encoders what words look like, which preferences alone take very long to do."""
    rating_weight: float = Field(1.0, gt=0)
    """Of the ratings' likelihood beside that of the pairs."""
    sigma_prior: float = Field(0.05, gt=0)
    """Weight of ½(log σ²)², which anchors the scale where there are no ratings; ratings anchor it by themselves."""

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        refuse(
            {
                f"warmup_steps={self.warmup_steps} must be below steps={self.steps}": self.warmup_steps >= self.steps,
                f"lr_min={self.lr_min} is above lr={self.lr}": self.lr_min > self.lr,
            }
        )
        return self


class RewardModelConfig(Section):
    """One learned reward model, whole."""

    out: str
    """Folder that gets the model and its report; must not exist yet."""
    seed: int = 0
    """Of first weights and of the order of the data."""
    data: RewardDataSection
    """What people (or a program) prefer."""
    net: RewardNetSection = RewardNetSection()
    """The network."""
    training: RewardOptimiserSection
    """How it is trained."""
    vision_cache_mb: int = Field(1024, ge=1)
    """Memory for pictures, or for vision features, that were made already."""

    @model_validator(mode="after")
    def _scale(self) -> Self:
        low, high = self.data.rating_scale
        refuse({f"data.rating_scale=({low:g}, {high:g}): the second must be above the first": high <= low})
        return self
