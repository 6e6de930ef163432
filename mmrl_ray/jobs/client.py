"""The job server of a Ray cluster (its dashboard, port 8265 by default), with deadlines and the project's errors."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp
import psutil
import ray
import requests
from ray.dashboard.modules.dashboard_sdk import SubmissionClient
from ray.dashboard.utils import ray_address_to_api_server_url
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient, JobType

from mmrl_ray.errors import ConfigError, JobError, JobServerError, JobSetupError, UnknownJobError, last_line, said
from mmrl_ray.jobs.records import Job, JobFacts, Status, check_id
from mmrl_ray.processes import listener

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
_TIMEOUT_S = 60.0
"""For one request; a submission waits for an agent on the head node."""
_OLDEST_RAY = "2.9"
_HOSTS_S = 10.0
"""A cluster that has just come up knows its nodes by then."""
_STATUSES: Mapping[str, Status] = {
    "PENDING": "pending",
    "RUNNING": "running",
    "SUCCEEDED": "succeeded",
    "FAILED": "failed",
    "STOPPED": "stopped",
}
_MS = 1000.0
_TALKATIVE = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
_LONGEST_REASON = 500
_AGENT_PORT = 52365
"""Where the agent of a node that `ray start` began listens, unless it was told otherwise."""
_NO_AGENT = re.compile(r"head node agent|Unauthorized|Forbidden|authentication token|No available agent")
"""What the job server says of an agent that did not come up, or of another Ray's that answers in its place."""

T = TypeVar("T")


class _Sdk(JobSubmissionClient):
    """Ray's client of the address that it is given (Ray's own prefers `RAY_ADDRESS`), with a deadline a request."""

    def __init__(self, url: str) -> None:
        self._client_ray_version = ray.__version__
        SubmissionClient.__init__(self, url)
        self._check_connection_and_version(_OLDEST_RAY)

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        return super()._do_request(method, endpoint, timeout=_TIMEOUT_S, **options)

    def hosts(self) -> list[str]:
        """Host names of the nodes that are up."""
        answer = self._do_request("GET", "/nodes?view=hostNameList")
        answer.raise_for_status()
        return list(answer.json()["data"]["hostNameList"])

    async def tail(self, id: str) -> AsyncIterator[str]:
        """The job's log from its beginning, in pieces, until the job is over."""
        limit = aiohttp.ClientTimeout(total=None, sock_connect=_TIMEOUT_S)
        async with aiohttp.ClientSession(cookies=self._cookies, headers=self._headers, timeout=limit) as session:
            socket = await session.ws_connect(f"{self._address}/api/jobs/{id}/logs/tail", ssl=self._ssl_context or True)
            async with socket:
                async for message in socket:
                    if message.type == aiohttp.WSMsgType.TEXT:
                        yield message.data
                if socket.close_code == aiohttp.WSCloseCode.ABNORMAL_CLOSURE:
                    raise aiohttp.ClientConnectionError("the connection broke off")


