"""The held-out split of a run, before and after training: captioned, scored, shown, and kept in the run folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmrl_ray.config import Config
from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import ModelError
from mmrl_ray.evaluation.records import MAX_STATES, States, save_evaluation, save_states
from mmrl_ray.evaluation.scores import (
    BLIND_EVENT,
    Blindness,
    Evaluation,
    compare,
    comparison_json,
    evaluation_blindness,
    in_common,
    score_captions,
)
from mmrl_ray.experience.carriers import SamplingParams
from mmrl_ray.metrics.text import CorpusStatistics
from mmrl_ray.rewards.base import RewardFn
from mmrl_ray.rollouts.controller_actor import ControllerClient
from mmrl_ray.run_records.run_dir import RunDir
from mmrl_ray.run_records.step_log import note_event
from mmrl_ray.telemetry.terminal import RunProgress
from mmrl_ray.training import offline


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

    def evaluate(self, name: str, controller: ControllerClient) -> None:
        """Greedy captions of the split, by the rollout workers, into `eval/NAME.parquet`; `name` is before or after.

        Raises:
            ModelError: not one of the samples could be captioned.
        """
        sampling = SamplingParams(
            temperature=self.cfg.rollout.temperature,
            max_new_tokens=self.cfg.rollout.max_new_tokens,
            greedy=True,
            value_beta=offline.decoding_beta(self.cfg) if name == "after" else 0.0,  # there are no values before
        )
        shown = self.progress.phase(f"evaluate ({name})")
        generated = controller.generate(
            self.samples, sampling, states=MAX_STATES, progress=lambda came: shown(came, len(self.samples), {})
        )
        shown(len(self.samples), len(self.samples), {})
        done = [(s, g) for s, g in zip(self.samples, generated.groups, strict=True) if g is not None]
        for failure in generated.failures:
            self.progress.note(f"evaluate: {failure.sample_id} left out: {failure.reason}")
        if not done:
            raise ModelError(
                f"none of {len(self.samples)} held-out samples could be captioned by {self.cfg.model.path}; the first: "
                f"{generated.failures[0].reason}"
            )
        groups = controller.groups([scored.payload for _, scored in done])
        captions = [group.completions[0].caption for group in groups]
        kept = [sample for sample, _ in done]
        looked_into = [(s, g.state) for s, g in zip(kept, groups, strict=True) if g.state is not None]
        if looked_into:
            save_states(self.run, name, States.of(*zip(*looked_into, strict=True)))
        # The last to be written: where it is, a resume takes all of it for done.
        self.score(name, kept, captions)

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
