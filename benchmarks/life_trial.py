"""One trial of `life.py`: a run in a folder of its own, and everything that is done to it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from mmrl_ray.run_records.run_dir import RunDir, checkpoint_steps  # noqa: E402

STEPS, EVERY, GROUPS, SIZE = 24, 2, 4, 4
HUB_MODEL = "acme/tiny"
MARK = "MMRL_LIFE_TRIAL"
"""In the environment of all that a trial starts, by which its processes are found."""
RUN_S, STOP_S, GONE_S = 180.0, 45.0, 30.0


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
    from mmrl_ray.data.scenes.generator import scenes_vocabulary
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
        how = ("process", "group", "both", "twice", "all")[index % 5]
        process = self.begin()
        self.until(process, moment)
        has_begun = self.run.exists()
        if process.poll() is None:
            if how == "all":  # Ray's processes, too, each in the order in which it was found
                for each in self.processes():
                    with suppress(psutil.Error):
                        each.send_signal(number)
            elif how != "group":
                process.send_signal(number)
            if how in ("group", "both"):
                os.killpg(process.pid, number)
            if how == "twice":
                time.sleep(chance.uniform(1.1, 2.5))
                if process.poll() is None:
                    process.send_signal(number)
        # In its first tenths of a second Python has its own way of ending by a signal; there is no run yet.
        # A second one may come when all is said and done and Python ends.
        codes = (0, 130) if has_begun and how not in ("twice", "all") else (0, 130, -number)
        if how == "all":  # a run that has lost its Ray may end by an error, and without a last checkpoint
            codes = (*codes, 1)
        said = self.ends(process, codes, f"{number.name} to the {how}", STOP_S)
        if has_begun and process.returncode == -number and "error: stopped" not in said:
            self.wrong("unexplained", f"{number.name}, twice: it did not say that it stopped")
        self.all_gone("the signal")
        before = Kept(self.run)
        if before.steps and how not in ("twice", "all") and before.steps != before.checkpoint:
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
