"""Log lines of a run's processes: text for people, or one JSON object a line for whatever collects them.

Through the standard `logging` module: a filter puts on each record what the process is at (run, step, and which worker
or rank it is), the formatter writes it out.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

LogFormat = Literal["text", "json"]

_CONTEXT = ("run", "step", "role", "worker", "rank")
_OTHERS = ("ray", "ray.serve", "ray.train", "ray.data", "transformers")
"""Loggers that bring handlers of their own, whose lines are to be of the same format."""


class LogContext(logging.Filter):
    """What a process is at; passes every record on with it."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._fields: Mapping[str, Any] = {}

    def put(self, **fields: Any) -> None:
        """Changes some of the fields; None takes one away."""
        with self._lock:
            self._fields = {k: v for k, v in {**self._fields, **fields}.items() if v is not None}

    @property
    def fields(self) -> dict[str, Any]:
        """What it is at now."""
        return dict(self._fields)

    def clear(self) -> None:
        """Forgets all fields of the context."""
        self._fields = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Lets the record through; a field that it was logged with (`extra=`) stays."""
        fields = self._fields
        for name in _CONTEXT:
            if not hasattr(record, name):
                setattr(record, name, fields.get(name))
        return True


CONTEXT = LogContext()
"""Of this process."""


class JsonFormatter(logging.Formatter):
    """One object a line: time, level, logger, message, run, step, role, worker or rank, where it runs, exception."""

    def __init__(self) -> None:
        super().__init__()
        self._node = socket.gethostname()

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **{name: getattr(record, name, None) for name in ("run", "step", "role")},
        }
        line |= {name: value for name in ("worker", "rank") if (value := getattr(record, name, None)) is not None}
        line |= {"thread": record.threadName, "pid": os.getpid(), "node": self._node}
        if record.exc_info and record.exc_info[1] is not None:
            kind, error, trace = record.exc_info
            line["exception"] = {
                "type": f"{kind.__module__}.{kind.__qualname__}" if kind is not None else "",
                "message": str(error),
                "traceback": "".join(traceback.format_exception(kind, error, trace)),
            }
        return json.dumps(line, ensure_ascii=False, default=str)


class TextFormatter(logging.Formatter):
    """`2026-01-31 12:00:00 INFO mmrl_ray.… [my-run worker-3 step 7] message`."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, and below it the traceback where there is one."""
        step = getattr(record, "step", None)
        told = (getattr(record, "run", None), getattr(record, "role", None), None if step is None else f"step {step}")
        place = " ".join(str(each) for each in told if each is not None)
        head = f"{self.formatTime(record, '%Y-%m-%d %H:%M:%S')} {record.levelname} {record.name}"
        text = f"{head}{f' [{place}]' if place else ''} {record.getMessage()}"
        return text if not record.exc_info else f"{text}\n{self.formatException(record.exc_info)}"


class _OwnHandler(logging.StreamHandler[TextIO]):
    """Told apart from anybody else's, so that starting twice writes no line twice."""


def start_logging(
    log_format: LogFormat,
    *,
    run: str | None,
    role: str,
    worker: str | None = None,
    rank: int | None = None,
    level: int = logging.INFO,
    stream: TextIO | None = None,
) -> None:
    """Has this process write its log lines to standard error in that format, from now on.

    Args:
        run: what the process works for; None for one that serves several.
        role: what it is: driver, controller, learner, worker-3, …
        level: of the project's own loggers; others show from WARNING on.
        stream: in place of standard error.
    """
    CONTEXT.clear()
    CONTEXT.put(run=run, role=role, worker=worker, rank=rank)
    handler = _OwnHandler(stream or sys.stderr)
    _dress(handler, log_format)
    root = logging.getLogger()
    for old in [h for h in root.handlers if isinstance(h, _OwnHandler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    logging.getLogger("mmrl_ray").setLevel(level)
    if log_format == "json":
        logging.captureWarnings(True)
        for name in _OTHERS:
            for other in logging.getLogger(name).handlers:
                if isinstance(other, logging.StreamHandler) and not isinstance(other, logging.FileHandler):
                    _dress(other, log_format)


def logs_json() -> bool:
    """Whether this process was told to write JSON."""
    own = [handler for handler in logging.getLogger().handlers if isinstance(handler, _OwnHandler)]
    return any(isinstance(handler.formatter, JsonFormatter) for handler in own)


def _dress(handler: logging.Handler, log_format: LogFormat) -> None:
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    if CONTEXT not in handler.filters:
        handler.addFilter(CONTEXT)
