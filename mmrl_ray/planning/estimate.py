"""What a run will need, from a model's shape alone: token batches and bytes by kind, with the formula of each.

The formulas are for planning, within some tens of percent; what allocators and libraries add on top is not in them.
b bytes a number of the base, L layers, h hidden width, I width inside an MLP, k = key-value heads × head width,
V vocabulary, P prompt tokens, T completion tokens, G completions a group, r rank of the adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from mmrl_ray.config import Config
from mmrl_ray.config.sections import LoraSection
from mmrl_ray.experience.plan import GroupSize, padded_tokens, split_micro_batches
from mmrl_ray.policy.logits import CHUNK_ELEMENTS
from mmrl_ray.policy.lora.targets import resolve_targets

_FLOAT32 = 4


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes that memory depends on."""

    parameters: int
    weight_bytes: int
    layer_bytes: int
    """Of `weight_bytes`, the decoder's layers: what sharding splits."""
    adapter_parameters: int
    adapted_layers: int
    adapted_parameters: int
    """Of the base, under the adapter."""
    itemsize: int
    """b."""
    layers: int
    hidden: int
    intermediate: int
    kv_width: int
    """k."""
    vocabulary: int


def model_shape(model: PreTrainedModel, lora: LoraSection, dtype: torch.dtype) -> ModelShape:
    """Reads the sizes off a model without weights (on the meta device).

    Raises:
        AdapterError: the LoRA targets do not fit the model.
    """
    text = model.config.get_text_config()
    head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    targets = resolve_targets(model, lora)
    linears = [model.get_submodule(name) for name in targets]
    parameters = sum(p.numel() for p in model.parameters())
    return ModelShape(
        parameters=parameters,
        weight_bytes=parameters * dtype.itemsize,
        layer_bytes=_layer_parameters(model) * dtype.itemsize,
        adapter_parameters=sum(lora.r * (m.in_features + m.out_features) for m in linears if isinstance(m, nn.Linear)),
        adapted_layers=len(targets),
        adapted_parameters=sum(m.weight.numel() for m in linears if isinstance(m, nn.Linear)),
        itemsize=dtype.itemsize,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=_mlp_width(text),
        kv_width=(getattr(text, "num_key_value_heads", None) or text.num_attention_heads) * head_width,
        vocabulary=text.vocab_size,
    )


def _layer_parameters(model: PreTrainedModel) -> int:
    layers = getattr(model.get_decoder(), "layers", None)
    return sum(p.numel() for p in layers.parameters()) if isinstance(layers, nn.ModuleList) else 0


def _mlp_width(text: Any) -> int:
    """I; models without the usual key, and those with one width a layer, are taken at 4 h and at the widest."""
    width = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    return max(width) if isinstance(width, list | tuple) else int(width)


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """How a run's work divides, with every completion at its longest."""

    groups: int
    completions: int
    assignments: int
    """Of one step; each is decoded by one worker."""
    micro_batches: tuple[int, ...]
    """Of one step, by learner rank."""
    micro_batch_groups: int
    """Groups in the largest micro-batch."""
    micro_batch_tokens: int
    """Of the largest micro-batch, padding included."""
    step_tokens: int
    """Token positions of one step's forward passes, each prompt once."""
    naive_tokens: int
    """What they would be with each prompt once a completion."""


def batch_plan(cfg: Config, prompt_tokens: int) -> BatchPlan:
    """The split that a step of equally long prompts and longest completions gets."""
    groups, size = cfg.learner.groups_per_step, cfg.rollout.group_size
    sizes = [GroupSize(prompt_tokens, size, cfg.rollout.max_new_tokens)] * groups
    split = split_micro_batches(sizes, cfg.learner.micro_batch_tokens, cfg.learner.max_workers)
    batches = [batch for rank in split for batch in rank]
    return BatchPlan(
        groups=groups,
        completions=groups * size,
        assignments=ceil(groups / cfg.rollout.groups_per_assignment),
        micro_batches=tuple(len(rank) for rank in split),
        micro_batch_groups=max(len(batch) for batch in batches),
        micro_batch_tokens=max(padded_tokens([sizes[i] for i in batch]) for batch in batches),
        step_tokens=sum(padded_tokens([sizes[i] for i in batch]) for batch in batches),
        naive_tokens=groups * size * (prompt_tokens + cfg.rollout.max_new_tokens),
    )


