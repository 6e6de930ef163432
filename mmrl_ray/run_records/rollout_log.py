"""The rollout log: `rollouts/step-%06d.parquet`, one row a completion, and each image once under `images/`.

Rows are made by the workers (`group_rows`) and reach the recorder as an Arrow stream an assignment, which costs next to
nothing to read; what the plan decided is filled in here. A step's file is written whole, from the groups that its step
resolved, so that a step which is done again after a resume replaces its file.

It is read again by its groups, in the order of the run's steps, with their pictures.
"""

from __future__ import annotations

import io
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmrl_ray.data.images import image_extension, image_hash
from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import MMRLError, RolloutError, RunError, one_line
from mmrl_ray.experience.carriers import GroupKey, PlannedGroup
from mmrl_ray.experience.schema import ROLLOUT_SCHEMA, decode_records
from mmrl_ray.run_records.run_dir import RunDir

QUEUE_STEPS = 8
"""Steps that may wait to be written; beyond, whoever finishes a step waits for the disk."""
IMAGE_WRITERS = 8
"""Images written at a time: each waits for the disk, or for an object store, and costs no work meanwhile."""
_QUEUE_TIMEOUT_S = 300.0
FOLDER = "rollouts"
_KEY = ("step", "index", "attempt", "completion")


def rollouts_name(step: int) -> str:
    """The step's file in the run folder."""
    return f"rollouts/step-{step:06d}.parquet"


@dataclass(frozen=True, slots=True)
class StepRecord:
    """Everything that is written about one step."""

    step: int
    keys: frozenset[GroupKey]
    """The groups that resolved the step's places, masked ones included; rows of any other are left out."""
    tables: Sequence[bytes]
    """Rows as `encode_records` makes them; several groups each."""
    planned: Mapping[GroupKey, PlannedGroup]
    samples: Sequence[Sample]


LEFT_OUT = "too few completions of its group have a reward"
"""Of a completion that has one, in a group that took no part in the step."""


def step_table(keys: frozenset[GroupKey], planned: Mapping[GroupKey, PlannedGroup], rows: pa.Table) -> pa.Table:
    """The rows of a step in order of place and completion, with what the step made of them filled in."""
    wanted = {_place(key) for key in keys}
    rows = rows.filter(pa.array([place in wanted for place in _places(rows)], pa.bool_()))
    rows = rows.sort_by([("index", "ascending"), ("completion", "ascending")])
    by_place = {_place(key): group for key, group in planned.items()}
    groups = [by_place.get(place) for place in _places(rows)]
    staleness = [None if group is None else group.staleness for group in groups]
    places = list(zip(groups, rows["completion"].to_pylist(), strict=True))
    advantages = [None if group is None or place < 0 else group.advantages[place] for group, place in places]
    learnt = [None if group is None or place < 0 else group.rewards[place] for group, place in places]
    masked = [
        why if why is not None or group is not None else LEFT_OUT
        for group, why in zip(groups, rows["masked"].to_pylist(), strict=True)
    ]
    columns = {
        "masked": masked,
        "staleness": staleness,
        "advantage": advantages,
        "learning_reward": learnt,
        "reward_normalization": [None if group is None else group.normalization for group in groups],
    }
    for name, values in columns.items():
        field = ROLLOUT_SCHEMA.field(name)
        rows = rows.set_column(ROLLOUT_SCHEMA.get_field_index(name), field, pa.array(values, field.type))
    return rows


