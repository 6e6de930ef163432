"""What a run will need, from a model's shape alone: token batches and bytes by kind, with the formula of each.

The formulas of a pass are `policy/memory.py`'s; held against what fake tensors count at full size they are within 15 %.
What allocators add by fragmentation is not in them.
P prompt tokens, T completion tokens, G completions a group, b bytes a number of the base, L layers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

from mmrl_ray.config import Config
from mmrl_ray.experience.plan import GroupSize, padded_tokens, split_micro_batches
from mmrl_ray.policy.generation.local import DecodeLimits
from mmrl_ray.policy.memory import ModelShape

_FLOAT32 = 4
PROCESS = 600 << 20
"""Of a process beside its tensors: Python and libraries in host memory, or CUDA's context on a GPU."""
PICTURE_PROCESS = 400 << 20
"""Of a process that makes pictures ready (`resources.rollout.picture_processes`), in host memory: torch, transformers
and one picture at work."""


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
    - weights: parameters × b; of sharded layers only the part of one of the fewest learners, and two layers whole
    - adapter, gradients, AdamW: adapter parameters × 4 × (1 + 1 + 2), and once more for the reduction's flat buffer
    - activations: tokens × what layers keep of one (`ModelShape.kept_of_token`); checkpointed layers keep their input,
      and the rest for one layer only
    - masks (packed rows): groups × (P + G T)², as bools and as numbers
    - repeated prefix (otherwise): the micro-batch's completions × (P + T) × their keys and values
    - logits: of completion tokens, at most one chunk of them
    - vision features: the micro-batch's images × image tokens × h × b
    - value heads: a Q head of w (h + V) weights each way, two that learn with gradients and AdamW's two
      moments, two that follow; and one chunk of Q
    """
    rows = plan.micro_batch_groups * cfg.rollout.group_size
    kept = shape.learnt_groups(
        plan.micro_batch_groups,
        GroupSize(prompt_tokens, cfg.rollout.group_size, cfg.rollout.max_new_tokens),
        packed=cfg.learner.wants_packed_rows,
        checkpointed=cfg.learner.gradient_checkpointing,
        on_gpu=bool(cfg.resources.learner.gpus),
    )
    return {
        "process": PROCESS,
        "weights": _learner_weights(cfg, shape),
        "adapter, gradients, AdamW": shape.adapter_parameters * _FLOAT32 * (4 + (cfg.learner.max_workers > 1)),
        **kept,
        "logits": shape.scored_logits(rows * cfg.rollout.max_new_tokens),
        "vision features": plan.micro_batch_groups * image_tokens * shape.hidden * shape.itemsize,
        **_value_heads(cfg, shape, copies=2 * 4 + 2, tokens=rows * cfg.rollout.max_new_tokens),
    }


def _value_heads(cfg: Config, shape: ModelShape, *, copies: int, tokens: int) -> dict[str, int]:
    """So many times the weights of a Q head, and Q of a chunk of tokens."""
    if (width := cfg.learner.family.value_width(shape.hidden)) is None:
        return {}
    head = width * (shape.hidden + shape.vocabulary) * _FLOAT32
    return {"value heads": copies * head + shape.scored_logits(tokens)}


def _learner_weights(cfg: Config, shape: ModelShape) -> int:
    parts = cfg.learner.min_workers if cfg.learner.sharding == "fsdp2" else 1
    if parts == 1:
        return shape.weight_bytes
    gathered = min(2, shape.layers) * shape.layer_bytes // shape.layers
    return shape.weight_bytes - shape.layer_bytes + shape.layer_bytes // parts + gathered


def rollout_memory(
    cfg: Config, shape: ModelShape, prompt_tokens: int, image_tokens: int, *, images: int | None = None
) -> Mapping[str, int]:
    """Bytes of one rollout worker at its peak, by kind: while it samples, or while the reference scores.

    - process: `PROCESS`
    - weights: parameters × b
    - adapter: adapter parameters × 4, and the adapted weights once more, with the adapter merged in (in 16 bits on a
      GPU alone)
    - keys and values: sampling, groups an assignment × (P + G T); scoring, once more groups × G × (P + T)
    - activations or logits, which do not live at once: those of the tokens of one pass through one layer; or, sampling,
      those of every row's next token, and scoring, at most one chunk of completion tokens
    - vision features: the assignment's, and the cache up to its budget or to all `images` of the dataset (the tower's
      own pass is over before the rest begins)
    - value heads: two Q heads, and their Q of a token each row
    - picture processes: `PICTURE_PROCESS` each, where the rest is in host memory, too
    """
    groups = min(cfg.rollout.groups_per_assignment, cfg.learner.groups_per_step)
    size, tokens = cfg.rollout.group_size, cfg.rollout.max_new_tokens
    rows = groups * size
    decoded = min(rows, max(DecodeLimits().max_rows, size))
    prompts = groups * prompt_tokens
    started = decoded // size * prompt_tokens
    sampling = {
        "keys and values": decoded // size * (prompt_tokens + size * tokens) * shape.kv_of_token,
        "activations or logits": max(started * shape.passing_of_token, shape.sampled_logits(decoded)),
    }
    repeated = rows * (prompt_tokens + tokens) * shape.kv_of_token
    scoring = {
        "keys and values": prompts * shape.kv_of_token + repeated,
        "activations or logits": max(
            max(prompts, rows * tokens) * shape.passing_of_token, shape.scored_logits(rows * tokens, learnt=False)
        ),
    }
    busiest = sampling
    if cfg.learner.family.needs_reference and sum(scoring.values()) > sum(sampling.values()):
        busiest = scoring
    one = image_tokens * shape.hidden * shape.itemsize
    budget = cfg.rollout.vision_cache_mb * 2**20
    merges = shape.itemsize == _FLOAT32 or bool(cfg.resources.rollout.gpus)
    return {
        "process": PROCESS,
        "weights": shape.weight_bytes,
        "adapter": shape.adapter_parameters * _FLOAT32 + (shape.adapted_parameters * shape.itemsize if merges else 0),
        **busiest,
        "vision features": groups * one + (budget if images is None else min(budget, images * one)),
        **_value_heads(cfg, shape, copies=2, tokens=rows),
        **({} if cfg.resources.rollout.gpus else picture_memory(cfg)),
    }


def picture_memory(cfg: Config) -> dict[str, int]:
    """Bytes of host memory of the processes of one rollout worker that make pictures ready; nothing where it has none.

    Their pixels, of two assignments at most, are not in it: they depend on the processor.
    """
    processes = cfg.resources.rollout.prompt_processes
    return {"picture processes": processes * PICTURE_PROCESS} if processes else {}


def warm_start_memory(cfg: Config, shape: ModelShape, prompt_tokens: int, image_tokens: int) -> Mapping[str, int]:
    """Bytes of the supervised warm start at its peak, by kind; captions are taken at `rollout.max_new_tokens`.

    - process: `PROCESS`
    - weights: of a full one in float32, and on a GPU a second time what trains, as bfloat16 for the products
    - gradients, AdamW: 4 × (1 + 2) of each number that trains, which an adapter's come on top of
    - activations, repeated prefix, logits: as a learner's
    - vision features: those of the step, and the cache up to its budget

    What the vision tower keeps where it trains, too (`sft.train_vision`), is not among them.
    """
    sft = cfg.sft
    if sft is None:
        return {}
    full, on_gpu = sft.mode == "full", bool(cfg.resources.learner.gpus)
    images = ceil(sft.batch_size / sft.captions_per_image)
    sizes = [GroupSize(prompt_tokens, sft.captions_per_image, cfg.rollout.max_new_tokens)] * images
    (batches,) = split_micro_batches(sizes, cfg.learner.token_budget, 1)
    largest = max(batches, key=len)
    tokens = padded_tokens([sizes[i] for i in largest])
    rows = len(largest) * sft.captions_per_image
    trained = shape.adapter_parameters
    if full:
        trained = shape.parameters if sft.train_vision else shape.language_parameters
    weights = shape.parameters * _FLOAT32 + (trained * 2 if on_gpu else 0) if full else shape.weight_bytes
    b = 2 if on_gpu else (_FLOAT32 if full else shape.itemsize)
    keys = shape.kv_of_token // shape.itemsize * b * (1 if on_gpu else shape.repeats)
    one = image_tokens * shape.hidden * shape.itemsize
    return {
        "process": PROCESS,
        "weights": weights,
        "gradients, AdamW": trained * _FLOAT32 * (3 if full else 4),
        "activations": tokens * shape.kept_of_token(b),
        "repeated prefix": rows * (prompt_tokens + cfg.rollout.max_new_tokens) * keys,
        "logits": shape.scored_logits(rows * cfg.rollout.max_new_tokens),
        "vision features": len(largest) * one + cfg.rollout.vision_cache_mb * 2**20,
    }
