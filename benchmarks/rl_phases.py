"""Where the seconds of `rl_step.py` go, phase by phase: a worker's and a learner's part of a step in this process.

What runs is the product's own `RolloutEngine` and `LearnerStep`, on one thread as in the run, with a stopwatch at the
seams; several steps, of which the medians count. Three further passes say how good that is:

    FLOP            of every matrix product and attention, by `torch.utils.flop_counter` and formulas for what it lacks;
                    attention counts in full, also where a mask hides half of it
    peak            the fastest of several large float32 products, square and in the model's shapes, by PyTorch's own
                    way and by oneDNN's, weights packed beforehand or not: what this core gives to any product at all
    products alone  the very products of a phase, shape for shape and as they lie in memory, one after another with
                    nothing between them: what is left for everything else to lose

Seconds are those of the CPU, so that a busy machine tells the same shares.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial, wraps
from importlib import import_module
from math import prod
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from mmrl_ray.config import Config
from mmrl_ray.data.samples import Sample, read_split
from mmrl_ray.experience.carriers import GroupKey, PlannedGroup, RolloutGroup, SamplingParams
from mmrl_ray.experience.plan import build_step_plan
from mmrl_ray.learner import step as learner_step
from mmrl_ray.learner.step import LearnerStep
from mmrl_ray.metrics.text import CorpusStatistics
from mmrl_ray.policy import cpu
from mmrl_ray.policy.generation import decode
from mmrl_ray.policy.generation.local import LocalEngine
from mmrl_ray.policy.load import load_policy
from mmrl_ray.policy.lora.adapter import adapter_state, add_run_adapter
from mmrl_ray.rewards.build import build_reward
from mmrl_ray.rollouts import group_codec
from mmrl_ray.rollouts.engine import RolloutEngine
from mmrl_ray.rollouts.factory import PolicyEngineFactory
from mmrl_ray.rollouts.scorer import Scorer
from mmrl_ray.rollouts.types import Assignment, GroupRequest
from mmrl_ray.rollouts.weights import decode_state, encode_state

aten, mkldnn = torch.ops.aten, torch.ops.mkldnn
REST_OF_WORKER, REST_OF_LEARNER, HANDOVER = "worker: rewards, the rest", "learner: the rest", "hand-over"
SEAMS: tuple[tuple[Any, str, str], ...] = (
    (RolloutEngine, "run", REST_OF_WORKER),
    (LocalEngine, "load", HANDOVER),
    (Scorer, "load", HANDOVER),
    (Scorer, "encode", "worker: pictures"),
    (decode, "vision_features", "vision"),
    (decode, "encode_prefix", "prefill"),
    (LocalEngine, "_generate", "decode"),
    (Scorer, "reference_logprobs", "reference"),
    (LearnerStep, "run", REST_OF_LEARNER),
    (learner_step, "score_completions", "learner: forward"),
    (learner_step, "micro_batch_share", "learner: loss"),
    (torch.Tensor, "backward", "learner: backward"),
    (import_module("torch.optim.adam"), "adam", "learner: optimiser"),
)
"""Where each phase is: what is called within another one is no part of that."""
PHASES = tuple(dict.fromkeys(["vision", "prefill", "decode", "reference", *(phase for _, _, phase in SEAMS)]))
WORKER = ("vision", "prefill", "decode")
"""What a rollout worker calls sampling."""
LEARNER = ("learner: forward", "learner: loss", "learner: backward")
"""What the learner calls forward and backward, but for the tensors that it makes of what it is given."""
_ALONE = 5
"""Runs of a product alone, of which the median counts."""


def linear_flop(x: Sequence[int], weight: Sequence[int], *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """[.., in] by [out, in], by oneDNN."""
    return 2 * prod(x) * weight[0]


def attention_flop(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Scores and what is mixed by them."""
    return int(sdpa_flop_count(query, key, value))


