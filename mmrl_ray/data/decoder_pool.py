"""Pictures of strangers, decoded in processes that can be ended, each picture within a budget of memory and CPU time.

The pixels come back over a socket, 0.15 ms a picture and some 0.5 ms a megabyte; a process decodes one picture after
the other, and one that ran out of its time is ended and another one started (0.3 s) for the next picture.
"""

from __future__ import annotations

import functools
import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

from PIL import Image

from mmrl_ray.data.images import DEFAULT_LIMITS, ImageLimits, banded, inspect_image
from mmrl_ray.errors import ImageError, ProcessError
from mmrl_ray.processes import ChildProcess, Lost

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
_WORKER, _BACKGROUND_WORKER = "mmrl_ray.data.decoder_child:work", "mmrl_ray.data.decoder_child:work_in_background"


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
        self._worker = _BACKGROUND_WORKER if background else _WORKER
        self._turns = threading.BoundedSemaphore(workers)
        self._lock = threading.Lock()
        self._idle: list[ChildProcess] = []

    def decode(
        self, data: bytes, limits: ImageLimits = DEFAULT_LIMITS, decoding: Decoding | None = None
    ) -> Image.Image:
        """What `decode_image` gives.

        Raises:
            ImageError: whatever `decode_image` refuses, and what takes more memory or CPU time than it may.
            ProcessError: no process can be started, it was ended from outside, or the decoding was given up.
        """
        with self._process() as process, (decoding or Decoding()).on(process):
            width, height = self._size(process, data, limits, pixels=True)
            pixels = process.more(_TIMEOUT_S)
        if isinstance(pixels, Lost):
            raise ProcessError(pixels.reason)
        if width * height > limits.max_pixels or len(pixels) != 3 * width * height:
            raise ProcessError(f"the decoder's process gave {len(pixels):,} bytes for {width}x{height} pixels")
        return banded((width, height), memoryview(pixels))

    def check(self, data: bytes, limits: ImageLimits = DEFAULT_LIMITS, decoding: Decoding | None = None) -> None:
        """Decodes as `decode` does, and raises like it; the pixels stay where they are."""
        with self._process() as process, (decoding or Decoding()).on(process):
            self._size(process, data, limits, pixels=False)

    def close(self) -> None:
        """Ends the processes that are idle; later pictures start others."""
        with self._lock:
            idle, self._idle = self._idle, []
        for process in idle:
            process.end()

    def _size(self, process: ChildProcess, data: bytes, limits: ImageLimits, *, pixels: bool) -> tuple[int, int]:
        count = inspect_image(data, limits)
        cpu_s = CPU_S + CPU_S_A_MEGAPIXEL * count / 1e6
        memory = MEMORY_FACTOR * 3 * count + MEMORY_BYTES + 2 * len(data)
        head = {"limits": asdict(limits), "pixels": pixels, "cpu_s": cpu_s, "memory_bytes": memory}
        answer = process.ask(json.dumps(head).encode(), data, timeout_s=_TIMEOUT_S)
        if isinstance(answer, Lost):
            if answer.by == signal.SIGPROF:
                raise ImageError(f"image that takes more than {cpu_s:.3g} s of CPU time to decode: save it again")
            if answer.by in (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE):
                raise ImageError("broken image: its decoder crashed over it")
            raise ProcessError(answer.reason)
        told = json.loads(answer)
        if "error" in told:
            raise ImageError(told["error"])
        width, height = told["size"]
        return width, height

    @contextmanager
    def _process(self) -> Iterator[ChildProcess]:
        if not self._turns.acquire(timeout=_TIMEOUT_S):
            raise ProcessError(f"other pictures kept the decoders busy for {_TIMEOUT_S:g} s")
        try:
            with self._lock:
                process = self._idle.pop() if self._idle else None
            if process is None or not process.alive:
                process = ChildProcess(self._worker, "a picture's decoder")
            try:
                yield process
            finally:
                if process.alive:
                    with self._lock:
                        self._idle.append(process)
        finally:
            self._turns.release()


@functools.cache
def shared_pool() -> DecoderPool:
    """The pool of this process."""
    return DecoderPool()


@functools.cache
def background_pool() -> DecoderPool:
    """The same for pictures that take long."""
    return DecoderPool(background=True)
