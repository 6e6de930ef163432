"""Processes in one process group (gloo), each of which runs the functions that it is sent.

    with processes(2, folder) as group:
        first, second = group.run(function, *arguments)     what it returned on each rank, or the error that it raised

A function is one that pickle finds by its name. None is waited for longer than `_DEADLINE_S`.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_DEADLINE_S = 240
_END_S = 20


@dataclass(frozen=True)
class Group:
    connections: list[Connection]

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """The same on all ranks."""
        for connection in self.connections:
            connection.send((function, arguments))
        deadline = time.monotonic() + _DEADLINE_S
        for rank, connection in enumerate(self.connections):
            assert connection.poll(max(0.0, deadline - time.monotonic())), f"rank {rank} hangs in {function.__name__}"
        return [connection.recv() for connection in self.connections]


@contextmanager
def processes(size: int, folder: Path) -> Iterator[Group]:
    """A group of so many; it meets by a file in `folder`."""
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(size)]
    made = [
        context.Process(target=_serve, args=(rank, size, str(folder / "store"), theirs), daemon=True)
        for rank, (_, theirs) in enumerate(pipes)
    ]
    for process, (_, theirs) in zip(made, pipes, strict=True):
        process.start()
        theirs.close()
    try:
        yield Group([ours for ours, _ in pipes])
    finally:
        for ours, _ in pipes:
            ours.close()
        for process in made:
            process.join(_END_S)
            process.kill()


def _serve(rank: int, size: int, store: str, connection: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=_DEADLINE_S)
    )
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = function(*arguments)
        except Exception as error:  # noqa: BLE001 - whoever asked gets it
            answer = error
        connection.send(answer)
