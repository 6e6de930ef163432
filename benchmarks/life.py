"""The life of a run: killed, signalled, resumed twice at once, moved, its caches deleted, at moments over all of it.

    python benchmarks/life.py --seed 1 --work /tmp/life [--minutes 8]

One whole run (data drawn, warm start, Ray, evaluation, steps with a checkpoint every two, evaluation, report) is the
reference. Each trial begins the same run in a folder of its own and has something happen to it at a moment that is
drawn from one tenth of the reference's time, the next trial's from the next tenth; then it is gone on with.

    killed     SIGKILL of the driver, of every other one of all its processes; `mmrl train --resume`
    signalled  SIGINT, SIGTERM or SIGHUP, to the process, its group, `timeout`-like to both, twice, or (as systemd and
               Slurm do) to every one of all its processes, Ray's too; `--resume`
    twice      two `--resume` at once after a kill; every other time a `--resume` while it runs
    moved      killed, its folder moved (every other time to another file system), resumed there; caption, report
    caches     killed or stopped, then `sft.cache`, the hub's cache, the data or all of them deleted; resumed,
               captioned, and every fifth time served

    lost         a run that did not end as the reference did: its steps once each, losses, rollouts and adapter equal to
                 the last bit; or that made anew what was finished (steps up to the newest checkpoint, base, evaluation)
    hung         an end that took longer than its bound
    unexplained  an end with a traceback, or without one line that says why and what to do
    left         processes that outlived their driver by 30 s, half-written files, an owner that is gone

Trials that are in the work folder's `trials.jsonl` are not done again: run it until none is left. Prints a table; the
last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pyarrow.parquet as pq
from life_trial import Trial, make_hub
from rich.console import Console
from rich.table import Table

from mmrl_ray.run_records.run_dir import RunDir
from mmrl_ray.run_records.run_owner import living_owner

KINDS = ("killed", "signalled", "twice", "moved", "caches")
SAME = ("reward/mean", "loss", "grad_norm", "lr", "entropy")


def outcome(run: Path) -> dict[str, Any]:
    """Of a finished run, what has to be the same whatever happened to it."""
    found = RunDir.at(run)
    lines = found.read_lines("metrics.jsonl")
    columns = ["step", "index", "completion", "sample_id", "caption", "token_ids", "reward", "masked"]
    rows = [
        row
        for file in sorted((run / "rollouts").glob("*.parquet"))
        for row in pq.read_table(file, columns=columns).to_pylist()
    ]
    evaluations = {name: pq.read_table(run / "eval" / f"{name}.parquet").to_pylist() for name in ("before", "after")}
    return {
        "state": (found.read_json("status.json")["state"], found.read_json("summary.json")["status"]),
        "steps": [line["step"] for line in lines],
        "figures": [[line[name] for name in SAME] for line in lines],
        "rollouts": rows,
        "evaluations": evaluations,
        "states": sorted(path.name for path in (run / "analysis").glob("*.parquet")),
        "evaluated": sorted(found.read_json("summary.json")["eval"]),
        "adapter": (run / "adapter" / "adapter_model.safetensors").read_bytes(),
        "checkpoints": sorted(path.name for path in (run / "checkpoints").iterdir()),
    }


def judge(trial: Trial, reference: dict[str, Any]) -> None:
    """Whether it ended as the reference did, and cleanly."""
    trial.all_gone("the end")
    try:
        found = outcome(trial.run)
    except Exception as error:  # noqa: BLE001  # whatever is missing: the run is not whole
        trial.wrong("lost", f"the run is not whole: {type(error).__name__}: {error}")
        return
    for name, value in reference.items():
        if found[name] != value:
            told = "" if name in ("adapter", "rollouts", "evaluations") else f": {str(found[name])[:200]}"
            trial.wrong("lost", f"other {name} than the reference's{told}")
    for file in ("events.jsonl", "metrics.jsonl", "quarantine.jsonl"):
        RunDir.at(trial.run).read_lines(file)
    places = [trial.run, trial.folder / ".cache", trial.folder / "data"]
    if scratch := [str(p) for place in places for name in (".tmp-*", ".old-*") for p in place.rglob(name)]:
        trial.wrong("left", f"half-written: {scratch[:4]}")
    if (trial.run / "owner.json").exists() or living_owner(RunDir.at(trial.run)) is not None:
        trial.wrong("left", "owner.json")
    if there := [name for name in ("prometheus.json", "live") if (trial.run / name).exists()]:
        trial.wrong("left", f"{there}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--trials", type=int, default=10, help="of each kind")
    parser.add_argument("--moments", nargs="+", type=int, help="of these tenths of the run alone, 0 to TRIALS - 1")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS, help="of these alone")
    parser.add_argument("--minutes", type=float, default=600.0, help="begin no trial after so long")
    parser.add_argument("--work", type=Path, default=Path("/tmp/mmrl-life"), help="short: Ray's sockets lie in it")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where this was started with it ignored
    began, log = time.monotonic(), args.work / "trials.jsonl"
    hub, reference = args.work / "hub", args.work / "reference"
    if not hub.exists():
        make_hub(hub)
    if not (args.work / "seconds").exists():
        trial = Trial(reference, hub, args.work / "r")
        started = time.monotonic()
        trial.ends(trial.begin(), (0,), "the reference")
        if trial.found:
            sys.exit(f"the reference run failed: {trial.found}")
        (args.work / "seconds").write_text(f"{time.monotonic() - started:.1f}")
    seconds, expected = float((args.work / "seconds").read_text()), outcome(reference / "runs" / "life")
    done = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    console = Console(stderr=True)
    order = Random(args.seed).sample(range(args.trials), args.trials)  # so that the first few are from all over the run
    wanted = set(range(args.trials) if args.moments is None else args.moments)
    places = [(kind, index) for index in order if index in wanted for kind in args.only]
    known = {(each["kind"], each["index"]) for each in done}

    for place in [place for place in places if place not in known]:
        if time.monotonic() - began > 60 * args.minutes:
            break
        done.append(one(args, *place, seconds, expected))
        with log.open("a") as file:
            file.write(json.dumps(done[-1]) + "\n")
        console.print(json.dumps(done[-1]), markup=False, soft_wrap=True)
    report(done, seconds)


def one(args: argparse.Namespace, kind: str, index: int, seconds: float, expected: dict[str, Any]) -> dict[str, Any]:
    """A trial from its beginning to its judgement; its folder stays where something was wrong."""
    chance = Random(f"{args.seed}/{kind}/{index}")
    moment = seconds * (index + chance.random()) / args.trials
    ray_folder = args.work / f"{kind[0]}{index}"
    trial = Trial(args.work / f"{kind}-{index}", args.work / "hub", ray_folder)
    began = time.monotonic()
    suffer: Callable[[int, float, Random], str] = getattr(trial, kind)
    try:
        how = suffer(index, moment, chance)
        judge(trial, expected)
    finally:
        trial.kill_all()
    if not trial.found:
        shutil.rmtree(trial.folder, ignore_errors=True)
        if trial.folder not in trial.run.parents:
            shutil.rmtree(trial.run.parent, ignore_errors=True)
    shutil.rmtree(ray_folder, ignore_errors=True)
    took = round(time.monotonic() - began, 1)
    return {"kind": kind, "index": index, "moment": round(moment, 2), "how": how, "took": took, "found": trial.found}


def report(done: list[dict[str, Any]], seconds: float) -> None:
    """The table, then the JSON line."""
    table = Table(title=f"a whole run takes {seconds:.0f} s")
    names = ("lost", "hung", "unexplained", "left")
    for column in ("", "trials", *names):
        table.add_column(column, justify="left" if not column else "right")
    total: Counter[str] = Counter()
    for kind in KINDS:
        of_kind = [each for each in done if each["kind"] == kind]
        counts = Counter(what for each in of_kind for what in {what for what, _ in each["found"]})
        total += counts
        table.add_row(kind, str(len(of_kind)), *(str(counts[name]) for name in names))
    Console().print(table)
    clean = sum(not each["found"] for each in done)
    ratio = round(clean / len(done), 3) if done else None
    print(json.dumps({"trials": len(done), **{name: total[name] for name in names}, "clean": clean, "ratio": ratio}))


if __name__ == "__main__":
    main()
