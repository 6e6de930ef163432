"""What a server asks of a vLLM engine's process (`child.py`): rows that come and go, and their tokens as they are made.

    news: begin rows, abort rows ──▶ the engine's steps, also between two requests ──▶ tokens since the last news

A row is one of vLLM's requests, so that each can be ended by itself. One whose adapter has no place waits here for one;
nobody else waits for it. Everything runs in the process's one thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from mmrl_ray.errors import one_line

if TYPE_CHECKING:
    from mmrl_ray.policy.generation.vllm.child import Engine, Version

_PREFIX = "row-"


@dataclass(slots=True)
class Told:
    """What there is to tell of a row since the last news."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: str | None = None
    prompt: int = 0
    """Tokens of its prompt as vLLM counts them."""
    cached: int = 0
    """Those of them that the prefix cache had; told once."""


@dataclass(slots=True)
class Begun:
    """A group that was asked for, with its prompt as vLLM takes it."""

    handle: int
    version: Version
    rendered: Any
    sampling: Mapping[str, Any]
    seeds: Sequence[int]
    """Of its rows."""


class Streams:
    """The rows of one engine that somebody reads along."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._rows: dict[str, Version] = {}
        """Under way, by vLLM's id."""
        self._waiting: deque[Begun] = deque()
        self._told: dict[str, Told] = {}

    def news(
        self, message: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Ends and begins what was asked for, and tells what there is; samples until there is anything.

        A group that cannot begin is among `failed`, with the reason. `reset` comes from an owner that knows of nothing.
        """
        if message["reset"]:
            self._end([*self._rows])
            self._waiting.clear()
            self._told.clear()
        self._end([_id(handle, row) for handle, row in message["abort"]])
        gone = {handle for handle, _ in message["abort"]}
        self._waiting = deque(each for each in self._waiting if each.handle not in gone)
        failed = []
        for group in message["begin"]:
            try:
                self._waiting.append(self._begun(group, tensors))
            except Exception as error:  # noqa: BLE001 - vLLM's processor, a model's code: this group's affair
                failed.append([group["handle"], f"{type(error).__name__}: {one_line(error)[:500]}"])
        failed += self._seat()
        while not self._told and not failed and self._engine.is_busy:
            self._engine.step()
            failed += self._seat()
        rows, tokens, logprobs = [], [], []
        for name, told in self._told.items():
            handle, row = name.removeprefix(_PREFIX).split(".")
            rows.append([int(handle), int(row), len(told.tokens), told.finish, told.prompt, told.cached])
            tokens += told.tokens
            logprobs += told.logprobs
        self._told = {}
        answer: dict[str, Any] = {"rows": rows, "failed": failed}
        if message["counters"]:
            answer["counters"] = self._engine.counters()
        return answer, {
            "tokens": torch.tensor(tokens, dtype=torch.int64),
            "logprobs": torch.tensor(logprobs, dtype=torch.float32),
        }

    def take(self, output: Any) -> None:
        """Notes what a step of the engine gave, if it is of a row that is still wanted."""
        version = self._rows.get(output.request_id)
        if version is None:
            return
        told = self._told.setdefault(output.request_id, Told())
        (row,) = output.outputs
        told.tokens += row.token_ids
        told.logprobs += [at[token].logprob for token, at in zip(row.token_ids, row.logprobs or (), strict=True)]
        told.prompt, told.cached = len(output.prompt_token_ids), output.num_cached_tokens or 0
        if output.finished:
            told.finish = row.finish_reason
            del self._rows[output.request_id]
            self._engine.left(version)

    def _begun(self, group: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Begun:
        version = self._engine.version(group["version"])
        rendered = self._engine.rendered(group, version, tensors)
        return Begun(group["handle"], version, rendered, group["sampling"], group["seeds"])

    def _seat(self) -> list[list[Any]]:
        """Begins groups whose adapters have a place, or can have one; those that vLLM refuses, each with the reason."""
        failed: list[list[Any]] = []
        waiting, self._waiting = self._waiting, deque()
        for group in waiting:
            names = [_id(group.handle, row) for row in range(len(group.seeds))]
            try:
                if not self._engine.seat(group.version):
                    self._waiting.append(group)
                    continue
                for name, seed in zip(names, group.seeds, strict=True):
                    self._engine.begin(name, group.rendered, {**group.sampling, "seed": seed}, group.version)
                    self._rows[name] = group.version
            except Exception as error:  # noqa: BLE001 - as above
                self._end(names)
                failed.append([group.handle, f"{type(error).__name__}: {one_line(error)[:500]}"])
        return failed

    def _end(self, names: Sequence[str]) -> None:
        found = [name for name in names if name in self._rows]
        self._engine.abort(found)
        for name in found:
            self._told.pop(name, None)
            self._engine.left(self._rows.pop(name))


def _id(handle: int, row: int) -> str:
    return f"{_PREFIX}{handle}.{row}"