class JobsClient:
    """Jobs of one cluster. The token is the one that Ray finds: `RAY_AUTH_TOKEN`, `RAY_AUTH_TOKEN_PATH`, its file.

    Raises (every method): `JobServerError` nothing answers at the address; `JobError` the token is wrong or missing,
    or what answers is no job server.
    """

    def __init__(self, address: str = DEFAULT_ADDRESS) -> None:
        """Looks whether a job server is there.

        Raises:
            ConfigError: the address is no HTTP URL.
        """
        self.address = address.rstrip("/")
        parts = urlsplit(self.address)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ConfigError(
                f"--address {address}: jobs go to the HTTP address of a cluster's job server: write for example "
                "http://head:8265"
            )
        for name in _TALKATIVE:
            logging.getLogger(name).setLevel(logging.WARNING)  # what is uploaded is not the user's affair
        self._sdk = self._asked(lambda: _Sdk(self.address))

    def hosts(self) -> list[str]:
        """Host names of the cluster's nodes, sorted."""
        deadline = time.monotonic() + _HOSTS_S
        while not (found := self._asked(self._sdk.hosts)):
            if time.monotonic() > deadline:
                raise JobServerError(f"Ray at {self.address} names no node of its own: is it still starting?")
            time.sleep(0.2)
        return sorted(found)

    def submit(self, id: str, entrypoint: str, folder: Path, facts: JobFacts, environment: Mapping[str, str]) -> None:
        """Sends `folder` and lets `entrypoint`, a shell's line, work in it on the head node.

        Raises:
            JobError: there is a job of that id, or Ray does not take it.
        """
        check_id(id)
        runtime = {"working_dir": str(folder), "env_vars": dict(environment)}
        self._asked(
            lambda: self._sdk.submit_job(
                entrypoint=entrypoint, submission_id=id, runtime_env=runtime, metadata=facts.metadata()
            ),
            id,
        )

    def jobs(self) -> list[Job]:
        """This project's jobs that the cluster remembers, the newest first."""
        found = (_job(details) for details in self._asked(self._sdk.list_jobs))
        return sorted((job for job in found if job is not None), key=lambda job: (-job.created, job.id))

    def get(self, id: str) -> Job:
        """The job of that id; an UnknownJobError where there is none, or it is not this project's."""
        job = _job(self._asked(lambda: self._sdk.get_job_info(check_id(id)), id))
        if job is None:
            raise UnknownJobError(f"job {id} at {self.address} was not submitted by mmrl")
        return job

    def find(self, name: str) -> Job:
        """By its id, or by the name of its run: then the newest; an UnknownJobError where neither is known."""
        jobs = self.jobs()
        found = next((job for job in jobs if job.id == name), None) or next(
            (job for job in jobs if job.facts.run == name), None
        )
        if found is None:
            known = ", ".join(job.id for job in jobs[:5]) or "none"
            raise UnknownJobError(
                f"no job and no run of a job is called {name} at {self.address}; the newest jobs are: {known}"
            )
        return found

    def stop(self, id: str) -> bool:
        """Asks the job to stop; False where it was over, an UnknownJobError where there is none."""
        return bool(self._asked(lambda: self._sdk.stop_job(check_id(id)), id))

    def logs(self, id: str) -> str:
        """All that a job has said."""
        return str(self._asked(lambda: self._sdk.get_job_logs(check_id(id)), id))

    async def tail(self, id: str) -> AsyncIterator[str]:
        """The job's log from its beginning, in pieces, until the job is over."""
        try:
            async for piece in self._sdk.tail(check_id(id)):
                yield piece
        except aiohttp.WSServerHandshakeError as error:
            if error.status == 404:
                raise self._unknown(id) from error
            raise JobServerError(f"Ray at {self.address} shows no log of {id}: {error.message}") from error
        except (aiohttp.ClientError, OSError) as error:
            raise self._away(error) from error

    def _asked(self, ask: Callable[[], T], id: str = "") -> T:
        """What `ask` gives; whatever Ray's client raises becomes an error of the project."""
        try:
            return ask()
        except AuthenticationError as error:
            raise JobSetupError(
                f"Ray at {self.address} refuses the token: put the cluster's into RAY_AUTH_TOKEN, or the path of a "
                f"file that holds it into RAY_AUTH_TOKEN_PATH; a cluster that was started without one has to be "
                "started again, with RAY_AUTH_MODE=token and RAY_AUTH_TOKEN set for ray start on every node "
                f"({said(error)[:_LONGEST_REASON]})"
            ) from error
        except (requests.ConnectionError, requests.Timeout, ConnectionError, TimeoutError) as error:
            raise self._away(error) from error
        except (requests.RequestException, ValueError, KeyError, TypeError) as error:
            raise JobError(
                f"what answers at {self.address} is no job server of Ray: name the address of the dashboard, "
                f"http://head:8265 by default ({said(error)[:_LONGEST_REASON]})"
            ) from error
        except RuntimeError as error:
            raise self._refusal(error, id) from error

    def _refusal(self, error: RuntimeError, id: str) -> JobError:
        """Of an answer that is no success; Ray's client gives its status in words."""
        told = re.match(r"Request failed with status code (\d+): (.*)\.$", str(error), re.DOTALL)
        if told is None:
            return JobError(f"Ray at {self.address}: {said(error)[:_LONGEST_REASON]}")
        status, reason = int(told[1]), last_line(told[2]) or "it does not say why"
        if status == 404 and id:
            return self._unknown(id)
        if "already exists" in told[2] or "already been used" in told[2]:
            return JobError(f"there is a job {id} at {self.address} already: choose another --id")
        if _NO_AGENT.search(told[2]) is not None:
            found = listener(_AGENT_PORT)
            holder = "" if found is None else f" (there listens {found})"
            kind = JobServerError if found is None else JobSetupError
            return kind(
                f"Ray at {self.address} has no agent that would start jobs: it has just begun, or another Ray "
                f"of its head node has the agent's port, {_AGENT_PORT} unless it was told otherwise{holder}. That "
                "does not pass by itself: end that one, or start this one with ray start --dashboard-agent-listen-port "
                f"and a port that is free ({reason})"
            )
        if status >= 500:
            return JobServerError(f"Ray at {self.address} cannot do it now: {reason}")
        return JobError(f"Ray at {self.address} refuses it: {reason}")

    def _unknown(self, id: str) -> UnknownJobError:
        return UnknownJobError(f"no job {id} is known at {self.address}: mmrl jobs list shows those that are")

    def _away(self, error: BaseException) -> JobServerError:
        return JobServerError(
            f"no job server answers at {self.address}: is the cluster up, and its dashboard's port open from here? "
            f"({said(error)[:_LONGEST_REASON]})"
        )


