"""Loading a policy: any Hugging Face image-text-to-text checkpoint, its processor and its chat template, frozen."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from contextlib import nullcontext, suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME, GENERATION_CONFIG_NAME, find_adapter_config_file
from transformers.utils.logging import disable_progress_bar

from mmrl_ray.config.paths import is_hub_id, nearest_folder
from mmrl_ray.config.sections import ModelSection
from mmrl_ray.errors import ConfigError, ModelError
from mmrl_ray.policy.checkpoint import (
    WEIGHTS_REMEDY,
    brief,
    commit_of,
    model_call,
    refuse_unfit,
    revision_key_of,
    skeleton_of_files,
    split_while_read,
    weight_files,
)
from mmrl_ray.policy.logits import takes_bare_head
from mmrl_ray.policy.model import Acceleration, Policy
from mmrl_ray.policy.quantized import loading_arguments, refuse_quantized_twice, require, use_one_product
from mmrl_ray.policy.tokens import (
    appended_tokens,
    end_tokens,
    image_tokens,
    load_processor,
    placeholder,
    read_turn,
    refuse_unknown_token,
    reserved_texts,
)
from mmrl_ray.policy.trial import try_policy, try_prompt
from mmrl_ray.processes import GROWING_SEGMENTS, allocator_settings

QUICK_BYTES = 1 << 30
"""Weights up to this size are loaded for a trial before anything else is started."""


disable_progress_bar()  # of loading and saving weights: they would run through the program's own, and through JSON logs

_CROSS_ATTENTION = ("cross_attention_mask", "image_attention_mask")
"""Inputs that tell each token of a row which pictures it may look at (Mllama, Idefics)."""


def load_policy(
    cfg: ModelSection,
    *,
    device: torch.device | str | None = None,
    split: Callable[[nn.Module], None] | None = None,
) -> Policy:
    """Loads model and processor, freezes every weight and switches dropout off; then tries it (`trial.try_policy`).

    `device` is the first GPU by default where there is one, else the CPU. With `split` the decoder's layers are given
    to it while they are read (`checkpoint.split_while_read`), and no forward is tried, for which all would have to be
    there.

    Raises:
        ModelError: the folder is missing, the checkpoint has no vision tower, no processor, no chat template or no
            image token, its weights are not (complete) safetensors, its parts do not fit together, its pictures are no
            tokens of the prompt, or its logits cannot be made of hidden states.
        ConfigError: `model.processor` has a key or a value that the processor does not take; or a model that is to be
            split is quantised, or its decoder has no list of layers; or `model.quantization` cannot be had here.
    """
    path = _resolve(cfg.path)
    _refuse_adapter(path, cfg)
    device = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        _let_segments_grow()
    config = _load_config(path, cfg)
    if split is not None and getattr(config, "quantization_config", None) is not None:
        raise ConfigError(
            f"model {cfg.path!r} is quantised, and such layers cannot be split over learners: set learner.sharding: "
            "none, or take the checkpoint that it was made from"
        )
    if cfg.quantization is not None:
        require(cfg.quantization, cfg.path, device)
        refuse_quantized_twice(cfg.quantization, config, cfg.path)
    processor = _load_processor(path, cfg, config)
    dtype = dtype_of(cfg.dtype, device)
    model = _load_model(path, cfg, config, dtype, device, split)
    if cfg.quantization is None:  # else it was put there as it was read, and cannot be moved
        model.to(device)  # type: ignore[arg-type]  # transformers' decorator hides torch's signature
    use_one_product(model, dtype)
    model.eval().requires_grad_(False)
    acceleration = accelerate(model, device)
    policy = assemble(model, processor, config, cfg, path, device, dtype, commit=_commit(path, cfg))
    policy.acceleration = acceleration
    if split is not None:
        try_prompt(policy)
    else:
        try_policy(policy)
    return policy


def _let_segments_grow() -> None:
    """On a Ray that was there before, too: its processes do not have our environment, and Ray Train has begun with the
    GPU of a learner already, so that PyTorch may not look there again."""
    settings = allocator_settings()
    if settings:
        os.environ.update(settings)
        change = getattr(torch._C, "_accelerator_setAllocatorSettings", None)  # None before PyTorch 2.9
        if change is not None:
            change(GROWING_SEGMENTS)


def accelerate(model: nn.Module, device: torch.device) -> Acceleration:
    """What makes `model` faster on `device`: that of the module `mmrl_ray.policy.<device>`, where there is one.

    Its `accelerate` may replace layers by others that compute the same. Nothing else knows of such a module.
    """
    name = f"{__package__}.{device.type}"
    found = find_spec(name)
    if found is None or found.origin is None:  # a folder without code is none
        return Acceleration()
    made: Acceleration = import_module(name).accelerate(model)
    return made


def load_skeleton(cfg: ModelSection) -> Policy:
    """`load_policy` without the weights: the model is on the meta device, for encoding prompts and for counting.

    Of a checkpoint in a folder the names and shapes of all weights are held against the model's; a prompt is tried.

    Raises:
        ModelError: as `load_policy`, the numbers in its weights and its forward apart.
        ConfigError: as `load_policy`.
    """
    path = _resolve(cfg.path)
    _refuse_adapter(path, cfg)
    config = _load_config(path, cfg)
    processor = _load_processor(path, cfg, config)
    dtype = dtype_of(cfg.dtype, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if os.path.isdir(path):
        model = skeleton_of_files(Path(path), cfg, config, dtype)
    else:
        with model_call(cfg.path, "its model cannot be made"), torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config, dtype=dtype, trust_remote_code=False)
    if cfg.quantization is not None:
        refuse_quantized_twice(cfg.quantization, config, cfg.path)
    meta = torch.device("meta")
    policy = assemble(model, processor, config, cfg, path, meta, dtype, commit=_commit(path, cfg))
    try_prompt(policy)
    return policy


def assemble(
    model: PreTrainedModel,
    processor: Any,
    config: Any,
    cfg: ModelSection,
    path: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    commit: str | None = None,
) -> Policy:
    """The policy of a model that is made already, frozen and on `device`; `path` names it in messages.

    `commit` is the hub's, of a model that is from there.

    Raises:
        ModelError: its parts do not fit together.
    """
    crossing = [name for name in _CROSS_ATTENTION if name in inspect.signature(model.forward).parameters]
    if crossing:
        raise ModelError(
            f"model {path!r}: the tokens of a {type(model).__name__} look at pictures by cross-attention "
            f"({crossing[0]}), and only models whose pictures are tokens of the prompt can be sampled and trained; use "
            "another checkpoint"
        )
    tokenizer = processor.tokenizer
    _use_generation_config(model, path, cfg)
    with model_call(cfg.path, "its tokenizer, its processor and its config cannot be read together", "fetch it again"):
        text_config = config.get_text_config()
        vocabulary = text_config.vocab_size
        listed = end_tokens(model, tokenizer, vocabulary)
        turn = read_turn(processor, listed, cfg.path)
        refuse_unknown_token(turn.end_id, vocabulary, tokenizer, cfg.path)
        eos = tuple(dict.fromkeys((*listed, turn.end_id)))
        never = image_tokens(config, processor, eos, vocabulary)
        pad = tokenizer.pad_token_id
        if pad is None or pad >= vocabulary or pad in never:  # padding is masked: any token of the text will do
            pad = eos[0]
        context = getattr(text_config, "max_position_embeddings", None) or tokenizer.model_max_length
        return Policy(
            model=model,
            processor=processor,
            tokenizer=tokenizer,
            device=device,
            dtype=dtype,
            placeholder_id=placeholder(config, processor, path),
            image_token_ids=never,
            eos_token_ids=eos,
            end_id=turn.end_id,
            pad_token_id=int(pad),
            reserved_texts=reserved_texts(processor),
            context_length=int(context),
            revision_key=revision_key_of(path, cfg, commit),
            path=path,
            revision=cfg.revision,
            processor_settings=dict(cfg.processor),
            turn=turn,
            appended_ids=appended_tokens(tokenizer),
            bare_head=takes_bare_head(model, path),
            quantization=cfg.quantization,
        )


def _use_generation_config(model: PreTrainedModel, path: str, cfg: ModelSection) -> None:
    """Gives a skeleton what `from_pretrained` gives a model: the checkpoint's own list of end tokens.

    `from_pretrained` passes over a file that it cannot read, and the list is gone without a word: not here.
    """
    there = os.path.isfile(os.path.join(path, GENERATION_CONFIG_NAME))
    skeleton = next(model.parameters()).device.type == "meta"
    if not (there or skeleton):
        return
    with (
        model_call(cfg.path, f"its {GENERATION_CONFIG_NAME} cannot be read", "fetch it again"),
        nullcontext() if there else suppress(OSError),  # it may have none
    ):
        found = GenerationConfig.from_pretrained(path, revision=cfg.revision or "main")
        if skeleton:
            model.generation_config = found


def _commit(path: str, cfg: ModelSection) -> str | None:
    return None if os.path.isdir(path) else commit_of(path, cfg.revision)


def _resolve(path: str) -> str:
    if path.startswith("builtin:"):
        raise ModelError(f"{path}: a built-in model must be made into a folder before it is loaded")
    expanded = os.path.expanduser(path)
    if os.path.isdir(expanded):
        return expanded
    if not is_hub_id(path):
        raise ModelError(
            f"model folder {path!r} does not exist or is not a folder{nearest_folder(expanded)}; "
            "give a folder or a hub id"
        )
    return path


def _refuse_adapter(path: str, cfg: ModelSection) -> None:
    """transformers puts an adapter that lies beside the model on it, unasked and under the name of the base."""
    try:
        found = find_adapter_config_file(path, revision=cfg.revision)
    except (OSError, ValueError):  # a hub that cannot be asked: what loads the config says so
        return
    if found is None:
        return
    if os.path.isdir(path) and not os.path.isfile(os.path.join(path, CONFIG_NAME)):
        raise ModelError(
            f"{cfg.path!r} is an adapter, not a model: name its base as the model, and serve the adapter from "
            "serving.adapters_root, or merge it into the base (PEFT's merge_and_unload)"
        )
    raise ModelError(
        f"model {cfg.path!r} has an adapter beside its weights ({ADAPTER_CONFIG_NAME}), and which of the two is meant "
        f"cannot be told: move {ADAPTER_CONFIG_NAME} and the adapter's weights to a folder of their own (one below "
        "serving.adapters_root is served by its name), or merge the adapter into the model (PEFT's merge_and_unload)"
    )


def _load_config(path: str, cfg: ModelSection) -> Any:
    # An id of the hub may be a slip in a folder's name.
    meant = "" if os.path.isdir(path) else nearest_folder(path).removeprefix("; ")
    with model_call(cfg.path, "its config.json cannot be read", meant):
        config = AutoConfig.from_pretrained(path, revision=cfg.revision, trust_remote_code=False)
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING or getattr(config, "vision_config", None) is None:
        raise ModelError(
            f"model {cfg.path!r} is a {config.model_type!r}, without a vision tower that transformers' "
            "image-text-to-text models know; use an image-text-to-text checkpoint"
        )
    return config


def _load_processor(path: str, cfg: ModelSection, config: Any) -> Any:
    with model_call(cfg.path, "its processor cannot be loaded", "mend its processor_config.json or fetch it again"):
        processor = load_processor(path, config, revision=cfg.revision)
    if getattr(processor, "image_processor", None) is None or getattr(processor, "tokenizer", None) is None:
        raise ModelError(
            f"model {cfg.path!r} has no processor with both an image processor and a tokenizer; "
            "its folder lacks processor_config.json or preprocessor_config.json"
        )
    template = getattr(processor, "chat_template", None) or getattr(processor.tokenizer, "chat_template", None)
    if template is None:
        raise ModelError(
            f"model {cfg.path!r} has no chat template; use an instruction-tuned checkpoint or add chat_template.jinja"
        )
    if processor.chat_template is None:
        processor.chat_template = template
    return processor


def _load_model(
    path: str,
    cfg: ModelSection,
    config: Any,
    dtype: torch.dtype,
    device: torch.device,
    split: Callable[[nn.Module], None] | None,
) -> PreTrainedModel:
    # Tensor by tensor to an accelerator: in another dtype than the files' all would lie in host memory first, once for
    # each process of the node.
    direct: dict[str, Any] = {}
    if device.type != "cpu" or cfg.quantization is not None:
        direct["device_map"] = {"": device}
    if cfg.quantization is not None:
        with torch.device("meta"):
            skeleton = AutoModelForImageTextToText.from_config(config, dtype=dtype, trust_remote_code=False)
        direct |= loading_arguments(cfg.quantization, skeleton)
    model_class: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)] if split is not None else None
    loads: Any = AutoModelForImageTextToText if split is None else split_while_read(model_class, split, cfg)
    with model_call(cfg.path, "its weights cannot be loaded", WEIGHTS_REMEDY):
        try:
            loaded: Any = loads.from_pretrained(
                path,
                revision=cfg.revision,
                dtype=dtype,
                attn_implementation=cfg.attn_implementation,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                **direct,
            )
        except torch.OutOfMemoryError as error:
            raise ModelError(
                f"model {cfg.path!r}: {device} has too little free memory for its weights: {brief(error)}; take "
                "a larger one, or end what else is on it"
            ) from error
        except RuntimeError:
            if os.path.isdir(path):
                skeleton_of_files(Path(path), cfg, config, dtype)  # it names the tensors that do not fit
            raise
    model, info = loaded
    refuse_unfit(info, cfg)
    if model_class is not None:
        model.__class__ = model_class
    return cast(PreTrainedModel, model)


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """What `model.dtype` means on a device."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


def try_quickly(cfg: ModelSection) -> bool:
    """Loads the model on the CPU and tries it where that is soon done: its weights lie in a folder and are few.

    Returns:
        whether it was tried.

    Raises:
        ModelError, ConfigError: as `load_policy`.
    """
    folder = Path(cfg.path).expanduser()
    if not folder.is_dir() or cfg.attn_implementation == "flash_attention_2":
        return False
    if sum(file.stat().st_size for file in weight_files(folder, cfg.path)) > QUICK_BYTES:
        return False
    load_policy(cfg.model_copy(update={"dtype": "float32"}), device="cpu")
    return True
