"""Supervised training of a policy on captions: the loop behind the warm start, stage after stage.

    stage: parts that train ─▶ AdamW, a group each, one cosine ─▶ steps ─▶ adapter merged, where there is one ─▶ next

`K` images and `N = K · captions_per_image` captions a step, `T` caption tokens. The loss is the mean cross-entropy over
all caption tokens of the step, whatever the micro-batches; prompts and captions are encoded, and captions scored, by
the same policy code as in reinforcement learning, the image and its prompt once for all its captions.

The model stays in evaluation mode: no dropout, and a tower with batch normalisation keeps the mean and variance that it
came with (its scale and shift train with it). Statistics of a few pictures would make each picture's features depend on
its neighbours in the batch, and be others where one picture is captioned.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from mmrl_ray.config import Config
from mmrl_ray.config.sft import SftSection
from mmrl_ray.data.samples import QuarantineRecord, Sample
from mmrl_ray.errors import NonFiniteError, RunError
from mmrl_ray.experience.carriers import derive_seed
from mmrl_ray.experience.plan import padded_tokens
from mmrl_ray.losses.schedule import cosine_scheduler
from mmrl_ray.policy.lora.adapter import add_adapter, merge_adapter
from mmrl_ray.policy.lora.variants import dropout_on
from mmrl_ray.policy.memory import ran_out
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.parity import choose_path
from mmrl_ray.policy.parts import model_parts, refuse_unknown_parts
from mmrl_ray.policy.scoring.prefix import ScorePath, score_completions
from mmrl_ray.policy.vision import VisionCache, vision_features
from mmrl_ray.telemetry.terminal import ProgressFn
from mmrl_ray.training.interrupts import StopOnInterrupt
from mmrl_ray.training.sft_data import Batches, Pair, group_sizes, micro_batches
from mmrl_ray.training.sft_look import HeldOut
from mmrl_ray.training.sft_state import Checkpoint

logger = logging.getLogger(__name__)

REPORT_EVERY = 10
"""Steps between two calls of the progress function, where they are not long ones."""
_TELL_S = 5.0
_BETAS = (0.9, 0.95)
"""A short memory of squared gradients: a warm start is a few hundred steps, whose gradients shrink all the time."""
_SHOWN = 3


@dataclass(slots=True)
class Trained:
    """How a supervised training went."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    """Of each step: `step` (1-based), `stage`, `loss`, `grad_norm` before it is clipped, `tokens`, and `lr/PART`."""
    looks: list[dict[str, Any]] = field(default_factory=list)
    """At held-out pictures: `step` as so many finished ones, and `HeldOut.look`'s figures."""

    @property
    def losses(self) -> list[float]:
        """Of each step."""
        return [line["loss"] for line in self.steps]


def train_supervised(
    policy: Policy,
    cfg: Config,
    sft: SftSection,
    progress: ProgressFn | None = None,
    on_left_out: Callable[[QuarantineRecord], None] | None = None,
    checkpoint: Checkpoint | None = None,
    say: Callable[[str], None] | None = None,
) -> Trained:
    """Trains `policy` in place on `cfg.data.train`, through all stages; adapters are merged at the end of theirs.

    Rows whose pictures or prompts cannot be used, or that have no target of the kinds asked for, are left out, within
    `data.max_quarantined`; `on_left_out` hears of each. The same arguments give the same weights on the CPU.

    With a `checkpoint` everything that goes on is kept there about once a minute and when the user stops it (a
    first signal lets the step finish, which `say` is told); where it is there, training goes on from it to the very
    same weights. `say` is told of each look at held-out pictures, too.

    Raises:
        DataError: the data cannot be read.
        QuarantineError: more rows that cannot be used than are tolerated.
        ModelError: the first rows all fail with the same error, or a stage names a part that the model has not.
        ContextLengthError: a prompt and its caption exceed the model's context.
        NonFiniteError: the loss or the gradient norm is NaN or infinite.
        RunError: the checkpoint cannot be written.
        KeyboardInterrupt: the user stopped it.
    """
    refuse_unknown_parts(policy.hf_model, cfg.model.path, sft)
    loop = _Loop(policy, cfg, sft, progress, on_left_out, checkpoint, say)
    with StopOnInterrupt(loop.asked.set, awaited=loop.awaited, say=say) if checkpoint is not None else nullcontext():
        loop.run()
    policy.model.requires_grad_(False)
    return loop.trained


