"""An adapter's folder from outside, read and checked whole before anything of it reaches the model.

Nothing in the folder is trusted: the weights are safetensors, no larger than an adapter of this model can be, their
names and shapes are held against the model's layers, and of the config only rank, scale and targets are used: the
targets to know which tensors there must be, patterns among them under a deadline. PEFT would also take modules to
import and pickled weights from it.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors

from mmrl_ray.config.sections import ModelSection
from mmrl_ray.errors import AdapterError
from mmrl_ray.policy.checkpoint import revision_key_of
from mmrl_ray.policy.heads import ValueHeads, decoding_heads, read_heads_state
from mmrl_ray.policy.lora.adapter import read_adapter_config
from mmrl_ray.policy.lora.targets import check_tensor_names, head_name, layers_of_config, matching
from mmrl_ray.policy.model import Policy
from mmrl_ray.run_records.run_dir import CONFIG_FILE, WEIGHTS_FILE

logger = logging.getLogger(__name__)

_WEIGHT = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_MAX_CONFIG_BYTES = 1 << 20
_MAX_HEADER_BYTES = 16 << 20
# What a config may say without changing what the adapter computes here.
_HARMLESS = frozenset(
    {
        *("base_model_name_or_path", "revision", "auto_mapping", "peft_version", "peft_type", "task_type"),
        *("inference_mode", "runtime_config", "init_lora_weights", "lora_dropout", "bias", "modules_to_save"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"),
    }
)
_BESIDE_OTHERS = {
    "use_dora": "a DoRA adapter",
    "modules_to_save": "an adapter with modules that were trained whole",
}
"""What PEFT and a run know, and a server does not."""


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """An adapter that fits the model."""

    config: LoraConfig
    """Made anew: the model's layers by full name, rank and scale."""
    state: Mapping[str, torch.Tensor]
    """float32, under the names that PEFT saves."""
    heads: ValueHeads | None = None
    """What came with it to decode by values."""


def read_adapter_files(
    folder: Path, policy: Policy, layers: Mapping[str, tuple[int, int] | None], *, max_rank: int
) -> AdapterFiles:
    """Reads the adapter in `folder`.

    Args:
        folder: in the PEFT layout.
        policy: the model that it is for.
        layers: `adaptable_layers` of the bare model.
        max_rank: the largest rank that is accepted.

    Raises:
        AdapterError: a file is missing, a link, or broken; the adapter is no plain LoRA, was made for another base, is
            of a higher rank, lacks tensors of its targets or has others, or holds NaN; or its value heads do.
    """
    for path in (folder, folder / CONFIG_FILE, folder / WEIGHTS_FILE):
        if path.is_symlink():
            raise AdapterError(f"{path} is a symbolic link; an adapter's files must lie in its own folder")
        if path != folder and not path.is_file():
            raise AdapterError(f"{folder} is not an adapter: it has no {path.name}")
    if (folder / CONFIG_FILE).stat().st_size > _MAX_CONFIG_BYTES:
        raise AdapterError(f"{folder / CONFIG_FILE} has more than {_MAX_CONFIG_BYTES:,} bytes; it is no adapter's")
    config = read_adapter_config(folder)
    _check_config(config, folder, max_rank)
    _check_base(config, folder, policy)
    ranks = _values_by_layer(config.rank_pattern, layers, folder)
    try:
        state = _read_weights(folder / WEIGHTS_FILE, layers, {name: ranks.get(name, config.r) for name in layers})
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{folder / WEIGHTS_FILE} is broken: {error}; take another checkpoint") from error
    try:
        modules = sorted(layers_of_config(config, layers, head_name(policy.hf_model)))
        expected = {f"base_model.model.{module}.lora_{part}.weight" for module in modules for part in "AB"}
        check_tensor_names(expected, state.keys())
    except AdapterError as error:
        raise AdapterError(f"{folder}: {error}") from error
    made = LoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        use_rslora=config.use_rslora,
        rank_pattern=_literal(ranks),
        alpha_pattern=_literal(_values_by_layer(config.alpha_pattern, layers, folder)),
        target_modules=modules,
        lora_dropout=0.0,
        bias="none",
        inference_mode=True,
    )
    stored = read_heads_state(folder)
    return AdapterFiles(made, state, None if stored is None else decoding_heads(policy, *stored))


