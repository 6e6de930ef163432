"""One run's life as jobs of a real cluster, by the commands of the docs: sent, stopped, resumed, killed, resumed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shlex
import signal
import socket
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import ray
import yaml
from ray._raylet import AuthenticationTokenLoader, Config

from mmrl_ray.config.serving import ServingSection
from mmrl_ray.jobs.client import JobsClient
from mmrl_ray.processes import free_port
from mmrl_ray.run_records.run_dir import RunDir
from mmrl_ray.serving.app import GatewayDeps, make_app
from mmrl_ray.serving.job_service import RayJobService, run_checkpoints, run_events, trained_tokens
from mmrl_ray.training.cluster import configure_ray, free_agent_port
from mmrl_ray.training.jobs import resume
from tests.integration.serving.conftest import wait_for
from tests.integration.training.conftest import Workplace, prepare
from tests.integration.training.test_readme import ELSEWHERE, commands
from tests.support.fake_services import FakePolicy, running_gateway
from tests.unit.cli.program import mmrl

pytestmark = pytest.mark.timeout(600)
STEPS = 8
SECONDS = 120.0
AFTER_RAY = "sleep 1"
"""Ray writes a last line of its own into a job's log when the job has begun, over what that has said by then."""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    """A Ray with a job server, whose token commands find in their environment."""
    folder = tmp_path_factory.mktemp("jobs")
    settings = prepare(folder)
    with pytest.MonkeyPatch.context() as patch:
        configure_ray()
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()
        port = free_port()
        with free_agent_port(), socket.socket() as elsewhere:  # as if another Ray of this machine had Ray's own port
            with contextlib.suppress(OSError):
                elsewhere.bind(("", 52365))
                elsewhere.listen()
            ray.init(
                "local", num_cpus=4, include_dashboard=True, dashboard_host="127.0.0.1", dashboard_port=port,
                object_store_memory=100 * 2**20, log_to_driver=False,
            )  # fmt: skip
        try:
            environment = {**os.environ, "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{port}", "COLUMNS": "200"}
            # A variable that Ray's own client would prefer to the address it is given.
            environment["RAY_ADDRESS"] = "127.0.0.1:1"
            yield Workplace(folder, environment, settings)
        finally:
            ray.shutdown()


@pytest.fixture(scope="module")
def client(workplace: Workplace) -> JobsClient:
    return JobsClient(workplace.environment["RAY_API_SERVER_ADDRESS"])


