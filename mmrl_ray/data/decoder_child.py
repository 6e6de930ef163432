"""What runs in the process of a decoder, see `decoder_pool.py`: one answer a picture, within its budgets."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import sys
from contextlib import suppress
from typing import Any

from mmrl_ray.child import receive, send, send_parts
from mmrl_ray.errors import ImageError

_NICENESS = 10
"""A tenth of what others get, where all want a core."""


def work_in_background(owner: socket.socket) -> None:
    """The same as `work`, at a low priority."""
    os.nice(_NICENESS)
    # Linux may share out the cores between sessions first, and each of these processes has one of its own.
    with suppress(OSError), open("/proc/self/autogroup", "w") as autogroup:
        autogroup.write(str(_NICENESS))
    work(owner)


def work(owner: socket.socket) -> None:
    """Answers until the owner is gone.

    A request is what `decode_image` takes with its budgets, as JSON, then the encoded picture. An answer is JSON, an
    error or a size, and, where they are wanted, the pixels.
    """
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # NumPy would start one a core, each with memory of its own
    from mmrl_ray.data.images import ImageLimits, bands, decode_image

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while (head := receive(owner)) is not None and (data := receive(owner)) is not None:
        asked: dict[str, Any] = json.loads(head)
        try:
            _set_budget(asked["cpu_s"], asked["memory_bytes"])
            image = decode_image(bytes(data), ImageLimits(**asked["limits"]))
        except ImageError as error:
            _set_budget(0.0, None)
            send(owner, json.dumps({"error": str(error)}).encode())
            continue
        _set_budget(0.0, None)
        send(owner, json.dumps({"size": image.size}).encode())
        if asked["pixels"]:
            send_parts(owner, 3 * image.width * image.height, bands(image))


def _set_budget(cpu_s: float, memory_bytes: int | None) -> None:
    """From here on: the kernel ends the process after so many seconds of CPU time, 0 for none, and refuses memory."""
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    if sys.platform == "linux":
        limit = resource.RLIM_INFINITY if memory_bytes is None else _memory() + memory_bytes
        resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))


def _memory() -> int:
    """Bytes that count against `RLIMIT_DATA`."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[5]) * resource.getpagesize()
