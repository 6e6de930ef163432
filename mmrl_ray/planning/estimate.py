"""What a run will need, from a model's shape alone: token batches and bytes by kind, with the formula of each.

The formulas of a pass are `policy/memory.py`'s; held against what fake tensors count at full size they are within 15 %.
On a GPU what its allocator adds by fragmentation is not in them; on a CPU it is.
P prompt tokens, T completion tokens, G completions a group, b bytes a number of the base, L layers, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

from mmrl_ray.config import Config
from mmrl_ray.config.sft import SftSection
from mmrl_ray.experience.plan import GroupSize, padded_tokens, split_micro_batches
from mmrl_ray.policy.memory import (
    CACHE_BLOCK,
    LORA_PLACES,
    DecodeLimits,
    EngineLimits,
    ModelShape,
    padded_rank,
    scored_parts,
)

_FLOAT32 = 4
PROCESS = 600 << 20
"""Of a process beside its tensors: Python and libraries in host memory, or CUDA's context on a GPU."""
PICTURE_PROCESS = 400 << 20
"""Of a process that makes pictures ready (`resources.rollout.picture_processes`), in host memory: torch, transformers
and one picture at work."""
_GPU_SHARE = 0.92
"""Of a GPU's memory, what vLLM takes by itself."""
KEPT = frozenset({"process", "weights", "dequantised layer", "adapter", "adapter, gradients, AdamW", "value heads"})
"""Kinds that a process has on a GPU also while another has its turn there."""
_FRAGMENTS = 0.4
"""Of what a backward pass wants, in host memory: the C library keeps freed tensors of less than 32 MB in its heap, and
others fit in between or do not. At 140 M parameters 0.2 to 0.6 were measured."""


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
    split = split_micro_batches(sizes, cfg.learner.token_budget, cfg.learner.max_workers)
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

    - process: `PROCESS`
    - weights: parameters × b, or what `quantized.bytes_of` says of quantised layers; of sharded layers only the part of
      one of the fewest learners, and two layers whole
    - dequantised layer: the largest of the quantised ones, as the numbers that it is multiplied by
    - adapter, gradients, AdamW: trained parameters (the adapter's, and those of modules that train whole) × 4 × (1 + 1
      + 2), and once more for the reduction's flat buffer
    - activations: tokens × what layers keep of one (`ModelShape.kept_of_token`); checkpointed layers keep their input,
      and the rest for one layer only
    - masks (packed rows): groups × (P + G T)², as bools and as numbers
    - repeated prefix (otherwise): the micro-batch's completions × (P + T) × their keys and values
    - logits: of completion tokens, at most one chunk of them
    - vision features: the micro-batch's images × image tokens × h × b
    - value heads: a Q head of w (h + V) weights each way, two that learn with gradients and AdamW's two
      moments, two that follow; and one chunk of Q
    - fragments: in host memory, `_FRAGMENTS` of activations, masks, repeated prefix and logits
    """
    on_gpu = bool(cfg.resources.learner.gpus)
    rows = plan.micro_batch_groups * cfg.rollout.group_size
    kept = shape.learnt_groups(
        plan.micro_batch_groups,
        GroupSize(prompt_tokens, cfg.rollout.group_size, cfg.rollout.max_new_tokens),
        packed=cfg.learner.wants_packed_rows,
        checkpointed=cfg.learner.gradient_checkpointing,
        on_gpu=on_gpu,
    )
    kept["logits"] = shape.scored_logits(rows * cfg.rollout.max_new_tokens)
    return {
        "process": PROCESS,
        "weights": _learner_weights(cfg, shape),
        **_dequantized(shape),
        "adapter, gradients, AdamW": shape.trained_parameters * _FLOAT32 * (4 + (cfg.learner.max_workers > 1)),
        **kept,
        "vision features": plan.micro_batch_groups * image_tokens * shape.hidden * shape.itemsize,
        **_value_heads(cfg, shape, copies=2 * 4 + 2, tokens=rows * cfg.rollout.max_new_tokens),
        **_fragments(kept, on_gpu),
    }


def _dequantized(shape: ModelShape) -> dict[str, int]:
    return {"dequantised layer": shape.dequantized_bytes} if shape.dequantized_bytes else {}


def _fragments(kept: Mapping[str, int], on_gpu: bool) -> dict[str, int]:
    return {} if on_gpu else {"fragments": int(_FRAGMENTS * sum(kept.values()))}


def _value_heads(cfg: Config, shape: ModelShape, *, copies: int, tokens: int) -> dict[str, int]:
    """So many times the weights of a Q head, and Q of a chunk of tokens."""
    if (width := cfg.learner.family.value_width(shape.hidden)) is None:
        return {}
    head = width * (shape.hidden + shape.vocabulary) * _FLOAT32
    return {"value heads": copies * head + shape.scored_logits(tokens)}


def _learner_weights(cfg: Config, shape: ModelShape) -> int:
    parts = _parts(cfg)
    if parts == 1:
        return shape.weight_bytes
    gathered = min(2, shape.layers) * shape.layer_bytes // shape.layers
    return shape.weight_bytes - shape.layer_bytes + shape.layer_bytes // parts + gathered


def loading_memory(cfg: Config, shape: ModelShape) -> int:
    """Bytes of a node's own memory that each learner on it takes, at most, while it loads the base.

    - sharded: its part of the layers (of one of the fewest learners), all that is not split, and one layer whole, which
      a converted one is for a moment
    - on a GPU otherwise: embeddings and head, the largest tensors; weights go there one by one
    - on CPUs otherwise: all weights; of a quantised base, beside them, the largest layer before it is quantised

    In the dtype of the files what is read are the files' own pages, which all processes of a node share and which are
    given back when memory is short: then it is less.
    """
    parts = _parts(cfg)
    if parts > 1:
        layer = shape.layer_bytes // max(1, shape.layers)
        return PROCESS + shape.weight_bytes - shape.layer_bytes + shape.layer_bytes // parts + layer
    if cfg.resources.learner.gpus:
        return PROCESS + min(shape.weight_bytes, 2 * shape.vocabulary * shape.hidden * shape.itemsize)
    return PROCESS + shape.weight_bytes + shape.dequantized_bytes


def _parts(cfg: Config) -> int:
    return cfg.learner.min_workers if cfg.learner.sharding == "fsdp2" else 1


def rollout_memory(
    cfg: Config,
    shape: ModelShape,
    prompt_tokens: int,
    image_tokens: int,
    *,
    images: int | None = None,
    gpu_bytes: int | None = None,
) -> Mapping[str, int]:
    """Bytes of one rollout worker at its peak, by kind: while it samples, or while the reference scores.

    Where vLLM samples, in a process of its own (`engine_memory`), it does not.

    - process: `PROCESS`
    - weights, dequantised layer: as a learner's
    - adapter: trained parameters × 4, and the adapted weights once more, with the adapter merged in (in 16 bits on a
      GPU alone, and never where they are quantised)
    - keys and values: sampling, of as many groups as the decode loop takes at a time, × (P + G T); scoring, of as many
      as are scored together, and there once more groups × G × (P + T)
    - activations or logits, which do not live at once: those of the tokens of one pass through one layer; or, sampling,
      those of every row's next token, and scoring, at most one chunk of completion tokens
    - vision features: the assignment's, and (unless tower or connector train) the cache up to its budget or to all
      `images` of the dataset (the tower's own pass is over before the rest begins)
    - value heads: two Q heads, and their Q of a token each row
    - picture processes: `PICTURE_PROCESS` each, where the rest is in host memory, too

    On a GPU the decode loop takes what its memory is enough for, `gpu_bytes` in all; where they are not known it is the
    most that it takes on any.
    """
    groups = min(cfg.rollout.groups_per_assignment, cfg.learner.groups_per_step)
    size, tokens, on_gpu = cfg.rollout.group_size, cfg.rollout.max_new_tokens, bool(cfg.resources.rollout.gpus)
    merges = (shape.itemsize == _FLOAT32 or on_gpu) and not shape.dequantized_bytes
    held = {
        "process": PROCESS,
        "weights": shape.weight_bytes,
        **_dequantized(shape),
        "adapter": shape.trained_parameters * _FLOAT32 + (shape.adapted_parameters * shape.itemsize if merges else 0),
    }
    limits = DecodeLimits()
    if on_gpu:
        free = None if gpu_bytes is None else max(0, gpu_bytes - sum(held.values()))
        limits = DecodeLimits.on_gpu(shape, free, tokens)
    drawn = size + (cfg.learner.advantage == "greedy")
    started = min(groups, max(limits.max_rows // drawn, 1))
    prefilled = min(started * prompt_tokens, max(limits.prefill_tokens, prompt_tokens))
    sampling = {
        "keys and values": started * (prompt_tokens + drawn * tokens) * shape.kv_of_token,
        "activations or logits": max(prefilled * shape.passing_of_token, shape.sampled_logits(started * drawn)),
    }
    parts = scored_parts([(size, prompt_tokens + tokens - 1)] * groups, shape.kv_of_token)
    together = max(part.stop - part.start for part in parts)
    rows = together * size
    repeated = rows * (prompt_tokens + tokens) * shape.kv_of_token
    scoring = {
        "keys and values": together * prompt_tokens * shape.kv_of_token + repeated,
        "activations or logits": max(
            max(together * prompt_tokens, rows * tokens) * shape.passing_of_token,
            shape.scored_logits(rows * tokens, learnt=False),
        ),
    }
    busiest = sampling
    elsewhere = cfg.rollout.engine.kind == "vllm"  # samples; and the worker scores what is greedy
    if elsewhere or (cfg.learner.family.needs_reference and sum(scoring.values()) > sum(sampling.values())):
        busiest = scoring
    one = image_tokens * shape.hidden * shape.itemsize
    return {
        **held,
        **busiest,
        "vision features": groups * one + (0 if shape.adapts_vision else _cached(cfg, one, images)),
        **_value_heads(cfg, shape, copies=2, tokens=groups * size),
        **({} if cfg.resources.rollout.gpus else picture_memory(cfg)),
    }


def engine_memory(
    cfg: Config,
    shape: ModelShape,
    prompt_tokens: int,
    *,
    context: int,
    embeds: bool = False,
    memory_bytes: int | None = None,
) -> Mapping[str, int]:
    """Bytes of the process of a vLLM engine beside each rollout worker, by kind; none where the worker samples itself.

    - process: `PROCESS`
    - weights: parameters × b of its own dtype, without the tower where features go to it instead of pictures (`embeds`)
    - adapters: places × the layers that could have one × rank, as vLLM pads it, × b; and the versions that are held
    - keys and values: what the config gives them; on CPUs by default `EngineLimits`; what else is left of its share
      of `memory_bytes`, those of a GPU or of this machine (all of an assignment's, where they are not known)
    - activations or logits: of the prompts of an assignment inside one layer, or of every row's next token

    `context` is the model's. Quantised weights are taken as they are without.
    """
    engine, on_gpu = cfg.rollout.engine, bool(cfg.resources.rollout.gpus)
    if engine.kind != "vllm":
        return {}
    b = engine.itemsize(shape.itemsize)
    groups = cfg.rollout.groups_per_assignment
    rows = groups * (cfg.rollout.group_size + (cfg.learner.advantage == "greedy"))
    layer = 4 * shape.hidden + 2 * shape.query_width + 2 * shape.kv_width + 3 * (shape.hidden + shape.intermediate)
    places = engine.args.get("max_loras", LORA_PLACES) * padded_rank(cfg.model.lora.largest_rank) * layer * shape.layers
    parts = engine.tensor_parallel_size or 1
    prefilled = groups * prompt_tokens + rows * CACHE_BLOCK  # what is left of a block is not shared
    at_a_time = min(rows, engine.max_num_seqs or rows)
    held = {
        "process": PROCESS,
        "weights": (shape.language_parameters if embeds else shape.parameters) * b // parts,
        "adapters": places * b // parts + LORA_PLACES * shape.adapter_parameters * (_FLOAT32 + b),
        "activations or logits": max(
            prefilled * shape.passing_of_token * b // shape.itemsize, shape.sampled_logits(at_a_time)
        ),
    }
    keys = shape.kv_of_token // shape.itemsize * b
    share = engine.gpu_memory_utilization or (_GPU_SHARE if on_gpu else None)
    written, space = engine.args.get("kv_cache_memory_bytes"), os.environ.get("VLLM_CPU_KVCACHE_SPACE")
    if space and not on_gpu:
        cache = int(space) << 30
    elif written is not None:
        cache = int(written)
    elif share is None:
        cache = EngineLimits.on_cpu(keys, context, rows=at_a_time, tokens=engine.max_model_len).cache_bytes
    elif memory_bytes is not None:
        cache = max(0, int(share * memory_bytes) - sum(held.values()))
    else:
        cache = (groups * prompt_tokens + rows * cfg.rollout.max_new_tokens) * keys // parts
    return {**held, "keys and values": cache}


def _cached(cfg: Config, one: int, images: int | None) -> int:
    """Bytes of the vision cache: its budget, or all `images` of the dataset, of `one` each."""
    budget = cfg.rollout.vision_cache_mb * 2**20
    return budget if images is None else min(budget, images * one)


def picture_memory(cfg: Config) -> dict[str, int]:
    """Bytes of host memory of the processes of one rollout worker that make pictures ready; nothing where it has none.

    Their pixels, of two assignments at most, are not in it: they depend on the processor.
    """
    processes = cfg.resources.rollout.prompt_processes
    return {"picture processes": processes * PICTURE_PROCESS} if processes else {}


def warm_start_memory(
    cfg: Config,
    shape: ModelShape,
    prompt_tokens: int,
    image_tokens: int,
    *,
    images: int | None = None,
    caption_tokens: int | None = None,
    parts: Mapping[str, int] | None = None,
) -> Mapping[str, int]:
    """Bytes of the supervised warm start at its peak, by kind; captions are taken at `caption_tokens`, or else at
    `rollout.max_new_tokens`.

    - process: `PROCESS`
    - weights: of a full one in float32, and on a GPU a second time what trains, as bfloat16 for the products
      (never quantised: `model.quantization` is of what RL starts from)
    - gradients, AdamW: 4 × (1 + 2) of each number that trains, which an adapter's come on top of
    - activations, repeated prefix, logits: as a learner's
    - vision features: those of the step, and the cache up to its budget or to all `images` of the dataset
    - fragments: as a learner's

    Of several stages it is the one that takes most. `parts` are the numbers of each part of the model; without them
    all but the language model counts as its tower. What the vision tower keeps where it trains is not among them.
    """
    if cfg.sft is None:
        return {}
    there = parts or {"language": shape.language_parameters, "vision": shape.parameters - shape.language_parameters}
    of_stages = [
        _stage_memory(cfg, cfg.sft, stage, shape, there, prompt_tokens, image_tokens, images, caption_tokens)
        for stage in cfg.sft.phases
    ]
    return max(of_stages, key=lambda each: sum(each.values()))


def _stage_memory(
    cfg: Config,
    sft: SftSection,
    stage: SftSection,
    shape: ModelShape,
    parts: Mapping[str, int],
    prompt_tokens: int,
    image_tokens: int,
    images: int | None,
    caption_tokens: int | None,
) -> dict[str, int]:
    in_float32, on_gpu = not sft.is_adapter_alone, bool(cfg.resources.learner.gpus)
    longest = caption_tokens or cfg.rollout.max_new_tokens
    pictures = ceil(stage.batch_size / stage.captions_per_image)
    sizes = [GroupSize(prompt_tokens, stage.captions_per_image, longest)] * pictures
    (batches,) = split_micro_batches(sizes, sft.micro_batch_tokens or cfg.learner.token_budget, 1)
    largest = max(batches, key=len)
    tokens = padded_tokens([sizes[i] for i in largest])
    rows = len(largest) * stage.captions_per_image
    adapter = shape.trained_parameters if stage.mode == "lora" else 0
    trained = sum(parts.get(part, 0) for part in stage.parts if not (adapter and part == "language"))
    weights = shape.parameters * shape.itemsize
    if in_float32:
        weights = shape.parameters * _FLOAT32 + (trained * 2 if on_gpu else 0)
    b = 2 if on_gpu else (_FLOAT32 if in_float32 else shape.itemsize)
    keys = shape.kv_of_token // shape.itemsize * b * (1 if on_gpu else shape.repeats)
    one = image_tokens * shape.hidden * shape.itemsize
    kept = {
        "activations": tokens * shape.kept_of_token(b),
        "repeated prefix": rows * (prompt_tokens + longest) * keys,
        "logits": shape.scored_logits(rows * longest),
    }
    return {
        "process": PROCESS,
        "weights": weights,
        "gradients, AdamW": _FLOAT32 * (3 * trained + 4 * adapter),
        **kept,
        "vision features": len(largest) * one + _cached(cfg, one, images),
        **_fragments(kept, on_gpu),
    }
