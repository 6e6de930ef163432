"""Loading a policy: any Hugging Face image-text-to-text checkpoint, its processor and its chat template, frozen."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME, find_adapter_config_file

from mmrl_ray.config.model import ModelSection
from mmrl_ray.errors import AdapterError, ModelError
from mmrl_ray.policy.cpu_linear import use_onednn
from mmrl_ray.policy.processors import load_processor
from mmrl_ray.policy.revision import revision_key_of
from mmrl_ray.policy.targets import examples
from mmrl_ray.policy.tokens import end_of_turn, end_tokens, image_tokens, placeholder, reserved_texts
from mmrl_ray.policy.value_heads import ValueHeads

_ADAPTED = re.compile(r"\.(lora_\w+|modules_to_save)\.")

_BRIEF = 300
_PROCESSOR_FILES = (".json", ".jinja", ".txt", ".model")


@dataclass(slots=True)
class Policy:
    """A vision-language model with what is needed to prompt it. Frozen and in eval mode until an adapter is added."""

    model: nn.Module
    """The Hugging Face model, or a `PeftModel` around it."""
    processor: Any
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    placeholder_id: int
    """The token whose positions take the vision features."""
    image_token_ids: tuple[int, ...]
    """Every token of the image, video or audio machinery: never sampled, logit minus infinity everywhere."""
    eos_token_ids: tuple[int, ...]
    """Tokens that end a completion."""
    end_id: int
    """The one of `eos_token_ids` that the chat template puts after an assistant's turn."""
    pad_token_id: int
    reserved_texts: tuple[str, ...]
    """What a user may not write: the texts of control tokens."""
    context_length: int
    revision_key: str
    """Names the weights and the processor: part of the vision cache's key."""
    path: str
    processor_settings: dict[str, Any] = field(default_factory=dict)
    inject_vision: bool = True
    """Whether ready-made vision features can stand in for the tower (`parity.choose_path` finds out); if not, the tower
    runs inside every forward, on the pixels."""
    value_heads: dict[str | None, ValueHeads] = field(default_factory=dict)
    """What next tokens are worth, by PEFT's name of the adapter whose hidden states the heads read; None is whatever is
    active on the model."""

    @property
    def hf_model(self) -> PreTrainedModel:
        """The Hugging Face model with its head, under the adapter if there is one."""
        return cast(PreTrainedModel, self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model)

    @property
    def core(self) -> Any:
        """The model below the head: it has `get_image_features` and returns hidden states."""
        return self.hf_model.base_model

    @property
    def decoder(self) -> nn.Module:
        """The language model (embeddings and layers, without the head)."""
        return cast(nn.Module, self.hf_model.get_decoder())

    @property
    def hidden_size(self) -> int:
        """d, the width of the hidden states that the head makes logits of."""
        return self.hf_model.config.get_text_config().hidden_size

    @property
    def vocab_size(self) -> int:
        """V, the width of the logits."""
        return self.hf_model.config.get_text_config().vocab_size

    @property
    def vision_trainable(self) -> bool:
        """Whether anything before the language model trains or is adapted.

        Vision features then change with the policy's version: they are made anew each time, never cached or shipped.
        An adapter counts even where it takes no gradient (in a rollout worker its weights still change).
        """
        language = {id(p) for p in self.decoder.parameters()}
        return any(
            p.requires_grad or _ADAPTED.search(name)
            for name, p in self.core.named_parameters()
            if id(p) not in language
        )


def load_policy(cfg: ModelSection, *, device: torch.device | str | None = None, on_host: bool = False) -> Policy:
    """Loads model and processor, freezes every weight and switches dropout off.

    `device` is the first GPU by default where there is one, else the CPU. With `on_host` the weights wait in host
    memory for whoever puts them there in parts.

    Raises:
        ModelError: the folder is missing, the checkpoint has no vision tower, no processor, no chat template or no
            image token, or its weights are not (complete) safetensors.
    """
    path = _resolve(cfg.path)
    _refuse_adapter(path, cfg)
    device = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    config = _load_config(path, cfg)
    processor = _load_processor(path, cfg, config)
    dtype = _dtype(cfg.dtype, device)
    model = _load_model(path, cfg, dtype)
    if not on_host:
        model.to(device)  # type: ignore[arg-type]  # transformers' decorator hides torch's signature
    model.eval().requires_grad_(False)
    use_onednn(model)
    return _assemble(model, processor, config, cfg, path, device, dtype)


