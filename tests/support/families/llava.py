"""LLaVA and what descends from it: one grid, tiles with line ends, features of several layers, rows with breaks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import (
    CLIPVisionConfig,
    ConvNextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
)
from transformers.models.fast_vlm.configuration_fast_vlm import FastVlmConfig
from transformers.models.fast_vlm.modeling_fast_vlm import FastVlmForConditionalGeneration
from transformers.models.granite4_vision.configuration_granite4_vision import (
    Granite4VisionConfig,
    Granite4VisionTextConfig,
)
from transformers.models.granite4_vision.modeling_granite4_vision import Granite4VisionForConditionalGeneration
from transformers.models.granite4_vision.processing_granite4_vision import Granite4VisionProcessor
from transformers.models.lfm2.configuration_lfm2 import Lfm2Config
from transformers.models.lighton_ocr.configuration_lighton_ocr import LightOnOcrConfig
from transformers.models.lighton_ocr.modeling_lighton_ocr import LightOnOcrForConditionalGeneration
from transformers.models.lighton_ocr.processing_lighton_ocr import LightOnOcrProcessor
from transformers.models.llama4.configuration_llama4 import Llama4TextConfig
from transformers.models.llava.configuration_llava import LlavaConfig
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration
from transformers.models.llava.processing_llava import LlavaProcessor
from transformers.models.llava_next.configuration_llava_next import LlavaNextConfig
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import LlavaNextForConditionalGeneration
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor
from transformers.models.llava_next_video.configuration_llava_next_video import LlavaNextVideoConfig
from transformers.models.llava_next_video.modeling_llava_next_video import LlavaNextVideoForConditionalGeneration
from transformers.models.llava_next_video.processing_llava_next_video import LlavaNextVideoProcessor
from transformers.models.llava_onevision.configuration_llava_onevision import LlavaOnevisionConfig
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionForConditionalGeneration
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor
from transformers.models.ministral3.configuration_ministral3 import Ministral3Config
from transformers.models.mistral3.configuration_mistral3 import Mistral3Config
from transformers.models.mistral3.modeling_mistral3 import Mistral3ForConditionalGeneration
from transformers.models.pixtral.configuration_pixtral import PixtralVisionConfig
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.vipllava.configuration_vipllava import VipLlavaConfig
from transformers.models.vipllava.modeling_vipllava import VipLlavaForConditionalGeneration

from mmrl_ray.policy.tokens import NoVideo, stills_only
from tests.support.families.common import TEXT, VISION, Builder, Parts, ids_of, make_template, make_tokenizer, text_ids

_IMAGE = {"image_token": "<image>"}
_PINPOINTS = [[24, 48], [48, 24], [48, 48]]
_SQUARE = {"height": 24, "width": 24}
_TOWER = {**VISION, "image_size": 24, "patch_size": 8}


def _clip(layers: int = 2) -> dict[str, Any]:
    return CLIPVisionConfig(**_TOWER, num_hidden_layers=layers).to_dict()


def _siglip(layers: int = 2) -> dict[str, Any]:
    return SiglipVisionConfig(**_TOWER, num_hidden_layers=layers, vision_use_head=False).to_dict()


def _pixtral_tower() -> dict[str, Any]:
    return PixtralVisionConfig(**VISION, num_hidden_layers=2, image_size=64, patch_size=8).to_dict()


def _llava_images() -> LlavaImageProcessorPil:
    return LlavaImageProcessorPil(size={"shortest_edge": 24}, crop_size=_SQUARE)


def _llava(text: Callable[[Any], Any]) -> Parts:
    tokenizer = make_tokenizer(_IMAGE)
    config = LlavaConfig(
        text_config=text(tokenizer).to_dict(),
        vision_config=_clip(),
        **ids_of(tokenizer, image_token_index="<image>"),
    )
    processor = LlavaProcessor(
        _llava_images(), tokenizer, patch_size=8, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=make_template("<image>"),
    )  # fmt: skip
    return Parts(processor, LlavaForConditionalGeneration, config)


def _llava_lfm2() -> Parts:
    """LFM2-VL's text model: short convolutions beside attention (LFM2-VL's own processor needs torchvision)."""
    return _llava(
        lambda tokenizer: Lfm2Config(
            **TEXT,
            **text_ids(tokenizer),
            layer_types=["conv", "full_attention"],
            block_auto_adjust_ff_dim=False,
            tie_word_embeddings=False,
        )
    )


def _llava_llama4() -> Parts:
    """Llama 4's text model: attention in chunks, layers without rotation, experts (its processor needs torchvision)."""
    return _llava(
        lambda tokenizer: Llama4TextConfig(
            **TEXT,
            **text_ids(tokenizer),
            head_dim=8,
            intermediate_size_mlp=48,
            num_local_experts=4,
            attention_chunk_size=8,
            no_rope_layers=[1, 0],
            floor_scale=8192,  # from there on it counts left padding, in transformers
        )
    )


