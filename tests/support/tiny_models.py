"""Tiny random models of the image-text-to-text families, as ordinary Hugging Face folders, and inputs for them.

Each has its family's own processor on a word-level tokenizer made on the fly, and its family's own image layout
(`families`). Pictures are noise, so that two never have equal features.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import GenerationConfig
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration

from mmrl_ray.config.sections import ModelSection
from mmrl_ray.data.samples import Sample
from mmrl_ray.policy.load import load_policy
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.tiny import build_tiny_llava
from tests.support.families import BUILDERS
from tests.support.families.common import WORDS, spread

__all__ = [
    "ALL_FAMILIES",
    "EAGER",
    "FAMILIES",
    "WORDS",
    "build_family",
    "image_bytes",
    "load_family",
    "make_completions",
    "make_samples",
    "section_of",
]

FAMILIES = ("llava", "qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm", "gemma3")
"""One of each kind of layout: a fixed grid, grids that follow the picture's size, tiles, a picture that sees both ways
and sliding windows. Tests of single parts of the product take these."""
ALL_FAMILIES = ("llava", *BUILDERS)
EAGER = ("fast_vlm", "paligemma2")
"""Families with a part that has no scaled dot-product attention in transformers."""


def section_of(name: str, path: str | Path, **section: Any) -> ModelSection:
    """How to load a family's folder: in float32, unless `section` says otherwise."""
    attention = {"attn_implementation": "eager"} if name in EAGER else {}
    return ModelSection(path=str(path), **{"dtype": "float32", **attention, **section})


def build_family(name: str, folder: str | Path, *, seed: int = 0) -> Path:
    """Saves a tiny random model of one family with its processor into `folder`."""
    folder = Path(folder)
    if name == "llava":
        sizes = {"image_size": 24, "patch_size": 8, "hidden": 32, "layers": 2, "vision_hidden": 32, "vision_layers": 2}
        build_tiny_llava(folder, vocabulary=WORDS, seed=seed, **sizes)
        llava = LlavaForConditionalGeneration.from_pretrained(folder)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            spread(llava)
        llava.save_pretrained(folder)
        return folder
    parts = BUILDERS[name]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = parts.model_class(parts.config)
        spread(model)
    tokenizer = parts.processor.tokenizer
    model.generation_config = GenerationConfig(pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(folder)
    parts.processor.save_pretrained(folder)
    return folder


def load_family(name: str, folder: str | Path, *, seed: int = 0, **section: Any) -> Policy:
    """Builds a family into `folder` and loads it as a policy, on the CPU in float32 unless `section` says otherwise."""
    return load_policy(section_of(name, build_family(name, folder, seed=seed), **section), device="cpu")


def image_bytes(width: int = 48, height: int = 32, *, seed: int = 0) -> bytes:
    """A PNG of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def make_samples(sizes: Sequence[tuple[int, int]] = ((64, 64), (96, 64), (64, 128)), *, seed: int = 0) -> list[Sample]:
    """One sample a picture size (width, height); prompts and pictures differ in length and size."""
    prompts = ("describe the image .", "say it short .", "what is in this picture ? a circle above the square")
    return [
        Sample(
            id=f"sample-{i}",
            images=(image_bytes(width, height, seed=seed * 1000 + i),),
            prompt=prompts[i % len(prompts)],
            references=("a red circle above a blue square .",),
        )
        for i, (width, height) in enumerate(sizes)
    ]


def make_completions(policy: Policy, lengths: Sequence[Sequence[int]], *, seed: int = 0) -> list[list[torch.Tensor]]:
    """Random allowed tokens, one group a prompt, of the given lengths."""
    generator = torch.Generator().manual_seed(seed)
    allowed = torch.tensor([i for i in range(policy.vocab_size) if i not in policy.image_token_ids])
    return [
        [allowed[torch.randint(len(allowed), (length,), generator=generator)] for length in group] for group in lengths
    ]
