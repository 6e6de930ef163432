"""The rollout engine: one assignment in, scored groups out. No Ray.

    load version → encode prompts → generate groups → reference log-probs → rewards → states, sight, where asked for

Prompts may be made in processes of their own: those of the assignment that is expected next, while this one decodes.

What samples is a `GenerationEngine`; prompts, reference log-probs and states are the `Scorer`'s, whatever samples.

A sample that cannot be encoded is a `DataFailure` and the others go on; a completion whose reward fails is masked with
its reason, and a group that has none left; anything else that goes wrong is raised, and belongs to the worker rather
than to a sample.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from mmrl_ray.analysis.sight import Eyes, Seen, look
from mmrl_ray.config.reward import RewardSection
from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import MMRLError
from mmrl_ray.experience.carriers import (
    CaptionState,
    Completion,
    EncodedPrompt,
    RewardFailure,
    RolloutGroup,
    Score,
    ScoredGroup,
)
from mmrl_ray.losses.regularizers import kl_penalty
from mmrl_ray.policy.generation.base import DecodeRequest, GenerationEngine, GroupOutput
from mmrl_ray.policy.prompts import without_pixels
from mmrl_ray.rewards.base import RewardFn, score_with_retry
from mmrl_ray.rollouts.scorer import Scorer
from mmrl_ray.rollouts.types import Assignment, AssignmentResult, DataFailure, FetchWeights, GroupRequest

if TYPE_CHECKING:
    from mmrl_ray.rollouts.teacher import TeacherClient  # needs Ray, which engines do not


@dataclass(frozen=True, slots=True)
class Sampled:
    """A request, and what came of it."""

    request: GroupRequest
    prompt: EncodedPrompt
    output: GroupOutput
    state: CaptionState | None = None
    sight: Mapping[str, float] = field(default_factory=dict)


class RolloutEngine:
    """Samples and scores; keeps the adapter version it has loaded."""

    def __init__(
        self,
        generator: GenerationEngine,
        scorer: Scorer,
        reward: RewardFn,
        *,
        worker: str,
        reward_cfg: RewardSection,
        ship_vision_bytes: int,
        takes_turns: bool = False,
        teacher: TeacherClient | None = None,
    ) -> None:
        """Features of an assignment travel with its groups if they are no more than `ship_vision_bytes` altogether.

        With `takes_turns` a learner uses the same device between assignments, and is left what they took of it. A
        `teacher` scores completions in the place of the reference policy.
        """
        self._generator = generator
        self._scorer = scorer
        self._reward = reward
        self._worker = worker
        self._reward_cfg = reward_cfg
        self._ship_vision_bytes = ship_vision_bytes
        self._takes_turns = takes_turns
        self._teacher = teacher
        self._version: int | None = None

    def run(self, assignment: Assignment, fetch: FetchWeights) -> AssignmentResult:
        """Groups in the order of the assignment, each `payload` its `RolloutGroup`.

        Args:
            fetch: gets the weights of `assignment.version`; called only when another version is loaded.

        Raises:
            MMRLError: the weights do not fit the adapter, or the model gives NaN: no sample is to blame.
        """
        try:
            result = self._run(assignment, fetch)
        except Exception:
            if self._takes_turns:
                with suppress(MMRLError):  # an engine that is gone says so, which is not what went wrong
                    self._generator.give_back()
            raise
        if self._takes_turns:  # nothing but the result is left by now, and that lies on the CPU
            self._generator.give_back()
        return result

    def prepare(self, samples: Sequence[Sample]) -> None:
        """These may come next: their prompts are made meanwhile, where processes do that."""
        self._scorer.prepare(samples)

    def _run(self, assignment: Assignment, fetch: FetchWeights) -> AssignmentResult:
        seconds: dict[str, float] = {}
        with _timed(seconds, "load"):
            self._load(assignment.version, fetch)
        with _timed(seconds, "encode"):
            self._scorer.prepare([*assignment.samples, *assignment.ahead])
            prompts, failures = self._encode(assignment.groups, again=assignment.kind == "aside")
        with _timed(seconds, "sample"):
            sampled = self._decode(prompts, greedy=assignment.greedy_baseline)
        with _timed(seconds, "reference"):
            if assignment.reference_logprobs and sampled:
                sampled, unread = self._with_reference(sampled)
                failures += unread
        with _timed(seconds, "reward"):
            scores = self._score(sampled)
        if any(each.request.wants_state for each in sampled):
            with _timed(seconds, "states"):
                sampled = self._with_states(sampled)
        if any(each.request.other is not None for each in sampled):
            with _timed(seconds, "sight"):
                sampled = self._with_sight(sampled, scores)
        counters = {**self._scorer.counters(), **self._generator.counters()}
        groups = [
            self._scored(assignment.version, each, score, seconds) for each, score in zip(sampled, scores, strict=True)
        ]
        return AssignmentResult(
            assignment_id=assignment.id,
            version=assignment.version,
            worker=self._worker,
            groups=tuple(self._shipped(groups, counters)),
            failures=tuple(failures),
            timings=seconds,
        )

    def _load(self, version: int, fetch: FetchWeights) -> None:
        if version == self._version:
            return
        self._version = None  # whatever goes wrong in between, the next assignment loads again
        weights = fetch()
        self._generator.load(version, weights)
        self._scorer.load(version, weights)
        self._version = version

    def _encode(
        self, requests: Sequence[GroupRequest], *, again: bool
    ) -> tuple[list[tuple[GroupRequest, EncodedPrompt]], list[DataFailure]]:
        prompts, failures = [], []
        for request in requests:
            try:
                prompt = self._scorer.encode(request.sample, request.sampling.max_new_tokens, again=again)
                prompt = self._generator.prepared(prompt, request.sample)
                self._check(request)
            except MMRLError as error:
                reason = f"{type(error).__name__}: {error}"
                failures.append(DataFailure(request.key, request.sample.id, reason))
            else:
                prompts.append((request, prompt))
        return prompts, failures

    def _check(self, request: GroupRequest) -> None:
        """Raises an MMRLError where what a sample brings beside its prompt, if anything, cannot be used."""

    def _decode(self, prompts: Sequence[tuple[GroupRequest, EncodedPrompt]], *, greedy: bool) -> list[Sampled]:
        if not prompts:
            return []
        encoded = [prompt for _, prompt in prompts]
        self._scorer.check_path(encoded)
        requests = [DecodeRequest(prompt, r.completions, r.sampling, greedy_extra=greedy) for r, prompt in prompts]
        outputs = self._generator.generate(requests)
        if not self._generator.capabilities.vision_features:
            features = self._scorer.features(encoded)
            outputs = [replace(o, vision=None if features is None else features[i]) for i, o in enumerate(outputs)]
        if not self._generator.capabilities.greedy_logprobs:
            outputs = self._scorer.with_greedy_logprobs(requests, outputs)
        return [Sampled(r, prompt, output) for (r, prompt), output in zip(prompts, outputs, strict=True)]

    def _with_reference(self, sampled: Sequence[Sampled]) -> tuple[list[Sampled], list[DataFailure]]:
        """With log-probs of the reference, or of the teacher; and the samples that the teacher cannot read."""
        temperature, outputs = sampled[0].request.sampling.temperature, [s.output for s in sampled]
        logprobs: Sequence[list[torch.Tensor] | str]
        if self._teacher is not None:
            tokens = [[c.token_ids for c in output.completions] for output in outputs]
            logprobs = self._teacher.logprobs([s.request.sample for s in sampled], tokens, temperature)
        else:
            logprobs = self._scorer.reference_logprobs([s.prompt for s in sampled], outputs, temperature)
        done: list[Sampled] = []
        unread: list[DataFailure] = []
        for each, rows in zip(sampled, logprobs, strict=True):
            if isinstance(rows, str):
                unread.append(DataFailure(each.request.key, each.request.sample.id, rows))
            else:
                completions = _referenced(each.output.completions, rows)
                done.append(replace(each, output=replace(each.output, completions=completions)))
        return done, unread

    def _with_states(self, sampled: Sequence[Sampled]) -> list[Sampled]:
        """The states of the first completions, where they are asked for."""
        wanted = [s for s in sampled if s.request.wants_state]
        states = iter(self._scorer.states([s.prompt for s in wanted], [s.output for s in wanted]))
        return [replace(each, state=next(states)) if each.request.wants_state else each for each in sampled]

    def _with_sight(self, sampled: Sequence[Sampled], scores: Sequence[Sequence[Score]]) -> list[Sampled]:
        """What the policy makes of other pictures than their own, where that is asked for."""
        sampling = next(each.request.sampling for each in sampled if each.request.other is not None)

        def encode(sample: Sample) -> EncodedPrompt:
            return self._scorer.encode(sample, sampling.max_new_tokens, again=True)

        def captions(prompts: Sequence[EncodedPrompt], samples: Sequence[Sample]) -> list[Completion]:
            prepared = [self._generator.prepared(p, s) for p, s in zip(prompts, samples, strict=True)]
            outputs = self._generator.generate([DecodeRequest(prompt, 1, sampling) for prompt in prepared])
            return [output.completions[0] for output in outputs]

        eyes = Eyes(
            encode,
            captions,
            self._scorer.caption_tokens,
            lambda prompts, tokens: self._scorer.policy_logprobs(prompts, tokens, sampling.temperature),
            sampling.max_new_tokens,
            self._rewarded,
        )
        seen = [
            Seen(each.request.sample, each.request.other, each.prompt, each.output.completions[0], earned[0])
            for each, earned in zip(sampled, scores, strict=True)
            if each.request.other is not None
        ]
        found = iter(look(eyes, seen))
        return [each if each.request.other is None else replace(each, sight=next(found)) for each in sampled]

    def _rewarded(self, samples: Sequence[Sample], captions: Sequence[str]) -> list[Score]:
        limits = self._reward_cfg
        return score_with_retry(self._reward, samples, captions, timeout_s=limits.timeout_s, retries=limits.retries)

    def _score(self, sampled: Sequence[Sampled]) -> list[list[Score]]:
        """All captions of the assignment in one batch; per group, its completions' scores, then the greedy one's."""
        captions = [[c.caption for c in _all_completions(each.output)] for each in sampled]
        flat = self._rewarded(
            [each.request.sample for each, group in zip(sampled, captions, strict=True) for _ in group],
            [text for group in captions for text in group],
        )
        scores = iter(flat)
        return [[next(scores) for _ in group] for group in captions]

    def _scored(
        self, version: int, sampled: Sampled, scores: Sequence[Score], seconds: Mapping[str, float]
    ) -> ScoredGroup:
        request, output = sampled.request, sampled.output
        rewards = tuple(scores[: len(output.completions)])
        reasons = [score.reason for score in rewards if isinstance(score, RewardFailure)]
        masked = reasons[0] if len(reasons) == len(rewards) else None
        return ScoredGroup(
            key=request.key,
            sample_id=request.sample.id,
            policy_version=version,
            prompt_tokens=sampled.prompt.input_ids.numel(),
            completion_tokens=tuple(c.token_ids.numel() for c in output.completions),
            rewards=() if masked is not None else rewards,
            greedy_reward=None if masked is not None or output.greedy is None else scores[-1],
            kl1=tuple(
                kl_penalty(c.logprobs, c.reference_logprobs)
                for c in output.completions
                if c.reference_logprobs is not None
            ),
            masked=masked,
            truncated=tuple(c.finish_reason == "length" for c in output.completions),
            payload=RolloutGroup(
                sample=request.sample,
                prompt=sampled.prompt,
                completions=output.completions,
                policy_version=version,
                sampling=request.sampling,
                greedy=output.greedy,
                vision=output.vision,
                state=sampled.state,
            ),
            worker=self._worker,
            timings=seconds,
            counters={"finished": sum(c.finish_reason == "stop" for c in output.completions)},
            sight=sampled.sight,
        )

    def _shipped(self, groups: Sequence[ScoredGroup], counters: Mapping[str, float]) -> Iterator[ScoredGroup]:
        """Groups as they travel: with their vision features if those are small enough, and without their pixels.

        The learner can make both again from the sample's image files, the smallest of the three. The assignment's
        counters go on its first group, the path on every one.
        """
        nbytes = sum(g.payload.vision.nbytes for g in groups if g.payload.vision is not None)
        ships = self._scorer.ships_vision and nbytes <= self._ship_vision_bytes
        for i, group in enumerate(groups):
            payload: RolloutGroup = group.payload
            vision = payload.vision.cpu() if ships and payload.vision is not None else None
            payload = replace(payload, prompt=without_pixels(payload.prompt), vision=vision)
            own = {name: value for name, value in counters.items() if i == 0 or name == "naive_path"}
            yield replace(group, payload=payload, counters={**group.counters, **own})


def _all_completions(output: GroupOutput) -> tuple[Completion, ...]:
    return (*output.completions, output.greedy) if output.greedy is not None else output.completions


def _referenced(completions: Sequence[Completion], rows: Sequence[torch.Tensor]) -> tuple[Completion, ...]:
    return tuple(replace(c, reference_logprobs=row) for c, row in zip(completions, rows, strict=True))


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    began = time.perf_counter()
    try:
        yield
    finally:
        seconds[phase] = time.perf_counter() - began
