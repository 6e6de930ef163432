"""The process that calls this package: a notebook's or a program's own, which is left as it was found.

Training sets environment variables that Ray's processes inherit, the format and levels of log lines, and what libraries
print. The `mmrl` program ends after a command, and keeps them for its last words; anybody else gets back what was.
"""

from __future__ import annotations

import functools
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

from mmrl_ray.telemetry.logs import CONTEXT

P = ParamSpec("P")
R = TypeVar("R")

_OURS: ContextVar[bool] = ContextVar("process_is_the_programs_own", default=False)
_LEVELS = {
    "mmrl_ray": logging.NOTSET,
    "huggingface_hub": logging.WARNING,
    "peft": logging.NOTSET,
    "ray.widgets.util": logging.NOTSET,
    "torch": logging.NOTSET,
    "transformers": logging.WARNING,
}
"""Loggers whose levels are changed, and what these are where nobody has looked at them yet."""


@contextmanager
def own_process() -> Iterator[None]:
    """Meanwhile the process is the program's own: what is called in it may leave it as it likes."""
    token = _OURS.set(True)
    try:
        yield
    finally:
        _OURS.reset(token)


def leaves_no_trace(function: Callable[P, R]) -> Callable[P, R]:
    """After a call of it, environment, logging, warnings, signal handlers and torch's threads are as before it."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if _OURS.get():
            return function(*args, **kwargs)
        with kept_as_it_was():
            return function(*args, **kwargs)

    return call


@contextmanager
def kept_as_it_was() -> Iterator[None]:
    """Puts back, at its end, what the block has changed of this process."""
    with ExitStack() as stack:  # the last first: Ray reads the environment again when that is what it was
        stack.callback(_forget_rays_settings)
        for keep in (_environment, _logging, warnings.catch_warnings, _signals, _threads):
            stack.enter_context(keep())
        # Ray and tqdm ask a notebook for widgets, which nothing here shows.
        warnings.filterwarnings("ignore", message="IProgress not found")
        logging.getLogger("ray.widgets.util").setLevel(logging.WARNING)
        yield


@contextmanager
def _environment() -> Iterator[None]:
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in {*before, *os.environ}:
            if name not in before:
                os.environ.pop(name, None)
            elif os.environ.get(name) != before[name]:
                os.environ[name] = before[name]


@contextmanager
def _logging() -> Iterator[None]:
    root = logging.getLogger()
    loggers = {name: each for name, each in root.manager.loggerDict.items() if isinstance(each, logging.Logger)}
    levels = {name: each.level for name, each in loggers.items()}
    handlers = {each: (each.formatter, [*each.filters]) for one in (root, *loggers.values()) for each in one.handlers}
    own, level, context = [*root.handlers], root.level, CONTEXT.fields
    is_captured = logging._warnings_showwarning is not None  # type: ignore[attr-defined]  # nothing else tells
    try:
        yield
    finally:
        if not is_captured:
            logging.captureWarnings(False)
        root.handlers[:] = own
        root.setLevel(level)
        CONTEXT.clear()
        CONTEXT.put(**context)
        for name, default in {**_LEVELS, **levels}.items():
            if name in root.manager.loggerDict:
                logging.getLogger(name).setLevel(levels.get(name, default))
        for handler, (formatter, filters) in handlers.items():
            handler.setFormatter(formatter)
            handler.filters[:] = filters


@contextmanager
def _signals() -> Iterator[None]:
    """Only the main thread has them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)


@contextmanager
def _threads() -> Iterator[None]:
    """Of torch, where it is there by then: nobody else loads it for that."""
    before: int | None = sys.modules["torch"].get_num_threads() if "torch" in sys.modules else None
    try:
        yield
    finally:
        torch: Any = sys.modules.get("torch")
        if before is not None and torch.get_num_threads() != before:
            torch.set_num_threads(before)


def _forget_rays_settings() -> None:
    if (cluster := sys.modules.get("mmrl_ray.training.cluster")) is not None:
        cluster.forget_settings()
