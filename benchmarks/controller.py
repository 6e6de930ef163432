"""What the controller can take, and whether more workers bring as much more: 32 simulated workers on a small machine.

    python benchmarks/controller.py

Everything is the product's own but the engines: the controller on Ray with its pool, its tracker, its buffer, its step
plans, its rollout log and its status; workers that are Ray actors in processes of their own, and hand their groups over
by reference. An engine only sleeps, so many seconds a group, and returns groups of a fixed payload; the learner takes
each plan at once and publishes weights of a few KB.

    groups_per_second   32 workers that sleep next to nothing: what controller and workers get through together, on the
                        cores there are, in the seconds after the first steps
    efficiency_32       groups a second with 32 workers at `--seconds` a group, over 32 times those with one

Prints a table; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mmrl_ray.config import Config
from mmrl_ray.config.sections import ScenesSection
from mmrl_ray.data.scenes.generator import generate_scenes
from mmrl_ray.data.writing import write_parquet
from mmrl_ray.experience.carriers import (
    Completion,
    EncodedPrompt,
    RewardBreakdown,
    RolloutGroup,
    ScoredGroup,
    StepPlan,
    VisionFeatures,
)
from mmrl_ray.rollouts.controller_actor import ControllerClient, start_controller
from mmrl_ray.rollouts.pool_settings import PoolSettings
from mmrl_ray.rollouts.types import Assignment, AssignmentResult, FetchWeights
from mmrl_ray.run_records.run_dir import RunDir
from mmrl_ray.training.cluster import ray_at

WORKERS = 32
SAMPLES = 512
COMPLETIONS, TOKENS, PROMPT = 8, 16, 64
START_S = 400.0


@dataclass
class SleepingEngine:
    """Sleeps, and returns groups that look like real ones."""

    worker: str
    seconds: float
    payload_bytes: int
    version: int | None = None

    def run(self, assignment: Assignment, fetch: FetchWeights) -> AssignmentResult:
        """See `Engine`."""
        if assignment.version != self.version:
            fetch()
            self.version = assignment.version
        time.sleep(self.seconds * len(assignment.groups))
        vision = VisionFeatures(torch.zeros(self.payload_bytes // 4), ())
        tokens = torch.arange(TOKENS)
        completions = (Completion(tokens, -torch.ones(TOKENS), "a red circle", "stop"),) * COMPLETIONS
        rewards = tuple(RewardBreakdown(i / COMPLETIONS, {"caption": i / COMPLETIONS}, {}) for i in range(COMPLETIONS))
        prompt = EncodedPrompt(torch.arange(PROMPT), {}, "key")
        groups = tuple(
            ScoredGroup(
                key=request.key,
                sample_id=request.sample.id,
                policy_version=assignment.version,
                prompt_tokens=PROMPT,
                completion_tokens=(TOKENS,) * COMPLETIONS,
                rewards=rewards,
                payload=RolloutGroup(
                    request.sample, prompt, completions, assignment.version, request.sampling, None, vision
                ),
                worker=self.worker,
                timings={"sample": self.seconds},
                counters={"finished": COMPLETIONS},
            )
            for request in assignment.groups
        )
        return AssignmentResult(assignment.id, assignment.version, self.worker, groups, (), {"sample": self.seconds})


@dataclass(frozen=True)
class SleepingEngineFactory:
    """Picklable."""

    seconds: float
    payload_bytes: int

    def __call__(self, worker: str) -> SleepingEngine:
        """See `EngineFactory`."""
        torch.set_num_threads(1)
        return SleepingEngine(worker, self.seconds, self.payload_bytes)


def config(folder: Path, name: str, *, workers: int, groups: int, chunk: int, staleness: int) -> Config:
    return Config.model_validate(
        {
            "run": {"name": name, "root": str(folder / "runs")},
            "model": {"path": "none"},
            "data": {"train": str(folder / "data"), "prompt": "describe"},
            "rollout": {
                "group_size": COMPLETIONS,
                "max_new_tokens": TOKENS,
                "workers": workers,
                "groups_per_assignment": chunk,
                "max_staleness": staleness,
            },
            "learner": {"steps": 1_000_000, "groups_per_step": groups, "kl": {"weight": 0.0}},
            "resources": {"rollout": {"cpus": 0.01}},
        }
    )


@contextmanager
def controller(cfg: Config, factory: SleepingEngineFactory) -> Iterator[ControllerClient]:
    """With all of its workers ready."""
    settings = PoolSettings.of(cfg)
    run = RunDir.create(cfg.run.root, cfg.run.name)
    client = start_controller(cfg, run, factory, settings=settings)
    try:
        deadline = time.monotonic() + START_S
        while (ready := client.status()["pool"]["ready"]) < cfg.rollout.first_workers:
            if time.monotonic() > deadline:
                raise SystemExit(f"{ready} of {cfg.rollout.first_workers} workers were ready after {START_S:g} s")
            time.sleep(0.2)
        client.rewind(0)
        yield client
    finally:
        client.close()


def take_steps(client: ControllerClient, first: int, *, until: float) -> list[tuple[float, int]]:
    """(time, groups) of each step that the learner has finished by `until`."""
    state = {"adapter": torch.zeros(1024)}
    done: list[tuple[float, int]] = []
    while time.monotonic() < until:
        step = first + len(done)
        plan = client.next_plan(step, 1)
        if not isinstance(plan, StepPlan):
            raise SystemExit(f"the controller stopped: {plan.reason}")
        client.publish(step + 1, state)
        client.finish_step(step, {"loss": 0.0})
        done.append((time.monotonic(), len(plan.groups)))
    return done


def rate(client: ControllerClient, *, warmup_s: float, seconds: float) -> float:
    """Groups a second of the steps that ended within so many seconds, after a warm-up."""
    warm = take_steps(client, 0, until=time.monotonic() + warmup_s)
    done = take_steps(client, len(warm), until=time.monotonic() + seconds)
    began = warm[-1][0]
    return sum(groups for _, groups in done) / (done[-1][0] - began)


def cpu_seconds(client: ControllerClient) -> dict[str, float]:
    """Of the controller's process so far, and of a worker's in the mean."""
    import psutil

    workers = [worker["pid"] for worker in client.status()["pool"]["workers"].values()]
    parents = {psutil.Process(pid).ppid() for pid in workers}
    siblings = [p for parent in parents for p in psutil.Process(parent).children() if p.pid not in workers]
    used = {p.pid: sum(p.cpu_times()[:2]) for p in [*siblings, *map(psutil.Process, workers)]}
    return {
        "controller": max((used[p.pid] for p in siblings), default=0.0),
        "workers": sum(used[pid] for pid in workers),
    }


def measure_ceiling(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """What 32 workers that sleep next to nothing get through."""
    factory = SleepingEngineFactory(args.short, args.payload_kb * 1024)
    cfg = config(folder, "ceiling", workers=WORKERS, groups=args.groups_per_step, chunk=args.chunk, staleness=2)
    with controller(cfg, factory) as client:
        take = take_steps(client, 0, until=time.monotonic() + args.warmup)
        before, began = cpu_seconds(client), take[-1][0]
        done = take_steps(client, len(take), until=time.monotonic() + args.measure)
        after = cpu_seconds(client)
    groups, wall = sum(count for _, count in done), done[-1][0] - began
    used = {name: (after[name] - before[name]) / groups * 1e3 for name in after}
    return {"groups_per_second": groups / wall, "steps": len(done), "cpu_ms_per_group": used}


def measure_scaling(folder: Path, args: argparse.Namespace) -> dict[int, float]:
    """Groups a second by number of workers, at the same seconds a group."""
    found = {}
    for workers in args.workers:
        # A group an assignment and enough of them ahead: what is measured is the workers, not the end of each step.
        factory = SleepingEngineFactory(args.seconds, args.payload_kb * 1024)
        cfg = config(folder, f"scaling-{workers}", workers=workers, groups=workers, chunk=1, staleness=2)
        with controller(cfg, factory) as client:
            found[workers] = rate(client, warmup_s=4 * args.seconds, seconds=args.measure)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.5, help="a group takes a worker, for the efficiency")
    parser.add_argument("--short", type=float, default=0.001, help="… and for the ceiling")
    parser.add_argument("--chunk", type=int, default=8, help="groups of an assignment, for the ceiling")
    parser.add_argument("--groups-per-step", type=int, default=256, help="for the ceiling")
    # Ray hands values of up to 100 KB over with the call's answer, through the caller; only larger ones go around it.
    parser.add_argument("--payload-kb", type=int, default=256, help="vision features of a group")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 8, WORKERS])
    parser.add_argument("--warmup", type=float, default=5.0)
    parser.add_argument("--measure", type=float, default=15.0, help="seconds of each measurement")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="mmrl-bench-"))
    # The simulated workers run nothing of this machine's numerics: one thread each is one too many already.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    samples, _ = generate_scenes(ScenesSection(train=SAMPLES, eval=1, image_size=32))
    write_parquet(folder / "data", samples)
    try:
        with ray_at(None, cpus=2, object_store_mb=1024, namespace="bench"):
            scaling = measure_scaling(folder, args)
            ceiling = measure_ceiling(folder, args)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    report(args, scaling, ceiling)


def report(args: argparse.Namespace, scaling: dict[int, float], ceiling: dict[str, Any]) -> None:
    """The table, then the JSON line."""
    table = Table(title=f"{args.seconds:g} s a group")
    for column in ("workers", "groups a second", "efficiency"):
        table.add_column(column, justify="right")
    first = min(scaling)
    efficiency = {n: value / n / (scaling[first] / first) for n, value in scaling.items()}
    for workers, value in scaling.items():
        table.add_row(str(workers), f"{value:.2f}", f"{efficiency[workers]:.3f}")
    console = Console()
    console.print(table)
    used = ceiling["cpu_ms_per_group"]
    console.print(
        f"{WORKERS} workers at {args.short:g} s a group: {ceiling['groups_per_second']:.0f} groups a second over "
        f"{ceiling['steps']} steps; CPU ms a group: controller {used['controller']:.2f}, workers {used['workers']:.2f}"
    )
    figures = {
        "groups_per_second": ceiling["groups_per_second"],
        "efficiency_32": efficiency.get(WORKERS),
        "cpu_ms_per_group": used,
        "controller_groups_per_core_second": 1e3 / used["controller"] if used["controller"] else None,
        "by_workers": scaling,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
