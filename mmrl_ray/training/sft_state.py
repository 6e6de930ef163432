"""The checkpoint of a supervised training that goes on: one file, with what it is made from in it."""

from __future__ import annotations

import json
import logging
import os
import pickle
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from mmrl_ray.config.load import changed_keys
from mmrl_ray.data import atomic
from mmrl_ray.errors import RunError

logger = logging.getLogger(__name__)

CHECKPOINT_S = 60.0
"""Between two checkpoints, at least."""
_SAVING_SHARE = 20.0
"""And so many times as long as one takes to write."""
_FORMAT = 2


class Checkpoint:
    """Where one training is kept, seldom enough that it takes little of the time."""

    def __init__(self, file: Path, made_from: Mapping[str, Any] | None = None) -> None:
        """`made_from`: everything that the result depends on, as JSON."""
        self.file = file
        self._made_from = dict(made_from or {})
        self._next = time.monotonic() + CHECKPOINT_S

    def is_due(self, asked: bool) -> bool:
        """Whether one is to be written now, where `asked` says that there may be no later one."""
        return asked or time.monotonic() >= self._next

    def save(self, state: Mapping[str, Any]) -> None:
        """Puts the whole file in place, atomically.

        Raises:
            RunError: it cannot be written.
        """
        began = time.monotonic()
        try:
            with atomic.scratch_folder(self.file.parent) as folder:
                scratch = folder / self.file.name
                with scratch.open("wb") as stream:
                    torch.save({"format": _FORMAT, "made_from": self._made_from, **state}, stream)
                atomic.sync(scratch)
                os.replace(scratch, self.file)
        except (OSError, RuntimeError) as error:  # torch writes in C++
            raise RunError(f"the warm start's checkpoint {self.file} cannot be written: {error}") from error
        now = time.monotonic()
        self._next = now + max(CHECKPOINT_S, _SAVING_SHARE * (now - began))

    def load(self) -> dict[str, Any] | None:
        """What `save` was given; None where there is none, or one of an earlier version, which is said.

        Raises:
            RunError: the file is broken.
        """
        if not self.file.is_file():
            return None
        found = _read(self.file)
        if found.get("format") != _FORMAT:
            logger.warning("%s was written by an earlier version of mmrl_ray: the warm start begins anew", self.file)
            return None
        return found

    def others(self, pattern: str) -> Iterator[tuple[Path, list[str]]]:
        """Files beside this one of trainings of the same model on the same data, and the settings that differ there."""
        for file in sorted(self.file.parent.glob(pattern)):
            if file == self.file:
                continue
            try:
                theirs = _read(file).get("made_from")
            except RunError:
                continue
            mine = self._made_from
            if theirs and all(theirs.get(name) == mine.get(name) for name in ("model", "data")):
                yield file, changed_keys(json.dumps(theirs), json.dumps(mine))


def _read(file: Path) -> dict[str, Any]:
    """Its tensors are read when they are used."""
    try:
        found: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        return found
    except (OSError, RuntimeError, ValueError, pickle.UnpicklingError, EOFError) as error:
        raise RunError(f"the warm start's checkpoint {file} is broken: {error}; delete it to begin anew") from error
