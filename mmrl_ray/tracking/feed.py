"""What one tracker is told, out of the run's folder, in order and once: that folder is the queue.

    metrics.jsonl ─────────── metrics, a step          ┐
    eval/steps.jsonl, eval/ ─ metrics and a table      ├─▶ items ─▶ tracker      tracking/NAME.json: its id, and how
    eval/blind.jsonl ──────── metrics                  │                         far it has come
    samples/ ──────────────── a table and histograms   ┘
    summary.json, adapter/, report.html, when the run has ended

So a tracker that was out of reach catches up, and a resume goes on where the run before it was.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mmrl_ray.config import Config
from mmrl_ray.run_records.run_dir import ADAPTER_FOLDER, LAST_ADAPTER_FOLDER, RunDir
from mmrl_ray.run_records.samples import load_samples, sample_steps
from mmrl_ray.run_records.step_log import EVALUATIONS, LOOKS, METRICS_FILE
from mmrl_ray.tracking.process import Call
from mmrl_ray.tracking.tables import evaluation_table, samples_table
from mmrl_ray.tracking.tail import StepTail

FOLDER = "tracking"
"""Of the run: what each tracker has, and what it printed where it failed."""
SUMMARY = "summary.json"
REPORT = "report.html"
ARTIFACT_PATIENCE = 10.0
_AHEAD = 1000
"""Items that may wait before the folder is looked at again."""


@dataclass
class Item:
    """Calls that belong together, and what is known once they are made."""

    what: str
    """In words."""
    calls: list[Call]
    step: int | None = None
    """Of a step's figures: the next one is due after them."""
    named: str | None = None
    """Of everything else: what it is kept by, once it is told."""
    rewind: int | None = None
    patience: float = 1.0
    done: int = 0
    """Calls that were made already."""
    tries: int = 0


@dataclass
class Progress:
    """How far a tracker has come; `tracking/NAME.json`."""

    id: str | None = None
    next_step: int = 0
    told: set[str] = field(default_factory=set)
    """Evaluations, samples, artifacts, by name."""

    def to_json(self) -> dict[str, Any]:
        """As it is written."""
        return {"id": self.id, "next_step": self.next_step, "told": sorted(self.told)}


def progress_name(tracker: str, ending: str = ".json") -> str:
    """The file of a tracker in the run folder; a user's class is called `module:Class`."""
    return f"{FOLDER}/{re.sub(r'[^A-Za-z0-9_.-]', '-', tracker)}{ending}"