class Recorder:
    """Writes steps in the background, in order. An error shows at the next call of any method."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._queue: queue.Queue[StepRecord | None] = queue.Queue(QUEUE_STEPS)
        self._known_images: set[str] = set()
        self._error: Exception | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="recorder", daemon=True)
        self._thread.start()

    def record(self, record: StepRecord) -> None:
        """Hands a step over; waits while too many are ahead of it.

        Raises:
            RolloutError: the log cannot be written.
        """
        self._check()
        try:
            self._queue.put(record, timeout=_QUEUE_TIMEOUT_S)
        except queue.Full:
            raise RolloutError(
                f"the rollout log of {self._run.location} did not move for {_QUEUE_TIMEOUT_S:g} s"
            ) from None

    def flush(self, timeout_s: float = _QUEUE_TIMEOUT_S) -> None:
        """Returns when every step handed over is in the run folder.

        Raises:
            RolloutError: that took longer than `timeout_s`, or the log cannot be written.
        """
        deadline = time.monotonic() + timeout_s
        with self._queue.all_tasks_done:
            while self._queue.unfinished_tasks and self._error is None:
                if not self._queue.all_tasks_done.wait(max(0.0, deadline - time.monotonic())):
                    raise RolloutError(
                        f"the rollout log of {self._run.location} was not written within {timeout_s:g} s"
                    )
        self._check()

    def close(self, timeout_s: float = _QUEUE_TIMEOUT_S) -> None:
        """`flush`, then ends the thread; nothing more may be recorded."""
        try:
            self.flush(timeout_s)
        finally:
            if not self._closed:
                self._closed = True
                self._queue.put(None, timeout=timeout_s)
                self._thread.join(timeout_s)

    def _check(self) -> None:
        if isinstance(self._error, MMRLError):
            raise self._error
        if self._error is not None:
            raise RolloutError(f"the rollout log cannot be written: {self._error}") from self._error

    def _work(self) -> None:
        while (record := self._queue.get()) is not None:
            try:
                if self._error is None:
                    self._write(record)
            except Exception as error:  # noqa: BLE001 - the boundary of the thread; raised at the next call
                self._error = error
            finally:
                self._queue.task_done()
        self._queue.task_done()

    def _write(self, record: StepRecord) -> None:
        new = {image_hash(sample.images): sample.images for sample in record.samples}
        new = {digest: images for digest, images in new.items() if digest not in self._known_images}
        with ThreadPoolExecutor(IMAGE_WRITERS) as pool:
            list(pool.map(self._store_images, new, new.values()))
        self._known_images.update(new)
        tables = [decode_records(table) for table in record.tables]
        rows = pa.concat_tables(tables) if tables else ROLLOUT_SCHEMA.empty_table()
        buffer = io.BytesIO()
        pq.write_table(step_table(record.keys, record.planned, rows), buffer, compression="zstd")
        self._run.write_bytes(rollouts_name(record.step), buffer.getvalue())

    def _store_images(self, common: str, images: Sequence[bytes]) -> None:
        """`images/<sha256>.<extension>`; those of a sample with several also listed under their common hash."""
        names = [f"{image_hash([image])}.{image_extension(image)}" for image in images]
        for name, image in zip(names, images, strict=True):
            if not self._run.exists(f"images/{name}"):
                self._run.write_bytes(f"images/{name}", image)
        if len(names) > 1 and not self._run.exists(f"images/{common}.json"):
            self._run.write_json(f"images/{common}.json", names)


def _place(key: GroupKey) -> tuple[int, int, int]:
    return key.step, key.index, key.attempt


def _places(rows: pa.Table) -> list[tuple[int, int, int]]:
    """Of each row's group; plain, since a `GroupKey` a row is slow to make and to look up."""
    return list(zip(*(rows[name].to_pylist() for name in ("step", "index", "attempt")), strict=True))


def logged_groups(run: RunDir, columns: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
    """The rows of each group of which a completion has a reward; the greedy caption is not among them.

    `reward` is None in the row of a completion that has none.

    Args:
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
            raise RunError(f"{run.full_path(f'{FOLDER}/{name}')} cannot be read: {one_line(error)}") from error
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
        """The sample's pictures; a RunError where they are not there."""
        if digest not in self._read:
            name = self._names.get(digest)
            if name is None:
                raise RunError(f"{self._run.location}: picture {digest} is missing")
            files = self._run.read_json(f"images/{name}") if name.endswith(".json") else [name]
            self._read[digest] = tuple(self._run.read_bytes(f"images/{file}") for file in files)
        return self._read[digest]
