"""Submits a run, or the rest of one, to a cluster as a job; and stops and remembers jobs when their Ray ends.

**What is sent**: this very program and the resolved config. Never data, weights or an environment.

    config.yaml        the config, resolved; not with a resume, which takes the one of its run folder
    mmrl_ray/          the package as it is installed here
    reward_code/       of the folders with the user's own reward functions and algorithm, where a config has some:
                       their Python files

The job works in that folder, so that its driver and its workers run the submitter's code, whatever the cluster's image
has of it. Everything else (Python, Ray, torch, …) is the cluster's own.

**When a Ray ends**, jobs that are under way checkpoint first (`stop_jobs`), and are remembered beside and in their run
folders. A Ray that is killed says nothing: what it was asked for over HTTP is noted in `.jobs` of the runs' root when
it is accepted, and how it ended is told by the run's own folder.
"""

from __future__ import annotations

import filecmp
import getpass
import os
import shlex
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mmrl_ray
from mmrl_ray.config import Config
from mmrl_ray.config.load import dump_config
from mmrl_ray.config.reward import RewardSection
from mmrl_ray.errors import JobError, RunError
from mmrl_ray.jobs.records import Job, JobFacts, Status, new_http_id, new_id
from mmrl_ray.own_code import SENT_CODE
from mmrl_ray.run_records.control_files import read_status
from mmrl_ray.run_records.run_dir import RunDir, run_location
from mmrl_ray.run_records.run_owner import living_owner

if TYPE_CHECKING:
    from mmrl_ray.jobs.client import JobsClient  # imports Ray, which takes seconds

DEFAULT_PYTHON = "python3"
"""On the cluster's PATH, unless another is named. On this machine alone it is the one that runs here."""
STOP_S = 600
"""A job that is stopped has so long to finish its step and to write a checkpoint, then it is killed."""
_ENVIRONMENT = {
    # As Ctrl-C does: the run finishes its step, writes a checkpoint, and says how to go on.
    "RAY_JOB_STOP_SIGNAL": "SIGINT",
    "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S),
    # See `training/cluster.py`.
    "GOMP_SPINCOUNT": "1000",
}
CONFIG_FILE = "config.yaml"
MAX_BYTES = 16 * 2**20
"""The package has about one megabyte. Ray keeps what is sent in the head node's memory."""
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
_NAMED = 3
_MOST_FILES = 20_000
"""In a folder of reward functions, whatever they are: more are hardly meant."""
JOB_FILE = "job.json"
_NOTES = ".jobs"
_ENDS: dict[str, Status] = {"finished": "succeeded", "failed": "failed"}
_LOOK_S = 0.5


def submit_run(
    server: JobsClient,
    cfg: Config,
    *,
    python: str = DEFAULT_PYTHON,
    id: str | None = None,
    request: Mapping[str, Any] | None = None,
    ray_address: str | None = None,
) -> str:
    """Sends a run; `cfg` names places that the cluster sees. Returns the job's id.

    Args:
        cfg: resolved.
        id: of the job; by default one with the run's name in it.
        request: of whoever asked over HTTP; see `JobFacts`.
        ray_address: of the cluster's control store, for the run to join; by default what Ray tells its jobs, which on
            a machine with several clusters may be another one.

    Raises:
        JobError: another job is at this run, or Ray does not take it.
    """
    location = run_location(cfg.run.root, cfg.run.name)
    code, text = own_code(cfg.reward, cfg.algorithm), dump_config(cfg)
    facts = JobFacts(cfg.run.name, location, submitter(), "train", request or {}, code, text)
    return _send(server, facts, f"train {CONFIG_FILE}{_joining(ray_address)}", text, python, id)


def resume_run(
    server: JobsClient,
    facts: JobFacts,
    *,
    python: str = DEFAULT_PYTHON,
    id: str | None = None,
    ray_address: str | None = None,
) -> str:
    """Sends a job that goes on with the run of another one from its newest checkpoint; returns the new job's id.

    The config goes along, for the case that the other was stopped before there was a run folder. What was asked for
    over HTTP is known there again, as a job of its own. `ray_address` as for `submit_run`.

    Raises:
        JobError: a job is still at this run, or Ray does not take it.
    """
    for folder in facts.code.splitlines():
        if not Path(folder).is_dir():
            raise JobError(f"job of {facts.run}: its own modules are in {folder} of {facts.by}: resume it from there")
    again = JobFacts(facts.run, facts.location, submitter(), "resume", facts.request, facts.code, facts.config)
    joining = _joining(ray_address)
    if facts.config:
        return _send(server, again, f"train {CONFIG_FILE} --resume-or-start{joining}", facts.config, python, id)
    return _send(server, again, f"train --resume {shlex.quote(facts.location)}{joining}", None, python, id)


