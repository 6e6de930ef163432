"""A Ray for one run: started here and ended here, or an existing cluster that is only joined."""

from __future__ import annotations

import functools
import logging
import math
import os
import re
import secrets
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import ray
from ray._private import auto_init_hook, parameter, services, utils
from ray._private.node import Node
from ray._private.ray_logging import global_worker_stdstream_dispatcher
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]  # compiled, without stubs
from ray._raylet import Config as RayConfig  # type: ignore[attr-defined]

from mmrl_ray.config import Config
from mmrl_ray.config.schema import demands_of
from mmrl_ray.errors import RaySessionError, RunError
from mmrl_ray.processes import allocator_settings
from mmrl_ray.rewards.child import MARK
from mmrl_ray.rollouts.pool_settings import end_coordinator, find_coordinator
from mmrl_ray.training.interrupts import StopOnInterrupt
from mmrl_ray.training.local_ray import clean_in_background, mark_session
from mmrl_ray.training.reaper import reaped

_SETTINGS = {
    # Ray is a control plane: whoever reaches it runs code. Never without its token, not even on a laptop.
    "RAY_AUTH_MODE": "token",
    # A dead learner and the end of a run are seen at Ray Train's next poll, 2 s apart by default; each takes some time
    # away from the learners.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "TOKENIZERS_PARALLELISM": "false",
    # Threads of torch that wait for each other by spinning take the cores from those that have work, as soon as two
    # processes share a machine; ones that sleep at once are woken for every small product. Loops of small products a
    # second on two cores, alone and of each of two processes: 1,245 and 145 as by default, 890 and 620 without
    # spinning, 1,110 and 530 so.
    "GOMP_SPINCOUNT": "1000",
    # Where Ray has ended, a call that comes late (Serve's routers poll on threads of their own) starts no new one.
    "RAY_ENABLE_AUTO_CONNECT": "0",
    # An actor that asked for no GPU sees none; as Ray comes, it sees those of its whole node.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
    # Counts of events in Ray's own loops, for its developers: a third of what an idle actor takes of a core.
    "RAY_event_stats": "0",
}
_WITHOUT_DASHBOARD = {
    # Every process sends each second what the dashboard shows of its tasks.
    "RAY_task_events_report_interval_ms": "0",
}
_OWN_NODE = {
    # How often the processes of a node look what there is to do beside their work: as Ray comes, ten times a second and
    # more, for clusters that come and go. None of it tells whether a process lives.
    "RAY_raylet_check_gc_period_milliseconds": "1000",
    "RAY_kill_idle_workers_interval_ms": "2000",
    "RAY_gcs_pull_resource_loads_period_milliseconds": "10000",
    "RAY_DASHBOARD_AGENT_CHECK_PARENT_INTERVAL_S": "2",
    "REPORTER_UPDATE_INTERVAL_MS": "15000",
}

_START_LOGS = ("gcs_server", "raylet", "dashboard", "log_monitor", "runtime_env_agent")
# Of Ray's C++ ("[2026-01-31 12:00:00,000 E 12 34] …", C and F too) and Python processes.
_LOG_ERROR = re.compile(r"^\[[^]]* [ECF] \d+ \d+\]|\bERROR\b|^\w*(Error|Exception): ")
_LOG_TAIL = 64 << 10
_LOG_LINE = 300

_MARKED = "mmrl_marked_lines"

_ROOM_TO_SCALE = 2
"""Workers that `mmrl scale` can add where the machine has no core for them. Ray starts a process a CPU beforehand."""