def _check_config(config: LoraConfig, folder: Path, max_rank: int) -> None:
    for rank in (config.r, *(config.rank_pattern or {}).values()):
        if not isinstance(rank, int) or not 1 <= rank <= max_rank:
            raise AdapterError(f"{folder} has rank r={rank!r}; from 1 to {max_rank} are accepted")
    for alpha in (config.lora_alpha, *(config.alpha_pattern or {}).values()):
        if not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise AdapterError(f"{folder} has lora_alpha={alpha!r}; it must be a finite number")
    for name, what in _BESIDE_OTHERS.items():
        if getattr(config, name):
            raise AdapterError(
                f"{folder} is {what} ({name}={getattr(config, name)!r}), which rows that share one base with others' "
                "cannot go through: merge it (mmrl export --merged) and serve the model"
            )
    plain, given = LoraConfig().to_dict(), config.to_dict()
    unknown = sorted(key for key, value in given.items() if key not in _HARMLESS and value != plain.get(key))
    if unknown:
        raise AdapterError(f"{folder} is a LoRA variant that is not supported here (it sets {', '.join(unknown)})")


def _check_base(config: LoraConfig, folder: Path, policy: Policy) -> None:
    named, served = config.base_model_name_or_path, policy.path
    if not isinstance(named, str) or not named or named == served:
        return
    if Path(named).is_dir():
        key = revision_key_of(named, ModelSection(path=named, processor=policy.processor_settings), None)
        if key == policy.revision_key:
            return
    elif Path(named).is_absolute() or Path(served).is_dir():
        logger.info("adapter %s was made for %r, which is not here to compare with %r", folder, named, served)
        return
    raise AdapterError(f"{folder} was made for another base, {named!r}, and not for {served!r}; serve that base")


def _values_by_layer(patterns: Any, layers: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What a config's pattern says of each layer that one of its keys fits, the first of them, as PEFT reads it.

    Whoever wrote the patterns may not be trusted: they have a deadline.
    """
    found: dict[str, Any] = {}
    for key, value in (patterns or {}).items():
        try:
            names = matching(rf"(.*\.)?({key})", layers)
        except AdapterError as error:
            raise AdapterError(f"{folder}: {error}") from error
        for name in names:
            found.setdefault(name, value)
    return found


def _literal(values: Mapping[str, Any]) -> dict[str, Any]:
    return {re.escape(name): value for name, value in values.items()}


def _read_weights(
    file: Path, layers: Mapping[str, tuple[int, int] | None], ranks: Mapping[str, int]
) -> dict[str, torch.Tensor]:
    """All weights, each of a linear layer of the model and of its shape."""
    largest = 4 * sum(ranks[n] * sum(size) for n, size in layers.items() if size is not None) + _MAX_HEADER_BYTES
    bytes_there = file.stat().st_size
    if bytes_there > largest:
        raise AdapterError(
            f"{file} has {bytes_there:,} bytes; an adapter of this model of its ranks has {largest:,} at most"
        )
    # Read, not mapped: whoever overwrites a mapped file takes the process down that looks at it.
    stored = load_tensors(file.read_bytes())
    for name, tensor in stored.items():
        match = _WEIGHT.fullmatch(name)
        size = None if match is None else layers.get(match[1])
        if match is None or size is None:
            raise AdapterError(f"{file} holds {name!r}, which belongs to no linear layer of this model")
        rank = ranks[match[1]]
        expected = [rank, size[0]] if match[2] == "A" else [size[1], rank]
        if list(tensor.shape) != expected:
            raise AdapterError(
                f"{file}: {name} has shape {list(tensor.shape)}, this model with r={rank} has {expected}; "
                "it was made for another model or with another rank"
            )
        if not tensor.is_floating_point():
            raise AdapterError(f"{file}: {name} is of type {tensor.dtype}, which is no floating-point type")
        if not bool(torch.isfinite(tensor.float()).all()):
            raise AdapterError(f"{file}: {name} holds NaN or infinity; take an earlier version")
    return {name: tensor.float() for name, tensor in stored.items()}
