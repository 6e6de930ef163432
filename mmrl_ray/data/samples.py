"""Reading samples: in order for evaluation, or endlessly in a seeded, resumable order for training; broken ones apart.

The order of an epoch: row groups of all shards shuffled, cut into windows that fit in memory, the rows of each window
shuffled. It follows from the seed, the epoch and the data set alone (hashes rather than a library's generator, whose
stream may change from version to version), so a cursor is three numbers and the list of what was left out.

Broken samples are counted, told apart by their place, and too many of them are an error.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from mmrl_ray.data.images import decode_image
from mmrl_ray.data.row import Sample, references_from_cell
from mmrl_ray.data.shards import ParquetDataset, RowGroup
from mmrl_ray.data.writing import ShardWriter, write_parquet
from mmrl_ray.errors import DataError, QuarantineError

__all__ = [
    "Quarantine",
    "QuarantineRecord",
    "Sample",
    "SampleStream",
    "ShardWriter",
    "dataset_fingerprint",
    "iter_references",
    "iter_samples",
    "read_split",
    "write_parquet",
]

_SHOWN = 3
WINDOW_GROUPS = 4
"""Row groups whose rows are shuffled together, and held in memory."""
WINDOW_BYTES = 256 * 1024 * 1024
"""A window takes no further row group beyond this, so that large ones are held one at a time."""
_STATE_VERSION = 1


@dataclass(frozen=True, slots=True)
class QuarantineRecord:
    """One sample that is left out, and why."""

    sample_id: str
    reason: str
    where: str = ""
    """Shard and row (`Sample.place`), or file and line; empty in runs from before workers' finds had their places."""

    def as_dict(self) -> dict[str, str]:
        """JSON-able, for `quarantine.jsonl` and checkpoints."""
        return asdict(self)


def some(names: Sequence[str], shown: int = 5) -> str:
    """The first few of many, for a message: `a, b, c and 4 more`."""
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more:,} more" if more > 0 else "")


def told(records: Sequence[QuarantineRecord]) -> str:
    """What was left out, for people: how many, some ids, the first reasons."""
    return f"{len(records):,} samples left out ({some([r.sample_id for r in records])}): {reasons_of(records)}"


def reasons_of(records: Sequence[QuarantineRecord]) -> str:
    """The first few places and reasons in words; nothing where there are none."""
    return "; ".join(f"{r.where or r.sample_id}: {r.reason}" for r in records[:_SHOWN])


class Quarantine:
    """What was left out so far, within a budget. A row that comes again counts once; rows may have the same id."""

    def __init__(
        self, budget: int, on_record: Callable[[QuarantineRecord], None] | None = None, *, source: str = ""
    ) -> None:
        """`budget` samples may be broken; `on_record` hears of each new one before the budget is checked.

        `source` is where the samples come from, for the error.
        """
        self.budget = budget
        self._source = source
        self._on_record = on_record
        self._records: dict[str, QuarantineRecord] = {}

    def __len__(self) -> int:
        return len(self._records)

    @property
    def records(self) -> tuple[QuarantineRecord, ...]:
        """In the order in which they were found."""
        return tuple(self._records.values())

    def holds(self, sample_id: str, where: str) -> bool:
        """Whether this row is left out already; an id counts only where it was left out without a place."""
        return where in self._records or sample_id in self._records

    @property
    def reasons(self) -> str:
        """The first few records in words; nothing where there are none."""
        return reasons_of(self.records)

    def add(self, sample_id: str, reason: str, where: str = "") -> None:
        """Leaves a sample out.

        Raises:
            QuarantineError: more than the budget; the message shows the first reasons.
        """
        # By place rather than by id where there is one: a data set may give two rows the same id.
        key = where or sample_id
        if key in self._records:
            return
        record = QuarantineRecord(sample_id, reason, where)
        self._records[key] = record
        if self._on_record is not None:
            self._on_record(record)
        if len(self._records) > self.budget:
            source = f" of {self._source}" if self._source else ""
            raise QuarantineError(
                f"{len(self._records)} broken samples, but at most {self.budget} are tolerated (max_quarantined): "
                f"mend them or raise it. First{source}: {self.reasons}"
            )

    def state(self) -> list[dict[str, str]]:
        """JSON-able; `restore` takes it back."""
        return [record.as_dict() for record in self.records]

    def restore(self, state: Iterable[Mapping[str, Any]]) -> None:
        """Replaces the records, without telling `on_record` again."""
        records = [QuarantineRecord(**entry) for entry in state]
        self._records = {record.where or record.sample_id: record for record in records}