class _Loop:
    """One training, from its beginning or from a checkpoint."""

    def __init__(
        self,
        policy: Policy,
        cfg: Config,
        sft: SftSection,
        progress: ProgressFn | None,
        on_left_out: Callable[[QuarantineRecord], None] | None,
        checkpoint: Checkpoint | None,
        say: Callable[[str], None] | None,
    ) -> None:
        self._policy, self._cfg, self._sft = policy, cfg, sft
        self._progress, self._say = progress, say
        self._seed = derive_seed(cfg.run.seed, "sft")
        self._held_out = None if sft.eval_every is None else HeldOut(cfg, sft.eval_samples)
        if self._held_out is not None and self._held_out.note is not None and say is not None:
            say(f"held-out pictures: {self._held_out.note}")
        self._left_out: list[QuarantineRecord] = []
        self._on_left_out = on_left_out
        self._batches = Batches(policy, cfg, self._seed, self._leave_out)
        self._cache = VisionCache(cfg.rollout.vision_cache_mb << 20)
        self._budget = sft.micro_batch_tokens or cfg.learner.token_budget
        self._path: ScorePath | None = None
        self._touched: dict[str, nn.Parameter] = {}
        """Weights of the base that a stage has trained, by their names without an adapter's."""
        self._stages, self._number = sft.phases, 0
        self._resumed: dict[str, Any] | None = None
        self._checkpoint = checkpoint
        self.asked = threading.Event()
        self.trained = Trained()
        if checkpoint is not None and (found := checkpoint.load()) is not None:
            self._restore(found)
        self._begun, self._started = len(self.trained.steps), time.monotonic()
        self._shown_at = self._started
        self._images_done = 0

    def run(self) -> None:
        """Until all stages are through, or the user stops it."""
        while self._number < len(self._stages):
            self._run_stage(self._stages[self._number])
            self._number += 1
        self._look_if_due()

    def awaited(self) -> str:
        """What the user waits for who wants it to stop."""
        step = min(len(self.trained.steps) + 1, self._sft.total_steps)
        return f"finishing step {step} of the warm start, which is kept to be gone on with"

    def _leave_out(self, record: QuarantineRecord) -> None:
        self._left_out.append(record)
        if self._on_left_out is not None:
            self._on_left_out(record)

    # -- a stage ---------------------------------------------------------------------------------------------------

    def _run_stage(self, stage: SftSection) -> None:
        policy, checkpoint, total = self._policy, self._checkpoint, self._sft.total_steps
        groups = _trainable(policy, self._cfg, stage, self._seed)
        if policy.vision_trainable:
            self._cache.clear()  # what it holds will be another tower's
        self._touched |= _base_weights(policy, trainable=True)
        optimizer = torch.optim.AdamW(
            [{"params": params, "lr": stage.rate(part)} for part, params in groups.items()],
            betas=_BETAS,
            weight_decay=stage.weight_decay,
        )
        steps = stage.total_steps
        scheduler = cosine_scheduler(optimizer, total_steps=steps, lr_min=stage.lr_min, warmup_steps=stage.warmup_steps)
        parameters = [p for p in policy.model.parameters() if p.requires_grad]
        done, self._path = 0, None
        if self._resumed is not None:
            saved, self._resumed = self._resumed, None
            _copy(parameters, saved["parameters"])
            optimizer.load_state_dict(saved["optimizer"])
            scheduler.load_state_dict(saved["scheduler"])
            torch.set_rng_state(saved["torch"])
            self._batches.restore(saved["batches"])
            done, self._path = saved["done"], saved["path"]
        while done < steps:
            samples, batch = self._batches.next(stage)
            self._path = self._path or choose_path(policy, [prompt for prompt, _ in batch[:2]]).path
            self._look_if_due()
            rates = {f"lr/{part}": group["lr"] for part, group in zip(groups, optimizer.param_groups, strict=True)}
            at = len(self.trained.steps)
            loss, self._budget = _step(
                policy, batch, self._cache, self._path, self._budget, partial(self._tell, rates), at
            )
            norm = float(torch.nn.utils.clip_grad_norm_(parameters, stage.max_grad_norm))
            _refuse_non_finite(at, {"loss": loss, "gradient norm": norm}, samples)
            optimizer.step()
            scheduler.step()
            done += 1
            tokens = sum(caption.numel() for _, captions in batch for caption in captions)
            line = {"step": at + 1, "stage": self._number + 1, "loss": loss, "grad_norm": norm, "tokens": tokens}
            self.trained.steps.append(line | rates)
            self._images_done += stage.batch_size
            self._tell(rates, always=(at + 1) % REPORT_EVERY == 0 or at + 1 in (1, total))
            if at + 1 < total and checkpoint is not None and checkpoint.is_due(self.asked.is_set()):
                checkpoint.save(self._state(done, parameters, optimizer, scheduler))
            if self.asked.is_set() and at + 1 < total:
                raise KeyboardInterrupt
        if stage.mode == "lora":
            adapted = _adapted(policy)
            merge_adapter(policy)
            plain = dict(policy.hf_model.named_parameters())
            self._touched = {name: plain[name] for name in (*self._touched, *adapted)}
        policy.model.zero_grad(set_to_none=True)
        policy.model.requires_grad_(False)

    def _state(
        self,
        done: int,
        parameters: Sequence[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
    ) -> dict[str, Any]:
        """All that goes on; of the weights, those that this stage trains and those that earlier ones have."""
        training = {id(p) for p in parameters}
        return {
            "stage": self._number,
            "done": done,
            "weights": {name: p.detach() for name, p in self._touched.items() if id(p) not in training},
            "parameters": [parameter.detach() for parameter in parameters],
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "torch": torch.get_rng_state(),
            "batches": self._batches.state(),
            "steps": self.trained.steps,
            "looks": self.trained.looks,
            "path": self._path,
            "left_out": [record.as_dict() for record in self._left_out],
        }

    def _restore(self, saved: dict[str, Any]) -> None:
        plain = dict(self._policy.hf_model.named_parameters())
        names = list(saved["weights"])
        _copy([plain[name] for name in names], [saved["weights"][name] for name in names])
        self._touched = {name: plain[name] for name in names}
        self._number, self._resumed = saved["stage"], saved
        self.trained = Trained(saved["steps"], saved["looks"])
        for record in saved["left_out"]:
            self._leave_out(QuarantineRecord(**record))

    # -- what is told ----------------------------------------------------------------------------------------------

    def _look_if_due(self) -> None:
        """Looks at the held-out pictures where that is due after so many steps, and was not done then."""
        done, total, every = len(self.trained.steps), self._sft.total_steps, self._sft.eval_every
        looks = self.trained.looks
        if self._held_out is None or every is None or (done % every and done != total):
            return
        if self._path is None or (looks and looks[-1]["step"] == done):
            return
        began = time.monotonic()
        tell = partial(self._tell, {}, looking=True)
        found = self._held_out.look(self._policy, self._cache, self._path, self._budget, tell)
        looks.append({"step": done, **found})
        self._started += time.monotonic() - began  # samples a second are of training
        if self._say is not None:
            figures = (f"{name} {value:.4g}" for name, value in found.items() if isinstance(value, float))
            self._say(f"held-out pictures after {done} of {total} steps: {'  '.join(figures)}")
            if "blind" in found and done:
                self._say(f"after {done} of {total} steps, {found['blind']}")

    def _tell(
        self, rates: Mapping[str, float], samples: int = 0, *, always: bool = False, looking: bool = False
    ) -> None:
        """Where it is, at least every `_TELL_S` seconds: steps, and samples of the one under way."""
        now = time.monotonic()
        if self._progress is None or not (always or now - self._shown_at >= _TELL_S):
            return
        self._shown_at = now
        losses = self.trained.losses
        recent = losses[-REPORT_EVERY:]
        figures = {"loss": sum(recent) / len(recent)} if recent else {}
        number = min(self._number, len(self._stages) - 1)
        is_one = rates and not isinstance(self._stages[number].lr, dict)
        figures |= {"lr": next(iter(rates.values()))} if is_one else rates
        done = self._images_done + samples
        figures |= {"samples/s": done / (now - self._started) if done and now > self._started else 0.0}
        if len(self._stages) > 1:
            figures |= {"stage": number + 1}
        if samples:
            figures |= {"samples of this step": samples}
        if looking:
            figures |= {"looks at held-out pictures": len(self.trained.looks) + 1}
        self._progress(len(losses), self._sft.total_steps, figures)


def _trainable(policy: Policy, cfg: Config, stage: SftSection, seed: int) -> dict[str, list[nn.Parameter]]:
    """Switches on what trains; its parameters by part, in the order of `train`."""
    parts = model_parts(policy.hf_model)
    chosen = {part: list(parts[part].values()) for part in stage.parts}
    if stage.mode == "lora":
        add_adapter(policy, cfg.model.lora, seed)
        chosen["language"] = [p for p in policy.model.parameters() if p.requires_grad]
    for parameters in chosen.values():
        for parameter in parameters:
            parameter.requires_grad_(True)
    return chosen


def _base_weights(policy: Policy, *, trainable: bool) -> dict[str, nn.Parameter]:
    """Of the model without its adapter, those that train, by the names that they have then."""
    named = policy.hf_model.named_parameters()
    return {_plain(name): p for name, p in named if p.requires_grad is trainable and ".lora_" not in name}


def _adapted(policy: Policy) -> list[str]:
    """Names of the weights that an adapter will be merged into."""
    assert isinstance(policy.model, PeftModel)
    modules = policy.model.get_base_model().named_modules()
    return [f"{name}.weight" for name, module in modules if isinstance(module, LoraLayer)]


def _plain(name: str) -> str:
    return name.replace(".base_layer.", ".")


@torch.no_grad()
def _copy(parameters: Sequence[nn.Parameter], values: Sequence[torch.Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


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
        largest = max(micro_batches(batch, budget), key=len)
        if len(largest) == 1:
            raise RunError(
                f"warm start step {step}: one image with {len(batch[largest[0]][1])} captions does not fit the "
                "device's memory: lower sft.captions_per_image or the picture's size (model.processor), or set "
                "sft.mode: lora"
            )
        sizes = group_sizes(batch)
        half = largest[: len(largest) // 2]
        budget = padded_tokens([sizes[i] for i in half])
        logger.warning(
            "warm start step %d: %d images at once do not fit the device's memory: from here on at most %d tokens",
            *(step, len(largest), budget),
        )


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
    for indices in micro_batches(batch, token_budget):
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
