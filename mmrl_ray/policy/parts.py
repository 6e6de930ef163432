"""The parts of a model that a warm start trains or leaves: vision tower, projector, language model.

    vision      what `get_encoder("image")` returns, without mergers and projectors that stand inside it (Qwen-VL)
    language    the decoder and its head
    projector   all between: mergers, resamplers, embeddings of rows' ends, …

Encoders of other modalities, and what draws pictures (Janus), are in none: captions do not reach them.
"""

from __future__ import annotations

import re

from torch import nn
from transformers import PreTrainedModel

from mmrl_ray.config.sft import SftSection
from mmrl_ray.errors import ModelError

_INNER = re.compile(r"(deepstack_|patch_)?(merger|merger_list|connector|projector|multi_modal_projector)")
"""Children of a tower that belong to the projector."""
_UNREACHED = re.compile(r"(^|\.)(generation_\w+|vqmodel|audio_\w+|embed_audio|speech_\w+|talker|token2wav)\.")

Named = dict[str, nn.Parameter]


def model_parts(model: PreTrainedModel) -> dict[str, Named]:
    """Parameters by name, in the model's order, of each part that has any; each parameter is in one part at most."""
    head = model.get_output_embeddings()
    language = {id(p) for module in (model.get_decoder(), head) if module is not None for p in module.parameters()}
    tower = model.get_encoder("image")
    vision: set[int] = set()
    if tower is not model and tower is not model.base_model:
        inner = {id(p) for n, child in tower.named_children() if _INNER.fullmatch(n) for p in child.parameters()}
        vision = {id(p) for p in tower.parameters()} - inner
    found: dict[str, Named] = {"projector": {}, "language": {}, "vision": {}}
    for name, parameter in model.named_parameters():
        if id(parameter) in language:
            found["language"][name] = parameter
        elif id(parameter) in vision:
            found["vision"][name] = parameter
        elif not _UNREACHED.search(name):
            found["projector"][name] = parameter
    return {part: named for part, named in found.items() if named}


def refuse_unknown_parts(model: PreTrainedModel, path: str, sft: SftSection) -> None:
    """Raises ModelError where a stage trains a part that the model at `path` does not have."""
    there = model_parts(model)
    for number, stage in enumerate(sft.phases, start=1):
        unknown = [part for part in stage.parts if part not in there]
        if unknown:
            key = f"sft.stages: the train of stage {number}" if sft.stages else "sft.train"
            parts = ", ".join(f"{part} ({sum(p.numel() for p in named.values()):,})" for part, named in there.items())
            raise ModelError(
                f"{key} names {', '.join(unknown)}, of which model {path!r} has no parameters; its parts are {parts}"
            )
