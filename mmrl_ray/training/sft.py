"""Supervised training of a policy on captions: the loop behind the warm start.

`K` images and `N = K · captions_per_image` captions a step, `T` caption tokens. The loss is the mean cross-entropy over
all caption tokens of the step; prompts and captions are encoded, and captions scored, by the same policy code as in
reinforcement learning, the image and its prompt once for all its captions.
"""

from __future__ import annotations

import logging
import math
import os
import pickle
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from mmrl_ray.config import Config
from mmrl_ray.config.sections import SftSection
from mmrl_ray.data import atomic
from mmrl_ray.data.samples import QuarantineRecord, Sample, SampleStream
from mmrl_ray.errors import DataError, ModelError, NonFiniteError, RunError
from mmrl_ray.experience.carriers import EncodedPrompt, derive_seed
from mmrl_ray.experience.plan import GroupSize, padded_tokens, split_micro_batches
from mmrl_ray.losses.schedule import cosine_scheduler
from mmrl_ray.policy.lora.adapter import add_adapter, merge_adapter
from mmrl_ray.policy.lora.variants import dropout_on
from mmrl_ray.policy.memory import ran_out
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.parity import choose_path
from mmrl_ray.policy.prompts import check_context, encode_caption, encode_prompts, image_key
from mmrl_ray.policy.scoring.prefix import ScorePath, score_completions
from mmrl_ray.policy.vision import VisionCache, vision_features
from mmrl_ray.rollouts.assignment_tracker import FirstErrors
from mmrl_ray.telemetry.terminal import ProgressFn
from mmrl_ray.training.interrupts import StopOnInterrupt

logger = logging.getLogger(__name__)

REPORT_EVERY = 10
"""Steps between two calls of the progress function, where they are not long ones."""
CHECKPOINT_S = 60.0
"""Between two checkpoints, at least."""
_SAVING_SHARE = 20.0
"""And so many times as long as one takes to write."""
_TELL_S = 5.0
_BETAS = (0.9, 0.95)
"""A short memory of squared gradients: a warm start is a few hundred steps, whose gradients shrink all the time."""
_KEPT_PROMPTS = 256 << 20
"""Bytes of prompts that need not be made anew in the next epoch: those of a small data set, whose steps are short."""
_SHOWN = 3

Pair = tuple[EncodedPrompt, list[torch.Tensor]]
"""One image's prompt and the token ids int64 [T] of its captions."""


def train_supervised(
    policy: Policy,
    cfg: Config,
    sft: SftSection,
    progress: ProgressFn | None = None,
    on_left_out: Callable[[QuarantineRecord], None] | None = None,
    checkpoint: Path | None = None,
    say: Callable[[str], None] | None = None,
) -> list[float]:
    """Trains `policy` in place on `cfg.data.train`; an adapter is merged at the end. Returns the loss of each step.

    Rows whose pictures or prompts cannot be used, or that have no target of the kinds asked for, are left out, within
    `data.max_quarantined`; `on_left_out` hears of each. The same arguments give the same weights on the CPU.

    With `checkpoint`, a file, everything that goes on is kept there about once a minute and when the user stops it (a
    first signal lets the step finish, which `say` is told); where it is there, training goes on from it to the very
    same weights.

    Raises:
        DataError: the data cannot be read.
        QuarantineError: more rows that cannot be used than are tolerated.
        ModelError: the first rows all fail with the same error.
        ContextLengthError: a prompt and its caption exceed the model's context.
        NonFiniteError: the loss or the gradient norm is NaN or infinite.
        RunError: the checkpoint cannot be written.
        KeyboardInterrupt: the user stopped it.
    """
    seed = derive_seed(cfg.run.seed, "sft")
    parameters = _trainable(policy, cfg, sft, seed)
    optimizer = torch.optim.AdamW(parameters, lr=sft.lr, betas=_BETAS, weight_decay=sft.weight_decay)
    scheduler = cosine_scheduler(optimizer, total_steps=sft.steps, lr_min=sft.lr_min, warmup_steps=sft.warmup_steps)
    cache = VisionCache(cfg.rollout.vision_cache_mb << 20)
    left_out: list[QuarantineRecord] = []

    def leave_out(record: QuarantineRecord) -> None:
        left_out.append(record)
        if on_left_out is not None:
            on_left_out(record)

    batches = _Batches(policy, cfg, sft, seed, leave_out)
    losses: list[float] = []
    path: ScorePath | None = None
    budget = cfg.learner.token_budget
    if checkpoint is not None and checkpoint.is_file():
        saved = _load(checkpoint)
        with torch.no_grad():
            for parameter, value in zip(parameters, saved["parameters"], strict=True):
                parameter.copy_(value)
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        torch.set_rng_state(saved["torch"])
        batches.restore(saved["batches"])
        losses, path = saved["losses"], saved["path"]
        for record in saved["left_out"]:
            leave_out(QuarantineRecord(**record))
    begun, started = len(losses), time.monotonic()
    shown = started
    saver = _Saver(checkpoint)
    asked = threading.Event()

    def tell(samples: int = 0, *, always: bool = False) -> None:
        """Where it is, at least every `_TELL_S` seconds: steps, and samples of the one under way."""
        nonlocal shown
        now = time.monotonic()
        if progress is None or not (always or now - shown >= _TELL_S):
            return
        shown = now
        recent = losses[-REPORT_EVERY:]
        figures = {"loss": sum(recent) / len(recent)} if recent else {}
        done = (len(losses) - begun) * sft.batch_size + samples
        figures |= {"lr": lr, "samples/s": done / (now - started) if done else 0.0}
        if samples:
            figures |= {"samples of this step": samples}
        progress(len(losses), sft.steps, figures)

    def awaited() -> str:
        return f"finishing step {min(len(losses) + 1, sft.steps)} of the warm start, which is kept to be gone on with"

    with StopOnInterrupt(asked.set, awaited=awaited, say=say) if checkpoint is not None else nullcontext():
        for samples, batch in batches:
            path = path or choose_path(policy, [prompt for prompt, _ in batch[:2]]).path
            lr = optimizer.param_groups[0]["lr"]
            loss, budget = _step(policy, batch, cache, path, budget, tell, len(losses))
            norm = float(torch.nn.utils.clip_grad_norm_(parameters, sft.max_grad_norm))
            _refuse_non_finite(len(losses), {"loss": loss, "gradient norm": norm}, samples)
            optimizer.step()
            scheduler.step()
            losses.append(loss)
            done = len(losses)
            tell(always=done % REPORT_EVERY == 0 or done in (1, sft.steps))
            if done < sft.steps and saver.is_due(asked.is_set()):
                saver.save(
                    {
                        "parameters": [parameter.detach() for parameter in parameters],
                        "optimizer": optimizer.state_dict(),
                        "scheduler": scheduler.state_dict(),
                        "torch": torch.get_rng_state(),
                        "batches": batches.state(),
                        "losses": losses,
                        "path": path,
                        "left_out": [record.as_dict() for record in left_out],
                    }
                )
            if asked.is_set() and done < sft.steps:
                raise KeyboardInterrupt
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