@pytest.fixture
def here(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands run in this process, which has imported everything already, as if a user had started them."""
    monkeypatch.chdir(workplace.folder)
    for name, value in workplace.environment.items():
        monkeypatch.setenv(name, value)


def call(*arguments: object, code: int = 0) -> str:
    done = mmrl(*arguments)
    assert done.exit_code == code, done.output
    return done.output


def documented(begin: str, *more: str, code: int = 0) -> str:
    """The documented command that begins so, at this cluster."""
    found = [command for command in commands("mmrl") if command.startswith(ELSEWHERE)]
    assert len(found) == 6
    (command,) = [command for command in found if command.startswith(begin)]
    arguments = [a.replace("http://head:8265", os.environ["RAY_API_SERVER_ADDRESS"]) for a in shlex.split(command)[1:]]
    return call(*arguments, *more, code=code)


def lines(run: Path) -> int:
    file = run / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.mark.usefixtures("here")
def test_a_run_whose_driver_is_killed_goes_on(workplace: Workplace, client: JobsClient) -> None:
    run = workplace.runs / "far"
    learner = {**workplace.settings["learner"], "steps": STEPS, "checkpoint_every": 2}
    data = {**workplace.settings["data"], "eval": None}
    settings = {**workplace.settings, "run": {"name": "mine", "root": "runs"}, "learner": learner, "data": data}
    Path("my.yaml").write_text(yaml.safe_dump(settings))

    first = documented("mmrl submit", "--no-wait").split()[-1]
    assert first.startswith("far-")
    busy = call("submit", "my.yaml", "--set", "run.name=far", code=1)
    assert f"job {first} is" in busy
    assert f"writes {run}: stop it first" in busy

    wait_for(lambda: lines(run) >= 3 or client.get(first).is_over, "three steps", SECONDS)
    (driver,) = drivers(first)
    driver.send_signal(signal.SIGKILL)
    wait_for(lambda: client.get(first).is_over, "end of the killed job", SECONDS)
    assert client.get(first).exit_code == 128 + signal.SIGKILL
    assert lines(run) < STEPS
    assert "exit code 137" in documented("mmrl jobs status")

    second = documented("mmrl jobs resume", "--no-wait").split()[-1]
    # Meanwhile, since most of a run this small is waiting for processes to start:
    jobs_end_as_their_commands_do(workplace, client)
    jobs_over_http(workplace, client)

    output = call("jobs", "logs", second, "--follow")
    assert output.count("Running entrypoint for job") == 1
    assert "finished: " in output
    assert output.endswith("GB\n"), "the log to its end"
    assert lines(run) == STEPS
    assert json.loads((run / "summary.json").read_text())["status"] == "finished"
    assert documented("mmrl jobs logs") in output
    left = RunDir.at(run)
    assert [checkpoint.step_number for checkpoint in run_checkpoints(left, "j")] == [STEPS, STEPS - 2]
    assert trained_tokens(left) >= STEPS
    assert [event.data["step"] for event in run_events(left, "j", 0) if event.data] == list(range(1, STEPS + 1))
    listed = [line.split() for line in documented("mmrl jobs list").splitlines()]
    assert listed[0][:2] == ["JOB", "STATUS"]
    assert [line[:2] for line in listed if line[2] == "far"] == [[second, "succeeded"], [first, "failed"]]
    assert "is over already: succeeded" in documented("mmrl jobs stop")
    assert "exists already" in call("submit", "my.yaml", "--set", "run.name=far", code=1)


def drivers(id: str) -> list[psutil.Process]:
    """The process of the job's entry point."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            arguments = process.cmdline()
            if (
                arguments[1:4] == ["-m", "mmrl_ray.cli", "train"]
                and id in process.environ().get("RAY_JOB_CONFIG_JSON_ENV_VAR", "")  # other runs are under way
            ):
                found.append(process)
    return found


def jobs_end_as_their_commands_do(workplace: Workplace, client: JobsClient) -> None:
    """The interpreter is a script here, which stands for what a run does."""
    config = workplace.config("ends")
    # No trap of the shell: it cannot hear a signal that was ignored when it began, as a run does.
    waits = (
        "import signal, sys, time; "
        "signal.signal(signal.SIGINT, lambda *_: (print('saved', flush=True), sys.exit(0))); "
        "print('up', flush=True); time.sleep(600)"
    )
    careful = script(workplace.folder / "careful", f"exec {shlex.quote(sys.executable)} -c {shlex.quote(waits)}")
    told = call("submit", workplace.config("careful"), "--id", "careful", "--python", careful, "--no-wait")
    assert told == "careful\n"

    asks = script(workplace.folder / "asks", f'{AFTER_RAY}; echo "$@"; ls; exit 7')
    output = call("submit", config, "--id", "seven", "--python", asks, code=7)
    store = re.escape(ray.get_runtime_context().gcs_address)
    begun = rf"-m mmrl_ray\.cli train config\.yaml --address {store}\nconfig\.yaml\nmmrl_ray\n"
    assert re.search(begun, output), output
    assert "error: job seven failed (exit code 7): " in output
    assert "go on with: mmrl jobs resume seven" in output
    assert "there is a job seven" in call("submit", config, "--id", "seven", "--python", asks, code=1)

    wait_for(lambda: "up\n" in client.logs("careful"), "the job's first word", SECONDS)
    call("jobs", "stop", "careful")
    output = call("jobs", "logs", "careful", "--follow", code=130)
    assert "\nsaved\n" in output, "it was asked as Ctrl-C asks"
    assert "error: job careful was stopped" in output
    assert "exit code 130" in call("jobs", "status", "careful")


@pytest.mark.usefixtures("here")
def test_what_is_wrong_is_said_in_one_line(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no job and no run of a job is called nobody" in call("jobs", "status", "nobody", code=1)
    absent = workplace.config("absent", data={"train": "/nowhere/train"})
    assert call("submit", absent, code=2) == "error: data.train=/nowhere/train does not exist: check the path\n"
    nobody = f"http://127.0.0.1:{free_port()}"
    assert f"no job server answers at {nobody}" in call("jobs", "list", "--address", nobody, code=1)
    # In processes of their own: this one has a Ray, whose token is not to change.
    for token, told in (("f" * 64, "refuses the token: put the cluster's into RAY_AUTH_TOKEN"), ("", "token")):
        environment = {**workplace.environment, "RAY_AUTH_TOKEN": token, "HOME": str(workplace.folder)}
        output = replace(workplace, environment=environment).mmrl("jobs", "list", code=1)
        assert told in output
        assert "Traceback" not in output


def jobs_over_http(workplace: Workplace, client: JobsClient) -> None:
    """The gateway's job service at the Ray that it has joined; the interpreter is a script."""
    asks = script(
        workplace.folder / "trains",
        f"{AFTER_RAY}; echo $*; grep -A9 ^learner: config.yaml; grep path: config.yaml; echo up; sleep 60",
    )
    recipe = {name: workplace.settings[name] for name in ("model", "algorithm", "rollout", "learner", "resources")}
    tuning = {
        "models": {"tiny": recipe}, "datasets": {"scenes": str(workplace.folder / "train")}, "python": str(asks),
        "max_active": 1, "root": str(workplace.runs),
    }  # fmt: skip
    settings = ServingSection.model_validate({"fine_tuning": tuning})
    app = make_app(GatewayDeps(FakePolicy(), None, None, settings, insecure=True, jobs=RayJobService(settings)))
    with running_gateway(app) as url:
        jobs = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0).fine_tuning.jobs
        ask: Any = {"model": "tiny", "training_file": "scenes", "hyperparameters": {"n_epochs": 2, "batch_size": 5}}
        job = jobs.create(**ask, suffix="mine", metadata={"who": "me"})
        assert job.status in ("queued", "running")
        wait_for(lambda: "up\n" in client.logs(job.id), "the job's first word", SECONDS)
        said = client.logs(job.id)
        assert f"train config.yaml --address {ray.get_runtime_context().gcs_address}\n" in said
        assert "steps: 10\n  groups_per_step: 5" in said, "24 images twice, 5 a step"
        assert f"path: {workplace.folder / 'base'}" in said
        with pytest.raises(openai.InternalServerError, match="1 jobs are under way"):
            jobs.create(**ask)
        assert [each.id for each in jobs.list()] == [job.id], "jobs of the command line are none of its own"
        jobs.cancel(job.id)
        wait_for(lambda: jobs.retrieve(job.id).status == "cancelled", "end of the job", SECONDS)
        ended = jobs.retrieve(job.id)
        assert ended.metadata == {"who": "me"}
        assert ended.finished_at is not None
        assert ended.finished_at >= ended.created_at
        messages = [event.message for event in jobs.list_events(job.id)]
        assert messages == ["The job was cancelled", f"Created fine-tuning job: {job.id}"]
        assert list(jobs.checkpoints.list(job.id)) == []
        again = resume(client, job.id, python=str(asks))
        assert jobs.retrieve(again).metadata == {"who": "me"}, "resumed elsewhere, it is a job here all the same"
        assert {each.id for each in jobs.list()} == {again, job.id}
        jobs.cancel(again)
        with pytest.raises(openai.NotFoundError):
            jobs.retrieve("far-1234")
