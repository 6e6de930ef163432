"""Supervised training of a policy on captions: the loop behind the warm start. No files, no cache.

`K` images and `N = K · captions_per_image` captions a step, `T` caption tokens. The loss is the mean cross-entropy over
all caption tokens of the step; prompts and captions are encoded, and captions scored, by the same policy code as in
reinforcement learning, the image and its prompt once for all its captions.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from mmrl_ray.config import Config
from mmrl_ray.config.sft import SftSection
from mmrl_ray.data.samples import QuarantineRecord, Sample, SampleStream
from mmrl_ray.errors import DataError, ModelError, NonFiniteError
from mmrl_ray.experience.carriers import EncodedPrompt
from mmrl_ray.experience.plan import GroupSize, split_micro_batches
from mmrl_ray.experience.seeds import derive_seed
from mmrl_ray.learner.schedule import cosine_scheduler
from mmrl_ray.policy.adapter import add_adapter, merge_adapter
from mmrl_ray.policy.load import Policy
from mmrl_ray.policy.parity import choose_path
from mmrl_ray.policy.prefix import ScorePath, score_completions
from mmrl_ray.policy.prompts import check_context, encode_caption, encode_prompts
from mmrl_ray.policy.vision import VisionCache, vision_features
from mmrl_ray.rollouts.ledger import FirstErrors
from mmrl_ray.runs.progress import ProgressFn

REPORT_EVERY = 10
"""Steps between two calls of the progress function."""
_BETAS = (0.9, 0.95)
"""A short memory of squared gradients: a warm start is a few hundred steps, whose gradients shrink all the time."""
_SHOWN = 3

Pair = tuple[EncodedPrompt, list[torch.Tensor]]
"""One image's prompt and the token ids int64 [T] of its captions."""


def train_supervised(
    policy: Policy,
    cfg: Config,
    sft: SftSection,
    progress: ProgressFn | None = None,
    on_left_out: Callable[[QuarantineRecord], None] | None = None,
) -> list[float]:
    """Trains `policy` in place on `cfg.data.train`; an adapter is merged at the end. Returns the loss of each step.

    Rows whose pictures or prompts cannot be used, or that have no target of the kinds asked for, are left out, within
    `data.max_quarantined`; `on_left_out` hears of each. The same arguments give the same weights on the CPU.

    Raises:
        DataError: the data cannot be read.
        QuarantineError: more rows that cannot be used than are tolerated.
        ModelError: the first rows all fail with the same error.
        ContextLengthError: a prompt and its caption exceed the model's context.
        NonFiniteError: the loss or the gradient norm is NaN or infinite.
    """
    seed = derive_seed(cfg.run.seed, "sft")
    parameters = _trainable(policy, cfg, sft, seed)
    optimizer = torch.optim.AdamW(parameters, lr=sft.lr, betas=_BETAS, weight_decay=sft.weight_decay)
    scheduler = cosine_scheduler(optimizer, total_steps=sft.steps, lr_min=sft.lr_min, warmup_steps=sft.warmup_steps)
    cache = VisionCache(cfg.rollout.vision_cache_mb << 20)
    losses: list[float] = []
    started = time.monotonic()
    path: ScorePath | None = None
    for step, (samples, batch) in enumerate(_batches(policy, cfg, sft, seed, on_left_out)):
        path = path or choose_path(policy, [prompt for prompt, _ in batch[:2]]).path
        lr = optimizer.param_groups[0]["lr"]
        optimizer.zero_grad(set_to_none=True)
        loss = _backward(policy, batch, cache, path, cfg.learner.micro_batch_tokens)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, sft.max_grad_norm))
        _refuse_non_finite(step, {"loss": loss, "gradient norm": norm}, samples)
        optimizer.step()
        scheduler.step()
        losses.append(loss)
        done = step + 1
        if progress is not None and (done % REPORT_EVERY == 0 or done in (1, sft.steps)):
            recent = losses[-REPORT_EVERY:]
            rate = done * sft.batch_size / (time.monotonic() - started)
            progress(done, sft.steps, {"loss": sum(recent) / len(recent), "lr": lr, "samples/s": rate})
    if sft.mode == "lora":
        merge_adapter(policy)
    policy.model.requires_grad_(False)
    return losses


def draw_target(sample: Sample, sft: SftSection, rng: random.Random) -> str:
    """One caption to train on: terse, partial or full by the section's weights, among the kinds that the row has.

    Raises:
        DataError: as `usable_targets`.
    """
    usable = usable_targets(sample, sft)
    (texts,) = rng.choices([texts for _, texts in usable], [weight for weight, _ in usable])
    return rng.choice(texts)


