"""Tiny random models of every family the shared prefix must be right for, as ordinary Hugging Face folders.

Each has its family's own processor on a word-level tokenizer made on the fly, and its family's own image layout:
LLaVA's fixed grid, Qwen-VL's grids that follow the picture's size, InternVL's and SmolVLM's tiles, Gemma 3's
bidirectional image block and sliding windows. Pictures are noise, so that two never have equal features.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, SiglipVisionConfig
from transformers.models.gemma3.configuration_gemma3 import Gemma3Config, Gemma3TextConfig
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma3.modeling_gemma3 import Gemma3ForConditionalGeneration
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.internvl.configuration_internvl import InternVLConfig, InternVLVisionConfig
from transformers.models.internvl.modeling_internvl import InternVLForConditionalGeneration
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLVisionConfig,
)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLConfig, Qwen3VLTextConfig, Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMConfig, SmolVLMVisionConfig
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMForConditionalGeneration
from transformers.models.smolvlm.processing_smolvlm import SmolVLMProcessor

from mmrl_ray.config.model import ModelSection
from mmrl_ray.data.samples import Sample
from mmrl_ray.policy.load import Policy, load_policy
from mmrl_ray.policy.processors import NoVideo, stills_only
from mmrl_ray.policy.tiny import build_tiny_llava, words_of

FAMILIES = ("llava", "qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm", "gemma3")

WORDS = words_of(
    [
        "Describe the image. What is in this picture? Say it short, a an small large red green blue yellow",
        "circle square triangle above below left right of and on there with one two user model assistant system :",
    ]
)


def build_family(name: str, folder: str | Path, *, seed: int = 0) -> Path:
    """Saves a tiny random model of one family with its processor into `folder`."""
    folder = Path(folder)
    if name == "llava":
        sizes = {"image_size": 24, "patch_size": 8, "hidden": 32, "layers": 2, "vision_hidden": 32, "vision_layers": 2}
        build_tiny_llava(folder, vocabulary=WORDS, seed=seed, **sizes)
        llava = LlavaForConditionalGeneration.from_pretrained(folder)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            _spread(llava)
        llava.save_pretrained(folder)
        return folder
    processor, model_class, config = _BUILDERS[name]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
        _spread(model)
    tokenizer = processor.tokenizer
    model.generation_config = GenerationConfig(pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def load_family(name: str, folder: str | Path, *, seed: int = 0, **section: Any) -> Policy:
    """Builds a family into `folder` and loads it as a policy, on the CPU in float32 unless `section` says otherwise."""
    path = build_family(name, folder, seed=seed)
    return load_policy(ModelSection(path=str(path), **{"dtype": "float32", **section}), device="cpu")


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


def _tokenizer(named: dict[str, str], listed: Sequence[str] = (), *, bos: str | None = None) -> PreTrainedTokenizerFast:
    """Word-level; `named` are media tokens by attribute name, `listed` are further special tokens."""
    special = ["<pad>", "<unk>", "</s>", *([bos] if bos else []), *named.values(), *listed]
    words = {word: i for i, word in enumerate(dict.fromkeys([*special, *WORDS]))}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if bos:  # like Gemma's tokenizer: it adds the token itself unless it is told not to
        core.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, words[bos])])
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="</s>",
        bos_token=bos,
        extra_special_tokens=named,
        clean_up_tokenization_spaces=True,
    )


def _template(image: str, *, start: str = "") -> str:
    return (
        start + "{% for m in messages %}{{ m['role'] }} : {% if m['content'] is string %}{{ m['content'] }}{% else %}"
        "{% for p in m['content'] %}{% if p['type'] == 'image' %}" + image + "{% else %}{{ p['text'] }}{% endif %} "
        "{% endfor %}{% endif %}{% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant :{% endif %}"
    )


def _spread(model: torch.nn.Module) -> None:
    """Larger random weights: with the usual tiny ones every position predicts nearly the same, and a mistake hides."""
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.15)


_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}

_QWEN_NAMED = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}
_QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def _ids(tokenizer: Any, **names: str) -> dict[str, int]:
    return {key: tokenizer.convert_tokens_to_ids(token) for key, token in names.items()}


def _text_ids(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }


def _qwen_ids(tokenizer: Any) -> dict[str, int]:
    return _ids(
        tokenizer,
        image_token_id="<|image_pad|>",
        video_token_id="<|video_pad|>",
        vision_start_token_id="<|vision_start|>",
        vision_end_token_id="<|vision_end|>",
    )


def _qwen2_5_vl() -> tuple[Any, Any, Any]:
    tokenizer = _tokenizer(_QWEN_NAMED)
    images = Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 16})
    processor = stills_only(Qwen2_5_VLProcessor)(images, tokenizer, NoVideo(), chat_template=_template(_QWEN_IMAGE))
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    config = Qwen2_5_VLConfig(
        text_config=Qwen2_5_VLTextConfig(**_TEXT, **_text_ids(tokenizer), rope_parameters=rope).to_dict(),
        vision_config=Qwen2_5_VLVisionConfig(
            hidden_size=32, intermediate_size=48, num_heads=4, depth=2, out_hidden_size=32, fullatt_block_indexes=[1]
        ).to_dict(),
        **_qwen_ids(tokenizer),
    )
    return processor, Qwen2_5_VLForConditionalGeneration, config


def _qwen3_vl() -> tuple[Any, Any, Any]:
    tokenizer = _tokenizer(_QWEN_NAMED)
    images = Qwen2VLImageProcessorPil(size={"shortest_edge": 32 * 32, "longest_edge": 32 * 32 * 16}, patch_size=16)
    processor = stills_only(Qwen3VLProcessor)(images, tokenizer, NoVideo(), chat_template=_template(_QWEN_IMAGE))
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2], "mrope_interleaved": True}
    config = Qwen3VLConfig(
        text_config=Qwen3VLTextConfig(**_TEXT, **_text_ids(tokenizer), head_dim=8, rope_parameters=rope).to_dict(),
        vision_config=Qwen3VLVisionConfig(
            hidden_size=32, intermediate_size=48, num_heads=4, depth=3, out_hidden_size=32,
            num_position_embeddings=64, deepstack_visual_indexes=[0, 1],
        ).to_dict(),
        **_qwen_ids(tokenizer),
    )  # fmt: skip
    return processor, Qwen3VLForConditionalGeneration, config


def _internvl() -> tuple[Any, Any, Any]:
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = _tokenizer(named)
    images = GotOcr2ImageProcessorPil(
        size={"height": 28, "width": 28}, crop_to_patches=True, min_patches=1, max_patches=3
    )
    processor = stills_only(InternVLProcessor)(
        images, tokenizer, NoVideo(), image_seq_length=4, chat_template=_template("<IMG_CONTEXT>")
    )
    config = InternVLConfig(
        text_config=Qwen2Config(**_TEXT, **_text_ids(tokenizer)).to_dict(),
        vision_config=InternVLVisionConfig(**_VISION, num_hidden_layers=2, image_size=28, patch_size=7).to_dict(),
        image_token_id=processor.image_token_id,
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    return processor, InternVLForConditionalGeneration, config


def _smolvlm() -> tuple[Any, Any, Any]:
    named = {
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
    }
    grid = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    tokenizer = _tokenizer(named, grid)
    images = SmolVLMImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    processor = stills_only(SmolVLMProcessor)(
        images, tokenizer, NoVideo(), image_seq_len=4, chat_template=_template("<image>")
    )
    config = SmolVLMConfig(
        text_config=LlamaConfig(**_TEXT, **_text_ids(tokenizer)).to_dict(),
        vision_config=SmolVLMVisionConfig(**_VISION, num_hidden_layers=2, image_size=32, patch_size=8).to_dict(),
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
        **_ids(tokenizer, image_token_id="<image>"),
    )
    return processor, SmolVLMForConditionalGeneration, config


def _gemma3() -> tuple[Any, Any, Any]:
    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokenizer = _tokenizer(named, bos="<bos>")
    images = Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
    processor = Gemma3Processor(
        images,
        tokenizer,
        image_seq_length=4,
        chat_template=_template("<start_of_image>", start="{{ bos_token }}"),
    )
    # A window shorter than every prompt, so that the sliding layers' caches drop part of it.
    text = Gemma3TextConfig(
        **_TEXT,
        **_text_ids(tokenizer),
        head_dim=8,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        query_pre_attn_scalar=8,
    )
    config = Gemma3Config(
        text_config=text.to_dict(),
        vision_config=SiglipVisionConfig(**_VISION, num_hidden_layers=2, image_size=32, patch_size=8).to_dict(),
        mm_tokens_per_image=4,
        **_ids(
            tokenizer,
            image_token_id="<image_soft_token>",
            boi_token_index="<start_of_image>",
            eoi_token_index="<end_of_image>",
        ),
    )
    return processor, Gemma3ForConditionalGeneration, config


_BUILDERS = {
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "internvl": _internvl,
    "smolvlm": _smolvlm,
    "gemma3": _gemma3,
}
