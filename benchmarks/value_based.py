"""Deep Q-learning with each of the four fusions: greedy return, beside a random policy's and a text-only agent's.

    python benchmarks/value_based.py
    python benchmarks/value_based.py --fusions attention --steps 400

For each fusion two runs of `configs/value_based.yaml`, one as it is and one whose pictures are zeroed: what can be
earned by words alone. Returns are mean rewards of the held-out pictures' captions, with 95 % bootstrap intervals; the
random policy draws every word that the template allows with the same probability. A run that is finished in `--work`
is taken as it is, so that the table can be made in parts. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from mmrl_ray.algorithms.dqn.network import image_features
from mmrl_ray.config.load import load_config
from mmrl_ray.data.samples import read_split
from mmrl_ray.evaluation.model_source import open_target
from mmrl_ray.evaluation.records import load_evaluation
from mmrl_ray.metrics.statistics import Interval, bootstrap_mean
from mmrl_ray.metrics.text import CorpusStatistics
from mmrl_ray.reward_model.fusion import FUSIONS
from mmrl_ray.rewards.build import build_reward
from mmrl_ray.run_records.run_dir import STATISTICS, RunDir
from mmrl_ray.training.train import SUMMARY, train

CONFIG = Path(__file__).parents[1] / "configs" / "value_based.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fusions", nargs="+", choices=FUSIONS, default=FUSIONS)
    parser.add_argument("--steps", type=int, help="optimiser steps of a run; the config's by default")
    parser.add_argument("--work", type=Path, default=Path(".cache/value_based"), help="folder of the runs and the data")
    given = parser.parse_args()
    rows = {name: measure(name, given.work, given.steps) for name in given.fusions}
    print(f"{'fusion':<18} {'greedy':>24} {'random':>24} {'text only':>24} {'÷ random':>9} {'learning':>9}")
    for name, row in rows.items():
        sides = " ".join(f"{shown(row[side]):>24}" for side in ("greedy", "random", "text_only"))
        print(f"{name:<18} {sides} {row['greedy'].mean / row['random'].mean:>9.1f} {row['seconds']:>7.0f} s")
    sides = ("greedy", "random", "text_only")
    print(json.dumps({"fusions": {name: {s: round(row[s].mean, 4) for s in sides} for name, row in rows.items()}}))


def measure(fusion: str, work: Path, steps: int | None) -> dict[str, Any]:
    seeing, blind = (finished(fusion, work, steps, blind=blind) for blind in (False, True))
    seconds = max(run.read_json(SUMMARY)["seconds"]["learning"] for run in (seeing, blind))
    return {
        "greedy": greedy(seeing),
        "random": random_policy(seeing),
        "text_only": greedy(blind),
        "seconds": seconds,
    }


def finished(fusion: str, work: Path, steps: int | None, *, blind: bool) -> RunDir:
    """The folder of a run that took all its steps, made now where it is not there."""
    name = f"{fusion}-{'blind' if blind else 'seeing'}"
    overrides = [
        f"run.root={work}/runs",
        f"run.name={name}",
        f"data.train={work}/train",
        f"data.eval={work}/eval",
        f"value_based.fusion={fusion}",
        f"value_based.blind={str(blind).lower()}",
        *([f"learner.steps={steps}"] if steps else []),
    ]
    cfg = load_config(CONFIG, overrides)
    root = work / "runs"
    there = (root / name / SUMMARY).is_file()
    if not there or RunDir.open(str(root), name).read_json(SUMMARY)["status"] != "finished":
        train(cfg, resume=(root / name).is_dir())
    return RunDir.open(str(root), name)


def greedy(run: RunDir) -> Interval:
    evaluation = load_evaluation(run, "after")
    assert evaluation is not None
    return evaluation.measures["reward"]


def random_policy(run: RunDir) -> Interval:
    target = open_target(run.location)
    assert target.agent is not None
    assert target.eval_data is not None
    samples = read_split(target.eval_data, prompt=target.prompt)
    agent = target.agent.agent
    images = image_features(target.policy, samples, agent.facts.shape.image_tokens, target.agent.cache)
    captions = agent.captions(images, epsilon=1.0, seed=1)
    reward = build_reward(target.reward, CorpusStatistics.from_json(run.read_text(STATISTICS)))
    return bootstrap_mean([each.total for each in reward.score_batch(samples, captions)], seed=0)


def shown(interval: Interval) -> str:
    return f"{interval.mean:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


if __name__ == "__main__":
    main()
