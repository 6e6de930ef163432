"""Tiny models with attention heads of a width that vLLM's kernels have, and adapters for them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GenerationConfig
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration

from mmrl_ray.config.sections import LoraSection
from mmrl_ray.policy.load import load_policy
from mmrl_ray.policy.lora.adapter import adapter_state, add_adapter
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.tiny import build_tiny_llava
from tests.support.families import BUILDERS
from tests.support.families.common import WORDS, spread
from tests.support.tiny_models import section_of

RANK = 4


def policy_of(name: str, folder: Path) -> Policy:
    """A tiny random model of a family with a fresh adapter, in float32 on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        (llava_folder if name == "llava" else _qwen)(folder)
    policy = load_policy(section_of(name, folder), device="cpu")
    add_adapter(policy, LoraSection(r=RANK, alpha=8.0), seed=0)
    return policy


def adapter_of(policy: Policy, version: int) -> dict[str, torch.Tensor] | None:
    """The weights of a version: none of version 0, and random ones that no two later versions share."""
    if version == 0:
        return None
    generator = torch.Generator().manual_seed(version)
    return {
        name: 0.3 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in adapter_state(policy.model).items()
    }


def llava_folder(folder: Path, *, quiet: bool = False) -> Path:
    """The model of a LLaVA alone; a quiet one's last word is hardly ever the likeliest."""
    sizes = {"image_size": 24, "hidden": 64, "heads": 2, "layers": 2, "vision_hidden": 32, "vision_layers": 2}
    build_tiny_llava(folder, vocabulary=WORDS, **sizes)
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    spread(model)
    if quiet:
        with torch.no_grad():
            model.lm_head.weight[-1].zero_()
    model.save_pretrained(folder)
    return folder


def _qwen(folder: Path) -> None:
    parts = BUILDERS["qwen2_5_vl"]()
    text = parts.config.text_config
    text.hidden_size, text.num_attention_heads, text.num_key_value_heads = 64, 2, 1
    text.rope_parameters = {**text.rope_parameters, "mrope_section": [4, 6, 6]}
    parts.config.vision_config.out_hidden_size = text.hidden_size
    model = parts.model_class(parts.config)
    spread(model)
    tokenizer = parts.processor.tokenizer
    model.generation_config = GenerationConfig(pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(folder)
    parts.processor.save_pretrained(folder)
    parts.processor.image_processor.save_pretrained(folder)  # as the Hub's checkpoint has it; a server asks for no less
