"""What is known of a job: Ray's record of it, as far as it was written by this project."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mmrl_ray.errors import JobError

Status = Literal["pending", "running", "succeeded", "failed", "stopped"]

INTERRUPTED = 130
"""Exit code of a job that was stopped, as of a run that Ctrl-C stopped."""
ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""A submission id; it becomes a part of paths on the cluster."""
HTTP_PREFIX = "ftjob-"
"""Begins the ids of jobs that were asked for over HTTP."""
_MARK = "mmrl."
"""Begins the keys of a job's metadata that are this project's."""
_LONGEST_MESSAGE = 2000
_LARGEST_CONFIG = 32 << 10
"""Bytes. Ray hands metadata to the job in an environment variable, of which Linux takes 128 kB."""


@dataclass(frozen=True, slots=True)
class JobFacts:
    """What a submitter says of a job; Ray keeps it as the job's metadata for as long as the cluster lives."""

    run: str
    """Name of the run."""
    location: str
    """Its folder, as the cluster's nodes see it."""
    by: str
    """Who submitted it, and from where."""
    task: Literal["train", "resume"] = "train"
    request: Mapping[str, Any] = field(default_factory=dict)
    """JSON of whoever asked for the job over HTTP; empty otherwise."""
    code: str = ""
    """Folder on the submitter's machine with its own reward functions, for a resume; empty where none is sent."""
    config: str = ""
    """YAML of the run, for a resume where the job was stopped before there was a run folder; empty of older jobs."""

    def metadata(self) -> dict[str, str]:
        """In Ray's shape: texts alone."""
        facts = {"run": self.run, "location": self.location, "by": self.by, "task": self.task}
        if self.request:
            facts["request"] = json.dumps(self.request, ensure_ascii=False)
        if self.code:
            facts["code"] = self.code
        if self.config and len(self.config.encode()) <= _LARGEST_CONFIG:
            facts["config"] = self.config
        return {"job_name": self.run, **{f"{_MARK}{key}": value for key, value in facts.items()}}

    @classmethod
    def of(cls, metadata: Mapping[str, str] | None) -> JobFacts | None:
        """What `metadata` made; None where something else did."""
        found = {key.removeprefix(_MARK): value for key, value in (metadata or {}).items() if key.startswith(_MARK)}
        try:
            task: Literal["train", "resume"] = "resume" if found.get("task") == "resume" else "train"
            request = json.loads(found.get("request", "{}"))
            request = request if isinstance(request, dict) else {}
            code, config = found.get("code", ""), found.get("config", "")
            return cls(found["run"], found["location"], found["by"], task, request, code, config)
        except (KeyError, ValueError):
            return None


@dataclass(frozen=True, slots=True)
class Job:
    """One job as it stands."""

    id: str
    status: Status
    facts: JobFacts
    created: float
    """Unix seconds."""
    ended: float | None = None
    """Unix seconds."""
    driver_code: int | None = None
    """What the entry point's process ended with; negative for the signal that killed it."""
    message: str = ""
    """Ray's; of a failed job it has the last lines of the log."""

    @property
    def is_over(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.status not in ("pending", "running")

    @property
    def exit_code(self) -> int:
        """As a shell tells it: the job's own, 128 + the signal that killed it, 130 where it was stopped."""
        if self.status == "stopped":
            return INTERRUPTED
        if self.status == "failed":
            code = self.driver_code or 1  # none: Ray could not even start it
            return code if code > 0 else 128 - code
        return 0

    @property
    def reason(self) -> str:
        """Why it failed, on one line: the last that it said."""
        lines = [line.strip() for line in self.message.splitlines() if line.strip()]
        if not lines:
            return "no reason is known"
        said = next((line for line in reversed(lines) if line.startswith("error:")), lines[-1])
        return said.removeprefix("error:").strip()[:_LONGEST_MESSAGE]


def new_id(run: str) -> str:
    """A submission id that nobody had before, with the run's name in it."""
    return f"{run[:100]}-{secrets.token_hex(4)}"


def new_http_id() -> str:
    """The same for a job that was asked for over HTTP, where the name of its run tells nothing."""
    return HTTP_PREFIX + secrets.token_hex(12)


def check_id(id: str) -> str:
    """The id itself.

    Raises:
        JobError: it could be none.
    """
    if ID.fullmatch(id) is None:
        raise JobError(f"{id[:64]!r} is no id of a job: it has up to 128 letters, digits, dots, dashes and underscores")
    return id