def usable_targets(sample: Sample, sft: SftSection) -> list[tuple[float, list[str]]]:
    """(weight, captions) of each kind that has a weight and that the row has.

    Raises:
        DataError: there is none.
    """
    kinds = (
        (sft.terse, _texts(sample.metadata, "terse")),
        (sft.partial, _texts(sample.metadata, "partial")),
        (sft.full, list(sample.references)),
    )
    usable = [(weight, texts) for weight, texts in kinds if weight and texts]
    if not usable:
        raise DataError(
            f"sample {sample.id!r} has no caption to train on: sft asks for terse={sft.terse:g}, "
            f"partial={sft.partial:g}, full={sft.full:g}; give the row such captions or change the weights"
        )
    return usable


def _texts(metadata: Mapping[str, Any], name: str) -> list[str]:
    found = metadata.get(name)
    return [text for text in found if isinstance(text, str) and text] if isinstance(found, list) else []


def _trainable(policy: Policy, cfg: Config, sft: SftSection, seed: int) -> list[torch.nn.Parameter]:
    """Switches on what trains."""
    if sft.mode == "lora":
        add_adapter(policy, cfg.model.lora, seed)
    elif sft.train_vision:
        policy.model.requires_grad_(True)
    else:
        policy.decoder.requires_grad_(True)
        policy.hf_model.get_output_embeddings().requires_grad_(True)
    return [p for p in policy.model.parameters() if p.requires_grad]


def _batches(
    policy: Policy,
    cfg: Config,
    sft: SftSection,
    seed: int,
    on_left_out: Callable[[QuarantineRecord], None] | None = None,
) -> Iterator[tuple[list[Sample], list[Pair]]]:
    """One batch a step: its samples, and each one's prompt with its captions."""
    stream = SampleStream(
        cfg.data.train,
        prompt=cfg.data.prompt,
        seed=seed,
        max_quarantined=cfg.data.max_quarantined,
        on_quarantine=on_left_out,
    )
    first = FirstErrors(policy.path)
    rng = random.Random(seed)
    for _ in range(sft.steps):
        taken = _take(policy, stream, sft, first)
        samples = [sample for sample, _ in taken]
        pairs: list[Pair] = []
        for sample, prompt in taken:
            texts = [draw_target(sample, sft, rng) for _ in range(sft.captions_per_image)]
            captions = [encode_caption(policy, text) for text in texts]
            check_context(policy, prompt, max(caption.numel() for caption in captions))
            pairs.append((prompt, captions))
        yield samples, pairs


def _take(
    policy: Policy, stream: SampleStream, sft: SftSection, first: FirstErrors
) -> list[tuple[Sample, EncodedPrompt]]:
    """A step's samples: the next that can be encoded and have a target; others are quarantined, as in rollouts."""
    count = sft.batch_size // sft.captions_per_image
    taken: list[tuple[Sample, EncodedPrompt]] = []
    while len(taken) < count:
        for sample in stream.take(count - len(taken)):
            try:
                usable_targets(sample, sft)
                taken += [(sample, prompt) for prompt in encode_prompts(policy, [sample])]
            except (DataError, ModelError) as error:
                reason = f"{type(error).__name__}: {error}"
                first.failed([sample.key], reason)
                stream.quarantine.add(sample.id, reason, sample.place)
            else:
                first.worked()
    return taken


def _backward(policy: Policy, batch: Sequence[Pair], cache: VisionCache, path: ScorePath, token_budget: int) -> float:
    """Adds the gradient of the step's mean loss, micro-batch by micro-batch; returns that loss."""
    tokens = sum(caption.numel() for _, captions in batch for caption in captions)
    sizes = [GroupSize(p.input_ids.numel(), len(c), max(t.numel() for t in c)) for p, c in batch]
    (micro_batches,) = split_micro_batches(sizes, token_budget, 1)
    total = 0.0
    for indices in micro_batches:
        prompts = [batch[i][0] for i in indices]
        completions = [batch[i][1] for i in indices]
        with _autocast(policy):
            features = vision_features(policy, prompts, cache) if policy.inject_vision else None
            scores = score_completions(policy, prompts, features, completions, 1.0, path=path)
        loss = -scores.logprobs.sum() / tokens
        loss.backward()
        total += loss.item()
    return total


def _autocast(policy: Policy) -> AbstractContextManager[Any]:
    """bfloat16 arithmetic on float32 weights, on GPUs that have it."""
    if policy.device.type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return nullcontext()


def _refuse_non_finite(step: int, figures: Mapping[str, float], samples: Sequence[Sample]) -> None:
    for name, value in figures.items():
        if not math.isfinite(value):
            shown = ", ".join(sample.id for sample in samples[:_SHOWN])
            more = "" if len(samples) <= _SHOWN else f" and {len(samples) - _SHOWN} more"
            raise NonFiniteError(
                f"warm start step {step}: {name} is {value} on samples {shown}{more}; lower sft.lr or look at them"
            )
