"""A merged model as a folder that others load: the adapter added once, old names, and the base's own files beside it.

    weights      W + s·BA, or what a variant of LoRA makes of them, in float32, rounded once; named as the family's
                 checkpoints on the Hub are, which older versions of transformers and vLLM read
    processor    the base's files, byte for byte, with `model.processor` of the run written into them
    generation   the base's file; tokens that end a turn are added to those that end a completion, as in the run

A checkpoint that is quantised itself is not merged: its weights are no numbers to add to. Where the run quantised its
base (`model.quantization`), the adapter is added to the base as it was before.
"""

from __future__ import annotations

import fnmatch
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange
from transformers.utils import GENERATION_CONFIG_NAME

from mmrl_ray.errors import AdapterError, ExportError
from mmrl_ray.policy.checkpoint import model_call
from mmrl_ray.policy.lora.adapter import forget_adapters
from mmrl_ray.policy.lora.variants import back_to_the_base_dtype, merged_weight
from mmrl_ray.policy.model import Policy

PROCESSOR_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken"),
    *("tekken.json", "chat_template*", "processor_config.json", "preprocessor_config.json"),
    *("video_preprocessor_config.json", "audio_tokenizer_config.json"),
)
"""Of a checkpoint: all that makes prompts and reads answers."""
_BESIDE = (*PROCESSOR_FILES, GENERATION_CONFIG_NAME, "LICENSE*", "NOTICE*")
_PROCESSOR, _IMAGES, _NESTED = "processor_config.json", "preprocessor_config.json", "image_processor"
_SHARD = "5GB"
_OLDER = "vision_model"
"""What CLIP's and SigLIP's weights are below in files of before transformers 5.23, and in vLLM."""

Dtypes = Mapping[str, torch.dtype]
"""Of each parameter and buffer of a model, by name."""


def dtypes_of(policy: Policy) -> dict[str, torch.dtype]:
    """What a model was loaded in, its adapter aside: some families keep a few weights in float32, whatever is asked."""
    found = {}
    for name, tensor in (*policy.hf_model.named_parameters(), *policy.hf_model.named_buffers()):
        if ".lora_" not in name and ".modules_to_save." not in name:
            found[name.replace(".base_layer.", ".").replace(".original_module.", ".")] = tensor.dtype
    return found


@torch.no_grad()
def merge_rounding_once(policy: Policy, dtypes: Dtypes) -> float:
    """Adds the adapter to the base's weights in float32 and rounds the sums to `dtypes`; an ordinary model again.

    Returns:
        the share of the adapter's update that is in the rounded weights: ⟨Δ as rounded, Δ⟩ ÷ ‖Δ‖² over all layers.
        Where a base lies on the grid of 16 bits, what moves a weight by less than half a step of it is gone. 1 of an
        adapter without effect.

    Raises:
        AdapterError: there is no adapter, or a merged weight is not finite.
    """
    peft = policy.model
    if not isinstance(peft, PeftModel):
        raise AdapterError(f"{policy.path} has no adapter to merge; put one on it first")
    adapter = str(peft.active_adapter)
    kept = total = 0.0
    for name, layer in peft.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        weight: nn.Parameter = layer.get_base_layer().weight  # type: ignore[assignment]
        dtype = dtypes[f"{name}.weight"]
        before, after = weight.data.float(), merged_weight(layer, adapter)
        if not bool(torch.isfinite(after).all()):
            raise AdapterError(f"the adapter cannot be merged into {name}: the sum holds NaN or infinity")
        weight.data = after.to(dtype)
        update = after - before
        kept += float(((weight.data.float() - before.to(dtype).float()) * update).sum(dtype=torch.float64))
        total += float(update.square().sum(dtype=torch.float64))
    back_to_the_base_dtype(peft)
    model: PreTrainedModel = forget_adapters(peft.unload())
    policy.model = model
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        tensor.data = tensor.data.to(dtypes[name])
    return kept / total if total else 1.0


