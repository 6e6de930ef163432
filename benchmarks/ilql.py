"""Values learnt from a quickstart's rollouts: held-out R_cap of decoding with log π + β(Q − V), β = 0 beside β > 0.

    python benchmarks/ilql.py                          # after `make quickstart`
    python benchmarks/ilql.py --choices base base-shuffled

Each choice is one run of `configs/ilql.yaml`:

    base              π is the warm-started model as it was before RL; all of the log. What the config ships.
    base-early        the same, and only the first ten steps of the log, when the policy that sampled was near π
    adapter           π is the policy that RL ended with; all of the log
    cloned            the adapter learns, too (`learner.ilql.bc_weight: 1`): π becomes a clone of the log; all of it
    …-shuffled        the control: the same tokens, but the rewards of the log changed hands at random, so that what is
                      left is how often the log says a token, not what it earned

Captions are greedy, as in a run's own evaluation. Intervals are 95 % bootstrap ones over the held-out pictures, those
of the differences paired by picture. A run that is finished in `--work` is taken as it is. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmrl_ray.config.load import load_config
from mmrl_ray.data.samples import read_split
from mmrl_ray.evaluation.captioning import target_captions
from mmrl_ray.evaluation.model_source import open_target
from mmrl_ray.evaluation.records import load_evaluation
from mmrl_ray.metrics.statistics import Interval, bootstrap_difference, bootstrap_mean
from mmrl_ray.rewards.build import build_reward
from mmrl_ray.run_records.run_dir import RunDir
from mmrl_ray.training.train import SUMMARY, train

CONFIG = Path(__file__).parents[1] / "configs" / "ilql.yaml"
EARLY = 9
"""The last of the log's first ten steps."""
CHOICES = {
    "base": [],
    "base-shuffled": [],
    "base-early": [f"data.rollouts.last_step={EARLY}"],
    "base-early-shuffled": [f"data.rollouts.last_step={EARLY}"],
    "adapter": ["data.rollouts.policy=adapter"],
    "cloned": ["learner.ilql.bc_weight=1"],
}
BETAS = (0.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)


Rewards = dict[float, list[float]]
"""By β, of each held-out picture."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", type=Path, default=Path("runs/quickstart"), help="the run whose rollouts are used")
    parser.add_argument("--choices", nargs="+", choices=CHOICES, default=list(CHOICES))
    parser.add_argument("--betas", nargs="+", type=float, default=BETAS, help="β above 0; 0 comes by itself")
    parser.add_argument("--work", type=Path, default=Path(".cache/ilql"), help="folder of the runs")
    given = parser.parse_args()
    betas = sorted({0.0, *given.betas})
    found = {name: measure(finished(name, given.log, given.work), betas) for name in given.choices}
    print(f"{'choice':<20} {'β':>5} {'held-out R_cap':>22} {'more than at β = 0':>26} {'more than shuffled':>26}")
    told: dict[str, dict[str, Any]] = {}
    for name, rewards in found.items():
        told[name] = {}
        for beta, values in rewards.items():
            row = {"r_cap": bootstrap_mean(values, seed=0)}
            if beta:
                row["more_than_0"] = bootstrap_difference(rewards[0.0], values, seed=0)
                if (control := found.get(f"{name}-shuffled")) is not None:
                    row["more_than_shuffled"] = bootstrap_difference(control[beta], values, seed=0)
            differences = [shown(row[key], "+") if key in row else "" for key in ("more_than_0", "more_than_shuffled")]
            print(f"{name:<20} {beta:>5g} {shown(row['r_cap']):>22} {differences[0]:>26} {differences[1]:>26}")
            told[name][f"{beta:g}"] = as_json(row)
    print(f"{'the run of the log':<20} {'':>5} {shown(after_rl(given.log)):>22}")
    rl = as_json({"r_cap": after_rl(given.log)})
    print(json.dumps({"beta": told.get("base", {}), "choices": told, "after_rl": rl}))


def measure(run: RunDir, betas: list[float]) -> Rewards:
    """What greedy captions of the held-out split earn."""
    target = open_target(run.location)
    assert target.eval_data is not None
    assert target.statistics is not None
    samples = read_split(target.eval_data, prompt=target.prompt)
    reward = build_reward(target.reward, target.statistics)
    return {
        beta: [each.total for each in reward.score_batch(samples, target_captions(target, samples, beta=beta))]
        for beta in betas
    }


def finished(choice: str, log: Path, work: Path) -> RunDir:
    """The folder of a run that took all its steps, made now where it is not there."""
    source = log
    if choice.endswith("-shuffled"):
        source = shuffled(log, work / "logs" / choice, EARLY if "early" in choice else None)
    root = work / "runs"
    overrides = [f"run.root={root}", f"run.name={choice}", f"data.rollouts.run={source}", *CHOICES[choice]]
    there = (root / choice / SUMMARY).is_file()
    if not there or RunDir.open(str(root), choice).read_json(SUMMARY)["status"] != "finished":
        train(load_config(CONFIG, overrides), resume=(root / choice).is_dir())
    return RunDir.open(str(root), choice)


def shuffled(log: Path, copy: Path, last_step: int | None) -> Path:
    """A copy of the log up to that step, whose completions have one another's rewards."""
    if copy.exists():
        return copy
    scratch = copy.with_name(f".{copy.name}")
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(log / "images", scratch / "images")
    files = sorted((log / "rollouts").glob("*.parquet"))[: None if last_step is None else last_step + 1]
    tables = [pq.read_table(file) for file in files]
    rewards = np.concatenate([table["reward"].to_numpy() for table in tables])
    counted = ~np.isnan(rewards) & np.concatenate([table["completion"].to_numpy() >= 0 for table in tables])
    rewards[counted] = np.random.default_rng(0).permutation(rewards[counted])
    (scratch / "rollouts").mkdir()
    for file, table in zip(files, tables, strict=True):
        mine, rewards = rewards[: len(table)], rewards[len(table) :]
        place = table.schema.get_field_index("reward")
        column = pa.array(mine, table.schema.field(place).type, from_pandas=True)
        pq.write_table(table.set_column(place, table.schema.field(place), column), scratch / "rollouts" / file.name)
    scratch.rename(copy)
    return copy


def after_rl(log: Path) -> Interval:
    evaluation = load_evaluation(RunDir.at(str(log)), "after")
    assert evaluation is not None
    return evaluation.measures["reward"]


def as_json(row: dict[str, Interval]) -> dict[str, Any]:
    """`{"r_cap": …, "low": …, "high": …}`, and the differences as `[mean, low, high]`."""
    mean, low, high = rounded(row["r_cap"])
    differences = {name: rounded(interval) for name, interval in row.items() if name != "r_cap"}
    return {"r_cap": mean, "low": low, "high": high, **differences}


def rounded(interval: Interval) -> list[float]:
    return [round(value, 4) for value in (interval.mean, interval.low, interval.high)]


def shown(interval: Interval, sign: str = "") -> str:
    return f"{interval.mean:{sign}.3f} [{interval.low:{sign}.3f}, {interval.high:{sign}.3f}]"


if __name__ == "__main__":
    main()