def learner_memory(
    cfg: Config, shape: ModelShape, plan: BatchPlan, prompt_tokens: int, image_tokens: int
) -> Mapping[str, int]:
    """Bytes of one learner worker at its peak, by kind.

    - weights: parameters × b; of sharded layers only the part of one of the fewest learners, and two layers whole
    - adapter, gradients, AdamW: adapter parameters × 4 × (1 + 1 + 2), and once more for the reduction's flat buffer
    - activations: tokens × L × (8 h + 4 I) × b, and (6 h + I) × 4 where b < 4: PEFT's float32 copies of its inputs
      checkpointed layers keep tokens × L × h × b, and the rest for one layer only
    - packed rows (checkpointed or sharded layers): their masks, the micro-batch's groups × (P + G T)²
    - repeated prefix (otherwise): the micro-batch's completions × (P + T) × 2 k × L × b
    - logits: completion tokens × V × 4 × 2 (logits, gradient), at most one chunk of them
    - vision features: the micro-batch's images × image tokens × h × b
    - value heads: a Q head of w (h + V) weights each way, two that learn with gradients and AdamW's two
      moments, two that follow; and one chunk of Q
    """
    rows = plan.micro_batch_groups * cfg.rollout.group_size
    copies = (6 * shape.hidden + shape.intermediate) * _FLOAT32 if shape.itemsize < _FLOAT32 else 0
    a_token = (8 * shape.hidden + 4 * shape.intermediate) * shape.itemsize + copies
    length = prompt_tokens + cfg.rollout.group_size * cfg.rollout.max_new_tokens
    packed = cfg.learner.wants_packed_rows
    kept = shape.layers * a_token
    if cfg.learner.gradient_checkpointing:
        kept = shape.layers * shape.hidden * shape.itemsize + a_token
    return {
        "weights": _learner_weights(cfg, shape),
        "adapter, gradients, AdamW": shape.adapter_parameters * _FLOAT32 * (4 + (cfg.learner.max_workers > 1)),
        "activations": plan.micro_batch_tokens * kept,
        "packed rows": plan.micro_batch_groups * length**2 if packed else 0,
        "repeated prefix": 0 if packed else rows * (prompt_tokens + cfg.rollout.max_new_tokens) * _kv_bytes(shape),
        "logits": _logit_bytes(shape, rows * cfg.rollout.max_new_tokens),
        "vision features": plan.micro_batch_groups * image_tokens * shape.hidden * shape.itemsize,
        **_value_heads(cfg, shape, copies=2 * 4 + 2, tokens=rows * cfg.rollout.max_new_tokens),
    }


def _value_heads(cfg: Config, shape: ModelShape, *, copies: int, tokens: int) -> dict[str, int]:
    """So many times the weights of a Q head, and Q of a chunk of tokens."""
    if (width := cfg.learner.family.value_width(shape.hidden)) is None:
        return {}
    head = width * (shape.hidden + shape.vocabulary) * _FLOAT32
    return {"value heads": copies * head + _logit_bytes(shape, tokens)}


def _learner_weights(cfg: Config, shape: ModelShape) -> int:
    parts = cfg.learner.min_workers if cfg.learner.sharding == "fsdp2" else 1
    if parts == 1:
        return shape.weight_bytes
    gathered = min(2, shape.layers) * shape.layer_bytes // shape.layers
    return shape.weight_bytes - shape.layer_bytes + shape.layer_bytes // parts + gathered


def rollout_memory(
    cfg: Config, shape: ModelShape, prompt_tokens: int, image_tokens: int, *, images: int | None = None
) -> Mapping[str, int]:
    """Bytes of one rollout worker at its peak, by kind.

    - weights: parameters × b
    - adapter: adapter parameters × 4, and in float32 the adapted weights once more, with the adapter merged in
    - key-value cache: groups an assignment × G × (P + T) × 2 k × L × b
    - logits: a row each × V × 4 × 2 while decoding; where the reference scores, one chunk of completion tokens
    - vision features: the assignment's, and the cache up to its budget or to all `images` of the dataset
    - value heads: two Q heads, and their Q of a token each row
    """
    groups = min(cfg.rollout.groups_per_assignment, cfg.learner.groups_per_step)
    rows = groups * cfg.rollout.group_size
    has_reference = cfg.learner.family.needs_reference
    scored = rows * (cfg.rollout.max_new_tokens if has_reference else 1)
    one = image_tokens * shape.hidden * shape.itemsize
    budget = cfg.rollout.vision_cache_mb * 2**20
    merged = shape.adapted_parameters if shape.itemsize == _FLOAT32 else 0
    return {
        "weights": shape.weight_bytes,
        "adapter": (shape.adapter_parameters + merged) * _FLOAT32,
        "key-value cache": rows * (prompt_tokens + cfg.rollout.max_new_tokens) * _kv_bytes(shape),
        "logits": _logit_bytes(shape, scored),
        "vision features": groups * one + (budget if images is None else min(budget, images * one)),
        **_value_heads(cfg, shape, copies=2, tokens=rows),
    }


def _kv_bytes(shape: ModelShape) -> int:
    """Of one token in all layers, keys and values."""
    return 2 * shape.kv_width * shape.layers * shape.itemsize


def _logit_bytes(shape: ModelShape, tokens: int) -> int:
    return min(tokens * shape.vocabulary, max(CHUNK_ELEMENTS, shape.vocabulary)) * _FLOAT32 * 2
