"""Tiny models that do more behind their core than `lm_head`, or read their prompts both ways; see `tiny_models`.

Granite-Docling divides its logits. PaliGemma lets every prompt token see the whole prompt; PaliGemma 2, on Gemma 2,
caps its logits softly beside that, and has layers with a sliding window.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, SiglipVisionConfig
from transformers.models.gemma.configuration_gemma import GemmaConfig
from transformers.models.gemma2.configuration_gemma2 import Gemma2Config
from transformers.models.granite_docling.configuration_granite_docling import GraniteDoclingConfig
from transformers.models.granite_docling.image_processing_pil_granite_docling import GraniteDoclingImageProcessorPil
from transformers.models.granite_docling.modeling_granite_docling import GraniteDoclingForConditionalGeneration
from transformers.models.granite_docling.processing_granite_docling import GraniteDoclingProcessor
from transformers.models.paligemma.configuration_paligemma import PaliGemmaConfig
from transformers.models.paligemma.modeling_paligemma import PaliGemmaForConditionalGeneration
from transformers.models.paligemma.processing_paligemma import PaliGemmaProcessor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tests.support.tiny_models import _TEXT, _VISION, _ids, _spread, _template, _text_ids, _tokenizer

CAPPED = ("granite_docling", "paligemma", "paligemma2")


def build_capped(name: str, folder: str | Path) -> Path:
    """Saves a tiny random model with its processor into `folder`."""
    processor, model_class, config = _granite_docling() if name == "granite_docling" else _paligemma(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config)
        _spread(model)
    tokenizer = processor.tokenizer
    model.generation_config = GenerationConfig(pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return Path(folder)


def _granite_docling() -> tuple[Any, Any, Any]:
    grid = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    named = {"image_token": "<image>", "fake_image_token": "<fake>", "global_image_token": "<global-img>"}
    tokenizer = _tokenizer(named, grid)
    images = GraniteDoclingImageProcessorPil(size={"height": 32, "width": 32}, min_patches=1, max_patches=3)
    processor = GraniteDoclingProcessor(images, tokenizer, image_seq_len=4, chat_template=_template("<image>"))
    config = GraniteDoclingConfig(
        text_config={**_TEXT, **_text_ids(tokenizer), "logits_scaling": 4.0, "attention_multiplier": 0.35},
        vision_config={
            **_VISION,
            "num_hidden_layers": 2,
            "image_size": 32,
            "patch_size": 8,
            "out_hidden_size": 32,
            "scale_factor": 2,
            "deepstack_visual_indexes": [0],
        },
        pad_token_id=tokenizer.pad_token_id,
        **_ids(tokenizer, image_token_id="<image>"),
    )
    return processor, GraniteDoclingForConditionalGeneration, config


def _paligemma(name: str) -> tuple[Any, Any, Any]:
    tokenizer = _tokenizer({"image_token": "<image>"}, bos="<bos>")
    images = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    images.image_seq_length = 16
    processor = PaliGemmaProcessor(images, tokenizer, chat_template=_template("<image>"))
    text = {**_TEXT, **_text_ids(tokenizer), "head_dim": 8}
    config = PaliGemmaConfig(
        text_config=GemmaConfig(**text).to_dict()
        if name == "paligemma"
        # A window shorter than every prompt, which all of a prompt sees beyond.
        else Gemma2Config(
            **text, sliding_window=8, query_pre_attn_scalar=8, final_logit_softcapping=2.0, attn_logit_softcapping=9.0
        ).to_dict(),
        vision_config=SiglipVisionConfig(**_VISION, num_hidden_layers=2, image_size=32, patch_size=8).to_dict(),
        projection_dim=32,
        **_ids(tokenizer, image_token_index="<image>"),
    )
    return processor, PaliGemmaForConditionalGeneration, config