def write_model(policy: Policy, folder: Path) -> None:
    """Writes weights and config of a merged policy, in its dtype, into a folder that is there.

    Raises:
        ModelError: of transformers.
    """
    model = policy.hf_model
    config = model.config
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        if part is not None:
            part.dtype = policy.dtype
    _name_as_before(model)
    model.generation_config = GenerationConfig()  # what a base says there may be refused by whoever writes it
    with model_call(policy.path, "the merged model cannot be written"):
        model.save_pretrained(folder, max_shard_size=_SHARD)


def write_rest(policy: Policy, base: Path, folder: Path, processor: Mapping[str, Any]) -> None:
    """Writes processor, chat template and generation config, over those that are there.

    Args:
        policy: says which tokens end a completion.
        base: where `files_of_base` lie.
        folder: of the merged model.
        processor: settings that become the processor's own.
    """
    for file in sorted(base.iterdir()):
        if file.is_file() and any(fnmatch.fnmatch(file.name, pattern) for pattern in _BESIDE):
            shutil.copyfile(file, folder / file.name)  # of a cache of the Hub these are links
    _end_turns(policy, base / GENERATION_CONFIG_NAME, folder / GENERATION_CONFIG_NAME)
    images = _read(folder / _PROCESSOR).get(_NESTED)
    if images and not (base / _IMAGES).exists():
        _write(folder / _IMAGES, images)  # versions of before read it, and a video processor that has no file
    for name, keys in ((_PROCESSOR, (_NESTED,)), (_IMAGES, ())):
        _set(folder / name, keys, processor)


def files_of_base(path: str, revision: str | None) -> Path:
    """The folder that holds what a merged model takes from its base as it is; of the Hub, a snapshot in its cache.

    Raises:
        ModelError: they cannot be fetched.
    """
    if Path(path).is_dir():
        return Path(path)
    with model_call(path, "its processor cannot be fetched", "fetch it once with a network"):
        return Path(snapshot_download(path, revision=revision, allow_patterns=list(_BESIDE)))


def refuse_quantised(policy: Policy) -> None:
    """Raises ExportError where the base's weights are no numbers that an adapter can be added to."""
    if getattr(policy.hf_model.config, "quantization_config", None) is not None:
        raise ExportError(
            f"{policy.path} is quantised, and an adapter cannot be merged into such weights: export the adapter alone "
            "(without --merged), or train on the checkpoint that it was made from"
        )


def _name_as_before(model: PreTrainedModel) -> None:
    """Has a model saved under the names that it was read by, and its tower under those of the Hub's checkpoints.

    One that was made by transformers 5.23, as a built-in model is, has a tower without `vision_model.`, which neither
    vLLM nor older versions find.
    """
    read_by = list(getattr(model, "_weight_conversions", None) or ())
    if any(isinstance(each, PrefixChange) and each.prefix_to_remove == _OLDER for each in read_by):
        return
    known = get_model_conversion_mapping(model, add_legacy=False)
    read_by += [each for each in known if isinstance(each, PrefixChange) and each.prefix_to_remove == _OLDER]
    model._weight_conversions = read_by  # type: ignore[assignment]


def _end_turns(policy: Policy, given: Path, target: Path) -> None:
    said = _read(given)
    ends = said.get("eos_token_id")
    listed = [] if ends is None else ends if isinstance(ends, list) else [ends]
    missing = [end for end in policy.eos_token_ids if end not in listed]
    if given.is_file() and not missing:
        return
    said["eos_token_id"] = [*listed, *missing]
    said.setdefault("pad_token_id", policy.pad_token_id)
    _write(target, said)


def _set(file: Path, keys: tuple[str, ...], settings: Mapping[str, Any]) -> None:
    """Changes settings in a JSON file, where there is one with such a section."""
    if not settings or not file.is_file():
        return
    whole = _read(file)
    section: Any = whole
    for key in keys:
        section = section.get(key)
        if section is None:
            return
    section.update(settings)
    _write(file, whole)


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    with model_call(str(file.parent), f"its {file.name} cannot be read", "fetch it again"):
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def _write(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
