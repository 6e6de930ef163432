"""Broken samples: counted, told apart by their place, and too many of them an error."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mmrl_ray.errors import QuarantineError

_SHOWN = 3


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
