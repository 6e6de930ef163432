"""The life of a run: killed, signalled, resumed twice at once, moved, its caches deleted, at moments over all of it.

    python benchmarks/life.py --seed 1 --work /tmp/life [--minutes 8] [--at-once 2]

One whole run (data drawn, warm start, Ray, evaluation, steps with a checkpoint every two, evaluation, report) is the
reference. Each trial begins the same run in a folder of its own and has something happen to it at a moment that is
drawn from one tenth of the reference's time, the next trial's from the next tenth; then it is gone on with.

    killed     SIGKILL of the driver, of every other one of all its processes; `mmrl train --resume`
    signalled  SIGINT, SIGTERM or SIGHUP, to the process, its group, `timeout`-like to both, or twice; `--resume`
    twice      two `--resume` at once after a kill; every other time a `--resume` while it runs
    moved      killed, its folder moved (every other time to another file system), resumed there; caption, report
    caches     killed or stopped, then `sft.cache`, the hub's cache, the data or all of them deleted; resumed,
               captioned, and every fifth time served

    lost         a run that did not end as the reference did: its steps once each, losses, rollouts and adapter equal to
                 the last bit; or that made anew what was finished (steps up to the newest checkpoint, base, evaluation)
    hung         an end that took longer than its bound
    unexplained  an end with a traceback, or without one line that says why and what to do
    left         processes that outlived their driver by 90 s, half-written files, an owner that is gone

Trials that are in the work folder's `trials.jsonl` are not done again: run it until none is left. Prints a table; the
last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import psutil
import pyarrow.parquet as pq
import yaml
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from mmrl_ray.learner.checkpoints import checkpoint_steps  # noqa: E402
from mmrl_ray.run_dir import RunDir  # noqa: E402
from mmrl_ray.run_owner import living_owner  # noqa: E402

KINDS = ("killed", "signalled", "twice", "moved", "caches")
STEPS, EVERY, GROUPS, SIZE = 24, 2, 4, 4
HUB_MODEL = "acme/tiny"
MARK = "MMRL_LIFE_TRIAL"
"""In the environment of all that a trial starts, by which its processes are found."""
RUN_S, STOP_S, GONE_S = 180.0, 45.0, 90.0
SAME = ("reward/mean", "loss", "grad_norm", "lr", "entropy")


def config() -> dict[str, Any]:
    """The quickstart's kind of run, as small as it gets; paths are relative to the trial's folder."""
    actor = {"cpus": 0.5, "threads": 1}
    return {
        "run": {"name": "life", "seed": 3},
        "model": {"path": HUB_MODEL, "dtype": "float32"},
        "data": {
            **{"train": "data/train", "eval": "data/eval", "prompt": "describe the image ."},
            "scenes": {"train": 24, "eval": 4},
        },
        "sft": {"steps": 120, "batch_size": 8, "warmup_steps": 2, "cache": ".cache/sft"},
        "algorithm": "grpo",
        "rollout": {"group_size": SIZE, "max_new_tokens": 6, "groups_per_assignment": GROUPS},
        "reward": {"host": "inline", "parts": {"caption": {"kind": "caption"}}, "weights": {"caption": 1.0}},
        "learner": {"steps": STEPS, "groups_per_step": GROUPS, "lr": 1e-2, "checkpoint_every": EVERY},
        "resources": {"learner": actor, "rollout": actor},
    }


def make_hub(folder: Path) -> None:
    """A hub's cache with one tiny model, as a download leaves it."""
    from mmrl_ray.data.scenes import scenes_vocabulary
    from mmrl_ray.policy.tiny import build_tiny_llava

    commit = "0" * 40
    repository = folder / "hub" / f"models--{HUB_MODEL.replace('/', '--')}"
    words = ["describe", "the", "image", ".", *scenes_vocabulary()]
    sizes = {"hidden": 32, "layers": 2, "heads": 2, "vision_hidden": 32, "vision_layers": 1, "vision_heads": 2}
    build_tiny_llava(repository / "snapshots" / commit, vocabulary=words, patch_size=16, **sizes)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)


