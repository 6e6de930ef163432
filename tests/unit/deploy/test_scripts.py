"""Beside Kubernetes: the file of `ray up`, and the Slurm script with stubs in the place of Slurm and Ray."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml

from .crds import ROOT

SLURM = ROOT / "deploy" / "slurm.sbatch"
UP = ROOT / "deploy" / "ray-up.yaml"


# -- ray up ------------------------------------------------------------------------------------------------------------


def test_ray_takes_the_file_of_ray_up() -> None:
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    cluster = yaml.safe_load(UP.read_text())
    jsonschema.validate(cluster, schema)
    wrong = {**cluster, "max_worker": 1}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, schema)


def test_it_has_a_token_everywhere_and_no_public_dashboard() -> None:
    cluster: dict[str, Any] = yaml.safe_load(UP.read_text())
    (token,) = cluster["file_mounts"]
    starts = [cluster["head_start_ray_commands"][-1], cluster["worker_start_ray_commands"][-1]]
    for command in starts:
        assert f"RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={token}" in command
    assert "--dashboard-host=127.0.0.1" in starts[0]
    types = cluster["available_node_types"]
    assert cluster["head_node_type"] in types
    assert types["head"]["resources"] == {"CPU": 0}
    assert sum(t.get("max_workers", 0) for t in types.values()) >= cluster["max_workers"]


# -- Slurm -------------------------------------------------------------------------------------------------------------

_SRUN = """#!/usr/bin/env bash
echo "srun $*" >> "$LOG"
while [[ $1 == --* ]]; do shift; done
if [[ $1 == hostname ]]; then echo "10.0.0.1 fe80::1"; exit; fi
exec "$@"
"""
_RAY = """#!/usr/bin/env bash
echo "ray $* mode=$RAY_AUTH_MODE token=$(wc -c < "$RAY_AUTH_TOKEN_PATH")" >> "$LOG"
if [[ $1 == start ]]; then exec sleep 60; fi
n=$(grep -c '^ray health-check' "$LOG")
((n >= ${HEALTHY_AFTER:-1}))
"""
_MMRL = """#!/usr/bin/env bash
trap 'echo "mmrl interrupted" >> "$LOG"; exit 130' INT
until [[ $(grep -c '^ray start' "$LOG") == 3 ]]; do sleep 0.02; done
echo "mmrl $*" >> "$LOG"
[[ -z ${LONG:-} ]] && exit "${STATUS:-0}"
for _ in {1..600}; do sleep 0.05; done
"""


class Slurm:
    """The script in a folder with stubs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "log"
        self.log.touch()
        self.started: list[subprocess.Popen[str]] = []
        stubs = {"srun": _SRUN, "ray": _RAY, "mmrl": _MMRL, "scontrol": '#!/bin/sh\nprintf "n1\\nn2\\nn3\\n"\n'}
        for name, text in stubs.items():
            path = folder / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            path.chmod(0o755)

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        variables = {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "HOME": str(self.folder),
            "LOG": str(self.log),
            "MMRL_BIN": str(self.folder / "bin"),
            "MMRL_POLL_S": "0.02",
            "SLURM_JOB_ID": "41",
            "SLURM_JOB_NODELIST": "n[1-3]",
            "SLURM_CPUS_ON_NODE": "8",
            "SLURM_GPUS_ON_NODE": "4",
            **environment,
        }
        # A suite started in the background has SIGINT ignored, and a shell cannot trap what came ignored.
        command = ["env", "--default-signal=INT", "bash", SLURM, *arguments]
        process = subprocess.Popen(
            command, env=variables, stderr=subprocess.PIPE, text=True, cwd=self.folder, start_new_session=True
        )
        self.started.append(process)
        return process

    def end(self) -> None:
        """Whatever a failed test has left; the session is its own."""
        for process in self.started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(timeout=10)

    def run(self, *arguments: str, **environment: str) -> tuple[int, list[str], str]:
        process = self.start(*arguments, **environment)
        _, errors = process.communicate(timeout=60)
        return process.returncode, self.lines(), errors

    def lines(self) -> list[str]:
        return self.log.read_text().splitlines()


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Slurm]:
    stubbed = Slurm(tmp_path)
    yield stubbed
    stubbed.end()


def test_shellcheck_has_nothing_to_say() -> None:
    program = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run([program, SLURM], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout


def test_one_ray_over_all_nodes_then_the_run(slurm: Slurm) -> None:
    status, lines, errors = slurm.run("my.yaml", "--set", "run.seed=1", HEALTHY_AFTER="3")
    assert (status, errors) == (0, "")
    port = 20041
    starts = sorted(line for line in lines if line.startswith("srun") and " start " in line)
    assert [s.split("--nodelist=")[1].split()[0] for s in starts] == ["n1", "n2", "n3"]
    assert all("--nodes=1 --ntasks=1 --overlap" in s for s in starts)
    assert f"--head --node-ip-address=10.0.0.1 --port={port} --include-dashboard=false" in starts[0]
    assert all(f"--address=10.0.0.1:{port}" in s for s in starts[1:])
    assert all("--num-cpus=8 --num-gpus=4 --disable-usage-stats --block" in s for s in starts)
    rays = [line for line in lines if line.startswith("ray ")]
    assert all(line.endswith("mode=token token=64") for line in rays)
    order = [i for i, line in enumerate(lines) if line.startswith("ray health-check")]
    assert len(order) == 3
    assert min(lines.index(start) for start in starts[1:]) > order[-1]  # no node looks for a head that is not there yet
    assert f"mmrl train my.yaml --set run.seed=1 --resume-or-start --address 10.0.0.1:{port}" in lines
    assert list(slurm.folder.glob(".mmrl-token-*")) == []


def test_its_status_is_the_run_s(slurm: Slurm) -> None:
    assert slurm.run("my.yaml", STATUS="3")[0] == 3


def test_the_signal_before_the_end_reaches_the_run(slurm: Slurm) -> None:
    process = slurm.start("my.yaml", LONG="1")
    deadline = time.monotonic() + 30
    while not any(line.startswith("mmrl train") for line in slurm.lines()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert "mmrl interrupted" in slurm.lines()
    assert process.returncode == 130


def test_a_signal_before_there_is_a_run_ends_it_at_once(slurm: Slurm) -> None:
    process = slurm.start("my.yaml", LONG="1", HEALTHY_AFTER="20")
    deadline = time.monotonic() + 30
    while not any(line.startswith("ray health-check") for line in slurm.lines()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)  # the stub's run takes 30 s by itself
    assert process.returncode == 130


def test_what_is_missing_is_said(slurm: Slurm) -> None:
    assert slurm.run()[0] == 2
    status, _, errors = slurm.run("my.yaml", MMRL_BIN="/nowhere")
    assert (status, "no /nowhere/ray" in errors) == (1, True)
    status, lines, errors = slurm.run("my.yaml", HEALTHY_AFTER="1000", MMRL_POLL_S="0")
    assert (status, "Ray's head on n1 did not come up" in errors) == (1, True)
    assert not any(line.startswith("mmrl") for line in lines)
