"""Whether the policy of a run looks at its pictures: before, while and after it learns (`learner.blind_check`).

Rollout workers show it held-out samples with their own pictures, others' and grey ones (`analysis/sight.py`), beside
the learning as evaluations go (`rollouts/held_out.py`). Here is judged what came of that, by `evaluation/sight.py`: a
line of `eval/blind.jsonl`, and the alarm.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mmrl_ray.analysis.sight import Arranged, arrange
from mmrl_ray.config import Config
from mmrl_ray.data.samples import Sample
from mmrl_ray.evaluation.sight import BLIND_LOOK, MIN_SAMPLES, NEVER_SAW, STOPPED, Sight, look_line, told, told_blind
from mmrl_ray.rollouts.controller_actor import ControllerClient
from mmrl_ray.rollouts.types import Generated
from mmrl_ray.run_records.run_dir import RunDir
from mmrl_ray.run_records.step_log import LOOKS, note_event
from mmrl_ray.telemetry.terminal import RunProgress
from mmrl_ray.training import offline

_LOOK_S = 0.2


@dataclass(frozen=True)
class SightCheck:
    """The samples that are looked at, and where it is kept."""

    cfg: Config
    run: RunDir
    samples: Sequence[Sample]
    """Held out; none: nothing is looked at."""
    progress: RunProgress

    @cached_property
    def arranged(self) -> Arranged:
        """Which of them are looked at, and beside whose pictures."""
        if not self.cfg.looks_every:
            return Arranged(())
        return arrange(self.samples, self.cfg.learner.blind_check.samples, self.cfg.run.seed)

    @property
    def looks(self) -> bool:
        """Whether there is something to look at."""
        return len(self.arranged.pairs) > 1

    def watch(self, controller: ControllerClient) -> None:
        """Has the controller ask for looks at the steps that are due. Before the learner begins."""
        if self.arranged.told:
            self.progress.note(f"blind_check: {self.arranged.told}")
        if self.looks:
            samples, others = zip(*self.arranged.pairs, strict=True)
            controller.watch_held_out(samples, offline.greedy_sampling(self.cfg, has_learned=True), "blind", others)
            if len(samples) < MIN_SAMPLES:
                self.progress.note(f"blind_check: {len(samples)} samples are too few to tell by: gaps, but no alarm")
        elif self.samples and self.cfg.looks_every:
            self.progress.warn(
                f"blind_check: of {len(self.samples)} held-out samples no two have different pictures and different "
                "references, so whether the policy looks at its pictures is not known: hold out more of them"
            )

    def look_before(self, controller: ControllerClient) -> None:
        """At what the run begins with."""
        if self.looks and not self._lines():
            self._look_now(0, controller)

    def look(self, controller: ControllerClient, *, may_stop: bool = True) -> None:
        """Judges what the pool has looked at since."""
        while (found := controller.evaluated("blind")) is not None:
            self._judge(*found, controller, may_stop=may_stop)

    def finish_looking(self, controller: ControllerClient, step: int) -> None:
        """When all is learned, after `step` steps: what is open yet, and a last look."""
        if not self.looks:
            return
        while controller.status()["looks"]["open"]:  # the pool's deadlines end what is stuck
            self.look(controller, may_stop=False)
            time.sleep(_LOOK_S)
        if all(line["step"] != step for line in self._lines()):
            self._look_now(step, controller, may_stop=False)

    def _look_now(self, step: int, controller: ControllerClient, *, may_stop: bool = True) -> None:
        samples, others = zip(*self.arranged.pairs, strict=True)
        with self.progress.busy("looking whether the policy looks at its pictures"):
            generated = controller.generate(
                samples, offline.greedy_sampling(self.cfg, has_learned=step > 0), others=others
            )
            self._judge(step, generated, controller, may_stop=may_stop)

    def _judge(self, step: int, generated: Generated, controller: ControllerClient, *, may_stop: bool) -> None:
        wanted, lines = self.cfg.learner.blind_check, self._lines()
        sight = Sight(tuple({} if group is None else group.sight for group in generated.groups), self.cfg.run.seed)
        if missing := len(sight.rows) - sight.samples:
            self.progress.note(f"blind_check (step {step}): {missing} of {len(sight.rows)} samples cannot be looked at")
        line = look_line(step, sight, lines, min_gap=wanted.min_gap, keep=wanted.keep)
        ends = may_stop and wanted.on_blind == "stop" and line["running"] >= wanted.looks
        # A policy that is blind before it learns has had no time to change: that is said at once.
        is_told = line["running"] == wanted.looks or (step == 0 and bool(line["blind"]))
        what = "before learning" if step == 0 else f"step {step}, {line['running']} looks running"
        said = told_blind(what, line["blind"], NEVER_SAW if _never_saw(lines) else STOPPED)
        if not controller.judge(line, "blind", f"{said} (learner.blind_check.on_blind=stop)" if ends else ""):
            return
        if is_told:
            self.progress.warn(said)
            detail = "; ".join(line["blind"])
            note_event(self.run, BLIND_LOOK, what=what, step=step, detail=detail, **line["intervals"])
        elif "gap_logprob" in sight.gaps and step > 0:
            self.progress.note(f"look (step {step}): {_told(sight)}")

    def _lines(self) -> list[dict[str, Any]]:
        return self.run.read_lines(LOOKS)


def _never_saw(lines: Sequence[Mapping[str, Any]]) -> bool:
    return all(line["blind"] for line in lines)


def _told(sight: Sight) -> str:
    return f"own pictures are worth {told(sight.gaps['gap_logprob'])} nats a token to references"


def sight_json(run: RunDir) -> dict[str, Any]:
    """`sight` of the summary: the first look and the last; nothing where there was none."""
    lines = run.read_lines(LOOKS)
    if not lines:
        return {}
    sides = {"first": lines[0], "last": lines[-1]}
    return {
        "looks": len(lines),
        **{name: {"step": line["step"], "blind": line["blind"], **line["intervals"]} for name, line in sides.items()},
    }
