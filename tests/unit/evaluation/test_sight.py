"""The blindness alarm: its rule on numbers, and on a policy that looks, with bugs planted into what it looks with.

A tiny policy is trained for seconds to name the two colours of a picture, left and right. Its worker is the product's
own rollout engine; what it learns between looks is plain supervised steps.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmrl_ray.analysis.sight import arrange
from mmrl_ray.config.reward import RewardSection
from mmrl_ray.config.sections import LoraSection, ModelSection
from mmrl_ray.data.samples import Sample
from mmrl_ray.evaluation.looking import policy_sight
from mmrl_ray.evaluation.sight import Sight, look_line
from mmrl_ray.experience.carriers import GroupKey, RewardBreakdown, SamplingParams, Score
from mmrl_ray.policy.generation.local import LocalEngine
from mmrl_ray.policy.load import load_policy
from mmrl_ray.policy.lora.adapter import adapter_state, add_adapter, load_adapter_state
from mmrl_ray.policy.lora.routing import VersionedPolicy
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.prompts import encode_caption, encode_prompts
from mmrl_ray.policy.scoring.prefix import score_completions
from mmrl_ray.policy.tiny import build_tiny_llava
from mmrl_ray.policy.vision import VisionCache
from mmrl_ray.rollouts.engine import RolloutEngine
from mmrl_ray.rollouts.scorer import Scorer
from mmrl_ray.rollouts.types import Assignment, GroupRequest
from tests.support.blinded import features, positions, swapped, zeroed

COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220), "green": (30, 180, 30), "white": (230, 230, 230)}
EVERY, LOOKED_AT = 2, 24
STEPS = 260
MIN_GAP, KEEP = 0.01, 0.25
GREEDY = SamplingParams(greedy=True, max_new_tokens=8)


# -- the rule ----------------------------------------------------------------------------------------------------------


def sight(reference: Sequence[float], caption: Sequence[float], seed: int = 0) -> Sight:
    """A look with such gaps of each sample."""
    rows = [
        {"reference/own": -1.0, "reference/other": -1.0 - r, "caption/own": -0.5, "caption/other": -0.5 - c}
        for r, c in zip(reference, caption, strict=True)
    ]
    return Sight(tuple(rows), seed)


def test_gaps_have_the_intervals_of_a_bootstrap_over_samples() -> None:
    """Against NumPy, and against the normal distribution that means of many samples have."""
    rng = np.random.default_rng(0)
    gaps = rng.normal(0.5, 1.0, 400)
    found = sight(gaps, gaps + 1.0).gaps
    assert found.keys() == {"gap_logprob", "gap_caption"}
    error = gaps.std() / math.sqrt(400)
    assert found["gap_logprob"].mean == pytest.approx(gaps.mean())
    assert found["gap_logprob"].low == pytest.approx(gaps.mean() - 1.96 * error, abs=0.15 * error)
    assert found["gap_caption"].high == pytest.approx(gaps.mean() + 1.0 + 1.96 * error, abs=0.15 * error)


@pytest.mark.parametrize(
    ("reference", "caption", "reasons"),
    [
        (0.5, 0.5, []),
        (0.0, 0.5, ["references are no likelier"]),
        (-0.5, 0.5, ["references are no likelier"]),
        (0.5, 0.0, ["its own greedy captions are no likelier"]),
        (0.005, 0.5, ["references are no likelier"]),
        (0.0, 0.0, ["references are no likelier", "its own greedy captions are no likelier"]),
        (0.11, 0.5, ["of what the own picture is worth to the references, 22% of the first look's is left"]),
        (0.14, 0.5, []),
    ],
)
def test_a_policy_is_blind_where_either_gap_is_not_above_the_least(
    reference: float, caption: float, reasons: list[str]
) -> None:
    spread = np.linspace(-0.01, 0.01, 48)
    found = sight(reference + spread, caption + spread).blind(MIN_GAP, {"gap_logprob": list(0.5 + spread)}, KEEP)
    assert [each[: len(reason)] for each, reason in zip(found, reasons, strict=True)] == reasons


@pytest.mark.parametrize(
    ("first", "now", "reason"),
    [
        (0.5, 0.5, None),
        (0.5, 0.05, "of what the places of things are worth to the references, 10% of the first look's is left"),
        (0.5, -0.3, "references are likelier with their picture upside down"),
        (0.005, 0.0, None),  # references that do not say where things are
        (0.0, -0.005, None),
    ],
)
def test_a_policy_that_sees_things_at_wrong_places_is_found_where_references_tell_places(
    first: float, now: float, reason: str | None
) -> None:
    spread = np.linspace(-0.01, 0.01, 48)
    looks = []
    for gap in (first, now):
        rows = [{**row, "reference/turned": -1.0 - gap - s} for row, s in
                zip(sight(0.5 + spread, 0.5 + spread).rows, spread, strict=True)]  # fmt: skip
        looks.append(Sight(tuple(rows)))
    found = looks[1].blind(MIN_GAP, {"gap_places": looks[0].differences("gap_places")}, KEEP)
    assert [each[: len(reason or "")] for each in found] == ([reason] if reason else [])


@pytest.mark.parametrize(("z", "least", "most"), [(0.0, 0.94, 1.0), (3.0, 0.09, 0.22), (5.5, 0.0, 0.01)])
def test_false_alarms_are_as_rare_as_is_said(z: float, least: float, most: float) -> None:
    """Φ(1.96 − z) of looks at 48 samples: 97.5 %, 15 % and 0.02 %."""
    rng = np.random.default_rng(1)
    looks = [sight(rng.normal(MIN_GAP + z / math.sqrt(48), 1.0, 48), np.full(48, 9.0), seed=i) for i in range(300)]
    assert least <= sum(bool(look.blind(MIN_GAP)) for look in looks) / 300 <= most


def test_looks_running_are_counted_and_the_first_is_what_later_ones_are_held_against() -> None:
    spread = np.linspace(-0.01, 0.01, 48)
    lines: list[dict[str, Any]] = []
    for step, gap in enumerate((0.5, 0.0, 0.4, 0.0, 0.0, 0.0)):
        lines.append(look_line(step, sight(gap + spread, 1.0 + spread), lines, min_gap=MIN_GAP, keep=KEEP))
    assert [line["running"] for line in lines] == [0, 1, 0, 1, 2, 3]
    assert lines[0]["blind/gap_logprob"] == pytest.approx(0.5)
    assert Sight(({}, {})).blind(MIN_GAP, {"gap_logprob": [0.5, 0.5]}, KEEP) == [], "nothing is known"


# -- a policy that looks ---------------------------------------------------------------------------------------------


def pictures(count: int, seed: int) -> list[Sample]:
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        left, right = rng.choice(list(COLOURS), 2, replace=False)
        pixels = np.zeros((24, 24, 3))
        pixels[:, :12], pixels[:, 12:] = COLOURS[left], COLOURS[right]
        buffer = io.BytesIO()
        noisy = np.clip(pixels + rng.normal(0, 20, pixels.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(buffer, "PNG")
        found.append(Sample(f"{i}", (buffer.getvalue(),), "describe it .", (f"{left} left of {right} .",)))
    return found


HELD_OUT = pictures(80, seed=7)


def teach(policy: Policy, samples: Sequence[Sample], steps: int, *, seed: int, lr: float = 3e-3) -> None:
    """Supervised steps on the references, of whatever parameters train."""
    trained = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr)
    prompts = encode_prompts(policy, samples)
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        drawn = rng.integers(0, len(samples), 16)
        captions = [[encode_caption(policy, samples[i].references[0])] for i in drawn]
        scores = score_completions(policy, [prompts[i] for i in drawn], None, captions, 1.0)
        optimizer.zero_grad()
        (-scores.logprobs.sum() / scores.mask.sum()).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()


@dataclass
class Pair:
    """A worker's policy and a learner's, of one model that looks."""

    worker: Policy
    learner: Policy
    untaught: dict[str, torch.Tensor]
    """The adapter's weights as they are made."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = build_tiny_llava(
        Path(tmp_path_factory.mktemp("tiny")),
        vocabulary=[f"describe it . left of {' '.join(COLOURS)}"],
        image_size=24, patch_size=8, hidden=32, layers=2, vision_hidden=32, vision_layers=1, initializer_range=0.15,
    )  # fmt: skip
    section = ModelSection(path=str(folder), dtype="float32")
    policy = load_policy(section, device="cpu")
    policy.model.requires_grad_(True)
    teach(policy, pictures(128, seed=1), STEPS, seed=2)
    policy.hf_model.save_pretrained(folder)
    worker, learner = (load_policy(section, device="cpu") for _ in range(2))
    for each in (worker, learner):
        add_adapter(each, LoraSection(), seed=0)
    yield Pair(worker, learner, {name: tensor.clone() for name, tensor in adapter_state(learner.model).items()})
    torch.set_num_threads(threads)


