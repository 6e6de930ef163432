"""Processors that hold more than an image processor and a tokenizer are loaded for still pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import Gemma4Config
from transformers.models.gemma4.feature_extraction_gemma4 import Gemma4AudioFeatureExtractor
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
from transformers.models.gemma4.processing_gemma4 import Gemma4Processor
from transformers.models.minicpmv4_6.configuration_minicpmv4_6 import MiniCPMV4_6Config
from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil
from transformers.models.minicpmv4_6.processing_minicpmv4_6 import MiniCPMV4_6Processor

from mmrl_ray.policy.tokens import NoVideo, load_processor, stills_only
from tests.support.families.common import make_template, make_tokenizer

GEMMA4 = ("boi", "eoi", "image", "audio", "boa", "eoa")
MINICPM = ("image", "video", "image_start", "image_end", "slice_start", "slice_end", "image_id_start", "image_id_end")


def gemma4(folder: Path) -> tuple[Any, Any]:
    named = {f"{name}_token": f"<{name}>" for name in GEMMA4}
    made = stills_only(Gemma4Processor)(
        Gemma4AudioFeatureExtractor(sampling_rate=8000),
        Gemma4ImageProcessorPil(patch_size=4, max_soft_tokens=70),
        make_tokenizer(named, ["<|video|>"], bos="<bos>"),
        NoVideo(),
        chat_template=make_template("<image>", start="{{ bos_token }}"),
    )
    made.save_pretrained(folder)
    return made, Gemma4Config()


def minicpm(folder: Path) -> tuple[Any, Any]:
    named = {f"{name}_token": f"<{name}>" for name in MINICPM}
    made = stills_only(MiniCPMV4_6Processor)(
        MiniCPMV4_6ImageProcessorPil(patch_size=8, scale_resolution=64, max_slice_nums=4),
        NoVideo(),
        make_tokenizer(named, ["\n"]),
        chat_template=make_template("<image>"),
    )
    made.save_pretrained(folder)
    return made, MiniCPMV4_6Config()


@pytest.mark.parametrize("family", [gemma4, minicpm])
def test_a_processor_of_more_than_pictures_is_loaded_whole_but_for_video(family: Any, tmp_path: Path) -> None:
    made, config = family(tmp_path)
    loaded = load_processor(str(tmp_path), config)
    assert type(loaded).__name__ == type(made).__name__
    assert isinstance(loaded.video_processor, NoVideo)
    for name in type(made).get_attributes():
        assert type(getattr(loaded, name)) is type(getattr(made, name))
    if family is gemma4:
        assert loaded.feature_extractor.sampling_rate == 8000
    picture = Image.new("RGB", (96, 64), (200, 30, 30))
    messages = [
        {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "a circle"}]}
    ]
    chat = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    mine, theirs = (p.apply_chat_template(messages, **chat) for p in (loaded, made))
    assert torch.equal(mine["input_ids"], theirs["input_ids"])
    assert (mine["input_ids"] == loaded.image_token_id).sum() > 1
    torch.testing.assert_close(mine["pixel_values"], theirs["pixel_values"])