class Feed:
    """Of one tracker. `fill` looks at the folder, `item` is what comes next, `told` takes note that it was told."""

    def __init__(self, run: RunDir, tracker: str, cfg: Config) -> None:
        """Raises a RunError where the folder cannot be read."""
        self.progress = Progress()
        self._run, self._section, self._file = run, cfg.tracking, progress_name(tracker)
        self._evaluates = cfg.eval.every is not None
        """Whether there is a line of `eval/steps.jsonl` for each evaluation."""
        if run.exists(self._file):
            found = run.read_json(self._file)
            self.progress = Progress(found.get("id"), int(found["next_step"]), set(found["told"]))
        self._tail = StepTail(run, METRICS_FILE)
        self._items: deque[Item] = deque()
        self._due = self.progress.next_step
        """The first step that is neither told nor among the items."""
        self._named = set(self.progress.told)
        """The same of what has a name."""
        self._lines = self._tail.read()
        """Read, and not looked at. Now, before steps may be done again: by then it is known how they were."""
        self._is_first = True

    def opened(self, id: str | None, next_step: int | None) -> None:
        """The tracker's own word for the run, and the first step that it has not, where it can tell."""
        self.progress.id = id or self.progress.id
        if next_step is not None and next_step > self._due:
            self.progress.next_step = self._due = next_step
        self.save()

    def save(self) -> None:
        """Writes down how far the tracker is; raises a RunError where it cannot be written."""
        self._run.write_json(self._file, self.progress.to_json())

    def fill(self, *, rewinds: bool) -> None:
        """Looks what there is to tell; raises a RunError where it cannot be read."""
        if len(self._items) >= _AHEAD:
            return
        written = int(self._lines[-1][0]["step"]) + 1 if self._lines else 0
        if rewinds and self._is_first and written < self._due:  # a run that was killed after it went back
            self._rewind(written)
        self._is_first = False
        lines, self._lines = [*self._lines, *self._tail.read()], []
        for line, is_other in lines:
            step = int(line["step"])
            if rewinds and is_other and step < self._due:
                self._rewind(step)
            if step >= self._due:
                self._due = step + 1
                calls: list[Call] = [("metrics", (step, figures_of(line)))]
                self._items.append(Item(f"step {step}", calls, step=step))
        self._items.extend(item for item in self._named_items() if item.named not in self._named)
        self._named.update(item.named for item in self._items if item.named is not None)

    def finish(self) -> None:
        """The run has ended: what it came to, and its artifacts."""
        if self._run.exists(SUMMARY):
            self._items.extend(self._conclusion(self._run.read_json(SUMMARY)))

    @property
    def item(self) -> Item | None:
        """What comes next; None if there is nothing."""
        return self._items[0] if self._items else None

    def told(self) -> None:
        """The item was told, or is left out: the next one comes."""
        self._note(self._items.popleft())

    def _note(self, item: Item) -> None:
        if item.step is not None:
            self.progress.next_step = max(self.progress.next_step, item.step + 1)
        if item.named is not None:
            self.progress.told.add(item.named)
        if item.rewind is not None:
            self.progress.next_step = min(self.progress.next_step, item.rewind)
            self.progress.told -= _later(self.progress.told, item.rewind)

    def _rewind(self, step: int) -> None:
        """Has the tracker take back `step` and later ones, of which what still holds is told again."""
        later = _later(self._named, step)
        self._named -= later
        kept = [item for item in self._items if item.step is None and item.named not in later]
        kept += [item for item in self._items if item.step is not None and item.step < step]
        self._items = deque([*kept, Item(f"steps from {step} on", [("rewind", (step,))], rewind=step)])
        self._due = min(self._due, step)

    # -- all but figures of steps ----------------------------------------------------------------------------------

    def _named_items(self) -> Iterator[Item]:
        run, rows = self._run, self._section.table_rows
        for line in run.read_lines(EVALUATIONS):
            step, name = int(line["step"]), f"eval/step-{line['step']:06d}"
            if name not in self._named:
                figures = {key: value for key, value in figures_of(line).items() if key.startswith("eval/")}
                record = "before" if step == 0 else f"step-{step:06d}"
                calls: list[Call] = [("metrics", (step, figures))]
                yield Item(f"the evaluation of step {step}", calls + self._table(record, step, rows), named=name)
        for line in run.read_lines(LOOKS):
            step, name = int(line["step"]), f"look/step-{line['step']:06d}"
            if name not in self._named:
                gaps = {key: value for key, value in figures_of(line).items() if key.startswith("blind/")}
                yield Item(f"the look of step {step}", [("metrics", (step, gaps))], named=name)
        if "eval/before" not in self._named and not self._evaluates and run.exists("eval/before.parquet"):
            yield Item("the evaluation before learning", self._table("before", 0, rows), named="eval/before")
        for step in sample_steps(run):
            if (name := f"samples/step-{step:06d}") not in self._named:
                found = load_samples(run, step)
                calls = [("table", ("samples", step, samples_table(run, found)))]
                calls += [("histogram", (f"samples/{part}", step, values)) for part, values in found["rewards"].items()]
                yield Item(f"the samples of step {step}", calls, named=name)

    def _table(self, record: str, step: int, rows: int) -> list[Call]:
        table = evaluation_table(self._run, record, rows) if rows else None
        return [] if table is None else [("table", ("eval/captions", step, table))]

    def _conclusion(self, summary: Mapping[str, Any]) -> Iterator[Item]:
        run, last = self._run, self._due
        sides = {name: _values(summary.get("eval", {}).get(name)) for name in ("before", "after")}
        if not self._evaluates:
            for name, step in (("before", 0), ("after", last)):
                known = f"figures/{name}-{step}"
                if sides[name] and known not in self._named:
                    calls: list[Call] = [("metrics", (step, {f"eval/{k}": v for k, v in sides[name].items()}))]
                    if name == "after":
                        calls += self._table("after", step, self._section.table_rows)
                    yield Item(f"the evaluation {name} learning", calls, named=known)
        told = {f"{side}/{key}": value for side, values in sides.items() for key, value in values.items()}
        best = summary.get("checkpoints", {}).get("best", {}).get("step")
        facts = {"status": str(summary.get("status")), "steps": last, **({"best_step": best} if best else {}), **told}
        yield Item("the summary", [("summary", (facts,))])
        if self._section.artifacts and run.is_local:
            kinds = {ADAPTER_FOLDER: "model", LAST_ADAPTER_FOLDER: "model", REPORT: "report"}
            for name, kind in kinds.items():
                if run.exists(name):
                    call: Call = ("artifact", (name.partition(".")[0], kind, run.local_path(name)))
                    yield Item(name, [call], patience=ARTIFACT_PATIENCE)


def figures_of(line: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a line, but for its step."""
    numbers = {k: float(v) for k, v in line.items() if isinstance(v, int | float) and k != "step"}
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


def _values(side: Any) -> dict[str, float]:
    measures = side.get("measures", {}) if isinstance(side, Mapping) else {}
    return figures_of({name: found.get("value") for name, found in measures.items()})


def _later(names: set[str], step: int) -> set[str]:
    """Those of a step that is not before `step`; what stands at `step` itself goes, too, and is told again."""
    return {name for name in names if (found := re.search(r"/step-(\d+)$", name)) and int(found[1]) >= step}
