"""`sft:` — the supervised warm start."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from mmrl_ray.config.base import Section, refuse

SFT_CACHE = ".cache/sft"
"""Where built-in models and warm starts are kept unless told otherwise."""


class SftSection(Section):
    """Supervised training on the references before reinforcement learning; its result is cached by content."""

    mode: Literal["full", "lora"] = "full"
    """`full` trains the whole language model; `lora` trains an adapter on it (`model.lora`) and merges it. What RL
    starts from is an ordinary model folder either way."""
    train_vision: bool = False
    """Also train the vision tower and its projector (the built-in tiny model starts from random weights, so its must
    be). Otherwise each image's features are made once and cached under `rollout.vision_cache_mb`."""
    steps: int = Field(..., ge=1)
    """Optimiser steps."""
    batch_size: int = Field(32, ge=1)
    """Image-caption pairs a step."""
    captions_per_image: int = Field(1, ge=1)
    """How many of them share an image, and the one pass of its prompt."""
    lr: float = Field(1e-3, gt=0)
    """Peak learning rate."""
    lr_min: float = Field(0.0, ge=0)
    """Learning rate at the end of the cosine."""
    warmup_steps: int = Field(10, ge=0)
    """Steps of linear warm-up."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled decay."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are clipped to this norm."""
    terse: float = Field(0.0, ge=0)
    """Weight of one-object, few-word targets in the mix (needs rows whose metadata names their terse captions)."""
    partial: float = Field(0.0, ge=0)
    """Weight of targets that leave something out."""
    full: float = Field(1.0, ge=0)
    """Weight of whole references."""
    cache: str = SFT_CACHE
    """Folder of finished warm starts, keyed by model, data and these settings. On a cluster, one that all nodes see."""

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        refuse(
            {
                f"warmup_steps={self.warmup_steps} must be below steps={self.steps}": self.warmup_steps >= self.steps,
                f"lr_min={self.lr_min} is above lr={self.lr}": self.lr_min > self.lr,
                f"terse={self.terse}, partial={self.partial} and full={self.full} are all 0: nothing would be "
                "trained on": not (self.terse or self.partial or self.full),
                f"captions_per_image={self.captions_per_image} does not divide batch_size={self.batch_size}": (
                    self.batch_size % self.captions_per_image != 0
                ),
                "train_vision needs mode: full; an adapter is trained on the language model alone": (
                    self.train_vision and self.mode == "lora"
                ),
            }
        )
        return self
