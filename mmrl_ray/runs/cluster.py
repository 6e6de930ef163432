"""A Ray for one run: started here and ended here, or an existing cluster that is only joined."""

from __future__ import annotations

import logging
import math
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
from ray._private import auto_init_hook
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]  # compiled, without stubs
from ray._raylet import Config as RayConfig  # type: ignore[attr-defined]

from mmrl_ray.config import Config
from mmrl_ray.config.demands import demands_of
from mmrl_ray.errors import RunError

_SETTINGS = {
    # Ray is a control plane: whoever reaches it runs code. Never without its token, not even on a laptop.
    "RAY_AUTH_MODE": "token",
    # A dead learner and the end of a run are seen at Ray Train's next poll, 2 s apart by default; each takes some time
    # away from the learners.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "TOKENIZERS_PARALLELISM": "false",
    # Where Ray has ended, a call that comes late (Serve's routers poll on threads of their own) starts no new one.
    "RAY_ENABLE_AUTO_CONNECT": "0",
}

_ROOM_TO_SCALE = 2
"""Workers that `mmrl scale` can add where the machine has no core for them. Ray starts a process a CPU beforehand."""


def configure_ray() -> None:
    """Puts the project's Ray settings into the environment; a variable that is set already keeps its value.

    Processes that Ray starts inherit them, so this comes before `ray.init`.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    # Ray read this one when it was imported.
    auto_init_hook.enable_auto_connect = os.environ["RAY_ENABLE_AUTO_CONNECT"] != "0"


def read_token_again() -> None:
    """Ray reads mode and token when it is imported, which may have been before they were set."""
    RayConfig.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


@contextmanager
def ray_session(cfg: Config, *, address: str | None = None, debug: bool = False) -> Iterator[None]:
    """A Ray for one run. A local one has at least the CPUs that the run's actors ask for, and those of a few more
    rollout workers: on one small machine learner and workers take turns, so that more actors than cores is no error.

    Raises:
        RunError: the cluster at `address` cannot be joined.
    """
    store = cfg.resources.object_store_mb
    room = math.ceil(_ROOM_TO_SCALE * cfg.resources.rollout.cpus)
    with ray_at(address, cpus=demanded_cpus(cfg) + room, object_store_mb=store, namespace=cfg.run.name, debug=debug):
        yield


@contextmanager
def ray_at(
    address: str | None,
    *,
    cpus: int,
    object_store_mb: int | None,
    namespace: str,
    debug: bool = False,
    dashboard: bool = False,
) -> Iterator[None]:
    """The Ray at an address (or at `RAY_ADDRESS`), or else a local one.

    A local one is started with a token of its own, at least `cpus` CPUs and an object store of that size, and ended
    when the block is left; with `dashboard` it takes jobs, too.

    Raises:
        RunError: the cluster at `address` cannot be joined.
    """
    configure_ray()
    address = address or os.environ.get("RAY_ADDRESS")
    level = logging.INFO if debug else logging.ERROR
    own_token = address is None and not os.environ.get("RAY_AUTH_TOKEN") and not os.environ.get("RAY_AUTH_TOKEN_PATH")
    if own_token:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    read_token_again()
    try:
        if address is None:
            ray.init(
                address="local",  # without it, Ray joins whatever `ray start` has left on this machine
                num_cpus=max(os.cpu_count() or 1, cpus),
                object_store_memory=object_store_mb * 2**20 if object_store_mb else None,
                include_dashboard=dashboard,
                log_to_driver=debug,
                logging_level=level,
                namespace=namespace,
            )
        else:
            try:
                ray.init(address=address, log_to_driver=debug, logging_level=level, namespace=namespace)
            except (ConnectionError, RuntimeError, ValueError) as error:
                first = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise RunError(
                    f"cannot join Ray at {address}: {first}; check the address and that RAY_AUTH_TOKEN is the cluster's"
                ) from error
        yield
    finally:
        ray.shutdown()
        if own_token:
            os.environ.pop("RAY_AUTH_TOKEN", None)


def demanded_cpus(cfg: Config) -> int:
    """CPUs that the run's actors ask Ray for, all together."""
    return math.ceil(sum(demand.count * demand.cpus for demand in demands_of(cfg, at_most=True)))


def node_local_root_refused(root: str) -> None:
    """Refuses a run folder that other nodes of a joined cluster would not see.

    Raises:
        RunError: Ray has nodes on several machines and `root` is a path on this one.
    """
    machines = {node["NodeManagerAddress"] for node in ray.nodes() if node.get("Alive")}
    if len(machines) > 1 and "://" not in root and not _is_network_mount(Path(root)):
        raise RunError(
            f"run.root={root} is a path on this node, but the cluster has nodes on {len(machines)} machines: "
            "use a location that all of them see, such as s3://bucket/runs or a network mount"
        )


def _is_network_mount(path: Path) -> bool:
    path = path.absolute()
    try:
        lines = Path("/proc/mounts").read_text().splitlines()
    except OSError:
        return False
    mounts = {fields[1]: fields[2] for line in lines if len(fields := line.split()) > 2}
    for folder in (path, *path.parents):
        if str(folder) in mounts:
            return mounts[str(folder)].startswith(("nfs", "ceph", "lustre", "fuse", "cifs", "gpfs", "9p", "virtiofs"))
    return False