class SampleStream:
    """Endless samples in a seeded order that `state` and `restore` continue exactly.

    Each sample's images are decoded once when it is taken, so that a broken one is found here, by the one reader of
    the data set, and not by a worker whose work would be lost: 0.2 ms for a 64×64 PNG, about 5 ms for a photograph of
    640×480, next to a rollout of its caption that takes a hundred times as long.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        prompt: str,
        seed: int,
        max_quarantined: int,
        on_quarantine: Callable[[QuarantineRecord], None] | None = None,
    ) -> None:
        """Opens a data set; `prompt` is for rows that bring none.

        Raises:
            DataError: the data set cannot be read (see `ParquetDataset`).
        """
        self.dataset = ParquetDataset(path, cached_groups=WINDOW_GROUPS)
        self.quarantine = Quarantine(max_quarantined, on_quarantine, source=str(path))
        """Shared on purpose: whoever finds a sample broken later adds it here, and it does not come again."""
        self._prompt = prompt
        self._seed = seed
        self._epoch = 0
        self._position = 0
        # Decoding is most of what a sample costs here, and its bytes are the same in every epoch.
        self._decoded: set[tuple[int, int]] = set()
        self._order = self._shuffled_rows()

    @property
    def epoch(self) -> int:
        """0-based; counts whole passes over the rows."""
        return self._epoch

    @property
    def rows(self) -> int:
        """Rows in the data set, broken ones included."""
        return self.dataset.rows

    def take(self, count: int) -> list[Sample]:
        """The next `count` samples; broken ones are quarantined and passed over.

        Raises:
            QuarantineError: more broken samples than the budget.
            DataError: a shard cannot be read, or a whole pass found no good sample.
        """
        return [self._next() for _ in range(count)]

    def state(self) -> dict[str, Any]:
        """JSON-able: the place in the stream and what was quarantined so far."""
        return {
            "version": _STATE_VERSION,
            "dataset": self.dataset.fingerprint,
            "seed": self._seed,
            "epoch": self._epoch,
            "position": self._position,
            "quarantine": self.quarantine.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues where `state` was taken, in this or in another process.

        Raises:
            DataError: the state is of another data set, seed or version.
        """
        mine = {"version": _STATE_VERSION, "dataset": self.dataset.fingerprint, "seed": self._seed}
        for key, value in mine.items():
            if state.get(key) != value:
                raise DataError(
                    f"cannot continue in {self.dataset.location}: the saved place is for {key} {state.get(key)!r}, "
                    f"this is {value!r}; use the data and seed of the run"
                )
        epoch, position = state.get("epoch"), state.get("position")
        if not (isinstance(epoch, int) and isinstance(position, int) and 0 <= position <= self.rows and epoch >= 0):
            raise DataError(f"cannot continue in {self.dataset.location}: no such place {epoch!r}, {position!r}")
        self._epoch, self._position = epoch, position
        self._order = self._shuffled_rows(skip=position)
        self.quarantine.restore(state["quarantine"])

    def _next(self) -> Sample:
        # Any 2 * rows places in a row hold a whole epoch.
        for _ in range(2 * self.rows):
            place = next(self._order, None)
            if place is None:
                self._epoch, self._position = self._epoch + 1, 0
                self._order = self._shuffled_rows()
                place = next(self._order)
            # Before the checks: a place is passed whatever becomes of its row.
            self._position += 1
            sample = _checked_sample(self.dataset, *place, self._prompt, self.quarantine, self._decoded)
            if sample is not None:
                return sample
        raise DataError(f"every row of {self.dataset.location} is quarantined: {self.quarantine.reasons}")

    def _shuffled_rows(self, skip: int = 0) -> Iterator[tuple[RowGroup, int]]:
        """(row group, offset in it) of each row of this epoch, without the first `skip`."""
        groups = self.dataset.groups
        order = [groups[i] for i in shuffled(len(groups), self._seed, self._epoch, "groups")]
        for number, window in enumerate(_windows(order)):
            rows = [(group, offset) for group in window for offset in range(group.rows)]
            if skip >= len(rows):
                skip -= len(rows)
                continue
            self.dataset.forget()
            for i in shuffled(len(rows), self._seed, self._epoch, number)[skip:]:
                yield rows[i]
            skip = 0


