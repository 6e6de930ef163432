"""Reads on in a `.jsonl` file that another process writes, and rewrites when steps are done again."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pyarrow import fs

from mmrl_ray.errors import RunError
from mmrl_ray.run_records.run_dir import RunDir


class StepTail:
    """New lines of `metrics.jsonl`, each once; says which of them was another one before."""

    def __init__(self, run: RunDir, name: str) -> None:
        self._run, self._name = run, name
        self._end = 0
        """Bytes read."""
        self._last = b""
        """The line before that: where it is another one, the file was rewritten."""
        self._seen: tuple[Any, ...] = ()
        self._known: dict[int, bytes] = {}
        """By step, a digest of its line."""

    def read(self) -> list[tuple[dict[str, Any], bool]]:
        """Whole lines since, each with whether steps were taken back from here on: then it stood there otherwise.

        Raises:
            RunError: the file cannot be read.
        """
        path = self._run.full_path(self._name)
        try:
            info = self._run.filesystem.get_file_info([path])[0]
            if info.type == fs.FileType.NotFound or (info.size, info.mtime_ns) == self._seen:
                return []
            with self._run.filesystem.open_input_file(path) as file:
                start = self._end - len(self._last)
                file.seek(min(start, file.size()))
                content: bytes = file.read()
                if content[: len(self._last)] == self._last:
                    content = content[len(self._last) :]
                else:
                    self._end = 0
                    file.seek(0)
                    content = file.read()
        except OSError as error:
            raise RunError(f"{path}: cannot be read ({error})") from error
        self._seen = (info.size, info.mtime_ns)
        whole, newline, _ = content.rpartition(b"\n")
        if not newline:
            return []
        self._end += len(whole) + 1
        self._last = whole.rpartition(b"\n")[2] + newline
        return [line for text in whole.split(b"\n") if (line := self._new(text)) is not None]

    def _new(self, text: bytes) -> tuple[dict[str, Any], bool] | None:
        try:
            line: dict[str, Any] = json.loads(text)
            step = int(line["step"])
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{self._run.full_path(self._name)} has a line that is none ({error})") from None
        digest = hashlib.blake2b(text, digest_size=8).digest()
        if self._known.get(step) == digest:
            return None
        is_other = step in self._known
        if is_other:
            self._known = {known: each for known, each in self._known.items() if known < step}
        self._known[step] = digest
        return line, is_other
