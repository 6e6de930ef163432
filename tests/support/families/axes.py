"""Other families whose decoders count positions on several axes, or whose towers take whole grids of patches."""

from __future__ import annotations

from typing import Any

from transformers.models.cohere_compass.configuration_cohere_compass import (
    CohereCompassConfig,
    CohereCompassTextConfig,
    CohereCompassVisionConfig,
)
from transformers.models.cohere_compass.image_processing_pil_cohere_compass import CohereCompassImageProcessorPil
from transformers.models.cohere_compass.modeling_cohere_compass import CohereCompassForConditionalGeneration
from transformers.models.cohere_compass.processing_cohere_compass import CohereCompassProcessor
from transformers.models.ernie4_5_vl_moe.configuration_ernie4_5_vl_moe import (
    Ernie4_5_VLMoeConfig,
    Ernie4_5_VLMoeTextConfig,
    Ernie4_5_VLMoeVisionConfig,
)
from transformers.models.ernie4_5_vl_moe.image_processing_pil_ernie4_5_vl_moe import Ernie4_5_VLMoeImageProcessorPil
from transformers.models.ernie4_5_vl_moe.modeling_ernie4_5_vl_moe import Ernie4_5_VLMoeForConditionalGeneration
from transformers.models.ernie4_5_vl_moe.processing_ernie4_5_vl_moe import Ernie4_5_VLMoeProcessor
from transformers.models.exaone4.configuration_exaone4 import Exaone4Config
from transformers.models.exaone4_5.configuration_exaone4_5 import Exaone4_5_Config, Exaone4_5_VisionConfig
from transformers.models.exaone4_5.modeling_exaone4_5 import Exaone4_5_ForConditionalGeneration
from transformers.models.exaone4_5.processing_exaone4_5 import Exaone4_5_Processor
from transformers.models.glm4v.configuration_glm4v import Glm4vConfig, Glm4vTextConfig, Glm4vVisionConfig
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.glm4v.modeling_glm4v import Glm4vForConditionalGeneration
from transformers.models.glm4v.processing_glm4v import Glm4vProcessor
from transformers.models.glm4v_moe.configuration_glm4v_moe import (
    Glm4vMoeConfig,
    Glm4vMoeTextConfig,
    Glm4vMoeVisionConfig,
)
from transformers.models.glm4v_moe.modeling_glm4v_moe import Glm4vMoeForConditionalGeneration
from transformers.models.glm46v.configuration_glm46v import Glm46VConfig
from transformers.models.glm46v.image_processing_pil_glm46v import Glm46VImageProcessorPil
from transformers.models.glm46v.modeling_glm46v import Glm46VForConditionalGeneration
from transformers.models.glm46v.processing_glm46v import Glm46VProcessor
from transformers.models.hunyuan_vl.configuration_hunyuan_vl import (
    HunYuanVLConfig,
    HunYuanVLTextConfig,
    HunYuanVLVisionConfig,
)
from transformers.models.hunyuan_vl.image_processing_pil_hunyuan_vl import HunYuanVLImageProcessorPil
from transformers.models.hunyuan_vl.modeling_hunyuan_vl import HunYuanVLForConditionalGeneration
from transformers.models.hunyuan_vl.processing_hunyuan_vl import HunYuanVLProcessor
from transformers.models.paddleocr_vl.configuration_paddleocr_vl import (
    PaddleOCRTextConfig,
    PaddleOCRVisionConfig,
    PaddleOCRVLConfig,
)
from transformers.models.paddleocr_vl.image_processing_pil_paddleocr_vl import PaddleOCRVLImageProcessorPil
from transformers.models.paddleocr_vl.modeling_paddleocr_vl import PaddleOCRVLForConditionalGeneration
from transformers.models.paddleocr_vl.processing_paddleocr_vl import PaddleOCRVLProcessor
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.video_llama_3.configuration_video_llama_3 import VideoLlama3Config, VideoLlama3VisionConfig
from transformers.models.video_llama_3.image_processing_pil_video_llama_3 import VideoLlama3ImageProcessorPil
from transformers.models.video_llama_3.modeling_video_llama_3 import VideoLlama3ForConditionalGeneration
from transformers.models.video_llama_3.processing_video_llama_3 import VideoLlama3Processor

from mmrl_ray.policy.tokens import NoVideo, stills_only
from tests.support.families.common import TEXT, VISION, Builder, Parts, ids_of, make_template, make_tokenizer, text_ids
from tests.support.families.qwen import NAMED, ROPE, TEMPLATE, qwen_ids, qwen_processor

_SIZES = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 16}
_GLM_NAMED = {"image_token": "<|image|>", "video_token": "<|video|>"}
_GLM_MARKS = ("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>")


