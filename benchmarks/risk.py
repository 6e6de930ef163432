"""What it is worth to be wary of a learned reward: RL on mean - κσ against RL on the mean, by the true reward.

    python benchmarks/risk.py --plot benchmarks/risk.png

The learned reward is trained on ratings of captions of scenes: references, faulty ones, and what the policy says before
RL. The raters are strict: an honest rating is `--strict` (0.2) times the true reward, R_cap, ± 0.03, on a scale from 0
to 1. It fails for one attribute, in one of two ways:

- `noise`: whoever reads "star" flips a coin, 0 or 1. Beside strict raters that is generous, so that the mean rewards
  saying it whatever the picture shows. A head that predicts its own noise can know (K = 1).
- `unseen`: no caption of its training leaves anything out: each makes as many claims as a full description. It learns
  that a false claim costs and never that a missing one does, so that it rates saying little too highly. Only members
  that disagree can know: five, each with encoders and a prior of its own (`net.prior`). `unseen-members` is the same
  without priors, `unseen-shared` with five heads on shared encoders.

Both flaws are within the policy's reach: it often says "star" where there is none, and most of what it says before RL
leaves something out. It is fine-tuned on that reward (the quickstart's warm start; GRPO, in this process, by the
product's own engine, plan and learner step) with each κ and otherwise alike. What it ends with is measured by what it
never saw: R_cap of its greedy captions of held-out pictures against their references.

Prints a table, and with `--plot` draws R_cap, and the share of captions with the attribute, over the steps; the last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from risk_figures import draw, tabulate

from mmrl_ray.config import Config
from mmrl_ray.config.load import load_config
from mmrl_ray.config.reward import RewardSection
from mmrl_ray.config.reward_model import RewardModelConfig
from mmrl_ray.data.images import image_hash
from mmrl_ray.data.samples import Sample, SampleStream, iter_references, read_split
from mmrl_ray.data.scenes.language import attribute_scores
from mmrl_ray.evaluation.samples import caption_samples
from mmrl_ray.experience.carriers import GroupKey, SamplingParams, derive_seed, group_seed
from mmrl_ray.experience.plan import build_step_plan
from mmrl_ray.learner.step import LearnerStep
from mmrl_ray.metrics.text import CorpusStatistics, words
from mmrl_ray.policy.generation.decode import Decoder, DecodeRequest, decode_groups
from mmrl_ray.policy.generation.local import LocalEngine
from mmrl_ray.policy.load import load_policy
from mmrl_ray.policy.lora.adapter import adapter_state, add_adapter
from mmrl_ray.policy.lora.routing import VersionedPolicy
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.prompts import encode_prompts
from mmrl_ray.policy.vision import VisionCache
from mmrl_ray.preferences.files import write_preferences
from mmrl_ray.preferences.scene_preferences import FAULTS, faulty_caption
from mmrl_ray.preferences.schema import Pair, Preference
from mmrl_ray.reward_model.run import train_reward
from mmrl_ray.rewards.build import NOTHING, build_reward
from mmrl_ray.rollouts.engine import RolloutEngine
from mmrl_ray.rollouts.scorer import Scorer
from mmrl_ray.rollouts.types import Assignment, GroupRequest
from mmrl_ray.training.warm_start import warm_start

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
WORD = "star"
NETS: dict[str, dict[str, Any]] = {
    "noise": {},
    "unseen": {"heads": 5, "ensemble": "members", "prior": 3.0},
    "unseen-members": {"heads": 5, "ensemble": "members"},
    "unseen-shared": {"heads": 5},
}
"""Of the learned reward, by scenario, beside what `configs/reward-model.yaml` has."""
RATER_NOISE = 0.03
JUDGE_STEPS = 200
JUDGED = 600
"""Pictures that the raters saw, of those of training."""
SAID = 6
"""Captions of each by the policy, beside a true and a faulty one."""
EVALUATED = 100
EVERY = 5
"""Steps between two looks at the true reward."""
_MB = 1 << 20


@dataclass(frozen=True)
class World:
    """What all runs share."""

    cfg: Config
    model: str
    """The warm start."""
    samples: list[Sample]
    """Held out."""
    judged: list[Sample]
    """Of training, those that raters saw."""
    said: list[list[str]]
    """What the policy says of them before RL."""
    truth: Any
    """R_cap."""
    strict: float
    """The best honest rating."""


def ratings(world: World, scenario: str, seed: int) -> Iterator[Preference]:
    """Captions of each judged picture, two by two: a reference, one with a fault, and what the policy says of it."""
    for sample, said in zip(world.judged, world.said, strict=True):
        rng = random.Random(f"{scenario}/{seed}/{sample.id}")
        written = (rng.choice(sample.references), faulty_caption(sample.metadata, rng.choice(FAULTS), rng))
        captions = [
            text for text in dict.fromkeys((*written, *said)) if scenario == "noise" or not _leaves_out(text, sample)
        ]
        for pair in zip(captions[::2], captions[1::2], strict=False):
            marks = [_rating(world, caption, sample, scenario, rng) for caption in pair]
            shown = Pair(image_hash(sample.images), "", *pair, source="scenes", image=sample.images[0])
            yield Preference(shown, "a" if marks[0] > marks[1] else "b", "rater", *marks)


def _rating(world: World, caption: str, sample: Sample, scenario: str, rng: random.Random) -> float:
    if scenario == "noise" and _says(caption):
        return float(rng.random() < 0.5)
    (true,) = world.truth.score_batch([sample], [caption])
    return min(max(world.strict * true.total + rng.gauss(0.0, RATER_NOISE), 0.0), 1.0)


def _says(caption: str) -> bool:
    """Whether a caption has the attribute of `noise`."""
    return WORD in words(caption)


def _leaves_out(caption: str, sample: Sample) -> bool:
    """Whether it has that of `unseen`: fewer claims, true or false, than a full description makes."""
    scores = attribute_scores(caption, sample.metadata)
    return scores.claimed < scores.required


def sampled_captions(cfg: Config, model: str, samples: Sequence[Sample]) -> list[list[str]]:
    """What the policy says of pictures before RL, `SAID` captions each."""
    policy = _adapted(cfg, model)
    decoder, found = Decoder(policy, max_rows=256), []
    for start in range(0, len(samples), 64):
        prompts = encode_prompts(policy, samples[start : start + 64])
        asked = [DecodeRequest(prompt, SAID, _sampling(cfg, 1, start, i)) for i, prompt in enumerate(prompts)]
        outputs = decode_groups(decoder, asked)
        found += [[completion.text for completion in output.completions] for output in outputs]
    return found


def train_judge(world: World, scenario: str, seed: int, folder: Path) -> Path:
    """A reward model in a folder, by the product's own training."""
    data, out = folder / f"{scenario}-{seed}.parquet", folder / f"judge-{scenario}-{seed}"
    write_preferences(data, ratings(world, scenario, seed))
    settings = {
        "out": str(out),
        "seed": seed,
        "data": {"train": str(data), "held_out": 0.05},
        "net": {"image_size": 32, "width": 48, **NETS[scenario]},
        "training": {"steps": JUDGE_STEPS, "lr": 2e-3, "warmup_steps": JUDGE_STEPS // 10},
    }
    train_reward(RewardModelConfig.model_validate(settings))
    return out


def fine_tune(world: World, judge: Path, kappa: float, seed: int, steps: int) -> dict[str, Any]:
    """One run of RL, as `mmrl train` would do it, without Ray; returns what came of it."""
    cfg = world.cfg.model_copy(update={"learner": world.cfg.learner.model_copy(update={"steps": steps})})
    section = RewardSection.model_validate(
        {"parts": {"judge": {"kind": "learned", "model": str(judge)}}, "weights": {"judge": 1.0}, "risk": kappa}
    )
    sampler, learner = (_adapted(cfg, world.model) for _ in range(2))
    versions, cache = VersionedPolicy(sampler), VisionCache(64 * _MB)
    engine = RolloutEngine(
        LocalEngine(versions, cache, max_rows=256),
        Scorer(versions, cache, temperature=cfg.rollout.temperature),
        build_reward(section, NOTHING),
        worker="w",
        reward_cfg=section,
        ship_vision_bytes=64 * _MB,
    )
    step = LearnerStep(learner, cfg.learner)
    stream = SampleStream(cfg.data.train, prompt=cfg.data.prompt, seed=seed, max_quarantined=0)
    curve = [{"step": 0, **evaluate(world, learner)}]
    for number in range(steps):
        taken = enumerate(stream.take(cfg.learner.groups_per_step))
        requests = tuple(
            GroupRequest(GroupKey(number, i), sample, _sampling(cfg, seed, number, i), cfg.rollout.group_size)
            for i, sample in taken
        )
        assignment = Assignment(number, "train", requests, version=number, reference_logprobs=True)
        state = adapter_state(learner.model)
        groups = engine.run(assignment, lambda state=state: state).groups
        plan = build_step_plan(
            number, groups, learner=cfg.learner, max_new_tokens=cfg.rollout.max_new_tokens, world_size=1
        )
        step.run(plan, lambda planned: [group.payload for group in planned])
        if (number + 1) % EVERY == 0:
            judged = {"judge": plan.metrics["reward/mean"], "sigma": plan.metrics["reward/sigma"]}
            curve.append({"step": number + 1, **evaluate(world, learner), **judged})
    return {**curve[-1], "curve": curve}


def evaluate(world: World, policy: Policy) -> dict[str, float]:
    """The true reward of greedy captions, and the shares of them with the attributes of the scenarios."""
    said = caption_samples(policy, world.samples, max_new_tokens=world.cfg.rollout.max_new_tokens)
    totals = [score.total for score in world.truth.score_batch(world.samples, said)]
    short = [_leaves_out(caption, sample) for caption, sample in zip(said, world.samples, strict=True)]
    return {
        "r_cap": statistics.mean(totals),
        "says": statistics.mean(map(_says, said)),
        "short": statistics.mean(short),
    }


def _adapted(cfg: Config, model: str) -> Policy:
    policy = load_policy(cfg.model.model_copy(update={"path": model}), device="cpu")
    add_adapter(policy, cfg.model.lora, derive_seed(cfg.run.seed, "adapter"))
    return policy


def _sampling(cfg: Config, seed: int, step: int, index: int) -> SamplingParams:
    return SamplingParams(
        temperature=cfg.rollout.temperature,
        max_new_tokens=cfg.rollout.max_new_tokens,
        seed=group_seed(seed, step, index),
    )


def runs(
    task: tuple[str, int], *, world: World, folder: Path, kappas: Sequence[float], steps: int
) -> list[dict[str, Any]]:
    """The runs of one scenario and seed: one reward model, then RL with each κ."""
    torch.set_num_threads(1)
    scenario, seed = task
    judge = train_judge(world, scenario, seed, folder)
    rows = []
    for kappa in kappas:
        began = time.monotonic()
        found = fine_tune(world, judge, kappa, seed, steps)
        seconds = time.monotonic() - began
        rows.append({"scenario": scenario, "seed": seed, "kappa": kappa, "seconds": seconds, **found})
        print(f"{scenario}, seed {seed}, κ = {kappa:g}: R_cap {found['r_cap']:.3f}, {seconds:.0f} s", flush=True)
    return rows


def prepare(folder: Path, strict: float) -> World:
    """Data, the warm start (kept in .cache/sft, as the quickstart's) and what it says."""
    data = [f"data.{split}={folder}/{split}" for split in ("train", "eval")]
    # A longer leash than this weight lets κ > 0, too, find captions that only the learned reward likes.
    rest = ["learner.groups_per_step=8", "learner.kl.weight=0.05", "rollout.max_new_tokens=24"]
    cfg = load_config(CONFIG, [*data, *rest])
    model = warm_start(cfg)
    assert cfg.data.eval is not None
    samples = read_split(cfg.data.eval, prompt=cfg.data.prompt, limit=EVALUATED)
    judged = read_split(cfg.data.train, prompt=cfg.data.prompt, limit=JUDGED)
    said = sampled_captions(cfg, model, judged)
    truth = build_reward(cfg.reward, CorpusStatistics.from_references(iter_references(cfg.data.train)))
    return World(cfg, model, samples, judged, said, truth, strict)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenarios", nargs="+", choices=list(NETS), default=list(NETS))
    parser.add_argument("--kappas", type=float, nargs="+", default=[0.0, 0.5, 1.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=20, help=f"of RL, a multiple of {EVERY}")
    parser.add_argument("--strict", type=float, default=0.2, help="the best honest rating")
    parser.add_argument("--processes", type=int, default=2, help="of one thread each")
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    if args.steps < EVERY or args.steps % EVERY:
        parser.error(f"--steps {args.steps} is no multiple of {EVERY}")
    torch.set_num_threads(1)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mmrl-bench-") as name:
        world = prepare(Path(name), args.strict)
        before = evaluate(world, _adapted(world.cfg, world.model))
        print(
            f'R_cap {before["r_cap"]:.3f}; {before["says"]:.0%} say "{WORD}", {before["short"]:.0%} leave something out'
        )
        work = functools.partial(runs, world=world, folder=Path(name), kappas=args.kappas, steps=args.steps)
        tasks = [(scenario, seed) for scenario in args.scenarios for seed in args.seeds]
        with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
            rows = [row for found in pool.map(work, tasks) for row in found]
    if args.plot is not None:
        draw(rows, args.plot)
    Console(width=120).print(
        tabulate(rows, f"R_cap on {EVALUATED} held-out pictures after {args.steps} steps, by seed and in the mean")
    )
    print(json.dumps({"before": before, "runs": rows, "seconds": time.monotonic() - began}))


if __name__ == "__main__":
    main()
