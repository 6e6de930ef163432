"""The engine around a generation engine, a scorer and a reward that are told what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from mmrl_ray.config.reward import RewardSection
from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import ConfigError, ContextLengthError, ImageError, ModelError, ProcessError, RewardError
from mmrl_ray.experience.carriers import (
    Completion,
    EncodedPrompt,
    GroupKey,
    RewardBreakdown,
    RewardFailure,
    SamplingParams,
    Score,
    VisionFeatures,
)
from mmrl_ray.experience.schema import group_rows
from mmrl_ray.policy.generation.base import Capabilities, DecodeRequest, GenerationEngine, GroupOutput
from mmrl_ray.rewards.base import TruncatedCaption
from mmrl_ray.rollouts.engine import RolloutEngine
from mmrl_ray.rollouts.types import Assignment, GroupRequest
from tests.unit.rollouts.fakes import samples

WEIGHTS = {"w": torch.ones(1)}


def as_made() -> None:
    """The weights of version 0: none."""


def trained() -> dict[str, torch.Tensor]:
    return WEIGHTS


@dataclass
class FakeGenerator(GenerationEngine):
    """A completion's text is "<sample> <place>"; its tokens are as many as its place plus 1."""

    name = "fake"
    capabilities = Capabilities(True, True, True, True, True)
    loads: list[Mapping[str, torch.Tensor] | None] = field(default_factory=list)
    load_error: Exception | None = None
    passes: list[int] = field(default_factory=list)

    def load(self, version: int, weights: Mapping[str, torch.Tensor] | None) -> None:
        if self.load_error is not None:
            raise self.load_error
        self.loads.append(weights)

    def _generate(self, requests: Sequence[DecodeRequest]) -> list[GroupOutput]:
        self.passes.append(len(requests))
        return [
            GroupOutput(
                completions=tuple(self._completion(r.prompt.image_key, i) for i in range(r.n)),
                greedy=self._completion(r.prompt.image_key, 9) if r.greedy_extra else None,
                vision=VisionFeatures(torch.zeros(4, 8)),
            )
            for r in requests
        ]

    def _completion(self, name: str, place: int) -> Completion:
        tokens = torch.arange(place + 1)
        reason = "stop" if place % 2 == 0 else "length"
        return Completion(tokens, -tokens.float(), f"{name} {place}", reason)  # type: ignore[arg-type]


@dataclass
class FakeScorer:
    """The reference says 0.25 · temperature less of every token."""

    ships_vision: bool = True
    refused: Mapping[str, Exception] = field(default_factory=dict)
    loads: list[tuple[int, Mapping[str, torch.Tensor] | None]] = field(default_factory=list)

    def load(self, version: int, weights: Mapping[str, torch.Tensor] | None) -> None:
        self.loads.append((version, weights))

    def prepare(self, samples: Sequence[Sample]) -> None:
        self.prepared = [sample.id for sample in samples]

    def encode(self, sample: Sample, max_new_tokens: int, *, again: bool = False) -> EncodedPrompt:
        if sample.id in self.refused:
            raise self.refused[sample.id]
        return EncodedPrompt(torch.arange(7), {"pixel_values": torch.ones(2), "grid": torch.ones(1)}, sample.id)

    def check_path(self, prompts: Sequence[EncodedPrompt]) -> None:
        assert prompts

    def features(self, prompts: Sequence[EncodedPrompt]) -> list[VisionFeatures]:
        return [VisionFeatures(torch.ones(4, 8)) for _ in prompts]

    def reference_logprobs(
        self, prompts: Sequence[EncodedPrompt], outputs: Sequence[GroupOutput], temperature: float
    ) -> list[list[torch.Tensor]]:
        return [[c.logprobs - 0.25 * temperature for c in output.completions] for output in outputs]

    def counters(self) -> dict[str, float]:
        return {"vision_hits": 3, "vision_misses": 1, "naive_path": 1}


