"""A model's folder, as plain transformers and others load it: weights, and the base's own files beside them.

weights      in the model's dtype, under the names that it was read by
processor    the base's files, byte for byte, with `model.processor` written into them
generation   the base's file; tokens that end a turn are added to those that end a completion, as here
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
from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange
from transformers.utils import GENERATION_CONFIG_NAME

from mmrl_ray.data import atomic
from mmrl_ray.errors import RunError, one_line
from mmrl_ray.experience.carriers import EncodedPrompt
from mmrl_ray.policy.checkpoint import model_call
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


def write_model(policy: Policy, folder: Path) -> None:
    """Writes weights and config of a policy without an adapter, in its dtype, into a folder that is there.

    Raises:
        ModelError: of transformers.
        RunError: there is no room, or the folder cannot be written.
    """
    model = policy.hf_model
    config = model.config
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        if part is not None:
            part.dtype = policy.dtype
    model.generation_config = GenerationConfig()  # what a base says there may be refused by whoever writes it
    with model_call(policy.path, "its weights cannot be written"):
        try:
            model.save_pretrained(folder, max_shard_size=_SHARD)
        except (OSError, SafetensorError) as error:
            raise RunError(f"a model cannot be written to {folder.parent}: {one_line(error)}; make room") from error


def write_rest(policy: Policy, base: Path, folder: Path, processor: Mapping[str, Any]) -> None:
    """Writes processor, chat template and generation config, over those that are there.

    Args:
        policy: says which tokens end a completion.
        base: where `files_of_base` lie.
        folder: of the model.
        processor: settings that become the processor's own. Where it takes them in a call only, what it makes is then
            not `same_inputs`: write again without.
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


def copy_model(folder: Path, out: Path) -> None:
    """Copies a model's folder to one that is not there yet, whole or not at all.

    Raises:
        RunError: it cannot be written.
    """
    try:
        with atomic.scratch_folder(out.absolute().parent) as scratch:
            for file in folder.iterdir():
                if file.is_file():
                    shutil.copyfile(file, scratch / file.name)
            atomic.commit_folder(scratch, out.absolute())
    except OSError as error:
        raise RunError(f"{out} cannot be written: {one_line(error)}; make room, or name another --out") from error


def same_inputs(one: EncodedPrompt, other: EncodedPrompt) -> bool:
    """Whether two processors made the same of a picture and a prompt."""
    return (
        torch.equal(one.input_ids, other.input_ids)
        and one.model_inputs.keys() == other.model_inputs.keys()
        and all(torch.equal(value, other.model_inputs[name]) for name, value in one.model_inputs.items())
    )


def name_as_before(model: PreTrainedModel) -> None:
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
