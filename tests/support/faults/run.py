"""A run of `mmrl train` on those machines, and everything that can be done to it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any

import psutil

from mmrl_ray.run_records.control_files import read_status
from mmrl_ray.run_records.run_dir import RunDir
from tests.support.faults.inside import PAUSE
from tests.support.faults.machines import Machines, full_store
from tests.support.programs import Program

STOPS_WITHIN_S = 60.0
"""A run that cannot go on ends, and says why, within so long."""
RECOVERS_WITHIN_S = 240.0
_LOOK_S = 0.05
ENGINE = "mmrl_ray.policy.generation.vllm.child:work"
"""Among the arguments of its process, and of the watcher of that."""


class NotSurvivedError(AssertionError):
    """A run did not do what it should after a fault."""


class FaultyRun:
    """`mmrl train` of one config on the cluster: started, resumed, and made to suffer."""

    def __init__(self, machines: Machines, config: Path, folder: Path, chance: Random, *, pause_s: float) -> None:
        """`folder` is the run's. An assignment takes `pause_s` longer than it would."""
        self.machines, self.config, self.folder = machines, config, folder
        self.driver: Program | subprocess.Popen[bytes] | None = None
        self.chance = chance
        self._log = config.with_suffix(".log")
        self._drivers = 0
        (machines.faults / PAUSE).write_text(str(pause_s))

    # -- how it stands ---------------------------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Finished so far."""
        file = self.folder / "metrics.jsonl"
        return file.read_bytes().count(b"\n") if file.exists() else 0

    def events(self, kind: str, since: float = 0.0) -> list[dict[str, Any]]:
        """Events of a kind from a time on."""
        lines = RunDir.at(self.folder).read_lines("events.jsonl") if self.folder.exists() else []
        return [line for line in lines if line["kind"] == kind and line["time"] >= since]

    def workers(self) -> Mapping[str, Any]:
        """By name, as the run's status has them."""
        pool = read_status(RunDir.at(self.folder)).get("pool", {})
        return {name: each for name, each in pool.get("workers", {}).items() if each["state"] in ("ready", "busy")}

    def output(self) -> str:
        """What the newest driver has printed."""
        return self._log.with_suffix(f".{self._drivers}.log").read_text()

    def start(self, *arguments: str | Path) -> None:
        """A driver: `mmrl train` with these arguments."""
        self._drivers += 1
        with self._log.with_suffix(f".{self._drivers}.log").open("wb") as log:
            environment = {**os.environ, "RAY_ADDRESS": self.machines.address, "COLUMNS": "200"}
            train, main = ["train", *map(str, arguments)], "tests.support.faults.driver"
            if self.machines.forked:
                self.driver = Program(train, environment, Path.cwd(), log=log, main=f"{main}:main")
            else:
                command = [sys.executable, "-m", main, *train]
                self.driver = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)

    def begin(self) -> None:
        """Starts it, until it has finished a step with all its workers."""
        self.start(self.config)
        self.wait(lambda: self.steps >= 1 and len(self.workers()) >= len(self.machines.nodes), "a first step")

    def resume(self) -> None:
        """As `mmrl jobs resume` does."""
        self.start("--resume", self.folder)

    def stop(self) -> None:
        """Ctrl-C, until it has checkpointed and ended."""
        assert self.driver is not None
        self.driver.send_signal(signal.SIGINT)
        self.ended(130)

    def close(self) -> None:
        """Leaves no driver behind, whatever happened."""
        if self.driver is not None and self.driver.poll() is None:
            self.driver.kill()
            self.driver.wait(STOPS_WITHIN_S)

    def wait(self, condition: Callable[[], object], what: str, seconds: float = RECOVERS_WITHIN_S) -> None:
        """Until the condition holds.

        Raises:
            NotSurvivedError: the driver ended before that, or it took too long.
        """
        deadline = time.monotonic() + seconds
        while not condition():
            if self.driver is not None and self.driver.poll() is not None:
                raise NotSurvivedError(f"the run ended before {what}: {self.output()[-2000:]}")
            if time.monotonic() > deadline:
                raise NotSurvivedError(f"no {what} within {seconds:g} s; it says: {self.output()[-2000:]}")
            time.sleep(_LOOK_S)

    def ended(self, code: int, cause: str = "", seconds: float = STOPS_WITHIN_S) -> None:
        """Waits until the driver has ended, as it should.

        Raises:
            NotSurvivedError: it has not, or otherwise, or does not say why.
        """
        assert self.driver is not None
        try:
            found = self.driver.wait(seconds)
        except subprocess.TimeoutExpired:
            raise NotSurvivedError(f"the run did not stop within {seconds:g} s: {self.output()[-2000:]}") from None
        if found != code or not re.search(cause, self.output()):
            raise NotSurvivedError(f"exit code {found}, not {code} with {cause!r}: {self.output()[-2000:]}")

    # -- what is done to it: each returns when it was done, and what is true when it is over ----------------------

    def suffer(self, fault: str) -> float:
        """Does it, and waits until the step that was due then is finished and whatever died is replaced.

        Returns the seconds from the one to the other.

        Raises:
            NotSurvivedError: it did not come to that.
        """
        due = self.steps
        began, over = getattr(self, fault)()
        self.wait(lambda: self.steps > due and over(), f"recovery from {fault}")
        return time.time() - began

    def worker_killed(self) -> tuple[float, Callable[[], bool]]:
        """Whatever it is doing."""
        began = time.time()
        os.kill(self._a_worker(), signal.SIGKILL)
        return began, lambda: self._replaced(began)

    def worker_stopped(self) -> tuple[float, Callable[[], bool]]:
        """It hangs, and does not die."""
        began = time.time()
        os.kill(self._a_worker(), signal.SIGSTOP)
        return began, lambda: self._replaced(began)

    def engine_killed(self) -> tuple[float, Callable[[], bool]]:
        """The process of a worker's engine dies, and the worker does not."""
        began = time.time()
        os.kill(self._an_engine(), signal.SIGKILL)
        return began, lambda: self._replaced(began)

    def engine_stopped(self) -> tuple[float, Callable[[], bool]]:
        """It hangs."""
        began = time.time()
        os.kill(self._an_engine(), signal.SIGSTOP)
        return began, lambda: self._replaced(began)

    def handover(self) -> tuple[float, Callable[[], bool]]:
        """A worker dies between sampling and handing over."""
        began = self._tell("handover")
        return began, lambda: self._replaced(began)

    def poison(self) -> tuple[float, Callable[[], bool]]:
        """A sample kills every worker that takes it."""
        began = self._tell("poison")
        return began, lambda: bool(self.events("sample_quarantined", began)) and self._replaced(began)

    def reward_timeout(self) -> tuple[float, Callable[[], bool]]:
        """The reward hangs on one sample."""
        return self._reward("reward_timeout")

    def reward_nan(self) -> tuple[float, Callable[[], bool]]:
        """The reward gives NaN for one."""
        return self._reward("reward_nan")

    def reward_few(self) -> tuple[float, Callable[[], bool]]:
        """The reward returns too few scores for one."""
        return self._reward("reward_few")

    def replica_killed(self) -> tuple[float, Callable[[], bool]]:
        """The reward's replica dies."""
        (pid,) = self.machines.processes(r"ray::ServeReplica:reward-")
        began = time.time()
        os.kill(pid, signal.SIGKILL)
        return began, lambda: bool(self.events("reward_replica_ready", began))

    def node_killed(self) -> tuple[float, Callable[[], bool]]:
        """A node goes with its worker, and another one comes."""
        node = self.machines.nodes.pop(self.chance.randrange(len(self.machines.nodes)))
        began = time.time()
        self.machines.cluster.remove_node(node, allow_graceful=False)
        self.machines.nodes.append(self.machines.add_node())
        return began, lambda: self._replaced(began)

    def learner_killed(self) -> tuple[float, Callable[[], bool]]:
        """While it holds a plan, or waits for one."""
        began = time.time()
        os.kill(int((self.machines.faults / "learner").read_text()), signal.SIGKILL)
        return began, lambda: bool(self.events("learner_restarted", began))

    def controller_killed(self) -> tuple[float, Callable[[], bool]]:
        """The run ends with that, and is resumed."""
        (pid,) = self.machines.processes(r"ray::ControllerActor")
        began = time.time()
        os.kill(pid, signal.SIGKILL)
        self.ended(1, "error: the rollout controller is gone: ")
        return began, self._resumed()

    def driver_killed(self) -> tuple[float, Callable[[], bool]]:
        """It cannot say anything, and is resumed."""
        assert self.driver is not None
        began = time.time()
        self.driver.kill()
        self.ended(-signal.SIGKILL)
        return began, self._resumed()

    def disk_full(self) -> tuple[float, Callable[[], bool]]:
        """The next checkpoint cannot be written: the run ends with that, and is resumed when there is room."""
        began = time.time()
        self.end_by_full_disk()
        return began, self._resumed()

    def end_by_full_disk(self) -> None:
        """The next checkpoint cannot be written, and the run ends with that."""
        (self.machines.faults / "disk_full").touch()
        self.ended(1, r"error: .*checkpoints/step-\d+: the disk is full; free some space and continue with --resume")
        (self.machines.faults / "disk_full").unlink()

    def store_full(self) -> tuple[float, Callable[[], bool]]:
        """A step is taken while no object store has room."""
        with full_store(self.machines):
            began, due = time.time(), self.steps
            self.wait(lambda: self.steps > due + 1, "a step with full object stores")
        return began, lambda: True

    # -- inside ----------------------------------------------------------------------------------------------------

    def _a_worker(self) -> int:
        pids: list[int] = []

        def found() -> bool:  # the status is up to a second old
            pids[:] = [each["pid"] for each in self.workers().values() if psutil.pid_exists(each["pid"])]
            return bool(pids)

        self.wait(found, "a worker that is ready")
        return self.chance.choice(sorted(pids))

    def _an_engine(self) -> int:
        """Of a worker that is ready: of the watcher and the process that it watches, that one."""
        pids: list[int] = []

        def found() -> bool:
            with contextlib.suppress(psutil.Error):
                below = psutil.Process(self._a_worker()).children(recursive=True)
                pids[:] = [each.pid for each in below if ENGINE in each.cmdline() and ENGINE in each.parent().cmdline()]
            return bool(pids)

        self.wait(found, "an engine beside a worker")
        return pids[0]

    def _replaced(self, since: float) -> bool:
        """Whoever died has a successor that is ready, or that died, too, and has one."""
        lost = self.events("worker_lost", since)
        if not lost:
            return False
        gone, created, ready = (
            {event["worker"] for event in self.events(kind, lost[0]["time"])}
            for kind in ("worker_lost", "worker_created", "worker_ready")
        )
        return len(created) >= len(gone) and created - gone <= ready

    def _resumed(self) -> Callable[[], bool]:
        """Goes on, until a step is finished that was not before the run ended."""
        at = self.steps
        self.resume()
        return lambda: self.steps > at

    def _reward(self, fault: str) -> tuple[float, Callable[[], bool]]:
        began = self._tell(fault)
        return began, lambda: bool(self.events("reward_failed", began))

    def _tell(self, fault: str) -> float:
        """Returns when it was taken."""
        taken = self.machines.faults / f"{fault}.taken"
        taken.unlink(missing_ok=True)
        (self.machines.faults / fault).touch()
        self.wait(taken.exists, f"{fault} taken")
        return taken.stat().st_ctime