@dataclass
class FakeReward:
    """A caption earns its place; one that is told to fails, always or so many times."""

    fails_for: str = ""
    times: int = 1_000_000
    batches: list[int] = field(default_factory=list)
    cut_off: set[str] = field(default_factory=set)

    def score_batch(self, samples: Sequence[Sample], captions: Sequence[str]) -> list[RewardBreakdown]:
        self.batches.append(len(captions))
        self.cut_off |= {caption for caption in captions if isinstance(caption, TruncatedCaption)}
        assert all(caption.startswith(sample.id) for sample, caption in zip(samples, captions, strict=True))
        if self.fails_for in {sample.id for sample in samples} and self.times > 0:
            self.times -= 1
            raise RewardError(f"{self.fails_for} has no references")
        totals = [float(caption.split()[-1]) for caption in captions]
        return [RewardBreakdown(total, {"place": total}, {"place": 1.0}) for total in totals]


def engine(
    generator: FakeGenerator | None = None,
    scorer: FakeScorer | None = None,
    reward: FakeReward | None = None,
    *,
    ship: int = 10**6,
    kind: type[RolloutEngine] = RolloutEngine,
    teacher: Any = None,
) -> RolloutEngine:
    scored: Any = scorer or FakeScorer()
    section = RewardSection(retries=0, timeout_s=5.0)
    parts = (generator or FakeGenerator(), scored, reward or FakeReward())
    return kind(*parts, worker="w7", reward_cfg=section, ship_vision_bytes=ship, teacher=teacher)


def assignment(version: int = 0, *, count: int = 3, greedy: bool = False, reference: bool = False) -> Assignment:
    groups = tuple(
        GroupRequest(GroupKey(4, i, i), sample, SamplingParams(temperature=2.0), completions=2)
        for i, sample in enumerate(samples(count))
    )
    return Assignment(11, "train", groups, version, (), greedy, reference)


def test_groups_come_back_in_order_with_everything_the_learner_needs() -> None:
    result = engine().run(assignment(version=5, greedy=True, reference=True), trained)
    assert (result.assignment_id, result.version, result.worker, result.failures) == (11, 5, "w7", ())
    assert [g.key for g in result.groups] == [GroupKey(4, i, i) for i in range(3)]
    group = result.groups[1]
    assert (group.sample_id, group.policy_version, group.prompt_tokens) == ("sample-001", 5, 7)
    assert group.completion_tokens == (1, 2)
    assert [r.total for r in group.rewards] == [0.0, 1.0]
    assert group.greedy_reward is not None
    assert group.greedy_reward.total == 9.0
    # behaviour − reference = 0.25 · temperature a token, of 1 and 2 tokens
    assert group.kl1 == pytest.approx((0.5, 1.0))
    assert group.payload.policy_version == 5
    assert group.payload.greedy.text == "sample-001 9"
    assert torch.equal(group.payload.completions[1].reference_logprobs, torch.tensor([-0.5, -1.5]))
    assert set(result.timings) == {"load", "encode", "sample", "reference", "reward"}


def test_an_engine_that_cannot_give_back_does_not_hide_what_went_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = FakeGenerator()
    monkeypatch.setattr(generator, "give_back", Mock(side_effect=ProcessError("the engine is not running any more")))
    parts: tuple[Any, ...] = (generator, FakeScorer(), FakeReward())
    section = RewardSection(retries=0, timeout_s=5.0)
    made = RolloutEngine(*parts, worker="w7", reward_cfg=section, ship_vision_bytes=0, takes_turns=True)
    with pytest.raises(ProcessError, match="not running"):  # a learner would find no room
        made.run(assignment(), as_made)
    monkeypatch.setattr(generator, "generate", Mock(side_effect=ModelError("NaN")))
    with pytest.raises(ModelError, match="NaN"):
        made.run(assignment(), as_made)


def test_the_reward_can_tell_which_captions_were_cut_off() -> None:
    reward = FakeReward()
    engine(reward=reward).run(assignment(greedy=True), as_made)
    assert reward.cut_off == {f"{sample.id} {place}" for sample in samples(3) for place in (1, 9)}


