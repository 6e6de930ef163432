"""Pictures of strangers, decoded in processes that can be ended, each picture within a budget of memory and CPU time.

The pixels come back in memory that both processes map (`Shared`), 0.3 ms a megabyte to write; who prepares a picture
in a process of its own (`policy/prompt_pool.py`) is handed that memory on. A process decodes one picture after the
other, and one that ran out of its time is ended and another one started (0.3 s) for the next picture.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

from PIL import Image

from mmrl_ray.child import Shared, receive, send
from mmrl_ray.data.images import DEFAULT_LIMITS, ImageLimits, banded, bands, decode_image, inspect_image
from mmrl_ray.errors import ImageError, ProcessError
from mmrl_ray.processes import ChildProcess, Lost, ProcessPool

WORKERS = 3
"""Pictures decoded at a time at most; whoever asks for large ones keeps their number, and the memory, smaller."""
MEMORY_FACTOR = 8
"""Bytes that decoding may take, as a multiple of the decoded picture's three a pixel."""
MEMORY_BYTES = 64 * 2**20
"""On top of that, and of the encoded picture, twice."""
CPU_S = 1.5
CPU_S_A_MEGAPIXEL = 0.1
"""On top of `CPU_S`: several times what the slowest sound picture takes."""
_TIMEOUT_S = 120.0
"""On the clock, where a machine has too much to do; requests have deadlines of their own."""
_WORKER, _BACKGROUND_WORKER = f"{__name__}:work", f"{__name__}:work_in_background"
_ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1"}  # NumPy would start one a core, each with memory of its own
_NICENESS = 10
"""A tenth of what others get, where all want a core."""
_CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE)


@dataclass(frozen=True, slots=True)
class SharedPicture:
    """A decoded picture whose pixels, 8-bit RGB, another process may be handed without a copy."""

    size: tuple[int, int]
    """Width and height."""
    pixels: Shared

    def image(self) -> Image.Image:
        """The picture as Pillow's, a copy."""
        return banded(self.size, memoryview(self.pixels.map()))


def images_of(pictures: Sequence[SharedPicture]) -> list[Image.Image]:
    """They as Pillow's, one that is there several times copied once."""
    found = {picture: picture.image() for picture in dict.fromkeys(pictures)}
    return [found[picture] for picture in pictures]


