"""What a job is: what is packed, what is run, what is known of it, how it ends."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import ray

import mmrl_ray
from mmrl_ray.config import Config
from mmrl_ray.config.load import load_config, parse_config
from mmrl_ray.config.reward import RewardSection
from mmrl_ray.errors import ConfigError, JobError, JobServerError, JobSetupError
from mmrl_ray.jobs import client as jobs_client
from mmrl_ray.jobs.client import JobsClient, local_rays
from mmrl_ray.jobs.records import Job, JobFacts, check_id, new_id
from mmrl_ray.jobs.submit import packed, python_for, resume_run, submit_run
from mmrl_ray.training.jobs import resume, submit

HERE = socket.gethostname()


@dataclass
class Cluster:
    """Keeps what was submitted, files and all."""

    nodes: list[str] = field(default_factory=lambda: [HERE])
    known: list[Job] = field(default_factory=list)
    sent: list[tuple[str, str, JobFacts, Mapping[str, str]]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    address: str = "http://127.0.0.1:8265"

    def hosts(self) -> list[str]:
        return self.nodes

    def jobs(self) -> list[Job]:
        return self.known

    def find(self, name: str) -> Job:
        return next(job for job in self.known if name in (job.id, job.facts.run))

    def submit(self, id: str, entrypoint: str, folder: Path, facts: JobFacts, environment: Mapping[str, str]) -> None:
        self.sent.append((id, entrypoint, facts, environment))
        self.files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def cfg(tmp_path: Path) -> Config:
    text = (
        "run: {name: far, root: /shared/runs}\nmodel: {path: hub/base}\ndata: {train: s3://b/d}\nlearner: {steps: 3}\n"
    )
    return parse_config(text, "test")


def test_a_job_is_the_resolved_config_and_this_package(cfg: Config, tmp_path: Path) -> None:
    cluster = Cluster()
    id = submit_run(cluster, cfg, python="/opt/my python/bin/python")
    ((sent, entrypoint, facts, environment),) = cluster.sent
    assert sent == id
    assert id.startswith("far-")
    assert entrypoint == "exec '/opt/my python/bin/python' -m mmrl_ray.cli train config.yaml"
    assert (facts.run, facts.location, facts.task) == ("far", "/shared/runs/far", "train")
    assert facts.by.endswith(f"@{HERE}")
    assert environment["RAY_JOB_STOP_SIGNAL"] == "SIGINT"
    submit_run(cluster, cfg, ray_address="10.0.0.7:6379")
    assert cluster.sent[-1][1] == "exec python3 -m mmrl_ray.cli train config.yaml --address 10.0.0.7:6379"
    (tmp_path / "again.yaml").write_bytes(cluster.files.pop("config.yaml"))
    assert load_config(tmp_path / "again.yaml") == cfg
    package = Path(mmrl_ray.__file__).parent
    expected = [p for p in package.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert sorted(cluster.files) == sorted(f"mmrl_ray/{p.relative_to(package)}" for p in expected)
    assert any(name.startswith("mmrl_ray/report/templates/") for name in cluster.files)


def test_a_resume_sends_the_config_again_since_there_may_be_no_run_folder_yet(cfg: Config, tmp_path: Path) -> None:
    cluster = Cluster()
    submit_run(cluster, cfg, request={"model": "smol"})
    remembered = JobFacts.of(cluster.sent[0][2].metadata())
    assert remembered is not None
    resume_run(cluster, remembered)
    id, entrypoint, again, _ = cluster.sent[-1]
    assert entrypoint == "exec python3 -m mmrl_ray.cli train config.yaml --resume-or-start"
    assert id.startswith("ftjob-"), "whoever asked for it over HTTP finds it there again"
    assert (again.location, again.task, again.request) == ("/shared/runs/far", "resume", {"model": "smol"})
    (tmp_path / "again.yaml").write_bytes(cluster.files["config.yaml"])
    assert load_config(tmp_path / "again.yaml") == cfg
    assert JobFacts.of(again.metadata()) == again


def test_a_resume_of_an_older_job_takes_the_config_of_its_run(cfg: Config) -> None:
    cluster = Cluster()
    facts = JobFacts("far", "/shared/my runs/far", "you@there", request={"model": "smol"})
    resume_run(cluster, facts)
    ((_, entrypoint, again, _),) = cluster.sent
    assert entrypoint == "exec python3 -m mmrl_ray.cli train --resume '/shared/my runs/far'"
    assert (again.location, again.task, again.request) == (facts.location, "resume", facts.request)
    assert "config.yaml" not in cluster.files


def test_one_job_at_a_run(cfg: Config) -> None:
    at_it = JobFacts("far", "/shared/runs/far", "you@there")
    cluster = Cluster(known=[Job("old", "failed", at_it, 0.0), Job("new", "running", at_it, 1.0)])
    for send in (lambda: submit_run(cluster, cfg), lambda: resume_run(cluster, at_it)):
        with pytest.raises(JobError, match=r"job new is running and writes /shared/runs/far: stop it first"):
            send()
    cluster.known.pop()
    submit_run(cluster, cfg)
    assert len(cluster.sent) == 1


@pytest.fixture
def two_rays(tmp_path: Path) -> Iterator[None]:
    """What the process table shows of two Rays on this machine that take jobs, and of one for a single run."""
    (tmp_path / "dashboard").mkdir()
    program = tmp_path / "dashboard" / "dashboard.py"
    program.write_text("import time\nprint('up', flush=True)\ntime.sleep(600)\n")
    with contextlib.ExitStack() as stack:
        alone = "--modules-to-load=UsageStatsHead"
        for store, port, more in ((7265, 8265, []), (7266, 8266, []), (7267, 8265, [alone])):
            arguments = [f"--port={port}", f"--gcs-address=10.0.0.7:{store}", *more]
            process = subprocess.Popen([sys.executable, str(program), *arguments], stdout=subprocess.PIPE)
            stack.enter_context(process)
            stack.callback(process.kill)
            assert process.stdout is not None
            assert process.stdout.readline() == b"up\n"
        yield


@pytest.mark.usefixtures("two_rays")
def test_of_two_rays_of_a_machine_one_is_named(cfg: Config, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    here: Any = Cluster(address="http://localhost:8266")
    cfg = cfg.model_copy(update={"run": cfg.run.model_copy(update={"root": str(tmp_path)})})
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1:8265.* and .*127\.0\.0\.1:8266.*--address"):
        submit(here, cfg, chosen=False)
    assert here.sent == []
    assert [each.url for each in local_rays() if each.store == "10.0.0.7:7267"] == [None]
    submit(here, cfg)
    assert here.sent[-1][1].endswith("train config.yaml --address 10.0.0.7:7266"), "what Ray would join is its guess"
    sent = here.sent[-1][2]
    for facts, command in (
        (sent, "train config.yaml --resume-or-start"),
        (replace(sent, config=""), f"train --resume {tmp_path}/far"),
    ):
        here.known = [Job("it", "stopped", facts, 0.0)]
        resume(here, "far")
        assert here.sent[-1][1].endswith(f"{command} --address 10.0.0.7:7266")


def test_a_port_that_another_has_is_named_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    class Head(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.path.startswith("/api/version")
            body = json.dumps({"version": "4", "ray_version": ray.__version__, "ray_commit": "x"}).encode()
            self.send_response(200 if known else 500)
            self.end_headers()
            self.wfile.write(body if known else b"No available agent to submit job, please try again later.")

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Head) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            client = JobsClient(f"http://127.0.0.1:{server.server_port}")
            monkeypatch.setattr(jobs_client, "_AGENT_PORT", server.server_port)
            cure = (
                rf"port, {server.server_port} .*there listens process {os.getpid()} on .*--dashboard-agent-listen-port"
            )
            with pytest.raises(JobSetupError, match=cure):
                client.jobs()
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                monkeypatch.setattr(jobs_client, "_AGENT_PORT", free.getsockname()[1])
                with pytest.raises(JobServerError, match="it has just begun"):
                    client.jobs()
        finally:
            server.shutdown()


def test_the_interpreter() -> None:
    assert python_for(Cluster(), "py") == "py"
    assert python_for(Cluster(), None) == sys.executable
    for nodes in (["head"], [HERE, "other"], []):
        assert python_for(Cluster(nodes), None) == "python3", "another machine has another Python"


def test_a_package_that_holds_data_is_refused_with_its_largest_files(tmp_path: Path) -> None:
    (tmp_path / "small.py").write_text("x = 1\n")
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "big.pyc").write_bytes(b"x" * 5000)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "pack").write_bytes(b"x" * 5000)
    with packed(None, source=tmp_path, max_bytes=1000) as folder:
        assert [p.name for p in (folder / "mmrl_ray").iterdir()] == ["small.py"]
    assert not folder.exists()
    (tmp_path / "weights.bin").write_bytes(b"x" * 2000)
    with (
        pytest.raises(JobError, match=r"2,006 bytes, and a job takes 1,000 at most: .*weights\.bin \(2,000 bytes\)"),
        packed(None, source=tmp_path, max_bytes=1000),
    ):
        pass


def test_own_reward_functions_travel_and_a_resume_brings_them_again(cfg: Config, tmp_path: Path) -> None:
    kept = {"mine.py": "x = 1\n", "pack/__init__.py": "", "pack/words.txt": "red\n", "tools/more.py": "y = 2\n"}
    left = {"photo.png": "-", "env/pyvenv.cfg": "", "env/lib.py": "", ".hidden/a.py": "", "data/big.parquet": "-" * 99}
    for name, text in {**kept, **left}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    part = {"kind": "function", "path": "pack.colours:named", "state": "text"}
    settings = {"parts": {"own": part}, "weights": {"own": 1.0}, "code": str(tmp_path)}
    own = cfg.model_copy(update={"reward": RewardSection.model_validate(settings)})
    cluster = Cluster()
    submit_run(cluster, own)
    prefix = "reward_code/"
    sent = {name: data.decode() for name, data in cluster.files.items() if name.startswith(prefix)}
    assert sent == {f"{prefix}{name}": text for name, text in kept.items()}
    facts = cluster.sent[-1][2]
    assert JobFacts.of(facts.metadata()) == facts

    resume_run(cluster, facts)
    assert {name for name in cluster.files if name.startswith(prefix)} == set(sent)
    with pytest.raises(JobError, match=rf"own modules are in {tmp_path}/gone of you: resume it from there"):
        resume_run(cluster, replace(facts, code=f"{tmp_path}/gone", by="you"))

    installed = {**settings, "parts": {"own": {**part, "path": "some_library:named"}}}
    submit_run(cluster, cfg.model_copy(update={"reward": RewardSection.model_validate(installed)}))
    assert not any(name.startswith(prefix) for name in cluster.files)


def test_an_algorithm_travels_from_the_working_directory_and_functions_from_their_folder(
    cfg: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rewards").mkdir()
    (tmp_path / "rewards" / "paid.py").write_text("def fn(captions, states): return [1.0] * len(captions)\n")
    (tmp_path / "my_loss.py").write_text(
        "from mmrl_ray.algorithms.base import Algorithm\nclass Mine(Algorithm): pass\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    part = {"kind": "function", "path": "paid:fn", "state": "text"}
    reward = {"parts": {"own": part}, "weights": {"own": 1.0}, "code": str(tmp_path / "rewards")}
    own = cfg.model_copy(update={"algorithm": "my_loss:Mine", "reward": RewardSection.model_validate(reward)})
    cluster = Cluster()
    submit_run(cluster, own)
    assert {"reward_code/paid.py", "reward_code/my_loss.py"} <= cluster.files.keys()
    resume_run(cluster, cluster.sent[-1][2])
    assert {"reward_code/paid.py", "reward_code/my_loss.py"} <= cluster.files.keys()

    (tmp_path / "paid.py").write_text("another = True\n")
    with pytest.raises(JobError, match=r"paid\.py has the name of another file that the job takes along"):
        submit_run(cluster, own)


def test_facts_go_through_rays_metadata() -> None:
    facts = JobFacts("far", "/runs/far", "me@here", "resume", {"model": "smol", "metadata": {"ü": "\n"}})
    kept = facts.metadata()
    assert all(isinstance(value, str) for value in kept.values())
    assert JobFacts.of(kept) == facts
    for foreign in (None, {}, {"run": "far"}, {"mmrl.run": "far"}, {**kept, "mmrl.request": "{"}):
        assert JobFacts.of(foreign) is None


@pytest.mark.parametrize(
    ("status", "driver", "code"),
    [("succeeded", 0, 0), ("failed", 2, 2), ("failed", -9, 137), ("failed", None, 1), ("stopped", None, 130)],
)
def test_exit_codes(status: Any, driver: int | None, code: int) -> None:
    assert Job("j", status, JobFacts("a", "b", "c"), 0.0, driver_code=driver).exit_code == code


def test_the_reason_is_the_last_error_that_the_log_has() -> None:
    message = "Job failed with exit code 1, last logs:\n[1.0s] x\nerror: no such model: try another\n[2s] bye\n"
    assert Job("j", "failed", JobFacts("a", "b", "c"), 0.0, message=message).reason == "no such model: try another"
    assert Job("j", "failed", JobFacts("a", "b", "c"), 0.0, message="a\n\nb\n").reason == "b"
    assert Job("j", "failed", JobFacts("a", "b", "c"), 0.0).reason == "no reason is known"


def test_ids() -> None:
    assert check_id(new_id("a" * 128)).startswith("a" * 100)
    for wrong in ("", "../x", "a/b", "a b", "a?b", "x" * 129, "a\n"):
        with pytest.raises(JobError, match="is no id of a job"):
            check_id(wrong)
