"""Log lines: every one a JSON object with its run, step and worker, whatever is logged."""

from __future__ import annotations

import io
import json
import logging
import threading
import warnings
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest

from mmrl_ray.telemetry.logs import CONTEXT, JsonFormatter, TextFormatter, logs_json, start_logging

logger = logging.getLogger("mmrl_ray.tests")


@pytest.fixture(autouse=True)
def put_back() -> Iterator[None]:
    root, own = logging.getLogger(), logging.getLogger("mmrl_ray")
    before, level = list(root.handlers), own.level
    yield
    root.handlers[:] = before
    own.setLevel(level)
    CONTEXT.clear()
    logging.captureWarnings(False)


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_says_who_and_where() -> None:
    stream = io.StringIO()
    start_logging("json", run="my-run", role="worker-3", worker="worker-3", stream=stream)
    CONTEXT.put(step=7)
    logger.info("sampled %d groups", 4)
    threading.Thread(target=lambda: logger.warning("from a thread\nof two lines")).start()
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(10)
    CONTEXT.put(step=None)
    logger.info("an evaluation")
    first, second, third = lines(stream)
    assert datetime.fromisoformat(first.pop("time")).tzinfo is not None
    assert isinstance(first.pop("pid"), int)
    assert first.pop("node")
    assert first == {
        "level": "info",
        "logger": "mmrl_ray.tests",
        "message": "sampled 4 groups",
        "run": "my-run",
        "step": 7,
        "role": "worker-3",
        "worker": "worker-3",
        "thread": "MainThread",
    }
    assert (second["message"], second["step"], second["run"]) == ("from a thread\nof two lines", 7, "my-run")
    assert (third["step"], third["run"]) == (None, "my-run")
    assert logs_json()


def test_an_exception_is_in_the_line() -> None:
    stream = io.StringIO()
    start_logging("json", run="r", role="learner-1", rank=1, stream=stream)
    try:
        raise ValueError("bad <value> é")
    except ValueError:
        logger.exception("it failed")
    (line,) = lines(stream)
    assert line["rank"] == 1
    assert line["exception"]["type"] == "builtins.ValueError"
    assert line["exception"]["message"] == "bad <value> é"
    assert 'raise ValueError("bad <value> é")' in line["exception"]["traceback"]


def test_what_others_log_is_json_too() -> None:
    stream = io.StringIO()
    other = logging.StreamHandler(stream)
    ray_logger = logging.getLogger("ray")
    ray_logger.addHandler(other)
    try:
        start_logging("json", run="r", role="driver", stream=stream)
        ray_logger.error("from Ray")
    finally:
        ray_logger.removeHandler(other)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("take care", UserWarning, stacklevel=1)
    logging.getLogger("a.library").info("not shown")
    logging.getLogger("a.library").warning("shown, with %s", object)
    found = lines(stream)
    assert {"from Ray", "shown, with <class 'object'>"} <= {line["message"] for line in found}
    assert any("take care" in line["message"] for line in found)
    assert {line["run"] for line in found} == {"r"}


def test_starting_again_writes_no_line_twice() -> None:
    old, new = io.StringIO(), io.StringIO()
    start_logging("json", run="r", role="driver", worker="w", stream=old)
    start_logging("text", run="s", role="driver", stream=new)
    logger.info("once")
    assert old.getvalue() == ""
    assert new.getvalue().endswith("INFO mmrl_ray.tests [s driver] once\n")
    assert new.getvalue().count("once") == 1
    assert not logs_json()


def test_what_a_record_brings_counts_more() -> None:
    stream = io.StringIO()
    start_logging("json", run="r", role="controller", stream=stream)
    CONTEXT.put(step=3)
    logger.info("about an older step", extra={"step": 1})
    assert lines(stream)[0]["step"] == 1


def test_formatters_take_a_record_without_context() -> None:
    record = logging.LogRecord("x", logging.INFO, "f", 1, "m %s", ("n",), None)
    assert json.loads(JsonFormatter().format(record))["message"] == "m n"
    assert TextFormatter().format(record).endswith("INFO x m n")
