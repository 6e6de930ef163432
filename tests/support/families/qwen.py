"""Qwen-VL: grids that follow the picture's size, positions on three axes, deepstack, experts, recurrent layers."""

from __future__ import annotations

from typing import Any

from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLVisionConfig,
)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLConfig, Qwen2VLTextConfig, Qwen2VLVisionConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5Config, Qwen3_5TextConfig, Qwen3_5VisionConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5ForConditionalGeneration
from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import (
    Qwen3_5MoeConfig,
    Qwen3_5MoeTextConfig,
    Qwen3_5MoeVisionConfig,
)
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeForConditionalGeneration
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLConfig, Qwen3VLTextConfig, Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl_moe.configuration_qwen3_vl_moe import (
    Qwen3VLMoeConfig,
    Qwen3VLMoeTextConfig,
    Qwen3VLMoeVisionConfig,
)
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeForConditionalGeneration

from mmrl_ray.policy.tokens import NoVideo, stills_only
from tests.support.families.common import TEXT, Builder, Parts, ids_of, make_template, make_tokenizer, text_ids

NAMED = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}
TEMPLATE = make_template("<|vision_start|><|image_pad|><|vision_end|>")
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
_INTERLEAVED = {**ROPE, "mrope_interleaved": True}
_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "depth": 2, "out_hidden_size": 32}


def qwen_ids(tokenizer: Any) -> dict[str, int]:
    """Token ids of a Qwen-VL config."""
    return ids_of(
        tokenizer,
        image_token_id="<|image_pad|>",
        video_token_id="<|video_pad|>",
        vision_start_token_id="<|vision_start|>",
        vision_end_token_id="<|vision_end|>",
    )


def qwen_processor(processor_class: Any, tokenizer: Any, *, patch_size: int = 14) -> Any:
    """At most sixteen image tokens a picture, each of 2 x 2 patches."""
    side = 2 * patch_size
    images = Qwen2VLImageProcessorPil(
        size={"shortest_edge": side * side, "longest_edge": side * side * 16}, patch_size=patch_size
    )
    return stills_only(processor_class)(images, tokenizer, NoVideo(), chat_template=TEMPLATE)


def _qwen2_vl() -> Parts:
    tokenizer = make_tokenizer(NAMED)
    config = Qwen2VLConfig(
        text_config=Qwen2VLTextConfig(**TEXT, **text_ids(tokenizer), rope_parameters=ROPE).to_dict(),
        vision_config=Qwen2VLVisionConfig(depth=2, embed_dim=32, hidden_size=32, mlp_ratio=2, num_heads=4).to_dict(),
        **qwen_ids(tokenizer),
    )
    return Parts(qwen_processor(Qwen2VLProcessor, tokenizer), Qwen2VLForConditionalGeneration, config)


def _qwen2_5_vl() -> Parts:
    tokenizer = make_tokenizer(NAMED)
    config = Qwen2_5_VLConfig(
        text_config=Qwen2_5_VLTextConfig(**TEXT, **text_ids(tokenizer), rope_parameters=ROPE).to_dict(),
        vision_config=Qwen2_5_VLVisionConfig(**_VISION, fullatt_block_indexes=[1]).to_dict(),
        **qwen_ids(tokenizer),
    )
    return Parts(qwen_processor(Qwen2_5_VLProcessor, tokenizer), Qwen2_5_VLForConditionalGeneration, config)


def _qwen3_vl() -> Parts:
    tokenizer = make_tokenizer(NAMED)
    text = Qwen3VLTextConfig(**TEXT, **text_ids(tokenizer), head_dim=8, rope_parameters=_INTERLEAVED)
    vision = Qwen3VLVisionConfig(**{**_VISION, "depth": 3}, num_position_embeddings=64, deepstack_visual_indexes=[0, 1])
    config = Qwen3VLConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), **qwen_ids(tokenizer))
    return Parts(qwen_processor(Qwen3VLProcessor, tokenizer, patch_size=16), Qwen3VLForConditionalGeneration, config)


def _qwen3_vl_moe() -> Parts:
    tokenizer = make_tokenizer(NAMED)
    text = Qwen3VLMoeTextConfig(
        **TEXT,
        **text_ids(tokenizer),
        head_dim=8,
        rope_parameters=_INTERLEAVED,
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
    )
    vision = Qwen3VLMoeVisionConfig(
        **{**_VISION, "depth": 3}, num_position_embeddings=64, deepstack_visual_indexes=[0, 1]
    )
    config = Qwen3VLMoeConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), **qwen_ids(tokenizer))
    processor = qwen_processor(Qwen3VLProcessor, tokenizer, patch_size=16)
    return Parts(processor, Qwen3VLMoeForConditionalGeneration, config)


def hybrid_text(tokenizer: Any) -> dict[str, Any]:
    """Settings of Qwen3.5's text model: a layer of linear attention, then one of full attention."""
    return {
        **TEXT,
        **text_ids(tokenizer),
        "head_dim": 16,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "layer_types": ["linear_attention", "full_attention"],
        "rope_parameters": {**_INTERLEAVED, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.25},
    }


def _qwen3_5() -> Parts:
    tokenizer = make_tokenizer(NAMED)
    config = Qwen3_5Config(
        text_config=Qwen3_5TextConfig(**hybrid_text(tokenizer)).to_dict(),
        vision_config=Qwen3_5VisionConfig(**_VISION, num_position_embeddings=64).to_dict(),
        **qwen_ids(tokenizer),
    )
    return Parts(qwen_processor(Qwen3VLProcessor, tokenizer, patch_size=16), Qwen3_5ForConditionalGeneration, config)


def _qwen3_5_moe() -> Parts:
    tokenizer = make_tokenizer(NAMED)
    settings = {k: v for k, v in hybrid_text(tokenizer).items() if k != "intermediate_size"}
    text = Qwen3_5MoeTextConfig(
        **settings, moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts=4, num_experts_per_tok=2
    )
    config = Qwen3_5MoeConfig(
        text_config=text.to_dict(),
        vision_config=Qwen3_5MoeVisionConfig(**_VISION, num_position_embeddings=64).to_dict(),
        **qwen_ids(tokenizer),
    )
    processor = qwen_processor(Qwen3VLProcessor, tokenizer, patch_size=16)
    return Parts(processor, Qwen3_5MoeForConditionalGeneration, config)


BUILDERS: dict[str, Builder] = {
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "qwen3_vl_moe": _qwen3_vl_moe,
    "qwen3_5": _qwen3_5,
    "qwen3_5_moe": _qwen3_5_moe,
}
