"""What a call through a Serve handle raises, as the project's own errors."""

from __future__ import annotations

from ray.exceptions import RayActorError, RayTaskError, WorkerCrashedError
from ray.serve.exceptions import BackPressureError, ReplicaUnavailableError

from mmrl_ray.errors import MMRLError, OverloadedError, ServingError

ATTEMPTS = 4
"""Of a call whose replica was lost, the first included. What the replicas do has no side effects, and sampling is
seeded, so that a second try gives what the first would have given."""
FIRST_WAIT_S = 0.2
"""Before the second attempt; it doubles. With no replica left the handle itself waits for the next one."""


def replica_lost(error: BaseException) -> bool:
    """Whether the replica went away, rather than answered."""
    return isinstance(_cause(error), RayActorError | WorkerCrashedError | ReplicaUnavailableError)


def project_error(error: Exception, who: str) -> MMRLError:
    """The error to raise in place of `error`; `who` names the deployment."""
    cause = _cause(error)
    if isinstance(cause, MMRLError):
        return cause
    if isinstance(cause, BackPressureError):
        return OverloadedError(f"the {who} deployment has as many waiting requests as it takes: try again later")
    if replica_lost(cause):
        return OverloadedError(f"a replica of the {who} deployment was lost, another is starting: try again later")
    first = (str(cause).strip() or type(cause).__name__).splitlines()[0]
    return ServingError(f"the {who} deployment failed: {type(cause).__name__}: {first}")


def _cause(error: BaseException) -> BaseException:
    """What was raised in the replica."""
    return error.cause if isinstance(error, RayTaskError) else error