@dataclass(frozen=True, slots=True)
class LocalRay:
    """A Ray whose head node is this machine."""

    store: str
    """HOST:PORT of its control store."""
    url: str | None
    """Of its job server; None where it takes no jobs, as that of a local `mmrl train`."""


def local_rays() -> list[LocalRay]:
    """Those whose processes are seen from here, by the command lines of their dashboards."""
    found = set()
    for process in psutil.process_iter():
        try:
            arguments = process.cmdline()
            if not any(each.endswith("dashboard/dashboard.py") for each in arguments):
                continue
            options = dict(each.removeprefix("--").split("=", 1) for each in arguments if re.match(r"--[a-z-]+=", each))
            if "gcs-address" not in options or "port" not in options:
                continue
            # Ray starts the process without its job server where it is to have no dashboard.
            takes_jobs = "modules-to-load" not in options and "--minimal" not in arguments
            port = _port_of(process, int(options["port"]), int(options.get("port-retries", 0)))
        except (psutil.Error, ValueError):  # it has ended, is another user's, or is no dashboard
            continue
        found.add((options["gcs-address"], f"http://127.0.0.1:{port}" if takes_jobs else None))
    return [LocalRay(store, url) for store, url in sorted(found, key=str)]


def _port_of(process: psutil.Process, first: int, retries: int) -> int:
    """Where a dashboard listens, which takes the next ports where its first one is taken."""
    held = {each.laddr.port for each in process.net_connections(kind="tcp") if each.status == psutil.CONN_LISTEN}
    return min((port for port in held if first <= port <= first + retries), default=first)


def own_ray() -> str:
    """HOST:PORT of the control store of the Ray that this process has joined."""
    return str(ray.get_runtime_context().gcs_address)


def own_address() -> str:
    """The job server of the Ray that this process has joined; a JobServerError where it has none."""
    try:
        return str(ray_address_to_api_server_url(own_ray()))
    except (ValueError, RuntimeError, ConnectionError) as error:
        raise JobServerError(
            f"this Ray has no job server ({said(error)[:_LONGEST_REASON]}): start it with its dashboard, or name "
            "another's address"
        ) from error


def _job(details: JobDetails) -> Job | None:
    """Ray's record as ours; None of a job that is not ours."""
    facts = JobFacts.of(details.metadata)
    if details.type != JobType.SUBMISSION or details.submission_id is None or facts is None:
        return None
    return Job(
        id=details.submission_id,
        status=_STATUSES[details.status.value],
        facts=facts,
        created=(details.start_time or 0) / _MS,
        ended=details.end_time / _MS if details.end_time else None,
        driver_code=details.driver_exit_code,
        message=details.message or "",
    )
