"""`sft:` — the supervised warm start."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mmrl_ray.config.base import Section


class SftSection(Section):
    """Supervised training on the references before reinforcement learning; its result is cached by content."""

    mode: Literal["full", "lora"] = "full"
    """`full` trains every weight but the frozen vision tower unless `train_vision`; `lora` trains an adapter and
    merges it, so that what RL starts from is an ordinary model folder either way."""
    train_vision: bool = False
    """Also train the vision tower (the built-in tiny model starts from random weights, so its must be)."""
    steps: int = Field(..., ge=1)
    batch_size: int = Field(32, ge=1)
    """Image-caption pairs a step."""
    lr: float = Field(1e-3, gt=0)
    lr_min: float = Field(0.0, ge=0)
    warmup_steps: int = Field(10, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    terse: float = Field(0.0, ge=0)
    """Weight of one-object, few-word targets in the mix (needs rows whose metadata names their terse captions)."""
    partial: float = Field(0.0, ge=0)
    """Weight of targets that leave something out."""
    full: float = Field(1.0, ge=0)
    """Weight of whole references."""
    cache: str = ".cache/sft"
    """Folder of finished warm starts, keyed by model, data and these settings."""