def iter_samples(path: str | Path, *, prompt: str, quarantine: Quarantine | None = None) -> Iterator[Sample]:
    """A data set's samples in order, images decoded once as a check.

    Raises:
        DataError: as `ParquetDataset`; without a `quarantine` also for the first broken row, which it names.
        QuarantineError: more broken rows than the quarantine's budget.
    """
    dataset = ParquetDataset(path)
    for group in dataset.groups:
        for offset in range(group.rows):
            sample = _checked_sample(dataset, group, offset, prompt, quarantine, set())
            if sample is not None:
                yield sample


def read_split(
    path: str | Path, *, prompt: str, limit: int | None = None, quarantine: Quarantine | None = None
) -> list[Sample]:
    """The first `limit` good samples in order (all by default), for evaluation; a DataError where no row is good.

    Raises as `iter_samples`, too.
    """
    samples = list(islice(iter_samples(path, prompt=prompt, quarantine=quarantine), limit))
    if not samples:
        reasons = "" if quarantine is None else quarantine.reasons
        raise DataError(f"no row of {path} can be used: {reasons}")
    return samples


def iter_references(path: str | Path) -> Iterator[tuple[str, ...]]:
    """Each row's references, in order; no image is read.

    Raises:
        DataError: as `ParquetDataset`, or there is no column of references.
    """
    dataset = ParquetDataset(path)
    column = dataset.columns.references
    if column is None:
        raise DataError(f"{path} has no references: none of the columns references, captions, caption, text is there")
    return (references_from_cell(cell) for cell in dataset.iter_column(column))


def dataset_fingerprint(path: str | Path) -> str:
    """Hex SHA-256 that changes with the data set's content; see `ParquetDataset.fingerprint` for what it covers."""
    return ParquetDataset(path).fingerprint


def shuffled(count: int, *key: object) -> list[int]:
    """A permutation of `range(count)` that depends on nothing but `key`, on any platform and version."""
    prefix = "/".join(str(part) for part in key)
    return sorted(range(count), key=lambda i: hashlib.blake2b(f"{prefix}/{i}".encode(), digest_size=8).digest())


def _windows(groups: Sequence[RowGroup]) -> Iterator[list[RowGroup]]:
    window: list[RowGroup] = []
    for group in groups:
        held = sum(each.nbytes for each in window)
        if window and (len(window) == WINDOW_GROUPS or held + group.nbytes > WINDOW_BYTES):
            yield window
            window = []
        window.append(group)
    if window:
        yield window


def _checked_sample(
    dataset: ParquetDataset,
    group: RowGroup,
    offset: int,
    prompt: str,
    quarantine: Quarantine | None,
    decoded: set[tuple[int, int]],
) -> Sample | None:
    """A sample whose images decode, or None when it went to quarantine now or before.

    `decoded` are rows, by shard and number, whose images did so before: they are not decoded again. It adds to them.
    """
    where = dataset.where(group, offset)
    sample_id = dataset.sample_id(None, group, offset)
    # Outside the try: a row group that cannot be read is no broken sample but a broken data set.
    dataset.load(group)
    try:
        row = dataset.row(group, offset)
        sample_id = dataset.sample_id(row, group, offset)
        if quarantine is not None and quarantine.holds(sample_id, where):
            return None
        sample = dataset.sample(row, group, offset, prompt)
        if (place := (group.shard, group.first_row + offset)) not in decoded:
            for image in sample.images:
                decode_image(image)
            decoded.add(place)
    except DataError as error:
        if quarantine is None:
            raise type(error)(f"{dataset.location}, {where} ({sample_id}): {error}") from error
        quarantine.add(sample_id, str(error), where)
        return None
    return sample
