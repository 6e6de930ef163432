"""Families that cut a picture into tiles or resample it to a fixed number of tokens."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig, Qwen2Config, SiglipVisionConfig
from transformers.models.aria.configuration_aria import AriaConfig, AriaTextConfig
from transformers.models.aria.image_processing_pil_aria import AriaImageProcessorPil
from transformers.models.aria.modeling_aria import AriaForConditionalGeneration
from transformers.models.aria.processing_aria import AriaProcessor
from transformers.models.aya_vision.configuration_aya_vision import AyaVisionConfig
from transformers.models.aya_vision.modeling_aya_vision import AyaVisionForConditionalGeneration
from transformers.models.aya_vision.processing_aya_vision import AyaVisionProcessor
from transformers.models.cohere2.configuration_cohere2 import Cohere2Config
from transformers.models.deepseek_vl.configuration_deepseek_vl import DeepseekVLConfig
from transformers.models.deepseek_vl.image_processing_pil_deepseek_vl import DeepseekVLImageProcessorPil
from transformers.models.deepseek_vl.modeling_deepseek_vl import DeepseekVLForConditionalGeneration
from transformers.models.deepseek_vl.processing_deepseek_vl import DeepseekVLProcessor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.internvl.configuration_internvl import InternVLConfig, InternVLVisionConfig
from transformers.models.internvl.modeling_internvl import InternVLForConditionalGeneration
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.janus.configuration_janus import JanusConfig, JanusVisionConfig, JanusVQVAEConfig
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil
from transformers.models.janus.modeling_janus import JanusForConditionalGeneration
from transformers.models.janus.processing_janus import JanusProcessor
from transformers.models.minicpmv4_6.configuration_minicpmv4_6 import MiniCPMV4_6Config, MiniCPMV4_6VisionConfig
from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil
from transformers.models.minicpmv4_6.modeling_minicpmv4_6 import MiniCPMV4_6ForConditionalGeneration
from transformers.models.minicpmv4_6.processing_minicpmv4_6 import MiniCPMV4_6Processor
from transformers.models.minicpmv4_7.configuration_minicpmv4_7 import MiniCPMV4_7Config, MiniCPMV4_7VisionConfig
from transformers.models.minicpmv4_7.modeling_minicpmv4_7 import MiniCPMV4_7ForConditionalGeneration
from transformers.models.minicpmv4_7.processing_minicpmv4_7 import MiniCPMV4_7Processor
from transformers.models.ovis2.configuration_ovis2 import Ovis2Config, Ovis2VisionConfig
from transformers.models.ovis2.image_processing_pil_ovis2 import Ovis2ImageProcessorPil
from transformers.models.ovis2.modeling_ovis2 import Ovis2ForConditionalGeneration
from transformers.models.ovis2.processing_ovis2 import Ovis2Processor
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig

from mmrl_ray.policy.tokens import NoVideo, stills_only
from tests.support.families.common import TEXT, VISION, Builder, Parts, ids_of, make_template, make_tokenizer, text_ids
from tests.support.families.qwen import hybrid_text

_IMAGE = {"image_token": "<image>"}


def _internvl() -> Parts:
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = make_tokenizer(named)
    images = GotOcr2ImageProcessorPil(
        size={"height": 28, "width": 28}, crop_to_patches=True, min_patches=1, max_patches=3
    )
    processor = stills_only(InternVLProcessor)(
        images, tokenizer, NoVideo(), image_seq_length=4, chat_template=make_template("<IMG_CONTEXT>")
    )
    config = InternVLConfig(
        text_config=Qwen2Config(**TEXT, **text_ids(tokenizer)).to_dict(),
        vision_config=InternVLVisionConfig(**VISION, num_hidden_layers=2, image_size=28, patch_size=7).to_dict(),
        image_token_id=processor.image_token_id,
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    return Parts(processor, InternVLForConditionalGeneration, config)


def _aya_vision() -> Parts:
    """Cohere's text model scales its logits; attention and MLP of a layer run side by side."""
    marks = ["<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", "TILE_GLOBAL"]
    tokenizer = make_tokenizer(_IMAGE, [*marks, *(f"TILE_{i}" for i in range(1, 4))])
    images = GotOcr2ImageProcessorPil(
        size={"height": 32, "width": 32}, crop_to_patches=True, min_patches=1, max_patches=3
    )
    processor = AyaVisionProcessor(
        images, tokenizer, patch_size=8, img_size=32, downsample_factor=2, chat_template=make_template("<image>")
    )
    text = Cohere2Config(
        **TEXT,
        **text_ids(tokenizer),
        head_dim=8,
        logit_scale=0.25,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    )
    tower = SiglipVisionConfig(**VISION, num_hidden_layers=2, image_size=32, patch_size=8, vision_use_head=False)
    config = AyaVisionConfig(
        text_config=text.to_dict(),
        vision_config=tower.to_dict(),
        downsample_factor=2,
        **ids_of(tokenizer, image_token_index="<|IMG_PATCH|>"),
    )
    return Parts(processor, AyaVisionForConditionalGeneration, config)