def test_without_reference_and_greedy_there_is_neither() -> None:
    group = engine().run(assignment(), as_made).groups[0]
    assert group.kl1 == ()
    assert group.greedy_reward is None
    assert group.payload.greedy is None
    assert group.payload.completions[0].reference_logprobs is None


def test_counters_of_the_assignment_are_on_its_first_group() -> None:
    first, second, _ = engine().run(assignment(), as_made).groups
    assert first.counters == {"finished": 1, "vision_hits": 3, "vision_misses": 1, "naive_path": 1}
    assert second.counters == {"finished": 1, "naive_path": 1}


def test_a_version_is_loaded_once() -> None:
    generator, scorer = FakeGenerator(), FakeScorer()
    worker = engine(generator, scorer)
    for version, fetch in ((0, as_made), (0, as_made), (1, trained), (1, trained), (0, as_made)):
        worker.run(assignment(version), fetch)
    assert generator.loads == [None, WEIGHTS, None]
    assert scorer.loads == [(0, None), (1, WEIGHTS), (0, None)]


def test_after_a_failed_load_the_next_assignment_loads_again() -> None:
    generator = FakeGenerator()
    worker = engine(generator)
    worker.run(assignment(1), trained)
    generator.load_error = ModelError("does not fit")
    with pytest.raises(ModelError, match="does not fit"):
        worker.run(assignment(2), trained)
    generator.load_error = None
    worker.run(assignment(1), trained)
    assert len(generator.loads) == 2


def test_a_sample_that_cannot_be_encoded_is_a_failure_and_the_others_go_on() -> None:
    refused = {"sample-000": ImageError("not a PNG"), "sample-002": ContextLengthError("900 tokens")}
    generator = FakeGenerator()
    result = engine(generator, FakeScorer(refused=refused)).run(assignment(), as_made)
    assert [g.sample_id for g in result.groups] == ["sample-001"]
    assert [(f.key, f.sample_id, f.reason) for f in result.failures] == [
        (GroupKey(4, 0, 0), "sample-000", "ImageError: not a PNG"),
        (GroupKey(4, 2, 2), "sample-002", "ContextLengthError: 900 tokens"),
    ]
    assert generator.passes == [1]


def test_an_assignment_of_nothing_but_broken_samples() -> None:
    scorer = FakeScorer(refused={f"sample-{i:03d}": ImageError("broken") for i in range(3)})
    generator, reward = FakeGenerator(), FakeReward()
    result = engine(generator, scorer, reward).run(assignment(greedy=True, reference=True), as_made)
    assert (len(result.groups), len(result.failures)) == (0, 3)
    assert generator.passes == []
    assert reward.batches == []


def test_a_group_whose_reward_fails_is_masked_and_never_scored_0() -> None:
    result = engine(reward=FakeReward(fails_for="sample-001")).run(assignment(greedy=True), as_made)
    kept, masked, _ = result.groups
    assert masked.masked == "sample-001 has no references"
    assert masked.rewards == ()
    assert masked.greedy_reward is None
    assert masked.completion_tokens == (1, 2)
    assert kept.masked is None
    assert [r.total for r in kept.rewards] == [0.0, 1.0]


def test_a_completion_whose_reward_fails_is_masked_alone() -> None:
    class Picky(FakeReward):
        def score_batch(self, samples: Sequence[Sample], captions: Sequence[str]) -> list[Score]:
            scores = super().score_batch(samples, captions)
            bad = ("sample-000 0", "sample-001 9")  # a completion, and a greedy one
            return [
                RewardFailure("no number") if caption in bad else score
                for caption, score in zip(captions, scores, strict=True)
            ]

    first, second, third = engine(reward=Picky()).run(assignment(greedy=True), as_made).groups
    assert [g.masked for g in (first, second, third)] == [None] * 3
    assert (first.rewards[0], first.failures) == (RewardFailure("no number"), ("no number",))
    assert [getattr(s, "total", None) for s in (first.rewards[1], first.greedy_reward)] == [1.0, 9.0]
    assert (second.failures, second.greedy_reward) == ((), RewardFailure("no number"))
    rows = {row["completion"]: row for row in group_rows("r", first, first.payload)}
    assert {place: row["masked"] for place, row in rows.items()} == {0: "no number", 1: None, -1: None}
    assert [rows[place]["reward"] for place in (0, 1, -1)] == [None, 1.0, 9.0]


