"""One process writes a run folder: a second is refused, a dead one's place is taken, whoever lost it stops."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs

from mmrl_ray.errors import RunError
from mmrl_ray.processes import process_start
from mmrl_ray.run_records import run_owner
from mmrl_ray.run_records.run_dir import RunDir
from mmrl_ray.run_records.run_owner import OWNER_FILE, RunOwner, living_owner


@pytest.fixture(params=["local", "object store"])
def run(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    monkeypatch.setattr(run_owner, "_SETTLE_S", 0.05)
    if request.param == "local":
        return RunDir.create(tmp_path / "runs", "r1")
    return RunDir.create("runs", "r1", filesystem=fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()))


def left_behind(run: RunDir, **changes: Any) -> None:
    """An owner that did not say goodbye; by default of another machine, heard of just now."""
    there = {"id": "x", "host": "elsewhere", "pid": 4711, "started": "1", "machine": "other", "since": 0.0}
    run.write_json(OWNER_FILE, {**there, "time": time.time(), **changes})


def test_a_second_process_is_refused_and_told_who_has_it(run: RunDir) -> None:
    with RunOwner(run) as first:
        pid = run.read_json(OWNER_FILE)["pid"]
        with pytest.raises(RunError, match=rf"being written by process {pid} on ") as refused, RunOwner(run):
            pass
        assert str(run.location) in str(refused.value)
        assert living_owner(run) is not None
        first.check()
    assert not run.exists(OWNER_FILE)
    with RunOwner(run) as next_one:
        assert next_one.taken_over is None


def test_the_place_of_a_process_that_is_dead_is_taken(run: RunDir) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    left_behind(run, host="here", pid=child.pid, started=process_start(child.pid), machine=run_owner._machine())
    try:
        with pytest.raises(RunError, match=f"process {child.pid} on here"), RunOwner(run):
            pass
    finally:
        child.kill()
        child.communicate()
    assert living_owner(run) is None
    with RunOwner(run) as owner:
        assert owner.taken_over is not None
        assert f"process {child.pid} on here" in owner.taken_over


def test_a_pid_that_is_used_again_is_not_the_owner(run: RunDir) -> None:
    mine = multiprocessing.current_process().pid
    left_behind(run, pid=mine, started="1", machine=run_owner._machine())
    with RunOwner(run) as owner:
        assert owner.taken_over is not None


@pytest.mark.parametrize(("silent_s", "beats", "refused"), [(1.0, False, True), (1e4, True, True), (1e4, False, False)])
def test_another_machine_is_believed_by_its_heartbeat(run: RunDir, silent_s: float, beats: bool, refused: bool) -> None:
    """Its clock may be hours behind: what counts then is that the heartbeat goes on."""
    left_behind(run, time=time.time() - silent_s)
    beat = threading.Timer(0.1, lambda: left_behind(run, time=time.time() - silent_s + 0.1))
    if beats:
        beat.start()
    owner = RunOwner(run, heartbeat_s=0.3, stale_s=60.0)
    if refused:
        with pytest.raises(RunError, match="process 4711 on elsewhere"), owner:
            pass
    else:
        with owner:
            assert owner.taken_over is not None
    beat.cancel()


def test_whoever_lost_the_folder_stops_and_leaves_it_to_the_other(run: RunDir) -> None:
    with RunOwner(run, heartbeat_s=0.05) as owner:
        before = run.read_json(OWNER_FILE)["time"]
        deadline = time.monotonic() + 10
        while run.read_json(OWNER_FILE)["time"] == before and time.monotonic() < deadline:
            time.sleep(0.02)
        assert run.read_json(OWNER_FILE)["time"] > before, "it says that it lives"
        while owner.lost is None and time.monotonic() < deadline:
            left_behind(run)
            time.sleep(0.02)
        with pytest.raises(RunError, match="taken over by process 4711 on elsewhere"):
            owner.check()
    assert run.read_json(OWNER_FILE)["id"] == "x"


def test_of_many_that_start_at_once_one_has_it(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, "r1")
    left_behind(run, pid=2**22 + 1, machine=run_owner._machine())  # dead, so that all want to take over
    ready, results = threading.Barrier(8), []

    def attempt() -> None:
        ready.wait(10)
        try:
            RunOwner(run).__enter__()
            results.append(True)
        except RunError:
            results.append(False)

    threads = [threading.Thread(target=attempt) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(results) == [False] * 7 + [True]
    assert json.loads((tmp_path / "r1" / OWNER_FILE).read_text())["host"]
