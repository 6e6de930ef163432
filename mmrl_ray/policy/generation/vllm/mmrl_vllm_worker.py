"""What vLLM's workers do beside their own: adapters that came in memory, and names that transformers 5.23 writes.

vLLM imports this file by name in each of its workers (`worker_extension_cls`), where there is nothing of this project:
it needs torch, transformers and vLLM alone. Its folder is on the path there, hence a name that nothing else has.

vLLM loads an adapter that it needs and does not have from the path in the request, and a path that is not there ends
the engine. Here no adapter has a path: one that was evicted is made again of the tensors that are held, under the same
id, for as long as any request may name it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

PILLOW = "MMRL_VLLM_PILLOW"
"""Environment variable: pictures are resized by Pillow, as the owner's processor does, and not by torchvision."""
_TOWER = r"^(?:model\.)?vision_tower\.(?=(?:embeddings|encoder|pre_layrnorm|post_layernorm)\.)"


class Adapters:
    """Mixed into vLLM's worker; called by name, by `collective_rpc`."""

    model_runner: Any

    def hold_adapter(self, lora_id: int, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> None:
        """Keeps these for requests with `lora_id`.

        Raises:
            ValueError: the model has no place for one of them; vLLM would leave it out without a word.
        """
        manager = self.model_runner.lora_manager
        if not hasattr(manager, "held_adapters"):
            manager.held_adapters = {}
            manager._load_adapter = partial(_make, manager)
        made = _adapter(manager, lora_id, tensors, config)
        places = manager._adapter_manager
        packed = places.packed_modules
        known = {part for name in places.modules for part in (name, *packed.get(name, ()))}
        if unknown := sorted(made.loras.keys() - known):
            raise ValueError(
                f"vLLM has no place for {len(unknown)} of the adapter's {len(made.loras)} layers, such as {unknown[0]}"
            )
        manager.held_adapters[lora_id] = (tensors, config)

    def release_adapter(self, lora_id: int) -> None:
        """Lets go of them: no request names them any more."""
        manager = self.model_runner.lora_manager
        manager.remove_adapter(lora_id)
        getattr(manager, "held_adapters", {}).pop(lora_id, None)


def _make(manager: Any, request: Any) -> Any:
    """In the place of `_load_adapter`, which reads files."""
    return _adapter(manager, request.lora_int_id, *manager.held_adapters[request.lora_int_id])


def _adapter(manager: Any, lora_id: int, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> Any:
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    helper = PEFTHelper.from_dict(dict(config))
    helper.validate_legal(manager.lora_config)
    model = manager._adapter_manager.model
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    made = LoRAModel.from_lora_tensors(
        lora_id,
        dict(tensors),
        helper,
        device="cpu",
        dtype=manager.lora_config.lora_dtype,
        model_vocab_size=manager.vocab_size,
        weights_mapper=None if mapper is None else mapper.get_rename_mapper(),
        skip_prefixes=getattr(model, "lora_skip_prefixes", None),
    )
    made.is_3d_lora_weight = False
    return made


def _read_later_names() -> None:
    """Towers of CLIP and SigLIP as transformers 5.23 saves them: without the `vision_model.` of vLLM's layers."""
    import regex
    from vllm.model_executor.models import gemma3_mm, llava, llava_next, llava_onevision, paligemma
    from vllm.model_executor.models.utils import WeightsMapper

    later = WeightsMapper(orig_to_new_regex={regex.compile(_TOWER): "vision_tower.vision_model."})
    for model in (
        gemma3_mm.Gemma3ForConditionalGeneration,
        llava.LlavaForConditionalGeneration,
        llava_next.LlavaNextForConditionalGeneration,
        llava_onevision.LlavaOnevisionForConditionalGeneration,
        paligemma.PaliGemmaForConditionalGeneration,
    ):
        model.hf_to_vllm_mapper = later | model.hf_to_vllm_mapper


def _do_without_video(processors: Any) -> None:
    """Folders whose processor was saved for still pictures: a video processor's own defaults take the file's place."""
    found = processors.get_video_processor_dict.__func__

    def read(cls: type, path: Any, **settings: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        try:
            return found(cls, path, **settings)
        except OSError:
            return {}, settings

    processors.get_video_processor_dict = classmethod(read)


def _do_without_numerals() -> None:
    """SmolVLM's processor is not made without a package that spells the times of a video's frames."""
    from transformers.models.smolvlm import processing_smolvlm

    processing_smolvlm.num2words = getattr(processing_smolvlm, "num2words", None) or str


def _resize_by_pillow(processors: Any) -> None:
    made = processors.from_pretrained.__func__

    def load(cls: type, *args: Any, **settings: Any) -> Any:
        settings.setdefault("backend", "pil")
        return made(cls, *args, **settings)

    processors.from_pretrained = classmethod(load)


def _prepare() -> None:
    from transformers import AutoImageProcessor
    from transformers.video_processing_utils import BaseVideoProcessor

    _read_later_names()
    _do_without_video(BaseVideoProcessor)
    _do_without_numerals()
    if os.environ.get(PILLOW):
        _resize_by_pillow(AutoImageProcessor)


if "vllm" in sys.modules:  # which imports this
    _prepare()