def _ovis2() -> Parts:
    """A tower that gives distributions over visual words; marks around a tile have embeddings of the tower's."""
    marks = ["<IMG_ATOM>", "<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"]
    tokenizer = make_tokenizer(_IMAGE, marks)
    images = Ovis2ImageProcessorPil(size={"height": 32, "width": 32}, crop_to_patches=True, max_patches=3)
    processor = Ovis2Processor(images, tokenizer, image_seq_length=4, chat_template=make_template("<image>"))
    config = Ovis2Config(
        text_config=Qwen2Config(**TEXT, **text_ids(tokenizer)).to_dict(),
        vision_config=Ovis2VisionConfig(
            **VISION, num_hidden_layers=2, image_size=32, patch_size=8, vocab_size=40, hidden_stride=2
        ).to_dict(),
        visual_indicator_token_ids=tokenizer.convert_tokens_to_ids(marks[1:]),
        vocab_size=len(tokenizer),
        hidden_size=32,
        tie_word_embeddings=False,
        **ids_of(tokenizer, image_token_id="<IMG_ATOM>"),
    )
    return Parts(processor, Ovis2ForConditionalGeneration, config)


_MINICPM_NAMED = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "image_start_token": "<image>",
    "image_end_token": "</image>",
    "slice_start_token": "<slice>",
    "slice_end_token": "</slice>",
    "image_id_start_token": "<image_id>",
    "image_id_end_token": "</image_id>",
}


def _minicpm(processor_class: Any, model_class: Any, config_class: Any, vision_class: Any, **peculiar: Any) -> Parts:
    """Slices of unequal grids, each merged twice; a text model with a recurrent layer."""
    tokenizer = make_tokenizer(_MINICPM_NAMED, ["\n"])
    images = MiniCPMV4_6ImageProcessorPil(patch_size=8, scale_resolution=64, max_slice_nums=4)
    processor = stills_only(processor_class)(
        images, _NoSlices(), tokenizer, chat_template=make_template("<|image_pad|>")
    )
    text = Qwen3_5TextConfig(**{**hybrid_text(tokenizer), **peculiar})
    config = config_class(
        text_config=text.to_dict(),
        vision_config=vision_class(**VISION, num_hidden_layers=3, image_size=64, patch_size=8).to_dict(),
        insert_layer_id=0,
        image_size=64,
        **ids_of(
            tokenizer,
            image_token_id="<|image_pad|>",
            video_token_id="<|video_pad|>",
            image_start_id="<image>",
            image_end_id="</image>",
            slice_start_id="<slice>",
            slice_end_id="</slice>",
            newline_id="\n",
        ),
    )
    return Parts(processor, model_class, config)