def configure_ray() -> None:
    """Puts the project's Ray settings into the environment; a variable that is set already keeps its value.

    Processes that Ray starts inherit them, so this comes before `ray.init`.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    os.environ.update(allocator_settings())
    # Ray read this one when it was imported.
    auto_init_hook.enable_auto_connect = os.environ["RAY_ENABLE_AUTO_CONNECT"] != "0"


def is_joined(address: str | None) -> bool:
    """Whether `ray_at` finds a Ray that outlives its block: that of an address, or the one this process is in."""
    return bool(address or os.environ.get("RAY_ADDRESS") or ray.is_initialized())


def forget_settings() -> None:
    """Has Ray read the environment again, where a process that goes on has it as it was before `configure_ray`."""
    if not ray.is_initialized():
        auto_init_hook.enable_auto_connect = os.environ.get("RAY_ENABLE_AUTO_CONNECT", "") != "0"
        read_token_again()


def read_token_again() -> None:
    """Ray reads mode and token when it is imported, which may have been before they were set."""
    RayConfig.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


@contextmanager
def ray_session(
    cfg: Config,
    *,
    address: str | None = None,
    debug: bool = False,
    show: Callable[[str], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> Iterator[None]:
    """A Ray for one run; `show` is given what the user's own reward functions print, `say` see `ray_at`.

    A local one has at least the CPUs that the run's actors ask for, and those of a few more rollout workers: on one
    small machine learner and workers take turns, so that more actors than cores is no error.

    Raises:
        RaySessionError: no local Ray starts, or the cluster at `address` cannot be joined.
    """
    store = cfg.resources.object_store_mb
    room = math.ceil(_ROOM_TO_SCALE * cfg.resources.rollout.cpus)
    cpus = demanded_cpus(cfg) + room
    show = show if cfg.reward.functions else None
    name = cfg.run.name
    with ray_at(address, cpus=cpus, object_store_mb=store, namespace=name, debug=debug, show=show, say=say):
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
    show: Callable[[str], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> Iterator[None]:
    """The Ray at an address (or at `RAY_ADDRESS`), the one that this process is in already, or else a local one.

    One that the process is in (`ray.init` in a notebook) stays as it is, and what workers log goes where it always did.
    A local one is started with a token of its own, at least `cpus` CPUs and an object store of that size, and ended
    when the block is left; with `dashboard` it takes jobs, too. `show` is given each line that reward functions print
    in this job's workers, on whatever node; with `debug` all that workers log goes to standard error instead.

    A first signal that comes while Ray starts is told to the user with `say`, and raised once it has started.

    Raises:
        KeyboardInterrupt: the user stopped it.
        RaySessionError: no local one starts, or the cluster at `address` cannot be joined.
    """
    if ray.is_initialized():
        with _in_session(address):
            yield
        return
    configure_ray()
    address = address or os.environ.get("RAY_ADDRESS")
    level = logging.INFO if debug else logging.ERROR
    own_token = address is None and not os.environ.get("RAY_AUTH_TOKEN") and not os.environ.get("RAY_AUTH_TOKEN_PATH")
    if own_token:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    read_token_again()
    began = time.time()
    logs = debug or show is not None
    coordinator_was_there = False
    ending = ExitStack()
    try:
        try:
            if address is None:
                ending.enter_context(reaped())
                clean_in_background(_ray_folder())
                idlers = _without_idlers(dashboard=dashboard, logs=logs)
                with _undisturbed(say), _signals_kept(), _out_of_reach(), free_agent_port(), idlers:
                    ray.init(
                        address="local",  # without it, Ray joins whatever `ray start` has left on this machine
                        num_cpus=max(os.cpu_count() or 1, cpus),
                        object_store_memory=object_store_mb * 2**20 if object_store_mb else None,
                        include_dashboard=dashboard,
                        log_to_driver=logs,
                        logging_level=level,
                        namespace=namespace,
                    )
                mark_session(_ray_folder())
            else:
                with _undisturbed(say), _signals_kept():
                    ray.init(address=address, log_to_driver=logs, logging_level=level, namespace=namespace)
                coordinator_was_there = ray.is_initialized() and find_coordinator() is not None
        except Exception as error:  # boundary: Ray's start raises bare exceptions, too
            if address is None:
                raise _not_started(error, began, cpus, object_store_mb) from error
            raise RaySessionError(
                f"cannot join Ray at {address}: {_first_line(error)}; check the address and that RAY_AUTH_TOKEN is the "
                "cluster's"
            ) from error
        if show is not None and not debug:
            _show_marked(show)
        yield
    finally:
        global_worker_stdstream_dispatcher.remove_handler(_MARKED)
        if address is not None and not coordinator_was_there and ray.is_initialized():
            end_coordinator()
        try:
            ray.shutdown()
        finally:
            ending.close()
        if own_token:
            os.environ.pop("RAY_AUTH_TOKEN", None)


@contextmanager
def _in_session(address: str | None) -> Iterator[None]:
    """The Ray that this process is in, which is left as it was found.

    Raises:
        RaySessionError: it is another than that of the address, or it is reached as by Ray Client.
    """
    if ray.util.client.ray.is_connected():
        raise RaySessionError(
            "this process is a client of Ray (ray://), by which no run can be driven: ray.shutdown(), then join the "
            "cluster with address=, or send the run there with mmrl submit"
        )
    here = ray.get_runtime_context().gcs_address
    if address not in (None, "auto", here):
        raise RaySessionError(
            f"this process is in the Ray at {here}, not in that at {address}: ray.shutdown() first, or leave the "
            "address out"
        )
    coordinator_was_there = find_coordinator() is not None
    try:
        yield
    finally:
        if not coordinator_was_there and ray.is_initialized():
            end_coordinator()


def _show_marked(show: Callable[[str], None]) -> None:
    """Of the lines that Ray brings from the workers' logs, shows those of reward functions, in place of all."""

    def handle(data: Mapping[str, Any]) -> None:
        for line in data.get("lines", ()):
            if line.startswith(MARK):
                show(line)

    global_worker_stdstream_dispatcher.remove_handler("ray_print_logs")
    global_worker_stdstream_dispatcher.add_handler(_MARKED, handle)


