"""The learning of a value-based run: pictures to features, rounds of RLlib's DQN, what they leave in the run folder.

pictures ──vision tower──▶ features ──▶ env runners ⇄ learner ──▶ metrics, rollouts, checkpoints ──▶ agent/
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmrl_ray.algorithms.dqn.agent import (
    Agent,
    AgentFacts,
    load_value_checkpoint,
    save_agent_folder,
    save_value_checkpoint,
)
from mmrl_ray.algorithms.dqn.network import FeatureScale, Vocabulary
from mmrl_ray.algorithms.dqn.rllib import environment_arguments
from mmrl_ray.algorithms.dqn.trainer import Said, ValueStatus, ValueTrainer
from mmrl_ray.config import Config
from mmrl_ray.data.images import image_extension, image_hash
from mmrl_ray.data.samples import Quarantine, QuarantineRecord, Sample, iter_references, read_split
from mmrl_ray.errors import DataError, Interrupted
from mmrl_ray.evaluation.records import load_evaluation
from mmrl_ray.experience.schema import ROLLOUT_SCHEMA
from mmrl_ray.run_records.checkpoint_choice import newest_valid_checkpoint
from mmrl_ray.run_records.control_files import StatusWriter
from mmrl_ray.run_records.rollout_log import rollouts_name
from mmrl_ray.run_records.run_dir import RunDir
from mmrl_ray.run_records.step_log import QUARANTINE_FILE, StepLog, note_event
from mmrl_ray.telemetry.terminal import RunProgress
from mmrl_ray.training.interrupts import StopOnInterrupt
from mmrl_ray.training.model_process import ModelProcess, features_of
from mmrl_ray.training.serve_apps import RunReward

_DESK_CLOSES_S = 10.0
_WRITTEN_S = 300.0
"""For a round's captions and pictures to be in the run folder."""