@pytest.fixture
def pair(made: Pair) -> Pair:
    load_adapter_state(made.learner.model, made.untaught)
    return made


class Words:
    """The share of a reference's words, in their places."""

    def score_batch(self, samples: Sequence[Sample], captions: Sequence[str]) -> list[Score]:
        pairs = [(s.references[0].split(), c.split()) for s, c in zip(samples, captions, strict=True)]
        right = [sum(a == b for a, b in zip(*pair, strict=False)) / len(pair[0]) for pair in pairs]
        return [RewardBreakdown(value, {"words": value}, {"words": 1.0}) for value in right]


class Run:
    """A worker that looks at a policy every other step of learning."""

    def __init__(self, pair: Pair, seed: int = 0) -> None:
        versions, cache = VersionedPolicy(pair.worker), VisionCache(1 << 20)
        self.pair, self.seed, self.cache = pair, seed, cache
        self.engine = RolloutEngine(
            LocalEngine(versions, cache, max_rows=64, prefill_tokens=4096),
            Scorer(versions, cache, temperature=1.0),
            Words(),
            worker="w",
            reward_cfg=RewardSection(),
            ship_vision_bytes=0,
        )
        self.pairs = arrange(HELD_OUT, LOOKED_AT, seed).pairs
        self.lines: list[dict[str, Any]] = []

    def look(self, step: int) -> dict[str, Any]:
        requests = [GroupRequest(GroupKey(-1, i), a, GREEDY, 1, other=b) for i, (a, b) in enumerate(self.pairs)]
        state = adapter_state(self.pair.learner.model)
        groups = [
            group
            for part in (requests[:16], requests[16:])
            for group in self.engine.run(Assignment(step, "aside", tuple(part), step), lambda: state).groups
        ]
        seen = Sight(tuple(group.sight for group in groups), self.seed)
        self.lines.append(look_line(step, seen, self.lines, min_gap=MIN_GAP, keep=KEEP))
        return self.lines[-1]

    def alarm_after(self, steps: int, learn: Any, planted: AbstractContextManager[None]) -> int | None:
        """Steps after which an alarm came; the bug is there from after the first look."""
        self.look(0)
        self.cache.clear()
        with planted:
            for step in range(EVERY, steps + 1, EVERY):
                learn(step)
                if self.look(step)["running"] >= 2:
                    return step
        return None