def _joining(ray_address: str | None) -> str:
    return f" --address {shlex.quote(ray_address)}" if ray_address else ""


def python_for(server: JobsClient, named: str | None) -> str:
    """The interpreter for a job: the one that was named, else this one where the cluster is this machine."""
    if named is not None:
        return named
    return sys.executable if is_this_machine(server) else DEFAULT_PYTHON


def is_this_machine(server: JobsClient) -> bool:
    """Whether all nodes of the cluster see this machine's files, for they are this machine.

    Asked of the cluster, since an address says nothing: that of a forwarded port is a loopback one, too.
    """
    return server.hosts() == [socket.gethostname()]


def submitter() -> str:
    """Who submits, for the job's record."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # a container's user that has no name
        name = "unknown"
    return f"{name}@{socket.gethostname()}"


def _send(server: JobsClient, facts: JobFacts, command: str, config: str | None, python: str, id: str | None) -> str:
    busy = next((job for job in server.jobs() if not job.is_over and job.facts.location == facts.location), None)
    if busy is not None:
        raise JobError(
            f"job {busy.id} is {busy.status} and writes {facts.location}: stop it first (mmrl jobs stop {busy.id}), "
            "or choose another run.name"
        )
    id = id or (new_http_id() if facts.request else new_id(facts.run))
    # `exec`: the shell that Ray starts makes way for the interpreter, which then gets the signals itself.
    entrypoint = f"exec {shlex.quote(python)} -m mmrl_ray.cli {command}"
    with packed(config, code=facts.code) as folder:
        server.submit(id, entrypoint, folder, facts, _ENVIRONMENT)
    return id


@contextmanager
def packed(
    config: str | None, *, source: Path | None = None, code: str = "", max_bytes: int = MAX_BYTES
) -> Iterator[Path]:
    """A folder of exactly what is sent, gone afterwards.

    Args:
        config: text of `config.yaml`.
        source: the package's folder; the one that runs here by default.
        code: folders of the user's own modules, see `own_code`.
        max_bytes: more is not sent.

    Raises:
        JobError: it is larger than that, or cannot be read; the message names what is largest in it.
    """
    source = source or Path(mmrl_ray.__file__).parent
    with tempfile.TemporaryDirectory(prefix="mmrl-job-") as scratch:
        folder = Path(scratch)
        try:
            _refuse_large(
                source, _files_of(source), max_bytes, "keep data, weights and runs out of the package's folder"
            )
            shutil.copytree(source, folder / "mmrl_ray", ignore=_LEFT_OUT)
            for own in code.splitlines():
                _copy_code(Path(own), folder / SENT_CODE, max_bytes)
        except (OSError, shutil.Error) as error:
            raise JobError(f"{source} cannot be packed for the job: {error}") from error
        if config is not None:
            (folder / CONFIG_FILE).write_text(config, encoding="utf-8")
        yield folder


def own_code(reward: RewardSection, algorithm: str = "") -> str:
    """The folders that a job needs for the user's modules, a line each; empty where those are installed, or none.

    Args:
        reward: with absolute paths; its functions are looked for in `reward.code`.
        algorithm: of the config; the module of a `module:Class` is looked for in the working directory.
    """
    asked = [(Path(reward.code or "."), part.path) for part in reward.functions.values()]
    asked += [(Path("."), algorithm)] if ":" in algorithm else []
    found = []
    for folder, path in asked:
        top = folder.absolute() / path.partition(":")[0].partition(".")[0]
        if top.is_dir() or top.with_suffix(".py").is_file():
            found.append(str(folder.absolute()))
    return "\n".join(dict.fromkeys(found))


def _copy_code(source: Path, target: Path, max_bytes: int) -> None:
    """Python files, and whatever lies beside an `__init__.py`: the data that a package brings for itself."""
    files = []
    for seen, path in enumerate(_files_of(source)):
        if seen > _MOST_FILES:
            raise JobError(f"{source} has more than {_MOST_FILES:,} files: name a smaller folder in reward.code")
        if path.suffix == ".py" or (path.parent / "__init__.py").is_file():
            files.append(path)
    _refuse_large(source, files, max_bytes, "name a folder with your reward functions alone in reward.code")
    for file in files:
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if copy.exists() and not filecmp.cmp(file, copy, shallow=False):
            raise JobError(f"{file} has the name of another file that the job takes along: rename one of them")
        shutil.copyfile(file, copy)


def _files_of(folder: Path) -> Iterator[Path]:
    """All but hidden ones, bytecode, virtual environments, and this package where it lies among others."""
    for where, folders, files in os.walk(folder):
        here = Path(where)
        folders[:] = sorted(
            name
            for name in folders
            if not _is_left_out(Path(name))
            and not (here / name / "pyvenv.cfg").is_file()
            and not (here / name).samefile(Path(mmrl_ray.__file__).parent)
        )
        yield from (here / name for name in sorted(files) if not _is_left_out(Path(name)))


def _refuse_large(source: Path, files: Iterable[Path], max_bytes: int, remedy: str) -> None:
    sizes = {path: path.stat().st_size for path in files}
    total = sum(sizes.values())
    if total > max_bytes:
        largest = sorted(sizes, key=lambda path: -sizes[path])[:_NAMED]
        named = ", ".join(f"{path.relative_to(source)} ({sizes[path]:,} bytes)" for path in largest)
        raise JobError(
            f"{source} has {total:,} bytes, and a job takes {max_bytes:,} at most: the largest are {named}; {remedy}"
        )


def _is_left_out(path: Path) -> bool:
    return any(part == "__pycache__" or part.startswith(".") for part in path.parts) or path.suffix == ".pyc"


def stop_jobs(server: JobsClient, say: Callable[[str], None], *, timeout_s: float = STOP_S) -> list[Job]:
    """Lets every job that is under way finish its step and checkpoint; returns them as they are then.

    Their runs' folders remember them, see `remembered`.

    Raises:
        JobError: the job server does not answer.
    """
    active = {job.id for job in server.jobs() if not job.is_over}
    for id in sorted(active):
        server.stop(id)
        say(f"job {id} finishes its step and writes a checkpoint")
    deadline = time.monotonic() + timeout_s
    while True:
        found = [job for job in server.jobs() if job.id in active]
        if all(job.is_over for job in found) or time.monotonic() >= deadline:
            break
        time.sleep(_LOOK_S)
    for job in found:
        try:
            run = RunDir.at(job.facts.location)
            ended = job.ended or time.time()
            run.write_json(JOB_FILE, _record(job, ended))
        except RunError as error:  # stopped before it had one
            say(f"job {job.id} left no run folder: {error}")
        else:
            say(f"job {job.id} is stopped; go on with: mmrl train --resume {job.facts.location}")
    return found


def note_job(root: str, job: Job) -> None:
    """Notes a job whose run will lie in the folder `root`, for `remembered`.

    Raises:
        RunError: nothing can be written there.
    """
    try:
        notes = RunDir.create(root, _NOTES)
    except RunError:  # it was there
        notes = RunDir.open(root, _NOTES)
    notes.write_json(f"{job.id}.json", _record(job, None))


def remembered(root: str) -> list[Job]:
    """Jobs of other Rays or such that are gone, of the runs in the folder `root`, as it stands with their runs.

    One that nobody goes on with is a stopped one.

    Raises:
        RunError: it cannot be read.
    """
    try:
        folder = RunDir.at(root)
    except RunError:
        return []
    found: dict[str, Job] = {}
    for name in folder.list():
        if folder.exists(f"{name}/{JOB_FILE}"):  # the run may have been moved since
            _remember(found, folder.read_json(f"{name}/{JOB_FILE}"), f"{root.rstrip('/')}/{name}")
    for name in folder.list(_NOTES):
        if name.removesuffix(".json") not in found:
            _remember(found, folder.read_json(f"{_NOTES}/{name}"), None)
    return list(found.values())


def _record(job: Job, ended: float | None) -> dict[str, Any]:
    return {"id": job.id, "created": job.created, "ended": ended, "metadata": job.facts.metadata()}


def _remember(found: dict[str, Job], said: Mapping[str, Any], location: str | None) -> None:
    facts = JobFacts.of(said.get("metadata"))
    if facts is None:
        return
    facts = facts if location is None else replace(facts, location=location)
    created = float(said["created"])
    last: Mapping[str, Any] = {}
    is_alive = False
    with suppress(RunError):  # it was not begun
        run = RunDir.at(facts.location)
        is_alive, last = living_owner(run) is not None, read_status(run)
    status = "running" if is_alive else _ENDS.get(last.get("state", ""), "stopped")
    ended = None if is_alive else float(said["ended"] or last.get("time") or created)
    found[said["id"]] = Job(said["id"], status, facts, created, ended, message=last.get("error") or "")
