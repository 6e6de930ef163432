"""What it is worth to be wary of a learned reward: RL on mean - κσ against RL on the mean, by the true reward.

    python benchmarks/risk.py --plot risk.png

The learned reward is trained on ratings of captions of scenes. The raters are strict: an honest rating is `--strict`
(0.3) times the F1 of a caption's facts, ± 0.03, on a scale from 0 to 1. It fails for one attribute, in one of two ways:

- `noise`: whoever reads "purple" rates at random, anywhere from 0 to 1. Beside strict raters that is generous, so that
  the mean alone rewards saying it. A head that predicts its own noise can know (K = 1).
- `unseen`: no picture of its training has three objects, and no caption names three. Only heads that disagree can know
  (K = 5).

Then the policy of the quickstart, warm-started on terse captions, is fine-tuned on that reward (GRPO, in this process,
by the product's own engine, plan and learner step), with κ = 0 and κ > 0 and otherwise alike. What it ends with is
measured by what it never saw: R_cap of its greedy captions of held-out pictures against their references. "Says it" is
the share of those captions that have the attribute; the share of pictures that do is in the first line.

Prints a table, and with `--plot` draws it; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mmrl_ray.config import Config
from mmrl_ray.config.load import load_config
from mmrl_ray.config.reward import RewardSection
from mmrl_ray.config.reward_model import RewardModelConfig
from mmrl_ray.data.images import image_hash
from mmrl_ray.data.samples import Sample, SampleStream, iter_references, read_split
from mmrl_ray.data.scene_language import SHAPES, attribute_scores
from mmrl_ray.data.scenes import generate_scenes
from mmrl_ray.experience.carriers import GroupKey, PlannedGroup, RolloutGroup, SamplingParams
from mmrl_ray.experience.plan import build_step_plan
from mmrl_ray.experience.seeds import derive_seed, group_seed
from mmrl_ray.feedback.files import write_preferences
from mmrl_ray.feedback.scene_preferences import FAULTS, faulty_caption
from mmrl_ray.feedback.schema import Pair, Preference
from mmrl_ray.learner.step import LearnerStep
from mmrl_ray.metrics.corpus import CorpusStatistics
from mmrl_ray.policy.adapter import adapter_state, add_adapter
from mmrl_ray.policy.load import Policy, load_policy
from mmrl_ray.rewards.build import NOTHING, build_reward
from mmrl_ray.rollouts.assignments import Assignment, GroupRequest
from mmrl_ray.rollouts.backend import PolicyBackend
from mmrl_ray.rollouts.engine import RolloutEngine
from mmrl_ray.runs.captioning import caption_samples
from mmrl_ray.runs.reward_model import train_reward
from mmrl_ray.runs.warm_start import warm_start

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
WORD = "purple"
MANY = 3
HEADS = {"noise": 1, "unseen": 5}
RATER_NOISE = 0.03
JUDGED = 800
"""Pictures that the raters saw."""
EVALUATED = 100
_MB = 1 << 20


@dataclass(frozen=True)
class World:
    """What all runs share."""

    cfg: Config
    samples: list[Sample]
    """Held out."""
    truth: Any
    """R_cap."""


def ratings(cfg: Config, scenario: str, seed: int, strict: float) -> Iterator[Preference]:
    """A true caption against one with a fault, for each fault of each picture, with both rated."""
    assert cfg.data.scenes is not None
    scenes, _ = generate_scenes(cfg.data.scenes)
    for number, sample in enumerate(scenes):
        if number == JUDGED:
            return
        rng = random.Random(f"{scenario}/{seed}/{sample.id}")
        for fault in FAULTS:
            said = (rng.choice(sample.references), faulty_caption(sample.metadata, fault, rng))
            if scenario == "unseen" and (_shows(sample)["unseen"] or any(_says(text)["unseen"] for text in said)):
                continue
            marks = [_rating(caption, sample, scenario, strict, rng) for caption in said]
            pair = Pair(image_hash(sample.images), "", *said, source=f"scenes:{fault}", image=sample.images[0])
            yield Preference(pair, "a" if marks[0] > marks[1] else "b", "rater", *marks)


def _rating(caption: str, sample: Sample, scenario: str, strict: float, rng: random.Random) -> float:
    if scenario == "noise" and _says(caption)["noise"]:
        return rng.random()
    found = attribute_scores(caption, sample.metadata)
    both = found.precision + found.recall
    quality = 2 * found.precision * found.recall / both if both else 0.0
    return min(max(strict * quality + rng.gauss(0.0, RATER_NOISE), 0.0), 1.0)


def _shows(sample: Sample) -> dict[str, bool]:
    """Whether a picture has the attribute of each scenario."""
    objects = sample.metadata["objects"]
    return {"noise": any(each["colour"] == WORD for each in objects), "unseen": len(objects) >= MANY}


def _says(caption: str) -> dict[str, bool]:
    """Whether a caption has it."""
    said = caption.lower().split()
    return {"noise": WORD in said, "unseen": sum(word.strip(".,") in SHAPES for word in said) >= MANY}


def train_judge(world: World, scenario: str, seed: int, folder: Path, steps: int, strict: float) -> Path:
    """A reward model in a folder, by the product's own training."""
    data, out = folder / f"{scenario}-{seed}.parquet", folder / f"judge-{scenario}-{seed}"
    write_preferences(data, ratings(world.cfg, scenario, seed, strict))
    settings = {
        "out": str(out),
        "seed": seed,
        "data": {"train": str(data), "held_out": 0.05},
        "net": {"heads": HEADS[scenario]},
        "training": {"steps": steps, "lr": 2e-3, "warmup_steps": steps // 10},
    }
    train_reward(RewardModelConfig.model_validate(settings))
    return out


def fine_tune(world: World, model: str, judge: Path, kappa: float, seed: int, steps: int) -> dict[str, Any]:
    """One run of RL, as `mmrl train` would do it, without Ray; returns what came of it."""
    cfg = world.cfg.model_copy(update={"learner": world.cfg.learner.model_copy(update={"steps": steps})})
    section = RewardSection.model_validate(
        {"parts": {"judge": {"kind": "learned", "model": str(judge)}}, "weights": {"judge": 1.0}, "risk": kappa}
    )
    sampler, learner = (_adapted(cfg, model) for _ in range(2))
    backend = PolicyBackend(sampler, vision_cache_bytes=64 * _MB, max_rows=256, temperature=cfg.rollout.temperature)
    engine = RolloutEngine(
        backend, build_reward(section, NOTHING), worker="w", reward_cfg=section, ship_vision_bytes=64 * _MB
    )
    step = LearnerStep(learner, cfg.learner)
    stream = SampleStream(cfg.data.train, prompt=cfg.data.prompt, seed=seed, max_quarantined=0)
    seen: list[dict[str, float]] = []
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
        step.run(plan, _payloads)
        seen.append({name: plan.metrics[f"reward/{name}"] for name in ("mean", "sigma")})
    return {**evaluate(world, learner), "judge": seen[-1]["mean"], "sigma": seen[-1]["sigma"]}


def evaluate(world: World, policy: Policy) -> dict[str, float]:
    """The true reward of greedy captions, and how many say the word."""
    said = caption_samples(policy, world.samples, max_new_tokens=world.cfg.rollout.max_new_tokens)
    totals = [score.total for score in world.truth.score_batch(world.samples, said)]
    shares = {f"says_{name}": statistics.mean(_says(caption)[name] for caption in said) for name in HEADS}
    return {"r_cap": statistics.mean(totals), **shares}


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


def _payloads(planned: Sequence[PlannedGroup]) -> list[RolloutGroup]:
    return [group.payload for group in planned]


def draw(rows: Sequence[dict[str, Any]], before: float, file: Path) -> None:
    """R_cap of every run, by scenario and κ."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    kinds = sorted({(row["scenario"], row["kappa"]) for row in rows})
    for place, (scenario, kappa) in enumerate(kinds):
        values = [row["r_cap"] for row in rows if (row["scenario"], row["kappa"]) == (scenario, kappa)]
        colour = "#0b62a8" if kappa else "#c2410c"
        axes.bar(place, statistics.mean(values), color=colour, alpha=0.35, width=0.6)
        axes.scatter([place] * len(values), values, color=colour, zorder=3, s=18)
    axes.axhline(before, color="#475569", linewidth=1, linestyle="--", label="before RL")
    axes.set_xticks(range(len(kinds)), [f"{scenario}\nκ = {kappa:g}" for scenario, kappa in kinds])
    axes.set_ylabel("true reward (R_cap), held out")
    axes.legend(frameon=False)
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenarios", nargs="+", choices=list(HEADS), default=list(HEADS))
    parser.add_argument("--kappa", type=float, default=2.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=15, help="of RL")
    parser.add_argument("--judge-steps", type=int, default=200)
    parser.add_argument("--groups", type=int, default=8, help="pictures a step")
    parser.add_argument("--strict", type=float, default=0.3, help="the best honest rating")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mmrl-bench-") as name:
        folder = Path(name)
        data = [f"data.{split}={folder}/{split}" for split in ("train", "eval")]
        cfg = load_config(CONFIG, [*data, f"learner.groups_per_step={args.groups}"])
        model = warm_start(cfg)  # kept in .cache/sft, as the quickstart's
        assert cfg.data.eval is not None
        samples = read_split(cfg.data.eval, prompt=cfg.data.prompt, limit=EVALUATED)
        statistics_ = CorpusStatistics.from_references(iter_references(cfg.data.train))
        world = World(cfg, samples, build_reward(cfg.reward, statistics_))
        before = evaluate(world, _adapted(cfg, model))
        have = {name: statistics.mean(_shows(sample)[name] for sample in samples) for name in HEADS}
        told = (f"{name}: in {have[name]:.0%} of pictures, said of {before[f'says_{name}']:.0%}" for name in HEADS)
        print(f"before RL: R_cap {before['r_cap']:.3f}; {'; '.join(told)}", flush=True)
        rows = []
        for seed in args.seeds:
            for scenario in args.scenarios:
                judge = train_judge(world, scenario, seed, folder, args.judge_steps, args.strict)
                for kappa in (0.0, args.kappa):
                    found = fine_tune(world, model, judge, kappa, seed, args.steps)
                    rows.append({"scenario": scenario, "seed": seed, "kappa": kappa, **found})
                    print(json.dumps(rows[-1]), flush=True)
    if args.plot is not None:
        draw(rows, before["r_cap"], args.plot)
    table = Table(title=f"R_cap on {EVALUATED} held-out pictures after {args.steps} steps, by seed and in the mean")
    for column in ("scenario", "κ", *(f"seed {seed}" for seed in args.seeds), "mean", "says it", "judge", "σ"):
        table.add_column(column, justify="left" if column == "scenario" else "right")
    for scenario in args.scenarios:
        for kappa in (0.0, args.kappa):
            some = [row for row in rows if (row["scenario"], row["kappa"]) == (scenario, kappa)]
            means = [
                statistics.mean(row[key] for row in some) for key in ("r_cap", f"says_{scenario}", "judge", "sigma")
            ]
            figures = [*(f"{row['r_cap']:.3f}" for row in some), f"{means[0]:.3f}", f"{means[1]:.0%}"]
            table.add_row(scenario, f"{kappa:g}", *figures, f"{means[2]:.3f}", f"{means[3]:.3f}")
    Console(width=120).print(table)
    print(json.dumps({"before": before, "have": have, "runs": rows, "seconds": time.monotonic() - began}))


if __name__ == "__main__":
    main()
