"""Faults at random on a real run, for minutes: what it survives, what it loses, and how long it takes to go on.

    python benchmarks/chaos.py --minutes 10 --seed 1
    python benchmarks/chaos.py --minutes 5 --engine vllm          # which MMRL_VLLM_PYTHON or `mmrl engine install` has

A Ray of three nodes on this machine and, on it, `mmrl train` of the quickstart's tiny model: one learner, two rollout
workers, the reward on Ray Serve. Faults come one after the other, drawn with the seed; each waits until the one before
is over. A fault that has to end the run (its controller, its driver, its disk) is followed by `mmrl train --resume`.
With vLLM two more: the process of a worker's engine is killed, or stopped.

    survived     the run went on, or stopped within 60 s, said why, and went on when it was resumed
    recovery     from the fault until the step that was due then is finished *and* what died has a successor that is
                 ready; with a run that ends, its end and its new start are in it
    lost         groups of finished steps that are not in the rollout log, without those of quarantined samples
    duplicated   groups that are in it twice, with other samples or with other seeds than the data and the seeds say
    stale        groups of another version than their step's, and the groups of a step in which the learner, by that
                 version's weights, computes another log-prob of a token than it was drawn with

Prints a table; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from random import Random
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # what tests use, too

from mmrl_ray.config.load import load_config  # noqa: E402
from tests.support.faults.judge import judge  # noqa: E402
from tests.support.faults.machines import HEAD, ROLLOUTS, machines  # noqa: E402
from tests.support.faults.run import FaultyRun, NotSurvivedError  # noqa: E402

FAULTS = {
    "worker_killed": 3,
    "worker_stopped": 2,
    "handover": 2,
    "poison": 1,
    "reward_timeout": 1,
    "reward_nan": 1,
    "reward_few": 1,
    "replica_killed": 2,
    "node_killed": 2,
    "learner_killed": 2,
    "controller_killed": 1,
    "driver_killed": 1,
    "disk_full": 1,
    "store_full": 1,
}
"""How often each is drawn, relatively; the first round has each of them once."""
ENGINE_FAULTS = {"engine_killed": 4, "engine_stopped": 3}
"""With an engine that is a process of its own."""
SMALL_ENGINE = {
    "enforce_eager": True,
    "max_model_len": 128,
    "max_num_seqs": 64,
    "args": {"kv_cache_memory_bytes": 1 << 27, "block_size": 32},
}
"""Of vLLM: several fit on one machine, and each starts in seconds."""
PAUSE_S = 0.3


def config(folder: Path, engine: str = "local") -> Path:
    """The quickstart, made to run for ever, and with deadlines that fit its steps."""
    settings: dict[str, Any] = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    settings["run"] = {"name": "chaos", "seed": 0, "root": str(folder / "runs")}
    settings["data"] |= {"train": str(folder / "train"), "max_quarantined": 1000}
    settings["data"]["scenes"] = {**settings["data"]["scenes"], "train": 200, "eval": 1}
    settings["data"]["eval"] = str(folder / "eval")
    settings["eval"] = {"samples": 1}
    settings["sft"] |= {"steps": 10, "warmup_steps": 0, "cache": str(folder / "cache")}
    settings["rollout"] |= {"workers": 2, "groups_per_assignment": 4, "assignment_timeout_s": 15.0}
    settings["reward"] |= {"timeout_s": 2.0, "retries": 1}
    settings["learner"] |= {"steps": 100_000, "groups_per_step": 8, "checkpoint_every": 5, "max_failures": 1000}
    settings["resources"] = {
        "learner": {"threads": 1, "node_labels": HEAD},
        "rollout": {"threads": 1, "node_labels": ROLLOUTS},
        "reward": {"cpus": 0.0, "node_labels": HEAD},
    }
    if engine == "vllm":
        settings["rollout"] |= {
            "engine": {"kind": "vllm", "python": os.environ.get("MMRL_VLLM_PYTHON"), **SMALL_ENGINE},
            "worker_deadline_s": 200.0,  # engines start on the cores that train
        }
    path = folder / "chaos.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def rounds(chance: Random, faults: Mapping[str, int]) -> Iterator[str]:
    """Each fault once, in any order, an engine's first; then as they come, each as often as its weight says."""
    first = list(faults)
    chance.shuffle(first)
    first.sort(key=lambda fault: fault not in ENGINE_FAULTS)
    yield from first
    while True:
        yield from chance.choices(list(faults), list(faults.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=[*FAULTS, *ENGINE_FAULTS], help="of these alone")
    parser.add_argument("--engine", choices=("local", "vllm"), default="local", help="what samples")
    parser.add_argument("--keep", action="store_true", help="leave the run's folder, and say where it is")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="mmrl-chaos-"))
    try:
        run(folder, args)
    finally:
        if args.keep:
            print(f"kept: {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder, ignore_errors=True)


def run(folder: Path, args: argparse.Namespace) -> None:
    """The whole experiment, and what it found."""
    chance, console = Random(args.seed), Console(stderr=True)
    injected: Counter[str] = Counter()
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    failures: list[str] = []
    path = config(folder, args.engine)
    weights = FAULTS | (ENGINE_FAULTS if args.engine == "vllm" else {})
    faults = {fault: weights[fault] for fault in args.only or weights}
    run_folder = folder / "runs" / "chaos"
    with machines(folder) as up, closing(FaultyRun(up, path, run_folder, chance, pause_s=PAUSE_S)) as chaos:
        chaos.begin()
        ends = time.monotonic() + 60 * args.minutes
        for fault in rounds(chance, faults):
            if time.monotonic() > ends:
                break
            time.sleep(chance.uniform(0.0, 2.0))
            injected[fault] += 1
            try:
                took = chaos.suffer(fault)
            except NotSurvivedError as error:
                failures.append(f"{fault}: {error}")
                console.print(f"{fault}: not survived: {error}", markup=False)
                break  # what comes after it would be blamed on the wrong fault
            seconds[fault].append(took)
            console.print(f"{fault}: {took:.1f} s, at step {chaos.steps}")
        if not failures:
            chaos.stop()
    report(args, run_folder, path, injected, seconds, failures)


def report(
    args: argparse.Namespace,
    folder: Path,
    path: Path,
    injected: Counter[str],
    seconds: dict[str, list[float]],
    failures: list[str],
) -> None:
    """The table, then the JSON line."""
    verdict = judge(folder, load_config(path))
    table = Table(title=f"{args.minutes:g} minutes, seed {args.seed}: {verdict.steps} steps, {verdict.groups} groups")
    for column in ("fault", "injected", "survived", "recovery median, s", "max, s"):
        table.add_column(column, justify="left" if column == "fault" else "right")
    for fault in sorted(injected):
        took = seconds.get(fault, [])
        figures = (f"{statistics.median(took):.1f}", f"{max(took):.1f}") if took else ("", "")
        table.add_row(fault, str(injected[fault]), str(len(took)), *figures)
    Console().print(table)
    told = [*verdict.lost, *verdict.duplicated, *verdict.wrong, *verdict.stale]
    print(f"quarantined {len(verdict.quarantined)}, masked {len(verdict.masked)}, wrong places: {told[:5]}")
    every = [s for took in seconds.values() for s in took]
    figures = {
        "injected": injected.total(),
        "survived": len(every),
        "lost": len(verdict.lost),
        "duplicated": len(verdict.duplicated) + len(verdict.wrong),
        "stale": len(verdict.stale),
        "sampler_gap_nats": verdict.gap,
        "recovery_s": {
            "median": round(statistics.median(every), 2) if every else None,
            "max": round(max(every), 2) if every else None,
        },
        "steps": verdict.steps,
        "failures": [failure[:300] for failure in failures],
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
