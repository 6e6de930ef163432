"""The weight files of a checkpoint in a folder: which they are, and whether their names and shapes are the model's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from mmrl_ray.config.sections import ModelSection
from mmrl_ray.errors import ModelError
from mmrl_ray.policy.boundary import model_call
from mmrl_ray.policy.lora.targets import examples

WEIGHTS_REMEDY = (
    "fetch the checkpoint again, as safetensors; where it does not support an attention, set model.attn_implementation"
)


def skeleton_of_files(folder: Path, cfg: ModelSection, config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The model on the meta device, loaded as ever (names are converted, experts stacked), but from headers alone.

    Raises:
        ModelError: a file is missing or broken, or its tensors are not the model's.
    """
    with model_call(cfg.path, "its weights cannot be loaded", WEIGHTS_REMEDY):
        shapes: dict[str, torch.Tensor] = {}
        for file in weight_files(folder, cfg.path):
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - it is no mapping
                    shapes[name] = torch.empty(opened.get_slice(name).get_shape(), dtype=dtype, device="meta")
        model_class: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
        model, info = model_class.from_pretrained(
            None,
            config=config,
            state_dict=shapes,
            device_map="meta",
            dtype=dtype,
            attn_implementation="sdpa" if cfg.attn_implementation == "flash_attention_2" else cfg.attn_implementation,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    refuse_unfit(info, cfg)
    return cast(PreTrainedModel, model)


def weight_files(folder: Path, name: str) -> list[Path]:
    """The files that transformers would load the weights of model `name` from.

    Raises:
        ModelError: one of them is not in `folder`.
    """
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    files = [SAFE_WEIGHTS_NAME]
    if not (folder / SAFE_WEIGHTS_NAME).is_file() and index.is_file():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(
            f"model {name!r}: its weights cannot be loaded: its folder lacks {missing[0]}{more}; "
            "fetch the checkpoint again, as safetensors"
        )
    return [folder / file for file in files]


def refuse_unfit(info: Mapping[str, Any], cfg: ModelSection) -> None:
    """Where transformers would go on with random weights and a warning.

    Raises:
        ModelError: of the loading report `info`, tensors are missing, unknown or of another shape.
    """
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
            f"model {cfg.path!r}: its weight files hold {len(extra)} tensors that the model by its config.json has no "
            f"place for{examples(extra)}; without them it is another model: fetch the checkpoint again, with the "
            "config.json that belongs to it"
        )
    unfit = sorted(info.get("mismatched_keys") or ())
    if unfit:
        name, have, want = unfit[0]
        raise ModelError(
            f"model {cfg.path!r}: {len(unfit)} tensors of its weight files have other shapes than its config says, the "
            f"first {name!r}: {list(have)}, not {list(want)}; config.json and weights are of different checkpoints"
        )