@contextmanager
def _out_of_reach() -> Iterator[None]:
    """Ray's processes are started in sessions of their own meanwhile, and so are all that they start.

    A signal to the driver's process group (Ctrl-C on a terminal, `timeout`, systemd) is then the driver's alone, which
    ends its run by a checkpoint for which it needs them. They still end with it, however it dies, see `reaper.py`.
    """
    started = services.ConsolePopen

    @functools.wraps(started, updated=())
    def start(*args: Any, **options: Any) -> Any:
        return started(*args, **{**options, "start_new_session": True})

    services.ConsolePopen = start  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        services.ConsolePopen = started  # type: ignore[misc]


@contextmanager
def free_agent_port() -> Iterator[None]:
    """The agent of a node, which starts and stops jobs, listens on any free port meanwhile.

    Ray's own default is one fixed port (52365): where another Ray of this machine has it, no job can be sent.
    """
    made = parameter.RayParams
    parameter.RayParams = functools.partial(made, dashboard_agent_listen_port=0)  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        parameter.RayParams = made  # type: ignore[misc]


@contextmanager
def _without_idlers(*, dashboard: bool, logs: bool) -> Iterator[None]:
    """A Ray that is started meanwhile has no process on this node that nobody asks anything.

    Without a cloud to ask for nodes its autoscaler has nothing to do, without a dashboard its head collects statistics
    that are off, and without lines to show nobody reads logs: 50 to 80 MB each.
    """
    # Ray has no switches for them. A version in which one is called otherwise starts it.
    unused = ["start_monitor", *([] if dashboard else ["start_api_server"]), *([] if logs else ["start_log_monitor"])]
    before = {name: getattr(Node, name) for name in unused if hasattr(Node, name)}
    for name in before:
        setattr(Node, name, lambda node, **options: None)
    for name, value in (_OWN_NODE | ({} if dashboard else _WITHOUT_DASHBOARD)).items():
        os.environ.setdefault(name, value)
    try:
        yield
    finally:
        for name, method in before.items():
            setattr(Node, name, method)


