"""Idefics and its descendants, whose tiles of a sample are padded with empty ones; Mllama's cross-attention."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig, MistralConfig
from transformers.models.granite_docling.configuration_granite_docling import (
    GraniteDoclingConfig,
    GraniteDoclingTextConfig,
    GraniteDoclingVisionConfig,
)
from transformers.models.granite_docling.image_processing_pil_granite_docling import GraniteDoclingImageProcessorPil
from transformers.models.granite_docling.modeling_granite_docling import GraniteDoclingForConditionalGeneration
from transformers.models.granite_docling.processing_granite_docling import GraniteDoclingProcessor
from transformers.models.idefics2.configuration_idefics2 import (
    Idefics2Config,
    Idefics2PerceiverConfig,
    Idefics2VisionConfig,
)
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
from transformers.models.idefics2.modeling_idefics2 import Idefics2ForConditionalGeneration
from transformers.models.idefics2.processing_idefics2 import Idefics2Processor
from transformers.models.idefics3.configuration_idefics3 import Idefics3Config, Idefics3VisionConfig
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.modeling_idefics3 import Idefics3ForConditionalGeneration
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.mllama.configuration_mllama import MllamaConfig, MllamaTextConfig, MllamaVisionConfig
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.mllama.modeling_mllama import MllamaForConditionalGeneration
from transformers.models.mllama.processing_mllama import MllamaProcessor
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMConfig, SmolVLMVisionConfig
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMForConditionalGeneration
from transformers.models.smolvlm.processing_smolvlm import SmolVLMProcessor

from mmrl_ray.policy.tokens import NoVideo, stills_only
from tests.support.families.common import TEXT, VISION, Builder, Parts, ids_of, make_template, make_tokenizer, text_ids

_NAMED = {
    "image_token": "<image>",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
}
_GRID = tuple(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5))
_TOWER = {**VISION, "num_hidden_layers": 2, "image_size": 32, "patch_size": 8}


def _smolvlm() -> Parts:
    tokenizer = make_tokenizer(_NAMED, _GRID)
    images = SmolVLMImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    processor = stills_only(SmolVLMProcessor)(
        images, tokenizer, NoVideo(), image_seq_len=4, chat_template=make_template("<image>")
    )
    config = SmolVLMConfig(
        text_config=LlamaConfig(**TEXT, **text_ids(tokenizer)).to_dict(),
        vision_config=SmolVLMVisionConfig(**_TOWER).to_dict(),
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
        **ids_of(tokenizer, image_token_id="<image>"),
    )
    return Parts(processor, SmolVLMForConditionalGeneration, config)


def _idefics3() -> Parts:
    tokenizer = make_tokenizer({}, [*_NAMED.values(), *_GRID])
    images = Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    processor = Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=make_template("<image>"))
    config = Idefics3Config(
        text_config=LlamaConfig(**TEXT, **text_ids(tokenizer)).to_dict(),
        vision_config=Idefics3VisionConfig(**_TOWER).to_dict(),
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
        **ids_of(tokenizer, image_token_id="<image>"),
    )
    return Parts(processor, Idefics3ForConditionalGeneration, config)


def _idefics2() -> Parts:
    """Pictures keep their shape up to a size; a perceiver makes the same number of tokens of each."""
    named = {"image_token": "<image>", "image_boundary_token": "<fake_token_around_image>"}
    tokenizer = make_tokenizer(named, ["<end_of_utterance>"])
    images = Idefics2ImageProcessorPil(size={"shortest_edge": 16, "longest_edge": 32})
    processor = Idefics2Processor(images, tokenizer, image_seq_len=4, chat_template=make_template("<image>"))
    perceiver = Idefics2PerceiverConfig(
        hidden_size=32, resampler_n_latents=4, resampler_depth=1, resampler_n_heads=4, resampler_head_dim=8,
        num_key_value_heads=2,
    )  # fmt: skip
    config = Idefics2Config(
        text_config=MistralConfig(**TEXT, **text_ids(tokenizer)).to_dict(),
        vision_config=Idefics2VisionConfig(**_TOWER).to_dict(),
        perceiver_config=perceiver.to_dict(),
        **ids_of(tokenizer, image_token_id="<image>"),
    )
    return Parts(processor, Idefics2ForConditionalGeneration, config)


def _granite_docling() -> Parts:
    """Granite's four multipliers, and the tower's first layer added into the decoder's."""
    tokenizer = make_tokenizer(_NAMED, _GRID)
    images = GraniteDoclingImageProcessorPil(size={"height": 32, "width": 32}, max_patches=3)
    processor = GraniteDoclingProcessor(images, tokenizer, image_seq_len=4, chat_template=make_template("<image>"))
    text = GraniteDoclingTextConfig(
        **TEXT, **text_ids(tokenizer), logits_scaling=4.0, embedding_multiplier=3.0, residual_multiplier=0.5,
        attention_multiplier=0.35, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    vision = GraniteDoclingVisionConfig(
        **_TOWER, out_hidden_size=32, scale_factor=2, deepstack_visual_indexes=[0], use_fine_route=False
    )
    config = GraniteDoclingConfig(
        text_config=text.to_dict(),
        vision_config=vision.to_dict(),
        pad_token_id=tokenizer.pad_token_id,
        **ids_of(tokenizer, image_token_id="<image>"),
    )
    return Parts(processor, GraniteDoclingForConditionalGeneration, config)


def _mllama() -> Parts:
    """One image token, which stands for nothing: layers of cross-attention read the picture."""
    tokenizer = make_tokenizer({}, bos="<bos>")
    words: dict[str, Any] = text_ids(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|image|>"]})  # behind the last row of the head
    images = MllamaImageProcessorPil(size={"height": 16, "width": 16}, max_image_tiles=4)
    processor = MllamaProcessor(images, tokenizer, chat_template=make_template("<|image|>", start="{{ bos_token }}"))
    text = MllamaTextConfig(
        **{**TEXT, "num_hidden_layers": 3}, **words, cross_attention_layers=[1],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    vision = MllamaVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_global_layers=1, attention_heads=4,
        image_size=16, patch_size=8, vision_output_dim=64, intermediate_layers_indices=[0],
    )  # fmt: skip
    config = MllamaConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), **ids_of(tokenizer, image_token_index="<|image|>")
    )
    return Parts(processor, MllamaForConditionalGeneration, config)


BUILDERS: dict[str, Builder] = {
    "smolvlm": _smolvlm,
    "idefics3": _idefics3,
    "idefics2": _idefics2,
    "granite_docling": _granite_docling,
    "mllama": _mllama,
}
