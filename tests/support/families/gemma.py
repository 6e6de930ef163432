"""Gemma and PaliGemma: soft caps, sliding windows, pictures and prefixes that see both ways, shared keys, experts."""

from __future__ import annotations

from typing import Any

from transformers import GemmaConfig, SiglipVisionConfig
from transformers.models.gemma2.configuration_gemma2 import Gemma2Config
from transformers.models.gemma3.configuration_gemma3 import Gemma3Config, Gemma3TextConfig
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma3.modeling_gemma3 import Gemma3ForConditionalGeneration
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor
from transformers.models.gemma4.configuration_gemma4 import Gemma4Config, Gemma4TextConfig, Gemma4VisionConfig
from transformers.models.gemma4.feature_extraction_gemma4 import Gemma4AudioFeatureExtractor
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
from transformers.models.gemma4.modeling_gemma4 import Gemma4ForConditionalGeneration
from transformers.models.gemma4.processing_gemma4 import Gemma4Processor
from transformers.models.paligemma.configuration_paligemma import PaliGemmaConfig
from transformers.models.paligemma.modeling_paligemma import PaliGemmaForConditionalGeneration
from transformers.models.paligemma.processing_paligemma import PaliGemmaProcessor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from mmrl_ray.policy.tokens import NoVideo, stills_only
from tests.support.families.common import TEXT, VISION, Builder, Parts, ids_of, make_template, make_tokenizer, text_ids

_SIGLIP = {**VISION, "num_hidden_layers": 2, "image_size": 32, "patch_size": 8}
_SQUARE = {"height": 32, "width": 32}
_LAYERS = ["sliding_attention", "full_attention"]


def _gemma3() -> Parts:
    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokenizer = make_tokenizer(named, bos="<bos>")
    processor = Gemma3Processor(
        Gemma3ImageProcessorPil(size=_SQUARE),
        tokenizer,
        image_seq_length=4,
        chat_template=make_template("<start_of_image>", start="{{ bos_token }}"),
    )
    # A window shorter than every prompt, so that the sliding layers' caches drop part of it.
    text = Gemma3TextConfig(
        **TEXT,
        **text_ids(tokenizer),
        head_dim=8,
        sliding_window=8,
        layer_types=_LAYERS,
        query_pre_attn_scalar=8,
    )
    config = Gemma3Config(
        text_config=text.to_dict(),
        vision_config=SiglipVisionConfig(**_SIGLIP).to_dict(),
        mm_tokens_per_image=4,
        **ids_of(
            tokenizer,
            image_token_id="<image_soft_token>",
            boi_token_index="<start_of_image>",
            eoi_token_index="<end_of_image>",
        ),
    )
    return Parts(processor, Gemma3ForConditionalGeneration, config)


def _paligemma(text: Any, tokenizer: Any) -> Parts:
    """The prompt sees itself both ways, the answer does not. Its real processor adds a BOS behind the image."""
    images = SiglipImageProcessorPil(size=_SQUARE, image_seq_length=16)
    processor = PaliGemmaProcessor(images, tokenizer, chat_template=make_template("<image>"))
    settings = {**text.to_dict(), "vocab_size": len(tokenizer), "num_image_tokens": 16}
    config = PaliGemmaConfig(
        text_config=settings,
        vision_config={**SiglipVisionConfig(**_SIGLIP, vision_use_head=False).to_dict(), "projection_dim": 32},
        projection_dim=32,
        hidden_size=32,
        **ids_of(tokenizer, image_token_index="<image>"),
    )
    return Parts(processor, PaliGemmaForConditionalGeneration, config)


def _paligemma1() -> Parts:
    tokenizer = make_tokenizer({"image_token": "<image>"}, bos="<bos>")
    return _paligemma(GemmaConfig(**TEXT, **text_ids(tokenizer), head_dim=8), tokenizer)


def _paligemma2() -> Parts:
    tokenizer = make_tokenizer({"image_token": "<image>"}, bos="<bos>")
    text = Gemma2Config(
        **TEXT,
        **text_ids(tokenizer),
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=8,  # shorter than every prompt, which all of a prompt sees beyond
        layer_types=_LAYERS,
        attn_logit_softcapping=9.0,
        final_logit_softcapping=2.0,
    )
    return _paligemma(text, tokenizer)


_GEMMA4_NAMED = {
    "boi_token": "<|image>",
    "eoi_token": "<image|>",
    "image_token": "<|image|>",
    "audio_token": "<|audio|>",
    "boa_token": "<|audio>",
    "eoa_token": "<audio|>",
}


def _gemma4(**peculiar: Any) -> Parts:
    """Pictures keep their shape: up to seventy tokens, each of 3 x 3 patches."""
    tokenizer = make_tokenizer(_GEMMA4_NAMED, ["<|video|>"], bos="<bos>")
    images = Gemma4ImageProcessorPil(patch_size=4, max_soft_tokens=70)
    processor = stills_only(Gemma4Processor)(
        Gemma4AudioFeatureExtractor(),
        images,
        tokenizer,
        NoVideo(),
        image_seq_length=70,
        chat_template=make_template("<|image|>", start="{{ bos_token }}"),
    )
    text = Gemma4TextConfig(
        **{
            **TEXT,
            **text_ids(tokenizer),
            "head_dim": 8,
            "global_head_dim": 16,
            "sliding_window": 16,
            "layer_types": _LAYERS,
            "final_logit_softcapping": 3.0,
            "vocab_size_per_layer_input": len(tokenizer),
            "hidden_size_per_layer_input": 0,
            **peculiar,
        }
    )
    vision = Gemma4VisionConfig(
        **VISION, num_hidden_layers=2, num_key_value_heads=4, head_dim=8, patch_size=4, position_embedding_size=128
    )
    config = Gemma4Config(
        text_config=text.to_dict(),
        vision_config=vision.to_dict(),
        audio_config=None,
        **ids_of(
            tokenizer,
            image_token_id="<|image|>",
            boi_token_id="<|image>",
            eoi_token_id="<image|>",
            video_token_id="<|video|>",
            audio_token_id="<|audio|>",
            boa_token_id="<|audio>",
            eoa_token_index="<audio|>",
        ),
    )
    return Parts(processor, Gemma4ForConditionalGeneration, config)


def _gemma4_e() -> Parts:
    """The small ones: inputs of their own for every layer, and late layers that read earlier layers' keys."""
    return _gemma4(
        num_hidden_layers=4,
        layer_types=_LAYERS * 2,
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=8,
        use_double_wide_mlp=True,
    )


def _gemma4_moe() -> Parts:
    """The mixture of experts: values are keys, and pictures see both ways."""
    return _gemma4(
        enable_moe_block=True,
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=16,
        attention_k_eq_v=True,
        num_global_key_value_heads=1,
        use_bidirectional_attention="vision",
    )


BUILDERS: dict[str, Builder] = {
    "gemma3": _gemma3,
    "paligemma": _paligemma1,
    "paligemma2": _paligemma2,
    "gemma4": _gemma4_e,
    "gemma4_moe": _gemma4_moe,
}