def save_policy(policy: Policy, folder: str | Path) -> None:
    """Saves a policy without adapter as an ordinary Hugging Face folder: safetensors, processor, chat template.

    The processor's own files are copied where the policy came from a folder, so that what this process left out of
    it (a video processor) is not lost.

    Raises:
        AdapterError: the policy carries an adapter; merge it first.
    """
    if isinstance(policy.model, PeftModel):
        raise AdapterError("a policy with an adapter is not saved as a model folder; merge the adapter first")
    folder = Path(folder)
    policy.hf_model.save_pretrained(folder)
    source = Path(policy.path)
    if not source.is_dir():
        policy.processor.save_pretrained(folder)
        return
    for file in source.iterdir():
        written = file.name in ("config.json", "generation_config.json") or file.name.endswith(".index.json")
        if file.suffix in _PROCESSOR_FILES and not written:
            shutil.copyfile(file, folder / file.name)


def load_skeleton(cfg: ModelSection) -> Policy:
    """`load_policy` without the weights: the model is on the meta device, for encoding prompts and for counting.

    Raises:
        ModelError: as `load_policy`, its weights apart.
    """
    path = _resolve(cfg.path)
    _refuse_adapter(path, cfg)
    config = _load_config(path, cfg)
    processor = _load_processor(path, cfg, config)
    dtype = _dtype(cfg.dtype, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype, trust_remote_code=False)
    return _assemble(model, processor, config, cfg, path, torch.device("meta"), dtype)


def _assemble(
    model: PreTrainedModel,
    processor: Any,
    config: Any,
    cfg: ModelSection,
    path: str,
    device: torch.device,
    dtype: torch.dtype,
) -> Policy:
    tokenizer = processor.tokenizer
    text_config = config.get_text_config()
    eos = end_tokens(model, tokenizer, path)
    pad = tokenizer.pad_token_id
    context = getattr(text_config, "max_position_embeddings", None) or tokenizer.model_max_length
    return Policy(
        model=model,
        processor=processor,
        tokenizer=tokenizer,
        device=device,
        dtype=dtype,
        placeholder_id=placeholder(config, processor, path),
        image_token_ids=image_tokens(config, processor, eos, text_config.vocab_size),
        eos_token_ids=eos,
        end_id=end_of_turn(processor, eos),
        pad_token_id=eos[0] if pad is None else int(pad),
        reserved_texts=reserved_texts(processor),
        context_length=int(context),
        revision_key=revision_key_of(path, cfg, getattr(config, "_commit_hash", None)),
        path=path,
        processor_settings=dict(cfg.processor),
    )


def _resolve(path: str) -> str:
    if path.startswith("builtin:"):
        raise ModelError(f"{path}: a built-in model must be made into a folder before it is loaded")
    expanded = os.path.expanduser(path)
    if os.path.isdir(expanded):
        return expanded
    # A hub id is `name` or `owner/name`; whatever else looks like a path is one that is not there.
    if expanded.startswith((".", os.sep)) or expanded.count("/") > 1 or os.path.exists(expanded):
        raise ModelError(f"model folder {path!r} does not exist or is not a folder; give a folder or a hub id")
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
    try:
        config = AutoConfig.from_pretrained(path, revision=cfg.revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise ModelError(f"model {cfg.path!r}: its config.json cannot be read: {_brief(error)}") from error
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING or getattr(config, "vision_config", None) is None:
        raise ModelError(
            f"model {cfg.path!r} is a {config.model_type!r}, without a vision tower that transformers' "
            "image-text-to-text models know; use an image-text-to-text checkpoint"
        )
    return config


def _load_processor(path: str, cfg: ModelSection, config: Any) -> Any:
    try:
        processor = load_processor(path, config, revision=cfg.revision)
    except ImportError as error:
        raise ModelError(
            f"model {cfg.path!r}: its processor needs a library that is not installed ({_brief(error)}); "
            "install it (torchvision, most often)"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"model {cfg.path!r}: its processor cannot be loaded: {_brief(error)}") from error
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


def _load_model(path: str, cfg: ModelSection, dtype: torch.dtype) -> PreTrainedModel:
    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            path,
            revision=cfg.revision,
            dtype=dtype,
            attn_implementation=cfg.attn_implementation,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"model {cfg.path!r}: its weights cannot be loaded: {_brief(error)}") from error
    model, info = loaded
    # transformers would go on with random weights and a warning.
    missing = sorted(info.get("missing_keys") or ())
    if missing:
        raise ModelError(
            f"model {cfg.path!r}: its weight files lack {len(missing)} tensors, the first {missing[0]!r}; "
            "fetch the checkpoint again"
        )
    # Those that transformers knows as harmless for this model are not among them.
    extra = sorted(info.get("unexpected_keys") or ())
    if extra:
        raise ModelError(
            f"model {cfg.path!r}: its weight files hold {len(extra)} tensors that a {model.config.model_type!r} "
            f"by its config.json has no place for{examples(extra)}; without them it is another model: fetch the "
            "checkpoint again, with the config.json that belongs to it"
        )
    return cast(PreTrainedModel, model)


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


def _brief(error: BaseException) -> str:
    """What another library says, in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _BRIEF else f"{text[: _BRIEF - 1]}…"
