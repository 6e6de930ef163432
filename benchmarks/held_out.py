"""Evaluations beside the learning (`eval.every`): what they cost, and what they save a run from.

    python benchmarks/held_out.py cost
    python benchmarks/held_out.py over-optimisation

`cost`: seconds of CPU, of one process with one thread, of a step of the quickstart (rollouts and learner, by the
product's own engine, plan and learner step) and of an evaluation of its 200 held-out pictures: captions and their
rewards, the other measures with their intervals, the paired comparison, what is written, and the checkpoint. Seconds of
CPU and not of the clock, since what a machine does beside it is none of either.

`over-optimisation`: `mmrl train` on a learned reward with a planted flaw, `unseen` of `risk.py`: its raters never saw a
caption that leaves something out, so that it rates saying little too highly. The judge of the run, CIDEr-D of held-out
captions, knows nothing of that reward. Prints what each evaluation found, and which step `adapter/` is of.

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from risk import prepare, train_judge

from mmrl_ray.config import Config
from mmrl_ray.config.load import dump_config, load_config
from mmrl_ray.data.samples import SampleStream, iter_references, read_split
from mmrl_ray.evaluation.records import load_evaluation, save_evaluation
from mmrl_ray.evaluation.scores import difference, rewarded_captions
from mmrl_ray.experience.carriers import GroupKey, SamplingParams, derive_seed, group_seed
from mmrl_ray.experience.plan import build_step_plan
from mmrl_ray.learner.checkpoints import save_checkpoint
from mmrl_ray.learner.step import LearnerStep
from mmrl_ray.metrics.overlap import CiderD
from mmrl_ray.metrics.text import CorpusStatistics
from mmrl_ray.policy.generation.local import LocalEngine
from mmrl_ray.policy.load import load_policy
from mmrl_ray.policy.lora.adapter import adapter_state, add_adapter
from mmrl_ray.policy.lora.routing import VersionedPolicy
from mmrl_ray.policy.memory import DecodeLimits
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.vision import VisionCache
from mmrl_ray.rewards.base import RewardFn
from mmrl_ray.rewards.build import build_reward
from mmrl_ray.rollouts.engine import RolloutEngine
from mmrl_ray.rollouts.scorer import Scorer
from mmrl_ray.rollouts.steps import chunks
from mmrl_ray.rollouts.types import Assignment, GroupRequest
from mmrl_ray.run_records.checkpoint_choice import choose_checkpoint, evaluation_lines
from mmrl_ray.run_records.run_dir import RunDir
from mmrl_ray.training.warm_start import warm_start

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
WARM_UP = 2
"""Steps, and one evaluation, before any is counted: kernels are made, and pictures encoded for the first time."""
_MB = 1 << 20


class Measured:
    """The quickstart in one process: a worker's engine and a learner."""

    def __init__(self, cfg: Config, model: str, run: RunDir, reward: RewardFn | None = None) -> None:
        """`reward` takes the place of the config's."""
        self.cfg, self.run = cfg, run
        self.statistics = CorpusStatistics.from_references(iter_references(cfg.data.train))
        self.cider = CiderD(self.statistics)
        self.held_out = read_split(cfg.data.eval or "", prompt=cfg.data.prompt)
        self.sampler, self.learner = (_adapted(cfg, model) for _ in range(2))
        versions, self.cache = VersionedPolicy(self.sampler), VisionCache(cfg.rollout.vision_cache_mb * _MB)
        limits = DecodeLimits.of(self.sampler, cfg.rollout.max_new_tokens)
        self.engine = RolloutEngine(
            LocalEngine(versions, self.cache, max_rows=limits.max_rows, prefill_tokens=limits.prefill_tokens),
            Scorer(versions, self.cache, temperature=cfg.rollout.temperature),
            reward or build_reward(cfg.reward, self.statistics),
            worker="w",
            reward_cfg=cfg.reward,
            ship_vision_bytes=64 * _MB,
        )
        self.step = LearnerStep(self.learner, cfg.learner)
        self.stream = SampleStream(cfg.data.train, prompt=cfg.data.prompt, seed=cfg.run.seed, max_quarantined=0)
        self.number = 0

    def take_step(self) -> None:
        """Rollouts and one step of the learner."""
        cfg, number = self.cfg, self.number
        seeds = (group_seed(cfg.run.seed, number, i) for i in itertools.count())
        requests = [
            GroupRequest(GroupKey(number, i), sample, self._sampling(next(seeds)), cfg.rollout.group_size)
            for i, sample in enumerate(self.stream.take(cfg.learner.groups_per_step))
        ]
        groups = self._sampled("train", requests)
        longest = cfg.rollout.max_new_tokens
        plan = build_step_plan(number, groups, learner=cfg.learner, max_new_tokens=longest, world_size=1)
        self.step.run(plan, lambda planned: [group.payload for group in planned])
        self.number += 1

    def evaluate(self) -> None:
        """All that `eval.every` adds to the step that was taken last."""
        sampling = SamplingParams(greedy=True, max_new_tokens=self.cfg.rollout.max_new_tokens)
        requests = [GroupRequest(GroupKey(-1, i), sample, sampling, 1) for i, sample in enumerate(self.held_out)]
        groups = self._sampled("aside", requests)
        captions = [group.payload.completions[0].caption for group in groups]
        rewards = [group.rewards[0] for group in groups]
        found = rewarded_captions(self.held_out, captions, rewards, self.cider, self.statistics.tokenizer)
        before = load_evaluation(self.run, "step")
        save_evaluation(self.run, "step", found, self.held_out)
        for name in self.cfg.eval.logged:
            found.measure(name)
        if before is not None:
            difference(before, found, self.cfg.eval.metric)
        state = self.step.state()
        save_checkpoint(self.run, self.number, policy=self.learner, learner=state, controller={}, keep=1)

    def _sampled(self, kind: Any, requests: list[GroupRequest]) -> list[Any]:
        state = adapter_state(self.learner.model)
        made, references = [], kind == "train"
        size = self.cfg.rollout.groups_per_assignment * (1 if references else self.cfg.rollout.group_size)
        for number, chunk in enumerate(chunks(requests, size)):
            asked = Assignment(number, kind, chunk, version=self.number, reference_logprobs=references)
            made += self.engine.run(asked, lambda: state).groups
        return made

    def _sampling(self, seed: int) -> SamplingParams:
        rollout = self.cfg.rollout
        return SamplingParams(temperature=rollout.temperature, max_new_tokens=rollout.max_new_tokens, seed=seed)