def _vipllava() -> Parts:
    tokenizer = make_tokenizer(_IMAGE)
    config = VipLlavaConfig(
        text_config=LlamaConfig(**TEXT, **text_ids(tokenizer)).to_dict(),
        vision_config=_clip(3),
        vision_feature_layers=[-2, -3, 1],
        vision_feature_layer=[-2, -3, 1],
        image_seq_length=9,
        **ids_of(tokenizer, image_token_index="<image>"),
    )
    processor = LlavaProcessor(
        _llava_images(), tokenizer, patch_size=8, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=make_template("<image>"),
    )  # fmt: skip
    return Parts(processor, VipLlavaForConditionalGeneration, config)


def _llava_next() -> Parts:
    """A sliding window shorter than a prompt, as Mistral 7B's is shorter than some."""
    tokenizer = make_tokenizer(_IMAGE)
    images = LlavaNextImageProcessorPil(size={"shortest_edge": 24}, crop_size=_SQUARE, image_grid_pinpoints=_PINPOINTS)
    processor = LlavaNextProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=make_template("<image>"),
    )  # fmt: skip
    config = LlavaNextConfig(
        text_config=MistralConfig(**TEXT, **text_ids(tokenizer), sliding_window=24).to_dict(),
        vision_config=_clip(),
        image_grid_pinpoints=_PINPOINTS,
        **ids_of(tokenizer, image_token_index="<image>"),
    )
    return Parts(processor, LlavaNextForConditionalGeneration, config)


def _llava_next_video() -> Parts:
    tokenizer = make_tokenizer({**_IMAGE, "video_token": "<video>"})
    images = LlavaNextImageProcessorPil(size={"shortest_edge": 24}, crop_size=_SQUARE, image_grid_pinpoints=_PINPOINTS)
    processor = stills_only(LlavaNextVideoProcessor)(
        tokenizer=tokenizer, image_processor=images, video_processor=NoVideo(), patch_size=8,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=make_template("<image>"),
    )  # fmt: skip
    config = LlavaNextVideoConfig(
        text_config=LlamaConfig(**TEXT, **text_ids(tokenizer)).to_dict(),
        vision_config=_clip(),
        image_grid_pinpoints=_PINPOINTS,
        **ids_of(tokenizer, image_token_index="<image>", video_token_index="<video>"),
    )
    return Parts(processor, LlavaNextVideoForConditionalGeneration, config)


def _llava_onevision() -> Parts:
    """Pictures of many tiles are shrunk again, in the model."""
    pinpoints = [[24 * rows, 24 * columns] for rows in range(1, 4) for columns in range(1, 4)]
    tokenizer = make_tokenizer({**_IMAGE, "video_token": "<video>"})
    images = LlavaOnevisionImageProcessorPil(size=_SQUARE, image_grid_pinpoints=pinpoints)
    processor = stills_only(LlavaOnevisionProcessor)(
        images, tokenizer, NoVideo(), num_image_tokens=9, vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_4", chat_template=make_template("<image>"),
    )  # fmt: skip
    config = LlavaOnevisionConfig(
        text_config=Qwen2Config(**TEXT, **text_ids(tokenizer)).to_dict(),
        vision_config=_siglip(),
        image_grid_pinpoints=pinpoints,
        vision_aspect_ratio="anyres_max_4",
        **ids_of(tokenizer, image_token_index="<image>", video_token_index="<video>"),
    )
    return Parts(processor, LlavaOnevisionForConditionalGeneration, config)


def _granite4_vision() -> Parts:
    """Features of several tower layers are added in several language layers; Granite's four multipliers."""
    tokenizer = make_tokenizer(_IMAGE)
    wide = {**TEXT, "hidden_size": 64, "num_hidden_layers": 3}
    text = Granite4VisionTextConfig(
        **wide, **text_ids(tokenizer), logits_scaling=4.0, embedding_multiplier=3.0, residual_multiplier=0.5,
        attention_multiplier=0.3,
    )  # fmt: skip
    tower = {**VISION, "hidden_size": 64, "image_size": 32, "patch_size": 8}
    images = LlavaNextImageProcessorPil(
        size={"height": 32, "width": 32},
        crop_size={"height": 32, "width": 32},
        image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]],
    )
    processor = Granite4VisionProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="full", downsample_rate="1/2",
        chat_template=make_template("<image>"),
    )  # fmt: skip
    config = Granite4VisionConfig(
        text_config=text.to_dict(),
        vision_config=SiglipVisionConfig(**tower, num_hidden_layers=2, vision_use_head=False).to_dict(),
        qformer_config={
            "model_type": "blip_2_qformer",
            "num_hidden_layers": 1,
            "intermediate_size": 48,
            "cross_attention_frequency": 1,
            "max_position_embeddings": 64,
            "use_qformer_text_input": False,
        },
        image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]],
        vision_feature_select_strategy="full",
        downsample_rate="1/2",
        deepstack_layer_map=[[-1, 0], [-2, 1]],
        spatial_target_layers=[0, 1, 1, 2],
        projector_dropout=0.0,
        **ids_of(tokenizer, image_token_index="<image>"),
    )
    return Parts(processor, Granite4VisionForConditionalGeneration, config)