def attention_backward_flop(
    grad: Any, query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """Scores again, and two products for each of the two."""
    return int(sdpa_backward_flop_count(grad, query, key, value))


def addmm_flop(added: Any, left: Any, right: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """A product that is added to a tensor in place."""
    return 2 * prod(left) * right[-1]


FORMULAS = {
    aten.addmm_: addmm_flop,
    mkldnn._linear_pointwise: linear_flop,
    aten._scaled_dot_product_flash_attention_for_cpu: attention_flop,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flop,
}
"""What PyTorch's counter does not know."""


class Stopwatch:
    """CPU seconds, and with a counter FLOP, to the innermost phase that they fall into."""

    def __init__(self, counter: FlopCounterMode | None = None) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.flop: dict[str, int] = defaultdict(int)
        self.phase = ""
        self._counter = counter
        self._last = (0.0, 0)

    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """Everything inside, but for phases of its own."""
        self._note()
        outer, self.phase = self.phase, phase
        try:
            yield
        finally:
            self._note()
            self.phase = outer

    @contextmanager
    def at_the_seams(self) -> Iterator[None]:
        """Watches the product's own functions."""
        with ExitStack() as patches:
            for owner, name, phase in SEAMS:
                patches.enter_context(mock.patch.object(owner, name, self._watched(getattr(owner, name), phase)))
            yield

    def _watched(self, function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        @wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            with self.within(phase):
                return function(*args, **kwargs)

        return watched

    def _note(self) -> None:
        now = time.process_time(), 0 if self._counter is None else self._counter.get_total_flops()
        self.seconds[self.phase] += now[0] - self._last[0]
        self.flop[self.phase] += now[1] - self._last[1]
        self._last = now


@dataclass(frozen=True)
class Call:
    """A product as it was called: hashable, tensors as what they look like."""

    function: Any
    arguments: tuple[Any, ...]
    keywords: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """With tensors replaced."""
        return cls(function, _frozen(args), tuple((name, _frozen(value)) for name, value in kwargs.items()))

    def seconds(self) -> float:
        """Of the CPU, alone, with other numbers of the same shapes."""
        args, kwargs = _thawed(self.arguments), {name: _thawed(value) for name, value in self.keywords}
        taken = []
        for _ in range(_ALONE + 1):
            began = time.process_time()
            self.function(*args, **kwargs)
            taken.append(time.process_time() - began)
        return statistics.median(taken[1:])


@dataclass(frozen=True)
class _Look:
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def made(self) -> torch.Tensor:
        tensor = torch.empty_strided(self.shape, self.stride, dtype=self.dtype)
        return tensor.normal_() if tensor.is_floating_point() else tensor.zero_()


def _frozen(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return _Look(tuple(value.shape), tuple(value.stride()), value.dtype)
    return tuple(_frozen(each) for each in value) if isinstance(value, list | tuple) else value


def _thawed(value: Any) -> Any:
    if isinstance(value, _Look):
        return value.made()
    return [_thawed(each) for each in value] if isinstance(value, tuple) else value


class Operations(TorchDispatchMode):
    """Notes every operation, by phase: products as they are called, and the bytes that others read and write."""

    def __init__(self, watch: Stopwatch, products: Sequence[Any]) -> None:
        super().__init__()
        self.products: dict[str, Counter[Call]] = defaultdict(Counter)
        self.nbytes: dict[str, int] = defaultdict(int)
        self.count: dict[str, int] = defaultdict(int)
        self._watch, self._known = watch, set(products)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        phase = self._watch.phase
        if func._overloadpacket in self._known:
            self.products[phase][Call.of(func, args, kwargs)] += 1
        elif not func.is_view:
            tensors = {id(t): t for t in tree_leaves((args, kwargs, made)) if isinstance(t, torch.Tensor)}
            self.nbytes[phase] += sum(tensor.nbytes for tensor in tensors.values())
            self.count[phase] += 1
        return made


@dataclass
class Step:
    """A worker and a learner that take one step after another in this process, one share of a run's each."""

    cfg: Config
    samples: Sequence[Sample]
    taken: int = 0
    watch: Stopwatch = field(default_factory=Stopwatch)

    def __post_init__(self) -> None:
        reward = build_reward(self.cfg.reward, CorpusStatistics.from_references([s.references for s in self.samples]))
        self._engine = PolicyEngineFactory(self.cfg, reward)("bench")
        self._policy = load_policy(self.cfg.model, device="cpu")
        add_run_adapter(self._policy, self.cfg)
        self._learner = LearnerStep(self._policy, self.cfg.learner)
        self._weights: Any = None
        self._groups = self.cfg.rollout.groups_per_assignment

    def take(self) -> None:
        """One step on pictures that it has not seen."""
        rollout, step = self.cfg.rollout, self.taken
        first = step * self._groups
        requests = tuple(
            GroupRequest(
                GroupKey(step, i),
                sample,
                SamplingParams(max_new_tokens=rollout.max_new_tokens, temperature=rollout.temperature, seed=first + i),
                rollout.group_size,
            )
            for i, sample in enumerate(self.samples[first : first + self._groups])
        )
        result = self._engine.run(
            Assignment(step, "train", requests, version=step, reference_logprobs=True), lambda: self._fetched()
        )
        with self.watch.within(HANDOVER):
            parcels, scored = group_codec.pack("bench", result.groups)
        plan = build_step_plan(
            step, scored, learner=self.cfg.learner, max_new_tokens=rollout.max_new_tokens, world_size=1
        )

        def payloads(planned: Sequence[PlannedGroup]) -> list[RolloutGroup]:
            with self.watch.within(HANDOVER):
                return [group_codec.open_payload(group.payload, parcels.__getitem__) for group in planned]

        self._learner.run(plan, payloads)
        with self.watch.within(HANDOVER):
            self._weights = encode_state(adapter_state(self._policy.model))
        self.taken += 1

    def _fetched(self) -> Any:
        with self.watch.within(HANDOVER):
            return None if self._weights is None else decode_state(self._weights)


@dataclass(frozen=True)
class Phase:
    """Of one process's part in a step."""

    seconds: float
    """Of the CPU, median of the steps."""
    flop: int
    alone: float
    """Seconds of its products alone."""
    operations: int
    """Others than products and views."""
    nbytes: int
    """That those read and write."""

    @classmethod
    def sum(cls, phases: Iterable[Phase]) -> Phase:
        """One after the other."""
        columns = zip(*((p.seconds, p.flop, p.alone, p.operations, p.nbytes) for p in phases), strict=True)
        return cls(*map(sum, columns))


def measure(cfg: Config, *, warmup: int, steps: int) -> dict[str, Phase]:
    """Every phase of a worker and a learner of `cfg`, whose data has pictures for two steps more than these."""
    torch.set_num_threads(1)
    samples = read_split(cfg.data.train, prompt=cfg.data.prompt)
    step = Step(cfg, samples)
    for _ in range(warmup):
        step.take()
    watches = []
    for _ in range(steps):
        step.watch = Stopwatch()
        with step.watch.at_the_seams():
            step.take()
        watches.append(step.watch)
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        step.watch = counted = Stopwatch(counter)
        with counted.at_the_seams():
            step.take()
    step.watch = Stopwatch()
    with step.watch.at_the_seams(), Operations(step.watch, counter.flop_registry) as operations:
        step.take()
    return {
        phase: Phase(
            statistics.median(watch.seconds[phase] for watch in watches),
            counted.flop[phase],
            sum(call.seconds() * times for call, times in operations.products[phase].items()),
            operations.count[phase],
            operations.nbytes[phase],
        )
        for phase in PHASES
    }


LARGE = ((1024, 1024, 1024), (2048, 2048, 2048), (522, 384, 1152), (522, 1152, 384), (4096, 384, 1152))
"""Squares, and weights of the model of `rl_step.py` under a pass of two prompts and of many."""


def gemm_peak(shapes: Iterable[tuple[int, int, int]] = LARGE, repeats: int = 5) -> tuple[float, str]:
    """FLOP per CPU second of the fastest float32 product [m, k] · [k, n] of one thread, and which one that was."""
    torch.set_num_threads(1)
    found = []
    for m, k, n in shapes:
        x, weight = torch.randn(m, k), torch.randn(n, k)
        ways: dict[str, Callable[[], Any]] = {"torch.mm": partial(torch.mm, x, weight.t())}
        if cpu.is_available():
            packed = mkldnn._reorder_linear_weight.default(weight, m)
            for name, laid in (("oneDNN", weight), ("oneDNN, packed", packed)):
                ways[name] = partial(mkldnn._linear_pointwise.default, x, laid, None, "none", [], "")
        for name, way in ways.items():
            taken = min(_seconds(way) for _ in range(repeats + 1))
            found.append((2.0 * m * k * n / taken, f"{name} {m} x {k} x {n}"))
    return max(found)


def _seconds(work: Callable[[], Any]) -> float:
    """Of the CPU; of a product long enough to be told."""
    began, times = time.process_time(), 0
    while (taken := time.process_time() - began) < 0.02 or not times:
        work()
        times += 1
    return taken / times
