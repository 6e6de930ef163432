"""The held-out split of a run, before, while and after it learns: captioned, scored, shown, kept in the run folder.

Beside the learning (`eval.every`) the controller has the pool caption it (`rollouts/held_out.py`), and here is judged
what came of that: a line of `eval/steps.jsonl`, which says what the best checkpoint is. The first that is evaluated is
the best until another's measure is higher by more than chance.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mmrl_ray.config import Config
from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import ConfigError, ModelError
from mmrl_ray.evaluation.records import MAX_STATES, States, load_evaluation, save_evaluation, save_states
from mmrl_ray.evaluation.scores import (
    BLIND_EVENT,
    Blindness,
    Evaluation,
    compare,
    comparison_json,
    difference,
    evaluation_blindness,
    in_common,
    interval_json,
    rewarded_captions,
    score_captions,
)
from mmrl_ray.experience.carriers import RewardFailure, RolloutGroup, ScoredGroup
from mmrl_ray.metrics.overlap import CiderD
from mmrl_ray.metrics.statistics import Interval
from mmrl_ray.metrics.text import CorpusStatistics
from mmrl_ray.rewards.base import RewardFn
from mmrl_ray.rollouts.controller_actor import ControllerClient
from mmrl_ray.rollouts.types import Generated
from mmrl_ray.run_records.checkpoint_choice import best_step, deliver_best, evaluation_lines
from mmrl_ray.run_records.run_dir import RunDir
from mmrl_ray.run_records.step_log import note_event
from mmrl_ray.telemetry.terminal import RunProgress
from mmrl_ray.training import offline

_LOOK_S = 0.2


@dataclass(frozen=True, slots=True)
class HeldOut:
    """The split, and what its evaluations are made with."""

    cfg: Config
    run: RunDir
    """Where they are kept."""
    samples: Sequence[Sample]
    """None of them: there is no such split."""
    reward: RewardFn
    statistics: CorpusStatistics
    """Of the training references."""
    progress: RunProgress
    _cider: CiderD = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_cider", CiderD(self.statistics))

    def evaluate(self, name: str, controller: ControllerClient) -> None:
        """Greedy captions of the split, by the rollout workers, into `eval/NAME.parquet`; `name` is before or after.

        Raises:
            ModelError: not one of the samples could be captioned.
        """
        sampling = offline.greedy_sampling(self.cfg, has_learned=name == "after")
        shown = self.progress.phase(f"evaluate ({name})")
        generated = controller.generate(
            self.samples, sampling, states=MAX_STATES, progress=lambda came: shown(came, len(self.samples), {})
        )
        shown(len(self.samples), len(self.samples), {})
        kept, _, groups = self._captioned(generated, controller)
        captions = [group.completions[0].caption for group in groups]
        looked_into = [(s, g.state) for s, g in zip(kept, groups, strict=True) if g.state is not None]
        if looked_into:
            save_states(self.run, name, States.of(*zip(*looked_into, strict=True)))
        # The last to be written: where it is, a resume takes all of it for done.
        self.score(name, kept, captions)

    def _captioned(
        self, generated: Generated, controller: ControllerClient
    ) -> tuple[list[Sample], list[ScoredGroup], list[RolloutGroup]]:
        """The samples that have a caption, and that."""
        done = [(s, g) for s, g in zip(self.samples, generated.groups, strict=True) if g is not None]
        for failure in generated.failures:
            self.progress.note(f"evaluate: {failure.sample_id} left out: {failure.reason}")
        if not done:
            raise ModelError(
                f"none of {len(self.samples)} held-out samples could be captioned by {self.cfg.model.path}; the first: "
                f"{generated.failures[0].reason}"
            )
        scored = [group for _, group in done]
        return [sample for sample, _ in done], scored, controller.groups([group.payload for group in scored])

    # -- beside the learning ---------------------------------------------------------------------------------------

    @property
    def chooses(self) -> bool:
        """Whether the run is evaluated while it learns, too."""
        return bool(self.samples) and self.cfg.eval.every is not None

    def watch(self, controller: ControllerClient) -> None:
        """Has the controller ask for captions at the steps that are due. Before the learner begins."""
        controller.watch_held_out(self.samples, offline.greedy_sampling(self.cfg, has_learned=True))

    def judge_before(self, controller: ControllerClient) -> None:
        """What the run begins with, so that curves begin there.

        Raises:
            ConfigError: a measure is asked for that these captions do not have.
        """
        if not evaluation_lines(self.run) and (before := load_evaluation(self.run, "before")) is not None:
            self._judge(0, before, controller)

    def look(self, controller: ControllerClient) -> None:
        """Judges what the pool has captioned since.

        Raises:
            ConfigError: a measure is asked for that these captions do not have.
            ModelError: not one of the samples could be captioned.
        """
        while (found := controller.evaluated()) is not None:
            step, generated = found
            samples, scored, groups = self._captioned(generated, controller)
            rewards = [s.rewards[0] if s.rewards else RewardFailure(s.masked or "no reward") for s in scored]
            captions = [group.completions[0].caption for group in groups]
            seed, tokenizer = self.cfg.run.seed, self.statistics.tokenizer
            evaluation = rewarded_captions(samples, captions, rewards, self._cider, tokenizer, seed=seed)
            save_evaluation(self.run, _record(step), evaluation, samples)
            self._judge(step, evaluation, controller)

    def finish_looking(self, controller: ControllerClient) -> None:
        """Returns when nothing is left to judge, the learner having ended."""
        while controller.status()["held_out"]["open"]:  # the pool's deadlines end what is stuck
            self.look(controller)
            time.sleep(_LOOK_S)

    def choose(self, step: int, controller: ControllerClient) -> None:
        """Judges the evaluation after `step` steps, the last, and makes `adapter/` of the best checkpoint."""
        after = load_evaluation(self.run, "after")
        if after is not None and all(line["step"] != step for line in evaluation_lines(self.run)):
            save_evaluation(self.run, _record(step), after, self.samples)
            self._judge(step, after, controller)
        if (best := best_step(self.run)) is not None:
            deliver_best(self.run, best, step)
            others = f"; adapter-last/ is of step {step}" if best != step else ", the last"
            self.progress.note(f"adapter/ is the best checkpoint, of step {best}{others}")
            if (gain := _since_start(self.run, best, self.cfg.eval.metric)) is not None and gain.high < 0:
                self.progress.warn(
                    f"the best checkpoint, of step {best}, is worse than what the run began with: "
                    f"{self.cfg.eval.metric} {gain.mean:+.3f} {gain.words('+.3f')}; without an adapter it is better"
                )

    def _judge(self, step: int, evaluation: Evaluation, controller: ControllerClient) -> None:
        wanted, lines = self.cfg.eval, evaluation_lines(self.run)
        _refuse_unmeasured(wanted.logged, evaluation)
        measures = {name: found for name in wanted.logged if (found := evaluation.measure(name)) is not None}
        best = lines[-1]["best"] if lines else None
        since = lines[-1]["since_best"] + 1 if lines else 0
        earlier = None if step == 0 else load_evaluation(self.run, "before" if best is None else _record(best))
        gain = None if earlier is None else difference(earlier, evaluation, wanted.metric)
        is_best = step > 0 and wanted.metric in measures and (best is None or (gain is not None and gain.low > 0))
        line = {
            "step": step,
            "samples": len(evaluation.captions),
            **{f"eval/{name}": found.mean for name, found in measures.items()},
            "intervals": {name: interval_json(found) for name, found in measures.items()},
            "metric": wanted.metric,
            "against": None if earlier is None else best or 0,
            "difference": None if gain is None else interval_json(gain),
            "best": step if is_best else best,
            "since_best": 0 if is_best or best is None else since,
        }
        if controller.judge(line) and step > 0:
            shown = "  ".join(f"{name} {found.mean:.3f}" for name, found in measures.items())
            verdict = "the best so far" if is_best else f"step {best} stays the best"
            self.progress.note(f"evaluate (step {step}): {shown}; {verdict}")

    def score(self, name: str, samples: Sequence[Sample], captions: Sequence[str]) -> None:
        """Scores one caption a sample, writes `eval/NAME.parquet`, and shows the figures."""
        evaluation = score_captions(
            samples,
            captions,
            self.reward,
            self.statistics,
            progress=self.progress.phase(f"score ({name})"),
            seed=self.cfg.run.seed,
            timeout_s=self.cfg.reward.timeout_s,
            retries=self.cfg.reward.retries,
        )
        save_evaluation(self.run, name, evaluation, samples)
        measures = evaluation.measures
        shown = (f"{key} {measures[key].mean:.3f}" for key in ("reward", "cider_d", "bleu_4") if key in measures)
        self.progress.note(f"evaluate ({name}): {'  '.join(shown)}")
        if evaluation.unrewarded:
            self.progress.warn(f"evaluation {name} training: {evaluation.told_unrewarded()}")
        if (agent := self.cfg.agent) is None or not agent.blind:
            warn_if_blind(self.run, self.progress, f"evaluation {name} training", evaluation_blindness(evaluation))


def _record(step: int) -> str:
    """What an evaluation of a step is called under `eval/`."""
    return f"step-{step:06d}"


def _refuse_unmeasured(names: Sequence[str], evaluation: Evaluation) -> None:
    is_rewarded = len(evaluation.unrewarded) < len(evaluation.captions)
    missing = [name for name in names if name not in evaluation.names and (is_rewarded or "reward" not in name)]
    if missing:
        raise ConfigError(
            f"eval.metrics: these captions have no {' and no '.join(missing)}; there are {', '.join(evaluation.names)}"
        )


def _since_start(run: RunDir, step: int, metric: str) -> Interval | None:
    """What a step gained on what the run began with, where both were evaluated."""
    before, found = load_evaluation(run, "before"), load_evaluation(run, _record(step))
    return None if before is None or found is None else difference(before, found, metric)


def choice_json(run: RunDir) -> dict[str, Any]:
    """`checkpoints` of the summary; nothing before one was evaluated while the run learned."""
    lines = evaluation_lines(run)
    if not lines or lines[-1]["best"] is None:
        return {}
    last = lines[-1]
    best = next(line for line in lines if line["step"] == last["best"])
    gain = _since_start(run, best["step"], last["metric"])
    return {
        "metric": last["metric"],
        "evaluations": len(lines),
        "best": {"step": best["step"], **best["intervals"].get(last["metric"], {})},
        "last": {"step": last["step"], **last["intervals"].get(last["metric"], {})},
        **({"best_less_start": interval_json(gain)} if gain is not None else {}),
        **({"last_less_best": last["difference"]} if last["step"] != best["step"] else {}),
    }


def warn_if_blind(run: RunDir, progress: RunProgress, what: str, found: Blindness | None) -> None:
    """Says on the terminal and in the events that captions do not depend on the picture, where they do not."""
    if found is not None:
        progress.warn(found.told(what))
        note_event(run, BLIND_EVENT, what=what, **found.to_json())


def evaluation_json(before: Evaluation | None, after: Evaluation | None) -> dict[str, Any]:
    """`eval` of the summary: each side, and their paired differences where there are both."""
    sides = {"before": before, "after": after}
    found: dict[str, Any] = {name: side.to_json() for name, side in sides.items() if side is not None}
    if before is not None and after is not None and (both := in_common(before, after)) is not None:
        found["difference"] = comparison_json(compare(*both))
    return found