class Decoding:
    """One picture's, which another thread may give up."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: ChildProcess | None = None
        self._given_up = False

    def give_up(self) -> None:
        """Ends its process, or never lets it begin."""
        with self._lock:
            self._given_up = True
            if self._process is not None:
                self._process.kill()

    @contextmanager
    def on(self, process: ChildProcess) -> Iterator[None]:
        """While `process` decodes for this.

        Raises:
            ProcessError: it was given up before.
        """
        with self._lock:
            if self._given_up:
                raise ProcessError("the decoding was given up before it began")
            self._process = process
        try:
            yield
        finally:
            with self._lock:
                self._process = None


class DecoderPool:
    """As many processes as pictures are decoded at a time, started when they are needed; from any threads."""

    def __init__(self, workers: int = WORKERS, *, background: bool = False) -> None:
        """With `background` its processes have what everything else leaves of the cores."""
        worker = _BACKGROUND_WORKER if background else _WORKER
        self._pool = ProcessPool(worker, "a picture's decoder", workers, environment=_ENVIRONMENT)

    def decode(
        self, data: bytes, limits: ImageLimits = DEFAULT_LIMITS, decoding: Decoding | None = None
    ) -> Image.Image:
        """What `decode_image` gives; raises like `decode_shared`."""
        return self.decode_shared(data, limits, decoding).image()

    def decode_shared(
        self, data: bytes, limits: ImageLimits = DEFAULT_LIMITS, decoding: Decoding | None = None
    ) -> SharedPicture:
        """What `decode_image` gives, its pixels where the process put them.

        Raises:
            ImageError: whatever `decode_image` refuses, and what takes more memory or CPU time than it may.
            ProcessError: no process can be started, it was ended from outside, or the decoding was given up.
        """
        with self._pool.process(_TIMEOUT_S) as process, (decoding or Decoding()).on(process):
            width, height = self._size(process, data, limits, pixels=True)
            pixels = process.more(_TIMEOUT_S)
        if isinstance(pixels, Lost):
            raise ProcessError(pixels.reason)
        if width * height > limits.max_pixels or pixels.count != 3 * width * height:
            raise ProcessError(f"the decoder's process gave {pixels.count:,} bytes for {width}x{height} pixels")
        return SharedPicture((width, height), pixels)

    def check(self, data: bytes, limits: ImageLimits = DEFAULT_LIMITS, decoding: Decoding | None = None) -> None:
        """Decodes as `decode` does, and raises like it; the pixels stay where they are."""
        with self._pool.process(_TIMEOUT_S) as process, (decoding or Decoding()).on(process):
            self._size(process, data, limits, pixels=False)

    def close(self) -> None:
        """Ends the processes that are idle; later pictures start others."""
        self._pool.close()

    def _size(self, process: ChildProcess, data: bytes, limits: ImageLimits, *, pixels: bool) -> tuple[int, int]:
        cpu_s, memory = budget_of(data, limits)
        head = {"limits": asdict(limits), "pixels": pixels, "cpu_s": cpu_s, "memory_bytes": memory}
        answer = process.ask(json.dumps(head).encode(), data, timeout_s=_TIMEOUT_S)
        if isinstance(answer, Lost):
            raise lost_over(answer, cpu_s)
        told = json.loads(answer)
        if "error" in told:
            raise ImageError(told["error"])
        width, height = told["size"]
        return width, height


def budget_of(data: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> tuple[float, int]:
    """(seconds of CPU time, bytes) that decoding an encoded picture may take; raises like `inspect_image`."""
    count = inspect_image(data, limits)
    return CPU_S + CPU_S_A_MEGAPIXEL * count / 1e6, MEMORY_FACTOR * 3 * count + MEMORY_BYTES + 2 * len(data)


def lost_over(lost: Lost, cpu_s: float) -> ImageError | ProcessError:
    """What the end of a process says about the picture that it was at, which had `cpu_s` seconds of CPU time: an
    `ImageError` where that is to blame."""
    if lost.by == signal.SIGPROF:
        return ImageError(f"image that takes more than {cpu_s:.3g} s of CPU time to decode: save it again")
    if lost.by in _CRASHES:
        return ImageError("broken image: its decoder crashed over it")
    return ProcessError(lost.reason)


@functools.cache
def shared_pool() -> DecoderPool:
    """The pool of this process."""
    return DecoderPool()


@functools.cache
def background_pool() -> DecoderPool:
    """The same for pictures that take long."""
    return DecoderPool(background=True)


# -- in the process ----------------------------------------------------------------------------------------------------


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
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while (head := receive(owner)) is not None and (data := receive(owner)) is not None:
        asked: dict[str, Any] = json.loads(head)
        try:
            with within(asked["cpu_s"], asked["memory_bytes"]):
                image = decode_image(bytes(data), ImageLimits(**asked["limits"]))
        except ImageError as error:
            send(owner, json.dumps({"error": str(error)}).encode())
            continue
        send(owner, json.dumps({"size": image.size}).encode())
        if asked["pixels"]:
            send(owner, Shared.of(bands(image)))


@contextmanager
def within(cpu_s: float, memory_bytes: int) -> Iterator[None]:
    """Inside, the kernel ends the process after so many seconds of CPU time, and refuses it more memory than that."""
    _set_budget(cpu_s, memory_bytes)
    try:
        yield
    finally:
        _set_budget(0.0, None)


def _set_budget(cpu_s: float, memory_bytes: int | None) -> None:
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    if sys.platform == "linux":
        limit = resource.RLIM_INFINITY if memory_bytes is None else _memory() + memory_bytes
        resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))


def _memory() -> int:
    """Bytes that count against `RLIMIT_DATA`."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[5]) * resource.getpagesize()