def cost(folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds of CPU of steps and evaluations, in turns."""
    torch.set_num_threads(1)
    cfg = load_config(CONFIG, [f"data.{split}={folder}/{split}" for split in ("train", "eval")])
    measured = Measured(cfg, warm_start(cfg), RunDir.create(folder, "run"))
    for _ in range(WARM_UP):
        measured.take_step()
    measured.evaluate()
    steps, evaluations = [], []
    for _ in range(rounds):
        steps += [seconds(measured.take_step) for _ in range(2)]
        evaluations.append(seconds(measured.evaluate))
    step, evaluation = statistics.median(steps), statistics.median(evaluations)
    share = evaluation / (10 * step)
    print(f"a step {step:.2f} s of CPU, an evaluation of {len(measured.held_out)} {evaluation:.2f} s")
    print(f"eval.every: 10 adds {share:.1%} to the learning")
    return {"step_s": steps, "evaluation_s": evaluations, "share_at_10": share}


def over_optimise(folder: Path, steps: int, every: int, seed: int) -> dict[str, Any]:
    """A run on a flawed reward, and which checkpoint it ends with."""
    world = prepare(folder, 0.2)
    judge = train_judge(world, "unseen", seed, folder)
    settings = yaml.safe_load(dump_config(world.cfg))
    settings["run"] |= {"name": "flawed", "root": str(folder / "runs"), "seed": seed}
    settings["reward"] |= {"parts": {"judge": {"kind": "learned", "model": str(judge)}}, "weights": {"judge": 1.0}}
    settings["learner"] |= {"steps": steps}
    settings["eval"] = {"every": every, "metrics": ["cider_d", "reward", "attributes/recall", "caption/words"]}
    file = folder / "flawed.yaml"
    file.write_text(yaml.safe_dump(settings))
    subprocess.run([sys.executable, "-m", "mmrl_ray.cli", "train", str(file)], check=True)
    run = RunDir.at(folder / "runs" / "flawed")
    lines = evaluation_lines(run)
    for line in lines:
        figures = "  ".join(f"{k.removeprefix('eval/')} {v:.3f}" for k, v in line.items() if k.startswith("eval/"))
        print(f"step {line['step']:>3}  {figures}  best {line['best']}")
    adapter, last = choose_checkpoint(run), choose_checkpoint(run, "last")
    print(f"adapter/ is of step {adapter.step}, adapter-last/ of step {last.step}")
    return {"adapter": adapter.step, "last": last.step, "evaluations": lines}


def _adapted(cfg: Config, model: str) -> Policy:
    policy = load_policy(cfg.model.model_copy(update={"path": model}), device="cpu")
    add_adapter(policy, cfg.model.lora, derive_seed(cfg.run.seed, "adapter"))
    return policy


def seconds(work: Callable[[], None]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["cost", "over-optimisation"])
    parser.add_argument("--rounds", type=int, default=5, help="of two steps and an evaluation")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mmrl-bench-") as name:
        folder = Path(name)
        wanted = args.what == "cost"
        found = cost(folder, args.rounds) if wanted else over_optimise(folder, args.steps, args.every, args.seed)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