def _glm(
    processor_class: Any, images_class: Any, model_class: Any, config_class: Any, *, experts: bool = False
) -> Parts:
    """GLM-4V: half of each head is rotated, in pairs of neighbours."""
    tokenizer = make_tokenizer(_GLM_NAMED, _GLM_MARKS)
    images = images_class(size={"shortest_edge": 28 * 28 * 2, "longest_edge": 28 * 28 * 32})
    template = make_template("<|begin_of_image|><|image|><|end_of_image|>")
    settings = {
        **TEXT,
        **text_ids(tokenizer),
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5},
    }
    tower = {"depth": 2, "hidden_size": 32, "num_heads": 4, "image_size": 56, "out_hidden_size": 32}
    text: Any = Glm4vTextConfig(**settings)
    vision: Any = Glm4vVisionConfig(**tower, intermediate_size=48)
    if experts:  # none in the first layer
        settings |= {"num_hidden_layers": 3, "moe_intermediate_size": 16, "n_routed_experts": 4}
        text = Glm4vMoeTextConfig(**settings, num_experts_per_tok=2)
        vision = Glm4vMoeVisionConfig(**tower, intermediate_size=48)
    config = config_class(
        text_config=text.to_dict(),
        vision_config=vision.to_dict(),
        **ids_of(
            tokenizer,
            image_token_id="<|image|>",
            video_token_id="<|video|>",
            image_start_token_id="<|begin_of_image|>",
            image_end_token_id="<|end_of_image|>",
            video_start_token_id="<|begin_of_video|>",
            video_end_token_id="<|end_of_video|>",
        ),
    )
    processor = stills_only(processor_class)(images, tokenizer, NoVideo(), chat_template=template)
    return Parts(processor, model_class, config)


def _glm4v() -> Parts:
    return _glm(Glm4vProcessor, Glm4vImageProcessorPil, Glm4vForConditionalGeneration, Glm4vConfig)


def _glm4v_moe() -> Parts:
    return _glm(Glm4vProcessor, Glm4vImageProcessorPil, Glm4vMoeForConditionalGeneration, Glm4vMoeConfig, experts=True)


def _glm46v() -> Parts:
    return _glm(Glm46VProcessor, Glm46VImageProcessorPil, Glm46VForConditionalGeneration, Glm46VConfig)


def _ernie4_5_vl_moe() -> Parts:
    """Experts of their own for image tokens, told apart by a type for each token."""
    named = {
        "image_token": "<|IMAGE_PLACEHOLDER|>",
        "image_start_token": "<|IMAGE_START|>",
        "image_end_token": "<|IMAGE_END|>",
        "video_token": "<|VIDEO_PLACEHOLDER|>",
        "video_start_token": "<|VIDEO_START|>",
        "video_end_token": "<|VIDEO_END|>",
    }
    tokenizer = make_tokenizer(named)
    text = Ernie4_5_VLMoeTextConfig(
        **{**TEXT, "num_hidden_layers": 3},  # the first layer has no experts
        **text_ids(tokenizer),
        moe_intermediate_size=[16, 8],
        moe_k=2,
        moe_num_experts=4,
        moe_num_shared_experts=1,
        rope_parameters={**ROPE, "mrope_section": [1, 1, 2]},
    )
    vision = Ernie4_5_VLMoeVisionConfig(depth=2, hidden_size=32, num_heads=4, intermediate_size=48)
    config = Ernie4_5_VLMoeConfig(
        text_config=text.to_dict(),
        vision_config=vision.to_dict(),
        **ids_of(tokenizer, **{f"{name}_id": token for name, token in named.items()}),
    )
    template = make_template("<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>")
    processor = stills_only(Ernie4_5_VLMoeProcessor)(
        Ernie4_5_VLMoeImageProcessorPil(size=_SIZES), tokenizer, _NoFont(), chat_template=template
    )
    return Parts(processor, Ernie4_5_VLMoeForConditionalGeneration, config)


class _NoFont(NoVideo):
    font = ""  # that video processor writes time stamps into frames


def _paddleocr_vl() -> Parts:
    tokenizer = make_tokenizer(NAMED)
    text = PaddleOCRTextConfig(**TEXT, **text_ids(tokenizer), head_dim=8, rope_parameters=ROPE)
    vision = PaddleOCRVisionConfig(**VISION, num_hidden_layers=2, image_size=56)
    config = PaddleOCRVLConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), tie_word_embeddings=False, **qwen_ids(tokenizer)
    )
    images = PaddleOCRVLImageProcessorPil(size=_SIZES)
    processor = PaddleOCRVLProcessor(images, tokenizer, chat_template=TEMPLATE)
    return Parts(processor, PaddleOCRVLForConditionalGeneration, config)


