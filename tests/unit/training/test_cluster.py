"""Ray's settings, without starting a Ray."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from queue import Queue

import pytest
import ray
from ray._private import ray_logging, services, utils
from ray._private.auto_init_hook import auto_init_ray

from mmrl_ray.errors import RaySessionError, RunError
from mmrl_ray.processes import process_start
from mmrl_ray.training import cluster
from mmrl_ray.training.cluster import configure_ray, node_local_root_refused, ray_at
from mmrl_ray.training.interrupts import StopOnInterrupt
from mmrl_ray.training.local_ray import KEPT_S, clean_old_sessions

_CONSOLE_POPEN = services.ConsolePopen


def test_a_late_call_starts_no_ray_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[bool] = []
    monkeypatch.setattr(ray, "init", lambda: started.append(True))
    configure_ray()
    auto_init_ray()
    assert not started


@pytest.mark.parametrize("own", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"])
def test_pytorch_lets_its_segments_grow_in_what_ray_starts_unless_the_user_has_set_its_allocator(
    monkeypatch: pytest.MonkeyPatch, own: str | None
) -> None:
    """Asked of PyTorch, in a process that inherits what `configure_ray` has set."""
    rest = {name: value for name, value in os.environ.items() if not name.endswith("_ALLOC_CONF")}
    monkeypatch.setattr(os, "environ", rest | ({own: "max_split_size_mb:64"} if own else {}))
    configure_ray()
    configure_ray()  # of a process that was started so
    found = {name: value for name, value in os.environ.items() if name.endswith("_ALLOC_CONF")}
    if own is not None:
        assert found == {own: "max_split_size_mb:64"}
        return
    assert len(found) == 2  # which of the names is heeded depends on PyTorch's version
    asked = "import torch; print(torch._C._accelerator_getAllocatorSettings())"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", asked], env=dict(os.environ), capture_output=True, text=True
    )
    assert done.stdout.strip() == "expandable_segments:True", done.stderr
    assert "deprecated" not in done.stderr


def test_a_local_ray_that_does_not_start_is_one_line_of_what_was_tried_and_the_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Ray's own start, in a folder whose name is too long for a socket."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("x" * 90)))
    with (
        pytest.raises(RaySessionError, match=r"no local Ray started in \d+ s, with \d+ CPUs and 80 MB of") as raised,
        ray_at(None, cpus=1, object_store_mb=80, namespace="none"),
    ):
        pass
    said = str(raised.value)
    assert "\n" not in said
    assert "AF_UNIX" in said
    assert "join a Ray that runs with --address" in said
    assert not ray.is_initialized()


def test_what_the_log_of_a_ray_that_did_not_start_says_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    logs = tmp_path / "ray" / f"session_2026-01-31_{os.getpid()}" / "logs"

    def init(**settings: object) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        (logs / "raylet.out").write_text(
            "[2026-01-31 12:00:00,001 I 7 7] (raylet) main.cc:1: started\n"
            "[2026-01-31 12:00:00,002 E 7 7] (raylet) store.cc:9: cannot create /dev/shm/plasma: no space\n"
            "[2026-01-31 12:00:00,003 I 7 7] (raylet) main.cc:2: ended\n"
        )
        raise Exception("The current node timed out during startup.\nmore\nlines")  # as Ray does

    monkeypatch.setattr(ray, "init", init)
    with (
        pytest.raises(
            RaySessionError, match=r"timed out during startup; .*raylet.out says: .* no space\. See"
        ) as raised,
        ray_at(None, cpus=1, object_store_mb=None, namespace="none"),
    ):
        pass
    assert "\n" not in str(raised.value)
    with (
        pytest.raises(
            RaySessionError, match=r"cannot join Ray at h:1: The current node timed out during startup; check"
        ),
        ray_at("h:1", cpus=1, object_store_mb=None, namespace="none"),
    ):
        pass


def test_of_what_workers_log_only_the_lines_of_reward_functions_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "somewhere")
    dispatcher = ray_logging.global_worker_stdstream_dispatcher
    asked: list[bool] = []

    def init(*, log_to_driver: bool, **settings: object) -> None:
        asked.append(log_to_driver)
        dispatcher.add_handler("ray_print_logs", lambda data: pytest.fail("all of the log is shown"))

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: dispatcher.remove_handler("ray_print_logs"))
    shown: list[str] = []
    data = {"lines": ["warming up", "[reward mine:f] red", "[rewards] x"], "is_err": True, "pid": 7}
    with ray_at(None, cpus=1, object_store_mb=None, namespace="none", show=shown.append):
        dispatcher.emit(data)
    dispatcher.emit(data)
    assert (asked, shown) == ([True], ["[reward mine:f] red"])


def test_a_local_root_is_refused_where_other_machines_would_not_see_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def nodes(*addresses: str) -> None:
        found = [{"Alive": True, "NodeManagerAddress": address} for address in addresses]
        monkeypatch.setattr(ray, "nodes", lambda: found)

    nodes("10.0.0.1", "10.0.0.1", "10.0.0.1")  # several nodes of one machine see the same disk
    node_local_root_refused("runs")
    nodes("10.0.0.1", "10.0.0.2")
    with pytest.raises(RunError, match=r"root=runs is a path on this node, but the cluster has nodes on 2 machines"):
        node_local_root_refused("runs")
    node_local_root_refused("s3://bucket/runs")


def test_rays_processes_are_out_of_reach_of_a_signal_to_the_group() -> None:
    """They are in a session of their own, and what starts afterwards is as before."""
    with cluster._out_of_reach():
        process = services.ConsolePopen(["sleep", "60"])
    try:
        assert os.getsid(process.pid) == process.pid != os.getsid(0)
    finally:
        process.kill()
        process.wait()
    assert services.ConsolePopen is _CONSOLE_POPEN


def test_a_signal_while_ray_starts_is_the_runs_and_not_rays_which_starts_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is half connected crashes when it ends; what is awaited is said when the signal comes."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    said: Queue[str] = Queue()
    heard: list[str] = []

    def init(**options: object) -> None:
        utils.set_sigterm_handler(lambda number, frame: sys.exit(number))  # as Ray's own does
        signal.raise_signal(signal.SIGTERM)
        heard.append(said.get(timeout=60))

    monkeypatch.setattr(ray, "init", init)
    session = ray_at(None, cpus=1, object_store_mb=None, namespace="n", say=said.put)
    with StopOnInterrupt(), pytest.raises(KeyboardInterrupt), session:
        pytest.fail("it went on all the same")
    assert heard == ["stopping: waiting for Ray to start, then ending it; Ctrl-C again stops at once"]


def test_old_sessions_of_this_product_are_deleted_and_nobody_elses(tmp_path: Path) -> None:
    long_ago = time.time() - 3 * KEPT_S
    sleeper = subprocess.Popen(["sleep", "60"])

    def session(
        name: str, *, marked: bool = True, pid: int = 2**22 + 1, host: str = "", began: str | None = "0"
    ) -> Path:
        """Of a process that is gone; nothing was written into it for days."""
        folder = tmp_path / f"session_{name}"
        (folder / "logs").mkdir(parents=True)
        (folder / "logs" / "raylet.out").write_text("x" * 100)
        if marked:
            owner = {"pid": pid, "started": began, "host": host or socket.gethostname()}
            (folder / "mmrl.json").write_text(json.dumps(owner))
        for path in (*folder.rglob("*"), folder):
            os.utime(path, (long_ago, long_ago))
        return folder

    try:
        mine, elsewhere = session("mine"), session("elsewhere", host="a pod that is gone")
        reused = session("reused", pid=sleeper.pid)
        kept = [
            session("others", marked=False),
            session("alive", pid=sleeper.pid, began=process_start(sleeper.pid)),
            session("torn"),
            session("fresh", host="a pod that shares the folder"),
        ]
        (kept[2] / "mmrl.json").write_text("{")
        os.utime(kept[2] / "mmrl.json", (long_ago, long_ago))
        os.utime(kept[3] / "logs" / "raylet.out")
        (tmp_path / "session_latest").symlink_to(kept[1])
        (tmp_path / "prom_metrics").mkdir()
        assert set(clean_old_sessions(tmp_path)) == {mine, elsewhere, reused}
        assert {*tmp_path.iterdir()} == {*kept, tmp_path / "session_latest", tmp_path / "prom_metrics"}
    finally:
        sleeper.kill()
        sleeper.wait()