def _minicpmv4_6() -> Parts:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    return _minicpm(
        MiniCPMV4_6Processor,
        MiniCPMV4_6ForConditionalGeneration,
        MiniCPMV4_6Config,
        MiniCPMV4_6VisionConfig,
        rope_parameters=rope,
    )


def _minicpmv4_7() -> Parts:
    """Slices lie on one canvas, on three axes that follow from their sizes."""
    return _minicpm(
        MiniCPMV4_7Processor, MiniCPMV4_7ForConditionalGeneration, MiniCPMV4_7Config, MiniCPMV4_7VisionConfig
    )


class _NoSlices(NoVideo):
    slice_mode = False
    downsample_mode = "16x"


def _aria() -> Parts:
    """Experts whose number a token picks from; queries that read the tower's patches."""
    tokenizer = make_tokenizer(_IMAGE)
    images = AriaImageProcessorPil(max_image_size=490, min_image_size=70)
    processor = AriaProcessor(
        images, tokenizer, size_conversion={490: 4, 980: 8}, chat_template=make_template("<image>")
    )
    text = AriaTextConfig(**TEXT, **text_ids(tokenizer), moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1)
    vision = Idefics3VisionConfig(
        hidden_size=8, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1, image_size=980, patch_size=70
    )
    config = AriaConfig(
        text_config=text.to_dict(),
        vision_config=vision.to_dict(),
        projector_patch_to_query_dict={49: 4, 196: 8},
        **ids_of(tokenizer, image_token_index="<image>"),
    )
    return Parts(processor, AriaForConditionalGeneration, config)


def _deepseek_vl() -> Parts:
    tokenizer = make_tokenizer({"image_token": "<image_placeholder>"})
    images = DeepseekVLImageProcessorPil(size={"height": 32, "width": 32})
    processor = DeepseekVLProcessor(
        images, tokenizer, num_image_tokens=16, chat_template=make_template("<image_placeholder>")
    )
    tower = SiglipVisionConfig(**VISION, num_hidden_layers=2, image_size=32, patch_size=8, vision_use_head=False)
    config = DeepseekVLConfig(
        text_config=LlamaConfig(**TEXT, **text_ids(tokenizer)).to_dict(),
        vision_config=tower.to_dict(),
        tie_word_embeddings=False,
        **ids_of(tokenizer, image_token_id="<image_placeholder>"),
    )
    return Parts(processor, DeepseekVLForConditionalGeneration, config)


def _janus() -> Parts:
    """Also draws pictures: a head for their codes stands beside the one for words."""
    named = {"image_token": "<image_placeholder>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"}
    tokenizer = make_tokenizer(named)
    images = JanusImageProcessorPil(size={"height": 32, "width": 32})
    processor = JanusProcessor(
        images, tokenizer, num_image_tokens=16, chat_template=make_template("<image_placeholder>")
    )
    vision = JanusVisionConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8, mlp_ratio=2.0,
        projection_dim=32, num_image_tokens=16,
    )  # fmt: skip
    codes = JanusVQVAEConfig(
        embed_dim=8, num_embeddings=16, latent_channels=8, base_channels=32, channel_multiplier=[1, 1],
        num_res_blocks=1, num_patches=4, projection_dim=32, image_token_embed_dim=32,
    )  # fmt: skip
    config = JanusConfig(
        text_config=LlamaConfig(**TEXT, **text_ids(tokenizer)).to_dict(),
        vision_config=vision.to_dict(),
        vq_config=codes.to_dict(),
        tie_word_embeddings=False,
        **ids_of(tokenizer, image_token_id="<image_placeholder>"),
    )
    return Parts(processor, JanusForConditionalGeneration, config)


BUILDERS: dict[str, Builder] = {
    "internvl": _internvl,
    "aya_vision": _aya_vision,
    "ovis2": _ovis2,
    "minicpmv4_6": _minicpmv4_6,
    "minicpmv4_7": _minicpmv4_7,
    "aria": _aria,
    "deepseek_vl": _deepseek_vl,
    "janus": _janus,
}