class ValueBasedRun:
    """Needs a Ray. `learn` takes all steps that are left."""

    def __init__(
        self,
        cfg: Config,
        run: RunDir,
        hosted: RunReward,
        held_out: Sequence[Sample],
        progress: RunProgress,
        process: ModelProcess,
    ) -> None:
        """Has every picture's features made in `process`, which then ends, and starts the env runners.

        They go on from the newest checkpoint if there is one.

        Raises:
            DataError, ModelError: a split or the vision tower cannot be used.
            PlacementError: Ray has no room for the env runners.
            CheckpointError: there are checkpoints, and none is valid.
        """
        assert cfg.agent is not None
        agent = cfg.agent
        self._cfg, self._run, self._progress = cfg, run, progress
        quarantine = Quarantine(cfg.data.max_quarantined, self._left_out, source=cfg.data.train)
        self._samples = read_split(
            cfg.data.train, prompt=cfg.data.prompt, limit=agent.max_pictures, quarantine=quarantine
        )
        bare = next((sample.id for sample in self._samples if not sample.references), None)
        if bare is not None:
            raise DataError(f"{cfg.data.train}: sample {bare!r} has no references to be paid by; leave it out")
        try:
            images, self._held_out = self._features(held_out, process)
        finally:
            process.close()
        scale = FeatureScale.of(images)
        vocabulary = Vocabulary.of(agent, iter_references(cfg.data.train), hosted.tokenizer)
        self._facts = AgentFacts.of(agent, vocabulary, scale, images.shape[1:])
        hosted.wait()
        step = newest_valid_checkpoint(run)
        state = None if step is None else load_value_checkpoint(run, step)
        seen = scale(images, blind=agent.blind)
        arguments = environment_arguments(cfg, seen, self._samples, hosted.reward, vocabulary)
        self._trainer = ValueTrainer(cfg, arguments, state)
        self._value_status = ValueStatus(cfg)
        self._down = 0
        """Workers that died and are not back."""
        self._look_at_workers()
        self._stop = threading.Event()
        self._log = StepLog(run)
        self._unreported: list[Said] = []
        self._saved = step or 0
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="rollouts")
        self._written: Future[None] = self._writer.submit(_nothing)
        self._stored = {name.split(".", 1)[0] for name in run.list("images")}
        """Hashes of pictures that lie in the run folder."""

    def learn(self, evaluate: Callable[[str, Sequence[str]], None]) -> None:
        """Rounds until all steps are taken.

        Args:
            evaluate: takes "before" or "after" and the agent's greedy captions of the held-out pictures.

        Raises:
            Interrupted: the user stopped it; what was finished is checkpointed.
            NonFiniteError, RolloutError: as `ValueTrainer.round`.
        """
        if len(self._held_out) and self._saved == 0 and load_evaluation(self._run, "before") is None:
            evaluate("before", self._agent().captions(self._held_out))
        self._rounds()
        if len(self._held_out):
            evaluate("after", self._agent().captions(self._held_out))

    def _rounds(self) -> None:
        updates, steps = self._trainer.updates, self._cfg.learner.steps
        self._log.rewind(updates)
        self._truncate_rollouts(updates)
        shown = self._progress.phase("learning")
        status_writer = StatusWriter(self._run, self._value_status.status, self._value_status.ask, self._note)
        status_writer.start()
        try:
            with StopOnInterrupt(
                self._stop.set,
                awaited=lambda: f"finishing the round after step {updates}, then a checkpoint",
                say=self._progress.note,
            ):
                while updates < steps and not self._stop.is_set():
                    line = self._one_round(updates)
                    updates = self._trainer.updates
                    if line is not None:
                        shown(updates, steps, {"reward": line.get("reward/mean", float("nan")), "loss": line["loss"]})
                    self._checkpoint(updates, due=updates >= steps or self._stop.is_set())
            self._written.result(_WRITTEN_S)
            if updates < steps:
                raise Interrupted(
                    f"stopped after {updates} steps; go on with: mmrl train --resume {self._run.location}"
                )
            save_agent_folder(self._run, self._agent(), updates)
        finally:
            status_writer.close(_DESK_CLOSES_S)

    def close(self) -> None:
        """Ends the env runners."""
        self._writer.shutdown(wait=False)
        self._trainer.close()

    # -- a round ---------------------------------------------------------------------------------------------------

    def _one_round(self, before: int) -> dict[str, Any] | None:
        """The round's line in metrics.jsonl; None while the replay buffer is being filled."""
        done = self._trainer.round()
        self._notice()
        self._scale()
        self._unreported += done.said
        line: dict[str, Any] | None = None
        if done.updates > before:
            line = {
                "step": before,
                "policy_version": done.updates,
                "words": done.words,
                **_earned(self._unreported),
                **done.figures,
                "samples_per_second": len(self._unreported) / done.figures["seconds/step"],
            }
            self._log.write(line)
            self._written.result(_WRITTEN_S)  # of the round before, and what went wrong there
            self._written = self._writer.submit(self._write_rollouts, before, self._unreported)
            self._unreported = []
        self._value_status.tell(done)
        return line

    def _notice(self) -> None:
        """Events of env runners that died, and of those that RLlib has started in their place."""
        lost = self._healthy - self._trainer.workers
        back = self._trainer.restarts - self._restarts  # counted when one is back
        for _ in range(max(lost, back - self._down)):
            self._note({"kind": "worker_lost", "reason": "an env runner failed"})
            self._down += 1
        for _ in range(min(back, self._down)):
            self._note({"kind": "worker_ready", "reason": "started again"})
            self._down -= 1
        if lost or back or self._seen < self._trainer.wanted:  # one that is starting does not answer yet
            self._look_at_workers()

    def _scale(self) -> None:
        """Does what `mmrl scale` has asked for."""
        wanted = self._value_status.wanted()
        if wanted is not None:
            self._trainer.scale(wanted)
            self._note({"kind": "workers_scaled", **self._value_status.scaled(wanted)})
            self._look_at_workers()

    def _look_at_workers(self) -> None:
        self._healthy, self._restarts = self._trainer.workers, self._trainer.restarts
        places = self._trainer.places()
        self._seen = len(places)
        self._value_status.tell_workers(places)

    def _checkpoint(self, updates: int, *, due: bool) -> None:
        learner = self._cfg.learner
        if updates == self._saved or not (due or updates - self._saved >= learner.checkpoint_every):
            return
        save_value_checkpoint(self._run, updates, self._agent(), self._trainer.state(), learner.keep_checkpoints)
        self._saved = updates

    def _agent(self) -> Agent:
        return Agent(self._facts, self._trainer.weights())

    def _note(self, event: Mapping[str, Any]) -> None:
        told = dict(event)
        note_event(self._run, told.pop("kind"), **told)

    # -- pictures and the rollout log ------------------------------------------------------------------------------

    def _left_out(self, record: QuarantineRecord) -> None:
        """Writes a broken training picture down; a resumed run comes upon it again."""
        if record.as_dict() not in self._run.read_lines(QUARANTINE_FILE):
            self._run.append_line(QUARANTINE_FILE, record.as_dict())
            told = {"sample": record.sample_id, "where": record.where, "detail": record.reason}
            self._note({"kind": "sample_quarantined", **told})

    def _features(self, held_out: Sequence[Sample], process: ModelProcess) -> tuple[np.ndarray, np.ndarray]:
        """Of the training pictures and of the held-out ones."""
        shown = self._progress.phase("vision features")
        both = [*self._samples, *held_out]
        images = process.call(features_of, self._cfg, both, progress=lambda done, total: shown(done, total, {}))
        return images[: len(self._samples)], images[len(self._samples) :]

    def _write_rollouts(self, step: int, said: Sequence[Said]) -> None:
        """The captions of a round in the schema of every rollout log, and their pictures."""
        if not said:
            return
        rows = []
        for place, each in enumerate(said):
            sample = self._samples[each.index]
            digest = image_hash(sample.images)
            if digest not in self._stored and len(sample.images) == 1:
                self._run.write_bytes(f"images/{digest}.{image_extension(sample.images[0])}", sample.images[0])
                self._stored.add(digest)
            rows.append(self._row(step, place, each, sample, digest))
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows, schema=ROLLOUT_SCHEMA), sink, compression="zstd")
        self._run.write_bytes(rollouts_name(step), sink.getvalue().to_pybytes())

    def _row(self, step: int, place: int, said: Said, sample: Sample, digest: str) -> dict[str, Any]:
        agent, weights = self._facts.vocabulary, self._cfg.reward.weights
        return {
            "run": self._run.name,
            "step": step,
            "index": place,
            "attempt": 0,
            "completion": 0,
            "policy_version": step,
            "sample_id": sample.id,
            "image_hash": digest,
            "prompt": sample.prompt,
            "caption": said.caption,
            "token_ids": list(said.actions),  # of the agent's own vocabulary
            "behaviour_logprobs": [],
            "reward_parts": [{"name": n, "value": v, "weight": weights.get(n)} for n, v in said.parts.items()],
            "reward": said.reward,
            "finish_reason": "stop" if said.actions[-1] == agent.end else "length",
            "sampling": {"max_new_tokens": agent.max_words, "seed": self._cfg.run.seed},
            "worker": "",
            "timings": [],
        }

    def _truncate_rollouts(self, updates: int) -> None:
        """Takes away what will be done again."""
        for name in self._run.list("rollouts"):
            step = name.removeprefix("step-").removesuffix(".parquet")
            if step.isdecimal() and int(step) >= updates:
                self._run.delete(f"rollouts/{name}")


def _nothing() -> None:
    """No round was written yet."""


def _earned(said: Sequence[Said]) -> dict[str, float]:
    """`reward/…` of finished captions: mean, deviation, and the mean of each part."""
    if not said:
        return {}
    rewards = np.array([each.reward for each in said])
    parts = {f"reward/{name}": float(np.mean([each.parts[name] for each in said])) for name in said[0].parts}
    lengths = float(np.mean([len(each.caption.split()) for each in said]))
    return {
        "captions": len(said),
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        **parts,
        "completion/length_mean": lengths,
    }
