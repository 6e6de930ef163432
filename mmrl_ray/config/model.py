"""`model:` — the checkpoint, its precision, its adapter."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from mmrl_ray.config.base import Section


class LoraSection(Section):
    """The PEFT adapter that reinforcement learning trains. Without dropout: it would make the policy ratio noisy."""

    r: int = Field(8, ge=1, le=1024)
    """Rank."""
    alpha: float = Field(16.0, gt=0)
    """Scaling: the adapter's output is multiplied by alpha / r."""
    targets: list[str] | str | None = None
    """Module-name suffixes, or one regular expression over full names; by default every linear layer of the language
    model (what `get_decoder()` returns)."""
    adapt_vision: bool = False
    """Allow `targets` that match layers outside the language model; turns the vision cache off."""


class ModelSection(Section):
    """Any Hugging Face image-text-to-text checkpoint."""

    path: str
    """Folder or hub id; `builtin:tiny-llava` is made on the spot from a config, for tests and the quickstart."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto`: bfloat16 on a GPU that has it, float32 elsewhere."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention kernels."""
    processor: dict[str, Any] = Field(default_factory=dict)
    """Passed to the processor as it is (for example `size`, `max_pixels`, `do_image_splitting`)."""
    lora: LoraSection = LoraSection()
    """The adapter."""