def _hunyuan_vl() -> Parts:
    """Four axes: order, width, height and number of the picture."""
    named = {"image_token": "<image>", "image_start_token": "<img>", "image_end_token": "</img>"}
    tokenizer = make_tokenizer(named, ["<img_newline>"])
    text = HunYuanVLTextConfig(
        **TEXT, **text_ids(tokenizer), head_dim=8, rope_parameters={**ROPE, "mrope_section": [1, 1, 1, 1]}
    )
    vision = HunYuanVLVisionConfig(
        **VISION, num_hidden_layers=2, out_hidden_size=32, patch_size=14, max_image_size=112, min_image_size=28,
        text_hidden_size=32, img_max_token_num=64, max_vit_seq_len=64,
    )  # fmt: skip
    config = HunYuanVLConfig(
        text_config=text.to_dict(),
        vision_config=vision.to_dict(),
        **ids_of(
            tokenizer, image_token_id="<image>", im_start_id="<img>", im_end_id="</img>", im_newline_id="<img_newline>"
        ),
    )
    images = HunYuanVLImageProcessorPil(size=_SIZES, patch_size=14)
    processor = HunYuanVLProcessor(images, tokenizer, chat_template=make_template("<img><image></img>"))
    return Parts(processor, HunYuanVLForConditionalGeneration, config)


def _cohere_compass() -> Parts:
    """Scaled logits, sliding layers that rotate on three axes, full ones that do not rotate, deepstack."""
    named = {
        "image_token": "<|IMAGE_PAD|>",
        "video_token": "<|VIDEO_PAD|>",
        "vision_start_token": "<|VISION_START|>",
        "vision_end_token": "<|VISION_END|>",
    }
    tokenizer = make_tokenizer(named)
    text = CohereCompassTextConfig(
        **TEXT, **text_ids(tokenizer), head_dim=8, logit_scale=0.25, sliding_window=8,
        rope_parameters={"sliding_attention": ROPE, "full_attention": None},
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    vision = CohereCompassVisionConfig(
        depth=3, hidden_size=32, intermediate_size=48, num_heads=4, out_hidden_size=32, num_position_embeddings=64,
        deepstack_visual_indexes=[0, 1],
    )  # fmt: skip
    config = CohereCompassConfig(
        text_config=text.to_dict(),
        vision_config=vision.to_dict(),
        **ids_of(tokenizer, **{f"{name}_id": token for name, token in named.items()}),
    )
    images = CohereCompassImageProcessorPil(size={"shortest_edge": 1024, "longest_edge": 16 * 1024}, patch_size=16)
    processor = stills_only(CohereCompassProcessor)(
        images, tokenizer, NoVideo(), chat_template=make_template("<|VISION_START|><|IMAGE_PAD|><|VISION_END|>")
    )
    return Parts(processor, CohereCompassForConditionalGeneration, config)


def _exaone4_5() -> Parts:
    """Its sliding layers rotate, its full ones do not."""
    tokenizer = make_tokenizer(NAMED)
    text = Exaone4Config(
        **TEXT,
        **text_ids(tokenizer),
        sliding_window=8,
        sliding_window_pattern="LG",
        layer_types=["sliding_attention", "full_attention"],
    )
    vision = Exaone4_5_VisionConfig(
        depth=2, hidden_size=32, intermediate_size=48, num_heads=4, num_key_value_heads=2, out_hidden_size=32,
        fullatt_block_indexes=[1],
    )  # fmt: skip
    config = Exaone4_5_Config(text_config=text.to_dict(), vision_config=vision.to_dict(), **qwen_ids(tokenizer))
    return Parts(qwen_processor(Exaone4_5_Processor, tokenizer), Exaone4_5_ForConditionalGeneration, config)


def _video_llama_3() -> Parts:
    named = {"image_token": "<image>", "video_token": "<video>"}
    tokenizer = make_tokenizer(named)
    config = VideoLlama3Config(
        text_config=Qwen2Config(**TEXT, **text_ids(tokenizer)).to_dict(),
        vision_config=VideoLlama3VisionConfig(**VISION, num_hidden_layers=2, patch_size=14).to_dict(),
        **ids_of(tokenizer, image_token_id="<image>", video_token_id="<video>"),
    )
    images = VideoLlama3ImageProcessorPil(size=_SIZES)
    processor = stills_only(VideoLlama3Processor)(images, tokenizer, NoVideo(), chat_template=make_template("<image>"))
    return Parts(processor, VideoLlama3ForConditionalGeneration, config)


BUILDERS: dict[str, Builder] = {
    "glm4v": _glm4v,
    "glm4v_moe": _glm4v_moe,
    "glm46v": _glm46v,
    "ernie4_5_vl_moe": _ernie4_5_vl_moe,
    "paddleocr_vl": _paddleocr_vl,
    "hunyuan_vl": _hunyuan_vl,
    "cohere_compass": _cohere_compass,
    "exaone4_5": _exaone4_5,
    "video_llama_3": _video_llama_3,
}