@contextmanager
def _undisturbed(say: Callable[[str], None] | None) -> Iterator[None]:
    """A signal is raised at the end of the block: a process that is half connected to Ray crashes when it ends."""
    with StopOnInterrupt(
        lambda: None, awaited=lambda: "waiting for Ray to start, then ending it", say=say
    ) as interrupt:
        yield
    if interrupt.asked:
        raise KeyboardInterrupt


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray's start takes SIGTERM away from whoever has it, and ends the process by it: here it does not get it."""
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        yield
        return
    taken = utils.set_sigterm_handler
    utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = taken


def _not_started(error: Exception, began: float, cpus: int, object_store_mb: int | None) -> RaySessionError:
    """Why no local Ray started: what was tried, what Ray and the log of its processes say, and what to do."""
    store = f"{object_store_mb} MB of object store" if object_store_mb else "an object store of Ray's own choice"
    said = "; ".join(filter(None, (_first_line(error), _last_cause(began))))
    return RaySessionError(
        f"no local Ray started in {time.time() - began:.0f} s, with {max(os.cpu_count() or 1, cpus)} CPUs and {store}: "
        f"{said}. See that memory, /dev/shm and the disk of {_ray_folder()} have room and that the machine is not "
        "overloaded, lower resources.object_store_mb or rollout.workers, or join a Ray that runs with --address"
    )


def _last_cause(since: float) -> str:
    """The last error in the logs of the Ray that this process began at `since` (Unix seconds); empty if none."""
    found: list[tuple[float, str]] = []
    for file in sorted(_ray_folder().glob(f"session_*_{os.getpid()}/logs/*")):
        try:
            changed = file.stat().st_mtime
            if file.name.startswith(_START_LOGS) and changed >= since:
                lines = file.read_bytes()[-_LOG_TAIL:].decode(errors="replace").splitlines()
                errors = [line.strip() for line in lines if _LOG_ERROR.search(line)]
                found += [(changed, f"{file} says: {line[:_LOG_LINE]}") for line in errors[-1:]]
        except OSError:  # a log that went away meanwhile
            continue
    return max(found)[1] if found else ""


def _ray_folder() -> Path:
    """Where Ray keeps its sessions on this machine."""
    return Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp") / "ray"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".;: ")


def demanded_cpus(cfg: Config) -> int:
    """CPUs that the run's actors ask Ray for, all together."""
    return math.ceil(sum(demand.count * demand.cpus for demand in demands_of(cfg, at_most=True)))


def node_local_root_refused(root: str) -> None:
    """Refuses a run folder that other nodes of a joined cluster would not see.

    Raises:
        RunError: Ray has nodes on several machines and `root` is a path on this one.
    """
    _refuse_node_local("run.root", root, "such as s3://bucket/runs or a network mount")


def refuse_node_local(cfg: Config) -> None:
    """Refuses places of a run that other nodes of a joined cluster would not see.

    Raises:
        RunError: as `node_local_root_refused`, or of the cache, where workers read a warm start from there.
    """
    node_local_root_refused(cfg.run.root)
    if "://" in cfg.run.root:  # one on a file system keeps its base, and all nodes find it there
        node_local_cache_refused(cfg)


def node_local_cache_refused(cfg: Config) -> None:
    """Refuses an `sft.cache` that is not the same on all nodes, where there is to be a warm start.

    Raises:
        RunError: Ray has nodes on several machines and it is a path on one.
    """
    if cfg.sft is not None:
        _refuse_node_local("sft.cache", cfg.sft.cache, "such as a network mount")


def _refuse_node_local(key: str, place: str, remedy: str) -> None:
    machines = {node["NodeManagerAddress"] for node in ray.nodes() if node.get("Alive")}
    if len(machines) > 1 and "://" not in place and not _is_network_mount(Path(place).expanduser()):
        raise RunError(
            f"{key}={place} is a path on this node, but the cluster has nodes on {len(machines)} machines: "
            f"use a location that all of them see, {remedy}"
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