def rest(step: int) -> None:
    pass


def test_zeroed_features_are_found(pair: Pair) -> None:
    run = Run(pair)
    assert run.alarm_after(8, rest, features(zeroed)) == 2 * EVERY
    last = run.lines[-1]
    assert [last[f"blind/{name}"] for name in ("gap_logprob", "gap_caption", "gap_reward")] == [0.0] * 3
    assert len(last["blind"]) == 2


def test_swapped_pictures_are_found_by_references_alone(pair: Pair) -> None:
    run = Run(pair)
    assert run.alarm_after(8, rest, features(swapped)) == 2 * EVERY
    last = run.lines[-1]
    assert last["intervals"]["gap_logprob"]["low"] < 0
    assert last["intervals"]["gap_caption"]["low"] > 0.1, "it says of the wrong picture what is true of that"
    assert last["intervals"]["gap_reward"]["low"] <= 0


def test_wrong_positions_are_found_by_references_that_tell_places(pair: Pair) -> None:
    run = Run(pair)
    assert run.alarm_after(8, rest, positions(pair.worker)) == 2 * EVERY, run.lines[-1]
    assert run.lines[0]["intervals"]["gap_places"]["low"] > 0.1
    last = run.lines[-1]
    assert last["intervals"]["gap_places"]["high"] < 0
    assert any("upside down" in reason for reason in last["blind"])


def test_a_policy_that_learns_to_ignore_the_picture_is_found(pair: Pair) -> None:
    """Pictures are swapped in what it learns from, and there alone: nothing is left to learn but to ignore them."""
    right = pictures(64, seed=1)
    wrong = [replace(sample, references=right[(i + 5) % 64].references) for i, sample in enumerate(right)]
    run = Run(pair)
    found = run.alarm_after(40, lambda step: teach(pair.learner, wrong, 10, seed=step, lr=1e-2), nullcontext())
    assert found is not None, run.lines[-1]
    assert run.lines[0]["blind"] == []


def test_clean_runs_are_not_alarmed(pair: Pair) -> None:
    """Twenty, each with samples and steps of its own."""
    right = pictures(32, seed=1)
    for seed in range(20):
        load_adapter_state(pair.learner.model, pair.untaught)
        run = Run(pair, seed)
        run.look(0)
        teach(pair.learner, right, EVERY, seed=seed)
        run.look(EVERY)
        assert not any(line["blind"] for line in run.lines), (seed, run.lines)


def test_an_evaluation_sees_what_workers_see(pair: Pair) -> None:
    """The same figures without a worker; and on samples that cannot be told apart none."""
    line = Run(pair).look(0)
    found, arranged = policy_sight(pair.worker, HELD_OUT, max_new_tokens=8, count=LOOKED_AT, reward=Words())
    assert len(arranged.pairs) == LOOKED_AT
    figures = {name.removeprefix("blind/"): value for name, value in line.items() if name.startswith("blind/")}
    assert {name: gap.mean for name, gap in found.gaps.items()} == pytest.approx(figures, abs=1e-4)
    nothing, _ = policy_sight(pair.worker, HELD_OUT[:1], max_new_tokens=8)
    assert (nothing.samples, nothing.gaps) == (0, {})