class Trial:
    """A folder with a config, a hub's cache and what was begun there."""

    def __init__(self, folder: Path, hub: Path, ray_folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(hub, folder / "hf")
        self.folder, self.run = folder, folder / "runs" / "life"
        self.config = folder / "life.yaml"
        self.config.write_text(yaml.safe_dump(config()))
        self.mark = f"{folder}-{os.getpid()}"
        self.environment = {**os.environ, MARK: self.mark, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"}
        self.environment |= {"RAY_TMPDIR": str(ray_folder), "COLUMNS": "200", "PYTHONPATH": str(ROOT)}
        self.picture: Path | None = None
        self.found: list[tuple[str, str]] = []
        """(what is wrong: lost, hung, …; in words)"""
        self._count = 0

    def wrong(self, what: str, how: str) -> None:
        """Notes it."""
        self.found.append((what, how))

    # -- processes -------------------------------------------------------------------------------------------------

    def start(self, *arguments: str | Path) -> subprocess.Popen[bytes]:
        """`mmrl` with these arguments, in a session of its own; it writes to `N.log`."""
        self._count += 1
        with (self.folder / f"{self._count}.log").open("wb") as log:
            command = [sys.executable, "-m", "mmrl_ray.cli", *map(str, arguments)]
            process = subprocess.Popen(
                command, stdout=log, stderr=log, env=self.environment, cwd=self.folder, start_new_session=True
            )
        process.log = Path(log.name)  # type: ignore[attr-defined]
        return process

    def begin(self) -> subprocess.Popen[bytes]:
        """The run, anew."""
        return self.start("train", self.config)

    def go_on(self) -> subprocess.Popen[bytes]:
        """As a user does: what is there is resumed, what is not is begun."""
        return self.start("train", "--resume", self.run) if self.run.exists() else self.begin()

    def ends(self, process: subprocess.Popen[bytes], codes: tuple[int, ...], what: str, within: float = RUN_S) -> str:
        """Waits; its output. Whatever is not as it should be is noted."""
        try:
            process.wait(within)
        except subprocess.TimeoutExpired:
            self.wrong("hung", f"{what}: still there after {within:g} s")
            self.kill_all()
            process.wait(GONE_S)
        said = process.log.read_text(errors="replace")  # type: ignore[attr-defined]
        if "Traceback" in said:
            self.wrong("unexplained", f"{what}: a traceback: {said[-600:]}")
        elif process.returncode not in codes and not self.found:
            self.wrong("unexplained", f"{what}: exit code {process.returncode}, not {codes}: {said[-600:]}")
        elif process.returncode in (1, 2) and not re.search(r"^error: .{20,}", said, re.MULTILINE):
            self.wrong("unexplained", f"{what}: exit code {process.returncode} without a word: {said[-600:]}")
        return said

    def processes(self) -> list[psutil.Process]:
        """All that this trial has started and that lives."""
        found = []
        for each in psutil.process_iter():
            try:
                if each.environ().get(MARK) == self.mark and each.status() != psutil.STATUS_ZOMBIE:
                    found.append(each)
            except (psutil.Error, OSError):
                continue
        return found

    def kill_all(self) -> None:
        """SIGKILL of all that this trial started, by id."""
        for each in self.processes():
            try:
                each.kill()
            except psutil.Error:
                continue

    def all_gone(self, after: str) -> None:
        """Nothing outlives its driver."""
        deadline = time.monotonic() + GONE_S
        while (there := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.2)
        if there:
            self.wrong("left", f"after {after}: {[' '.join(p.cmdline()[:3])[:80] for p in there]}")
            self.kill_all()

    # -- what is done to it ----------------------------------------------------------------------------------------

    def until(self, process: subprocess.Popen[bytes], moment: float) -> None:
        """Waits for a moment, in seconds since its start."""
        time.sleep(max(0.0, moment - (time.time() - psutil.Process(process.pid).create_time())))

    def kill(self, process: subprocess.Popen[bytes], *, tree: bool) -> None:
        """SIGKILL, of all its processes or of the driver alone."""
        for each in self.processes() if tree else ():
            if each.pid != process.pid:
                each.kill()
        process.kill()
        process.wait(GONE_S)

    def killed(self, index: int, moment: float, chance: Random) -> str:
        """SIGKILL, then a resume."""
        process = self.begin()
        self.until(process, moment)
        self.kill(process, tree=index % 2 == 1)
        before = Kept(self.run)
        self.ends(self.go_on(), (0,), "resume")
        before.compare(self)
        return "all processes" if index % 2 else "the driver"

    def signalled(self, index: int, moment: float, chance: Random) -> str:
        """A signal, then a resume."""
        number = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)[index % 3]
        how = ("process", "group", "both", "twice")[index % 4]
        process = self.begin()
        self.until(process, moment)
        has_begun = self.run.exists()
        if process.poll() is None:
            if how != "group":
                process.send_signal(number)
            if how in ("group", "both"):
                os.killpg(process.pid, number)
            if how == "twice":
                time.sleep(chance.uniform(1.1, 2.5))
                if process.poll() is None:
                    process.send_signal(number)
        # In its first tenths of a second Python has its own way of ending by a signal; there is no run yet.
        codes = (0, 130) if has_begun else (0, 130, -number)
        self.ends(process, codes, f"{number.name} to the {how}", STOP_S)
        self.all_gone("the signal")
        before = Kept(self.run)
        if before.steps and how != "twice" and before.steps != before.checkpoint:
            self.wrong("lost", f"{before.steps} steps were finished, the checkpoint is of {before.checkpoint}")
        if before.steps and how != "twice" and not before.report:
            self.wrong("lost", "there is no report of what was stopped")
        self.ends(self.go_on(), (0,), "resume")
        before.compare(self)
        return f"{number.name}, {how}"

    def twice(self, index: int, moment: float, chance: Random) -> str:
        """Two that would write one folder."""
        first = self.begin()
        self.until(first, moment)
        if index % 2 == 0:
            self.kill(first, tree=False)
            before = Kept(self.run)
            pair = [self.go_on(), self.go_on()]
        else:
            before = Kept(self.run)
            pair = [first, self.start("train", "--resume", self.run)]
        said = [self.ends(each, (0, 1), "one of two") for each in pair]
        codes = [each.returncode for each in pair]
        if index % 2 == 1 and codes == [0, 0]:  # it was over when the second one came
            pass
        elif sorted(codes) != [0, 1]:
            self.wrong("lost", f"of two at once, the exit codes are {codes}: {said[0][-300:]} / {said[1][-300:]}")
        else:
            refused, winner = said[codes.index(1)], pair[codes.index(0)]
            no_folder = index % 2 == 1 and "no run folder" in refused
            if not no_folder and f"process {winner.pid} on " not in refused:
                self.wrong("unexplained", f"the refused one does not name process {winner.pid}: {refused[-300:]}")
        before.compare(self)
        return "a resume while it runs" if index % 2 else "two resumes after a kill"

    def moved(self, index: int, moment: float, chance: Random) -> str:
        """Killed, then elsewhere."""
        process = self.begin()
        self.until(process, moment)
        self.kill(process, tree=False)
        if index % 4 > 1:
            self.all_gone("the kill")
        far = Path("/dev/shm") if index % 2 else self.folder
        target = far / f"elsewhere-{self.folder.name}" / "moved"
        shutil.rmtree(target.parent, ignore_errors=True)
        before = Kept(self.run)
        if self.run.exists():
            target.parent.mkdir(parents=True)
            shutil.move(self.run, target)
            self.run = target
        self.ends(self.go_on(), (0,), "resume")
        before.compare(self)
        self.use()
        if (self.folder / "runs" / "life").exists() and self.run == target:
            self.wrong("left", "something was written where the folder had been")
        return "to another file system" if index % 2 else "on its file system"

    def caches(self, index: int, moment: float, chance: Random) -> str:
        """Ended, then without what is kept outside of its folder."""
        what = ("sft.cache", "hub", "data", "all")[index % 4]
        process = self.begin()
        self.until(process, moment)
        if index % 2 == 0:
            self.kill(process, tree=False)
        else:
            process.send_signal(signal.SIGINT)
            self.ends(process, (0, 130, -signal.SIGINT), "SIGINT", STOP_S)
        before = Kept(self.run)
        places = {"sft.cache": [".cache"], "hub": ["hf"], "data": ["data"], "all": [".cache", "hf", "data"]}[what]
        aside = self.folder / "aside"
        aside.mkdir()
        for place in places:
            if (self.folder / place).exists():
                shutil.move(self.folder / place, aside / place)
        process = self.go_on()
        said = self.ends(process, (0, 1), "resume")
        if process.returncode == 1:
            # Its base was not made yet, and what that is made from is gone: an error that says so, and its cure.
            if "hf" not in places or before.base is not None or HUB_MODEL not in said:
                self.wrong("unexplained", f"what is missing is not said: {said[-500:]}")
            shutil.copytree(aside / "hf", self.folder / "hf", dirs_exist_ok=True)
            self.ends(self.go_on(), (0,), "resume with the hub's cache back")
        before.compare(self)
        for place in places:
            shutil.rmtree(self.folder / place, ignore_errors=True)
        self.use()
        if index % 5 == 0:
            self.serve()
        return f"{what} deleted"

    def use(self) -> None:
        """`mmrl caption` and `mmrl report` of the run that is finished."""
        picture = next((self.run / "images").iterdir())
        self.ends(self.start("caption", "--run", self.run, picture), (0,), "caption")
        self.ends(self.start("report", self.run), (0,), "report")

    def serve(self) -> None:
        """`mmrl serve` of it, until it is ready; then Ctrl-C."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        process = self.start("serve", self.run, "--set", f"serving.port={port}")
        deadline = time.monotonic() + RUN_S
        while "http://" not in process.log.read_text(errors="replace"):  # type: ignore[attr-defined]
            if process.poll() is not None or time.monotonic() > deadline:
                break
            time.sleep(0.2)
        else:
            process.send_signal(signal.SIGINT)
        self.ends(process, (0, 130), "serve", STOP_S)


class Kept:
    """What of a run is finished at a moment: it must not be made again."""

    def __init__(self, run: Path) -> None:
        self.base = _bytes(run / "base" / "warm_start.json")
        self.evaluation = _bytes(run / "eval" / "before.parquet")
        self.lines = (_bytes(run / "metrics.jsonl") or b"").split(b"\n")[:-1]
        self.steps = len(self.lines)
        there = run.exists()
        self.checkpoint = max(checkpoint_steps(RunDir.at(run)), default=0) if there else 0
        self.report = (run / "report.html").exists()

    def compare(self, trial: Trial) -> None:
        """What was made again is lost work."""
        run = trial.run
        if self.base is not None and _bytes(run / "base" / "warm_start.json") != self.base:
            trial.wrong("lost", "the warm start was made again")
        if self.evaluation is not None and _bytes(run / "eval" / "before.parquet") != self.evaluation:
            trial.wrong("lost", "the first evaluation was made again")
        lines = (_bytes(run / "metrics.jsonl") or b"").split(b"\n")[:-1]
        same = next((i for i, (a, b) in enumerate(zip(self.lines, lines, strict=False)) if a != b), self.steps)
        if same < min(self.checkpoint, self.steps):
            trial.wrong("lost", f"the checkpoint was of step {self.checkpoint}, and it went on from {same}")


def _bytes(file: Path) -> bytes | None:
    return file.read_bytes() if file.exists() else None


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
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS, help="of these alone")
    parser.add_argument("--minutes", type=float, default=600.0, help="begin no trial after so long")
    parser.add_argument("--at-once", type=int, default=1, help="trials at a time")
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
    places = [(kind, index) for index in order for kind in args.only]
    known = {(each["kind"], each["index"]) for each in done}

    def attempt(place: tuple[str, int]) -> None:
        if time.monotonic() - began < 60 * args.minutes:
            done.append(found := one(args, *place, seconds, expected))
            with log.open("a") as file:
                file.write(json.dumps(found) + "\n")
            console.print(json.dumps(found), markup=False, soft_wrap=True)

    with ThreadPoolExecutor(args.at_once) as pool:
        list(pool.map(attempt, [place for place in places if place not in known]))
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