def test_all_captions_are_scored_in_one_batch() -> None:
    reward = FakeReward()
    engine(reward=reward).run(assignment(greedy=True), as_made)
    assert reward.batches == [9]


@pytest.mark.parametrize(("limit", "ships"), [(3 * 4 * 8 * 4, True), (3 * 4 * 8 * 4 - 1, False)])
def test_vision_features_travel_up_to_a_size_and_pixels_never(limit: int, ships: bool) -> None:
    result = engine(ship=limit).run(assignment(), as_made)
    for group in result.groups:
        assert (group.payload.vision is not None) == ships
        assert set(group.payload.prompt.model_inputs) == {"grid"}


def test_features_that_may_not_travel_stay() -> None:
    result = engine(scorer=FakeScorer(ships_vision=False)).run(assignment(), as_made)
    assert all(group.payload.vision is None for group in result.groups)


def test_what_is_no_samples_fault_is_raised() -> None:
    class Broken(FakeGenerator):
        def _generate(self, requests: Sequence[DecodeRequest]) -> list[GroupOutput]:
            raise ModelError("the model's logits are NaN")

    with pytest.raises(ModelError, match="NaN"):
        engine(Broken()).run(replace(assignment(), id=1), as_made)


def test_what_an_engine_cannot_do_is_refused_and_never_left_out() -> None:
    class Plain(FakeGenerator):
        capabilities = Capabilities(False, False, False, False, False)

    generator = Plain()
    with pytest.raises(ConfigError, match=r"the fake engine gives no greedy completion .* another advantage"):
        engine(generator).run(assignment(greedy=True), as_made)
    given = assignment()
    steered = replace(given.groups[0], sampling=SamplingParams(value_beta=0.5))
    with pytest.raises(ConfigError, match=r"the fake engine cannot decode by value heads .* leave beta at 0"):
        engine(generator).run(replace(given, groups=(steered, *given.groups[1:])), as_made)
    assert generator.passes == []


@pytest.mark.parametrize("hands_on", [True, False])
def test_where_the_engine_hands_on_no_features_they_are_the_scorers(hands_on: bool) -> None:
    class Made(FakeGenerator):
        capabilities = replace(FakeGenerator.capabilities, vision_features=hands_on)

    for group in engine(Made()).run(assignment(), as_made).groups:
        assert torch.equal(group.payload.vision.tokens, torch.zeros(4, 8) if hands_on else torch.ones(4, 8))


@dataclass
class FakeTeacher:
    """Says 1 · temperature less of every token, and cannot read one of the samples."""

    asked: list[int] = field(default_factory=list)

    def logprobs(self, samples: Sequence[Sample], completions: Sequence[Any], temperature: float) -> list[Any]:
        self.asked += [len(group) for group in completions]
        found: list[Any] = [[-tokens.float() - temperature for tokens in group] for group in completions]
        return [
            "the teacher cannot read it" if s.id == "sample-001" else f for s, f in zip(samples, found, strict=True)
        ]


def test_a_teacher_stands_in_the_place_of_the_reference() -> None:
    teacher = FakeTeacher()
    result = engine(teacher=teacher).run(assignment(reference=True), as_made)
    assert teacher.asked == [2, 2, 2]
    assert [g.sample_id for g in result.groups] == ["sample-000", "sample-002"]
    assert [(f.sample_id, f.reason) for f in result.failures] == [("sample-001", "the teacher cannot read it")]
    (one, two) = result.groups[0].payload.completions
    assert torch.equal(one.reference_logprobs, torch.tensor([-2.0]))
    assert torch.equal(two.reference_logprobs, torch.tensor([-2.0, -3.0]))
    assert [len(g.rewards) for g in result.groups] == [2, 2]
