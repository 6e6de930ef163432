"""Reading a run's rollout log again: its groups, in the order of its steps, and their pictures."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmrl_ray.errors import RunError
from mmrl_ray.run_records.run_dir import RunDir

FOLDER = "rollouts"
_KEY = ("step", "index", "attempt", "completion")


def logged_groups(run: RunDir, columns: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
    """The rows of each group of which a completion has a reward; the greedy caption is not among them.

    `reward` is None in the row of a completion that has none.

    Args:
        run: a run with a rollout log.
        columns: of `ROLLOUT_SCHEMA`, beside those that name a row's place.

    Raises:
        RunError: the run has no rollout log, or it cannot be read.
    """
    names = sorted(name for name in run.list(FOLDER) if name.endswith(".parquet"))
    if not names:
        raise RunError(f"{run.location} has no rollout log: no step was finished yet")
    wanted = list(dict.fromkeys((*_KEY, "reward", *columns)))
    for name in names:
        try:
            table = pq.read_table(io.BytesIO(run.read_bytes(f"{FOLDER}/{name}")), columns=wanted)
        except pa.ArrowException as error:
            reason = " ".join(str(error).split())
            raise RunError(f"{run.full_path(f'{FOLDER}/{name}')} cannot be read: {reason}") from error
        groups: dict[tuple[int, int, int], list[dict[str, Any]]] = defaultdict(list)
        for row in table.to_pylist():
            if row["completion"] >= 0:
                groups[row["step"], row["index"], row["attempt"]].append(row)
        for _, rows in sorted(groups.items()):
            if any(row["reward"] is not None for row in rows):
                yield sorted(rows, key=lambda row: row["completion"])


class LoggedPictures:
    """Pictures of a run by the hash that the log gives a sample's; each file is read once."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._names = {name.split(".", 1)[0]: name for name in run.list("images")}
        self._read: dict[str, tuple[bytes, ...]] = {}

    def __getitem__(self, digest: str) -> tuple[bytes, ...]:
        """The sample's pictures.

        Raises:
            RunError: they are not there.
        """
        if digest not in self._read:
            name = self._names.get(digest)
            if name is None:
                raise RunError(f"{self._run.location}: picture {digest} is missing")
            files = self._run.read_json(f"images/{name}") if name.endswith(".json") else [name]
            self._read[digest] = tuple(self._run.read_bytes(f"images/{file}") for file in files)
        return self._read[digest]
