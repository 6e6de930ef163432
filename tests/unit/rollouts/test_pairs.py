"""The engine of preferences: stored captions in place of sampled ones, on a fake backend and on a tiny model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmrl_ray.config.reward import RewardSection
from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import DataError, ImageError
from mmrl_ray.experience.carriers import GroupKey, SamplingParams
from mmrl_ray.preferences.dataset import LabelledPair, sample_of
from mmrl_ray.preferences.schema import Pair
from mmrl_ray.rollouts.stored import PairEngine
from mmrl_ray.rollouts.types import Assignment, AssignmentResult, GroupRequest
from tests.unit.learner.worlds import TEMPERATURE, make_policy, reference_logprobs, sample, tiny_folder
from tests.unit.rollouts.test_engine import FakeReward, as_made, assignment
from tests.unit.rollouts.test_engine import engine as faked
from tests.unit.rollouts.test_stored import parts_on

CAPTIONS = (("w1 w2 w3", "w4"), ("w5 w6", "w7 w8 w9 w1"), ("w2", "w3"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


def pair_sample(index: int, captions: tuple[str, str], p: float = 1.0) -> Sample:
    image = sample(index).images[0]
    pair = Pair(f"{index:064d}", sample(index).prompt, *captions, image=image)
    return replace(sample_of(pair, LabelledPair(captions, (p, 1 - p))), id=f"pair{index}")


def run(engine: PairEngine, samples: Sequence[Sample], *, step: int = 0) -> AssignmentResult:
    sampling = SamplingParams(temperature=TEMPERATURE, max_new_tokens=5)
    groups = tuple(GroupRequest(GroupKey(step, i), each, sampling, 2) for i, each in enumerate(samples))
    return engine.run(Assignment(1, "train" if step >= 0 else "eval", groups, 0), as_made)


def engine_on(folder: Path) -> PairEngine:
    parts = parts_on(folder)
    return PairEngine(*parts, FakeReward(), worker="w", reward_cfg=RewardSection(), ship_vision_bytes=2**20)


def test_both_captions_are_scored_under_the_reference_as_on_rows_of_their_own(tiny: Path) -> None:
    engine = engine_on(tiny)
    labels = (1.0, 0.25, 0.5)
    result = run(engine, [pair_sample(i, c, p) for i, (c, p) in enumerate(zip(CAPTIONS, labels, strict=True))])
    assert result.failures == ()
    bare = make_policy(tiny, fresh=True)  # B = 0: the base model
    for scored, captions, p in zip(result.groups, CAPTIONS, labels, strict=True):
        assert [r.total for r in scored.rewards] == [p, 1 - p]
        assert scored.masked is None
        group = scored.payload
        assert [c.text for c in group.completions] == list(captions)
        for completion in group.completions:
            assert completion.token_ids[-1] == bare.end_id
            with torch.no_grad():
                expected = reference_logprobs(bare, group, completion.token_ids)
            torch.testing.assert_close(completion.reference_logprobs, expected, atol=2e-5, rtol=0)
            assert torch.equal(completion.logprobs, completion.reference_logprobs)


def test_an_evaluation_also_asks_the_policy(tiny: Path) -> None:
    engine = engine_on(tiny)
    result = run(engine, [pair_sample(0, CAPTIONS[0])], step=-1)
    policy = make_policy(tiny)
    for completion in result.groups[0].payload.completions:
        with torch.no_grad():
            expected = reference_logprobs(policy, result.groups[0].payload, completion.token_ids)
        torch.testing.assert_close(completion.logprobs, expected, atol=2e-5, rtol=0)
        assert not torch.allclose(completion.logprobs, completion.reference_logprobs, atol=1e-3)


def test_a_pair_that_cannot_be_used_is_told_and_the_others_go_on(tiny: Path) -> None:
    engine = engine_on(tiny)
    long = pair_sample(1, ("w1 w2 w3 w4 w5 w6", "w1"))
    special = pair_sample(2, ("w1 <image>", "w1"))
    broken = replace(pair_sample(3, CAPTIONS[0]), images=(b"no picture",))
    result = run(engine, [pair_sample(0, CAPTIONS[0]), long, special, broken])
    assert [g.sample_id for g in result.groups] == ["pair0"]
    reasons = {failure.sample_id: failure.reason for failure in result.failures}
    assert "has 6 tokens, above rollout.max_new_tokens=5" in reasons["pair1"]
    assert "special token '<image>'" in reasons["pair2"]
    assert reasons["pair3"].startswith(ImageError.__name__)


def test_a_row_that_nobody_wrote_as_a_pair_is_refused(tiny: Path) -> None:
    engine = engine_on(tiny)
    good = pair_sample(0, CAPTIONS[0])
    for wrong in ({"captions": ["one"]}, {"captions": ["a", "b"], "preferred": [1.0, 1.0]}, 3):
        result = run(engine, [good, replace(good, id="bad", metadata={"mmrl_pair": wrong})])
        assert [f.sample_id for f in result.failures] == ["bad"]
        assert result.failures[0].reason.startswith(DataError.__name__)


def test_ordinary_samples_are_sampled_and_rewarded_as_ever() -> None:
    engine = faked(kind=PairEngine)
    assert [[r.total for r in g.rewards] for g in engine.run(assignment(), as_made).groups] == [[0.0, 1.0]] * 3
