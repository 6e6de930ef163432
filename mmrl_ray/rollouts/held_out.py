"""Held-out captions beside the learning: when they are due, who waits for what they show, and when it ends the run.

    publish(v) ── due? ──▶ asked of the pool behind all training, with the weights of v
    the pool ────────────▶ all there ──▶ the driver scores them ──▶ judge(line) ──▶ eval/steps.jsonl
    next_plan(s) ────────▶ waits for the judgement on v where s is the next evaluation's, or where it may end the run

So an evaluation has `eval.every` steps of the learner's time, and yet nothing hangs on how long it takes: which steps
are taken, and what is the best checkpoint at which of them, is the same however slow the pool is, and after a resume.
Where learners and workers take turns on a GPU, the plan waits at once.

Looks at the policy's sight (`learner.blind_check`) go the same way, by steps of their own, into `eval/blind.jsonl`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from mmrl_ray.config import Config
from mmrl_ray.data.samples import Sample
from mmrl_ray.experience.carriers import SamplingParams
from mmrl_ray.rollouts.steps import Evaluation, StepBuffer
from mmrl_ray.rollouts.types import Generated
from mmrl_ray.run_records.run_dir import RunDir
from mmrl_ray.run_records.step_log import EVALUATIONS, LOOKS

Purpose = Literal["eval", "blind"]
"""What held-out captions are for: to find the best checkpoint, or to see whether the policy sees."""


class Watch(ABC):
    """Evaluations of a run that learns, by their steps. Its owner holds a lock around it."""

    file: ClassVar[str]
    """Of the run folder, with a line for each."""

    def __init__(self, cfg: Config, run: RunDir, buffer: StepBuffer) -> None:
        """Nothing is due before `watch`."""
        self._run, self._buffer = run, buffer
        self._steps = cfg.learner.steps
        self._at_once = cfg.resources.takes_turns
        self._samples: Sequence[Sample] = ()
        self._others: Sequence[Sample] = ()
        self._sampling = SamplingParams(greedy=True)
        self._open: dict[int, Evaluation] = {}
        self._lines: list[dict[str, Any]] = []

    @property
    @abstractmethod
    def every(self) -> int:
        """Steps from one to the next; 0: none."""

    @abstractmethod
    def may_end(self, step: int, place: int) -> bool:
        """Whether what that step shows may end the run, if so many others are judged before it."""

    def watch(self, samples: Sequence[Sample], sampling: SamplingParams, others: Sequence[Sample] = ()) -> None:
        """What to caption, and how; with `others`, beside whose pictures, too."""
        self._samples, self._sampling, self._others = samples, sampling, others

    def begin(self, step: int) -> None:
        """A (re)start after `step` finished steps: later ones will be judged anew."""
        self._run.truncate_lines(self.file, lambda line: line["step"] <= step)
        self._lines = self._run.read_lines(self.file)
        for later in [each for each in self._open if each > step]:
            self._close(later)

    # -- what is due -----------------------------------------------------------------------------------------------

    def is_due(self, step: int) -> bool:
        """Whether that version is to be evaluated now. The last one is the driver's, after all learning."""
        wanted = bool(self._samples and self.every) and step % self.every == 0 and 0 < step < self._steps
        return wanted and step > self._judged and step not in self._open

    def open(self, step: int) -> Evaluation:
        """Expects captions by that version."""
        asked = self._samples, self._sampling, 1, step
        self._open[step] = self._buffer.open_evaluation(*asked, others=self._others)
        return self._open[step]

    # -- who waits -------------------------------------------------------------------------------------------------

    def awaited(self, step: int) -> int | None:
        """The evaluation that has to be judged before `step` is planned."""
        for place, each in enumerate(sorted(self._open)):
            if self._at_once or self.may_end(each, place) or step >= each + self.every:
                return each
        return None

    def ended(self) -> str | None:
        """Why no further step is taken, if none is."""
        return None

    # -- what came of them -----------------------------------------------------------------------------------------

    def complete(self) -> tuple[int, Generated] | None:
        """The first whose captions are all there, to be judged; evaluations are judged in order."""
        step = min(self._open, default=None)
        if step is None or not self._open[step].complete:
            return None
        return step, self._open[step].answer()

    def judge(self, line: Mapping[str, Any], finished: int) -> bool:
        """Writes down what an evaluation has shown; False of one that does not count any more.

        `finished` steps are done: one of those that was not asked for here is the one before the first or after the
        last.
        """
        step = int(line["step"])
        first, last = step == 0 and not self._lines, step == finished and step > self._judged
        if step not in self._open and not first and not last:
            return False
        self._run.append_line(self.file, line)
        self._lines.append(dict(line))
        if step in self._open:
            self._close(step)
        return True

    def status(self) -> dict[str, Any]:
        """JSON-able."""
        last = self._lines[-1] if self._lines else {}
        return {
            "open": sorted(self._open),
            "complete": sorted(step for step, each in self._open.items() if each.complete),
            "step": last.get("step"),
        }

    @property
    def _judged(self) -> int:
        """The last step that was."""
        return int(self._lines[-1]["step"]) if self._lines else 0

    def _close(self, step: int) -> None:
        self._buffer.close_evaluation(self._open.pop(step).number)


class HeldOutWatch(Watch):
    """Evaluations that find the best checkpoint."""

    file = EVALUATIONS

    def __init__(self, cfg: Config, run: RunDir, buffer: StepBuffer) -> None:
        super().__init__(cfg, run, buffer)
        self._cfg = cfg.eval

    @property
    def every(self) -> int:
        """`eval.every`."""
        return self._cfg.every or 0

    def may_end(self, step: int, place: int) -> bool:
        """By `eval.patience`."""
        return self._cfg.ends(step, self._since_best + 1 + place)

    def ended(self) -> str | None:
        """`eval.patience` is at its end."""
        if not self._lines or not self._cfg.ends(self._judged, self._since_best):
            return None
        best = self._lines[-1]["best"]
        return (
            f"{self._cfg.metric} of held-out captions has not risen in {self._since_best} evaluations: the best "
            f"checkpoint is that of step {best}"
        )

    def status(self) -> dict[str, Any]:
        """JSON-able."""
        last = self._lines[-1] if self._lines else {}
        measure = {self._cfg.metric: last.get(f"eval/{self._cfg.metric}")}
        return {**super().status(), "best": last.get("best"), **measure}

    @property
    def _since_best(self) -> int:
        return int(self._lines[-1].get("since_best", 0)) if self._lines else 0


class BlindWatch(Watch):
    """Looks at the policy's sight. What ends a run that is blind is the error of whoever judges them."""

    file = LOOKS

    def __init__(self, cfg: Config, run: RunDir, buffer: StepBuffer) -> None:
        super().__init__(cfg, run, buffer)
        self._cfg, self._every = cfg.learner.blind_check, cfg.looks_every

    @property
    def every(self) -> int:
        """`learner.blind_check.every`."""
        return self._every

    def may_end(self, step: int, place: int) -> bool:
        """As the last that is missing of `blind_check.looks`."""
        running = int(self._lines[-1]["running"]) if self._lines else 0
        return self._cfg.on_blind == "stop" and running + 1 + place >= self._cfg.looks

    def status(self) -> dict[str, Any]:
        """JSON-able."""
        last = self._lines[-1] if self._lines else {}
        return {**super().status(), "blind": last.get("blind"), "gap_logprob": last.get("blind/gap_logprob")}