_PIXTRAL_NAMED = {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}


def _pixtral_processor(tokenizer: Any, *, merge: int) -> LightOnOcrProcessor:
    """Not `PixtralProcessor`, whose module needs torchvision: this one has the same layout, without line breaks."""
    side = 8 * merge
    images = PixtralImageProcessorPil(size={"longest_edge": 64}, patch_size={"height": side, "width": side})
    return LightOnOcrProcessor(
        images, tokenizer, patch_size=8, spatial_merge_size=merge, chat_template=make_template("[IMG]")
    )


def _pixtral() -> Parts:
    tokenizer = make_tokenizer(_PIXTRAL_NAMED)
    config = LlavaConfig(
        text_config=MistralConfig(**TEXT, **text_ids(tokenizer), head_dim=8).to_dict(),
        vision_config=_pixtral_tower(),
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        **ids_of(tokenizer, image_token_index="[IMG]"),
    )
    return Parts(_pixtral_processor(tokenizer, merge=1), LlavaForConditionalGeneration, config)


def _mistral3() -> Parts:
    tokenizer = make_tokenizer(_PIXTRAL_NAMED)
    config = Mistral3Config(
        text_config=MistralConfig(**TEXT, **text_ids(tokenizer), head_dim=8).to_dict(),
        vision_config=_pixtral_tower(),
        spatial_merge_size=2,
        tie_word_embeddings=False,
        **ids_of(tokenizer, image_token_index="[IMG]"),
    )
    return Parts(_pixtral_processor(tokenizer, merge=2), Mistral3ForConditionalGeneration, config)


def _ministral3() -> Parts:
    """Queries grow with their position, from the middle of a prompt on."""
    tokenizer = make_tokenizer(_PIXTRAL_NAMED)
    rope = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 16.0,
        "original_max_position_embeddings": 8,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale_all_dim": 1.0,
        "mscale": 1.0,
        "llama_4_scaling_beta": 0.1,
    }
    config = Mistral3Config(
        text_config=Ministral3Config(**TEXT, **text_ids(tokenizer), head_dim=8, rope_parameters=rope).to_dict(),
        vision_config=_pixtral_tower(),
        spatial_merge_size=2,
        **ids_of(tokenizer, image_token_index="[IMG]"),
    )
    return Parts(_pixtral_processor(tokenizer, merge=2), Mistral3ForConditionalGeneration, config)


def _lighton_ocr() -> Parts:
    tokenizer = make_tokenizer(_PIXTRAL_NAMED)
    config = LightOnOcrConfig(
        text_config=Qwen3Config(**TEXT, **text_ids(tokenizer), head_dim=8).to_dict(),
        vision_config=_pixtral_tower(),
        spatial_merge_size=2,
        **ids_of(tokenizer, image_token_id="[IMG]"),
    )
    return Parts(_pixtral_processor(tokenizer, merge=2), LightOnOcrForConditionalGeneration, config)


def _fast_vlm() -> Parts:
    """A convolutional tower whose output is a map (real checkpoints have timm's FastViT there)."""
    tokenizer = make_tokenizer(_IMAGE)
    tower = ConvNextConfig(hidden_sizes=[16, 32], depths=[1, 1], num_stages=2, patch_size=4, image_size=24)
    config = FastVlmConfig(
        text_config=Qwen2Config(**TEXT, **text_ids(tokenizer)).to_dict(),
        vision_config={**tower.to_dict(), "hidden_size": 32},
        image_seq_length=9,
        **ids_of(tokenizer, image_token_index="<image>"),
    )
    processor = LlavaProcessor(
        _llava_images(), tokenizer, patch_size=8, vision_feature_select_strategy="full",
        num_additional_image_tokens=0, chat_template=make_template("<image>"),
    )  # fmt: skip
    return Parts(processor, FastVlmForConditionalGeneration, config)


BUILDERS: dict[str, Builder] = {
    "llava_lfm2": _llava_lfm2,
    "llava_llama4": _llava_llama4,
    "vipllava": _vipllava,
    "llava_next": _llava_next,
    "llava_next_video": _llava_next_video,
    "llava_onevision": _llava_onevision,
    "granite4_vision": _granite4_vision,
    "pixtral": _pixtral,
    "mistral3": _mistral3,
    "ministral3": _ministral3,
    "lighton_ocr": _lighton_ocr,
    "fast_vlm": _fast_vlm,
}
