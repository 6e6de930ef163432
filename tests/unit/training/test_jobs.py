"""What `mmrl submit` refuses before anything is sent."""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest

from mmrl_ray.config import Config
from mmrl_ray.config.load import parse_config
from mmrl_ray.errors import ConfigError, RunError
from mmrl_ray.jobs.client import JobsClient
from mmrl_ray.jobs.records import Job, JobFacts
from mmrl_ray.training.jobs import connect, outcome, submit
from tests.unit.cli.program import mmrl
from tests.unit.jobs.test_submit import Cluster


@dataclass
class Head(Cluster):
    """A cluster at an address."""

    address: str = "http://head:8265"


def config(root: str, train: str) -> Config:
    text = f"run: {{name: far, root: {root}}}\ndata: {{train: {train}}}\n"
    return parse_config(text + "model: {path: hub/base}\nlearner: {steps: 3}\n", "test")


def send(head: Head, cfg: Config, **options: Any) -> str:
    return submit(cast(JobsClient, head), cfg, **options)


def test_paths_of_this_machine_are_refused_where_the_cluster_is_another(tmp_path: Path) -> None:
    head = Head(["head-0", "worker-1"])
    cfg = config(str(tmp_path / "runs"), str(tmp_path))
    with pytest.raises(ConfigError, match=r"run\.root=.*which the cluster at http://head:8265 is not"):
        send(head, cfg)
    with pytest.raises(ConfigError, match="write an absolute path"):
        send(head, cfg, shared=["shared"])
    assert head.sent == []
    send(head, cfg, shared=[str(tmp_path)])
    send(head, config("s3://bucket/runs", "s3://bucket/train"))
    ((_, entrypoint, first, _), (_, _, second, _)) = head.sent
    assert entrypoint.startswith("exec python3 ")
    assert (first.location, second.location) == (f"{tmp_path}/runs/far", "s3://bucket/runs/far")


def test_on_this_machine_paths_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    head = Head([socket.gethostname()])
    with pytest.raises(ConfigError, match=r"^data\.train=.*/train does not exist: check the path$"):
        send(head, config("runs", "train"))
    (tmp_path / "train").mkdir()
    send(head, config("runs", "train"))
    ((_, _, facts, _),) = head.sent
    assert facts.location == f"{tmp_path}/runs/far", "as the job, which works elsewhere, will find it"
    assert f"train: {tmp_path}/train".encode() in head.files["config.yaml"]


def test_an_existing_run_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    for nodes, shared in ((["head"], [str(tmp_path)]), ([socket.gethostname()], [])):
        head = Head(nodes)
        with pytest.raises(RunError, match="exists already"):
            send(head, config(str(tmp_path), str(tmp_path)), shared=shared)
        assert head.sent == []


@pytest.mark.parametrize("address", ["auto", "head:6379", "ray://head:10001", "http://", "127.0.0.1:8265"])
def test_an_address_is_a_job_servers(address: str) -> None:
    with pytest.raises(ConfigError, match="http://head:8265"):
        connect(address)


def test_jobs_are_told_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = JobFacts("far", "/runs/far", "me@here")
    head = Head(known=[Job("b", "running", facts, 2.0), Job("a", "failed", facts, 1.0, 1.5, 3, "error: no room")])
    monkeypatch.setattr("mmrl_ray.training.jobs.connect", lambda address: head)
    running, failed = json.loads(mmrl("jobs", "list", "--json").stdout)
    assert (running["job"], running["began"], running["ended"], running["exit_code"]) == ("b", 2.0, None, None)
    assert (failed["status"], failed["exit_code"], failed["reason"]) == ("failed", 3, "no room")
    assert mmrl("jobs", "list").stdout.splitlines()[1].startswith("b    running  far")


def test_how_it_ended_in_one_line() -> None:
    facts = JobFacts("far", "/runs/far", "me@here")
    assert outcome(Job("j", "succeeded", facts, 0.0)) is None
    assert outcome(Job("j", "stopped", facts, 0.0)) == "job j was stopped; go on with: mmrl jobs resume j"
    failed = Job("j", "failed", facts, 0.0, driver_code=-9, message="x\nout of memory")
    assert outcome(failed) == "job j failed (exit code 137): out of memory; go on with: mmrl jobs resume j"
    never = Job("j", "failed", facts, 0.0, message="no room")
    assert "(it did not run to an exit code): no room" in str(outcome(never))