class _Batches:
    """One batch a step: its samples, and each one's prompt with its captions."""

    def __init__(
        self,
        policy: Policy,
        cfg: Config,
        sft: SftSection,
        seed: int,
        on_left_out: Callable[[QuarantineRecord], None] | None = None,
    ) -> None:
        self._policy, self._sft = policy, sft
        self._stream = SampleStream(
            cfg.data.train,
            prompt=cfg.data.prompt,
            seed=seed,
            max_quarantined=cfg.data.max_quarantined,
            on_quarantine=on_left_out,
        )
        self._first = FirstErrors(policy.path)
        self._rng = random.Random(seed)
        self._drawn = 0
        self._prompts: dict[tuple[str, str], EncodedPrompt] = {}
        self._room = _KEPT_PROMPTS

    def __iter__(self) -> Iterator[tuple[list[Sample], list[Pair]]]:
        while self._drawn < self._sft.steps:
            self._drawn += 1
            yield self._next()

    def state(self) -> dict[str, Any]:
        """Where the next batch begins, in plain values."""
        return {"drawn": self._drawn, "stream": self._stream.state(), "rng": self._rng.getstate()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state` was taken.

        Raises:
            DataError: it is of other data.
        """
        self._drawn = state["drawn"]
        self._stream.restore(state["stream"])
        version, words, rest = state["rng"]
        self._rng.setstate((version, tuple(words), rest))
        self._first.worked()  # a whole step has

    def _next(self) -> tuple[list[Sample], list[Pair]]:
        taken = _take(self._prompt, self._stream, self._sft, self._first)
        pairs: list[Pair] = []
        for sample, prompt in taken:
            texts = [draw_target(sample, self._sft, self._rng) for _ in range(self._sft.captions_per_image)]
            captions = [encode_caption(self._policy, text) for text in texts]
            check_context(self._policy, prompt, max(caption.numel() for caption in captions))
            pairs.append((prompt, captions))
        return [sample for sample, _ in taken], pairs

    def _prompt(self, sample: Sample) -> EncodedPrompt:
        """As `encode_prompts`, once for pictures and text that come again while there is room."""
        key = (image_key(self._policy, sample.images), sample.prompt)
        found = self._prompts.get(key)
        if found is None:
            (found,) = encode_prompts(self._policy, [sample])
            nbytes = sum(each.nbytes for each in (found.input_ids, *found.model_inputs.values()))
            if nbytes <= self._room:
                self._room -= nbytes
                self._prompts[key] = found
        return found


class _Saver:
    """Writes checkpoints, seldom enough that they take little of the time."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._next = time.monotonic() + CHECKPOINT_S

    def is_due(self, asked: bool) -> bool:
        """Whether one is to be written now, where `asked` says that there may be no later one."""
        return self._file is not None and (asked or time.monotonic() >= self._next)

    def save(self, state: Mapping[str, Any]) -> None:
        """Puts the whole file in place, atomically.

        Raises:
            RunError: it cannot be written.
        """
        assert self._file is not None
        began = time.monotonic()
        try:
            with atomic.scratch_folder(self._file.parent) as folder:
                scratch = folder / self._file.name
                with scratch.open("wb") as stream:
                    torch.save(dict(state), stream)
                atomic.sync(scratch)
                os.replace(scratch, self._file)
        except (OSError, RuntimeError) as error:  # torch writes in C++
            raise RunError(f"the warm start's checkpoint {self._file} cannot be written: {error}") from error
        now = time.monotonic()
        self._next = now + max(CHECKPOINT_S, _SAVING_SHARE * (now - began))


def _load(file: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        return found
    except (OSError, RuntimeError, ValueError, pickle.UnpicklingError, EOFError) as error:
        raise RunError(f"the warm start's checkpoint {file} is broken: {error}; delete it to begin anew") from error


def _take(
    prompt_of: Callable[[Sample], EncodedPrompt], stream: SampleStream, sft: SftSection, first: FirstErrors
) -> list[tuple[Sample, EncodedPrompt]]:
    """A step's samples: the next that can be encoded and have a target; others are quarantined, as in rollouts."""
    count = sft.batch_size // sft.captions_per_image
    taken: list[tuple[Sample, EncodedPrompt]] = []
    while len(taken) < count:
        for sample in stream.take(count - len(taken)):
            try:
                usable_targets(sample, sft)
                taken.append((sample, prompt_of(sample)))
            except (DataError, ModelError) as error:
                reason = f"{type(error).__name__}: {error}"
                first.failed([sample.key], reason)
                stream.quarantine.add(sample.id, reason, sample.place)
            else:
                first.worked()
    return taken


def _step(
    policy: Policy,
    batch: Sequence[Pair],
    cache: VisionCache,
    path: ScorePath,
    budget: int,
    tell: Callable[[int], None],
    step: int,
) -> tuple[float, int]:
    """Leaves the gradient of the step's mean loss; returns that loss, and the tokens that a micro-batch may have.

    Where one does not fit the device's memory the step is begun anew with half as many: its parts add up to the same.

    Raises:
        RunError: a single image with its captions does not fit.
    """
    while True:
        policy.model.zero_grad(set_to_none=True)
        try:
            with dropout_on(policy.model):
                return _backward(policy, batch, cache, path, budget, tell), budget
        except RuntimeError as error:
            if not ran_out(error):
                raise
        # Not in the handler, which keeps the frames of the pass alive, and their tensors with them.
        largest = max(_micro_batches(batch, budget), key=len)
        if len(largest) == 1:
            raise RunError(
                f"warm start step {step}: one image with {len(batch[largest[0]][1])} captions does not fit the "
                "device's memory: lower sft.captions_per_image or the picture's size (model.processor), or set "
                "sft.mode: lora"
            )
        sizes = _sizes(batch)
        half = largest[: len(largest) // 2]
        budget = padded_tokens([sizes[i] for i in half])
        logger.warning(
            "warm start step %d: %d images at once do not fit the device's memory: from here on at most %d tokens",
            *(step, len(largest), budget),
        )


def _sizes(batch: Sequence[Pair]) -> list[GroupSize]:
    return [GroupSize(p.input_ids.numel(), len(c), max(t.numel() for t in c)) for p, c in batch]


def _micro_batches(batch: Sequence[Pair], budget: int) -> Sequence[Sequence[int]]:
    (micro_batches,) = split_micro_batches(_sizes(batch), budget, 1)
    return micro_batches


def _backward(
    policy: Policy,
    batch: Sequence[Pair],
    cache: VisionCache,
    path: ScorePath,
    token_budget: int,
    tell: Callable[[int], None],
) -> float:
    """Adds the gradient of the step's mean loss, micro-batch by micro-batch; returns that loss."""
    tokens = sum(caption.numel() for _, captions in batch for caption in captions)
    total = 0.0
    came = 0
    for indices in _micro_batches(batch, token_budget):
        tell(came)
        prompts = [batch[i][0] for i in indices]
        completions = [batch[i][1] for i in indices]
        with _autocast(policy):
            features = vision_features(policy, prompts, cache) if policy.inject_vision else None
            scores = score_completions(policy, prompts, features, completions, 1.0, path=path)
        loss = -scores.logprobs.sum() / tokens
        loss.backward()
        total += loss.item()
        came += sum(map(len, completions))
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
