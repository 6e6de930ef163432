"""`sft:` — the supervised warm start."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from mmrl_ray.config.base import Section, refuse


class SftSection(Section):
    """Supervised training on the references before reinforcement learning; its result is cached by content."""

    mode: Literal["full", "lora"] = "full"
    """`full` trains every weight but the frozen vision tower unless `train_vision`; `lora` trains an adapter and
    merges it, so that what RL starts from is an ordinary model folder either way."""
    train_vision: bool = False
    """Also train the vision tower (the built-in tiny model starts from random weights, so its must be)."""
    steps: int = Field(..., ge=1)
    """Optimiser steps."""
    batch_size: int = Field(32, ge=1)
    """Image-caption pairs a step."""
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
    cache: str = ".cache/sft"
    """Folder of finished warm starts, keyed by model, data and these settings."""

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        refuse(
            {
                f"warmup_steps={self.warmup_steps} must be below steps={self.steps}": self.warmup_steps >= self.steps,
                f"lr_min={self.lr_min} is above lr={self.lr}": self.lr_min > self.lr,
                f"terse={self.terse}, partial={self.partial} and full={self.full} are all 0: nothing would be "
                "trained on": not (self.terse or self.partial or self.full),
            }
        )
        return self
