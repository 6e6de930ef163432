"""Fine-tuning jobs that stand where a test puts them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from mmrl_ray.config.serving import FineTuningSection, ServingSection
from mmrl_ray.errors import UnknownFileError, UnknownJobError
from mmrl_ray.serving.fine_tuning_types import CheckpointCard, EventCard
from mmrl_ray.serving.protocols import ResultFile, TuningJob, TuningOrder

RECIPE = {
    "model": {"path": "hub/base", "lora": {"r": 4}},
    "prompt": "What is it?",
    "algorithm": "dapo",
    "rollout": {"group_size": 4},
    "learner": {"steps": 50, "groups_per_step": 8, "lr": 1e-3, "lr_min": 1e-4},
}
SETTINGS = ServingSection(
    adapters_root="/runs",
    fine_tuning=FineTuningSection.model_validate(
        {"models": {"smol": RECIPE, "big/vlm": RECIPE}, "datasets": {"coco": "s3://data/coco", "held-out": "/held-out"}}
    ),
)


@dataclass
class FakeJobs:
    """Creates jobs that run until they are told otherwise."""

    error: Exception | None = None
    known: dict[str, TuningJob] = field(default_factory=dict)
    told: dict[str, list[EventCard]] = field(default_factory=dict)
    kept: dict[str, list[CheckpointCard]] = field(default_factory=dict)
    files: dict[str, ResultFile] = field(default_factory=dict)

    def create(self, order: TuningOrder) -> TuningJob:
        if self.error is not None:
            raise self.error
        number = len(self.known)
        job = TuningJob(f"ftjob-{number}", order, f"{order.model}-{number}", "queued", 1_700_000_000 + number)
        self.known[job.id] = job
        return job

    def get(self, id: str) -> TuningJob:
        if self.error is not None:
            raise self.error
        if id not in self.known:
            raise UnknownJobError(f"there is no fine-tuning job {id!r}")
        return self.known[id]

    def jobs(self) -> list[TuningJob]:
        if self.error is not None:
            raise self.error
        return list(reversed(self.known.values()))

    def cancel(self, id: str) -> TuningJob:
        return self.change(id, status="cancelled", finished_at=1_800_000_000)

    def events(self, id: str) -> list[EventCard]:
        return self.told.get(self.get(id).id, [])

    def checkpoints(self, id: str) -> list[CheckpointCard]:
        return self.kept.get(self.get(id).id, [])

    def result(self, file_id: str) -> ResultFile:
        if file_id not in self.files:
            raise UnknownFileError(f"there is no file {file_id!r}")
        return self.files[file_id]

    def change(self, id: str, **facts: object) -> TuningJob:
        if id not in self.known:
            raise UnknownJobError(f"there is no fine-tuning job {id!r}")
        self.known[id] = replace(self.known[id], **facts)  # type: ignore[arg-type]
        return self.known[id]
