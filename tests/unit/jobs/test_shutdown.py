"""A Ray that ends lets its jobs checkpoint, and their runs remember them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mmrl_ray.jobs.records import Job, JobFacts
from mmrl_ray.jobs.submit import note_job, remembered, stop_jobs
from mmrl_ray.run_records.control_files import conclude_status, write_status
from mmrl_ray.run_records.run_dir import RunDir
from mmrl_ray.run_records.run_owner import RunOwner


class Server:
    """Jobs that take a few looks to stop."""

    def __init__(self, *jobs: Job) -> None:
        self.known = {job.id: job for job in jobs}
        self.stopping: dict[str, int] = {}

    def jobs(self) -> list[Job]:
        for id in self.stopping:
            self.stopping[id] -= 1
            if self.stopping[id] == 0:
                self.known[id] = replace(self.known[id], status="stopped", ended=20.0)
        return list(self.known.values())

    def stop(self, id: str) -> bool:
        self.stopping[id] = 2
        return True


def job(root: Path, name: str, status: str) -> Job:
    facts = JobFacts(name, str(root / name), "me@here", request={"model": "m"}, config="run: {}")
    return Job(f"ftjob-{name}", status, facts, created=10.0)  # type: ignore[arg-type]


def test_jobs_under_way_are_stopped_waited_for_and_remembered(tmp_path: Path) -> None:
    for name in ("a", "b"):
        RunDir.create(tmp_path, name)
    server = Server(job(tmp_path, "a", "running"), job(tmp_path, "b", "succeeded"), job(tmp_path, "c", "pending"))
    said: list[str] = []
    stopped = stop_jobs(server, said.append)
    assert {each.id: each.status for each in stopped} == {"ftjob-a": "stopped", "ftjob-c": "stopped"}
    assert f"job ftjob-a is stopped; go on with: mmrl train --resume {tmp_path}/a" in said
    assert any("ftjob-c left no run folder" in line for line in said)
    (known,) = remembered(str(tmp_path))
    assert known == stopped[0]
    tmp_path.joinpath("a").rename(tmp_path / "moved")
    (known,) = remembered(str(tmp_path))
    assert known.facts.location == f"{tmp_path}/moved"
    assert remembered(str(tmp_path / "nowhere")) == []


def test_jobs_of_a_ray_that_was_killed_are_known_by_what_became_of_their_runs(tmp_path: Path) -> None:
    ended = {"a": "finished", "b": "failed: the disk is full", "c": "interrupted", "d": "running", "e": None}
    for name, how in ended.items():
        note_job(str(tmp_path), job(tmp_path, name, "running"))
        if how == "running":
            write_status(RunDir.create(tmp_path, name), how, 60.0)
        elif how is not None:
            conclude_status(RunDir.create(tmp_path, name), how)
    with RunOwner(RunDir.open(tmp_path, "d")):  # of another server, or `mmrl train --resume`
        assert {each.facts.run for each in remembered(str(tmp_path)) if not each.is_over} == {"d"}
    known = {each.facts.run: each for each in remembered(str(tmp_path))}
    assert {name: each.status for name, each in known.items()} == {
        "a": "succeeded", "b": "failed", "c": "stopped", "d": "stopped", "e": "stopped",
    }  # fmt: skip
    assert {each.id for each in known.values()} == {f"ftjob-{name}" for name in ended}
    assert known["b"].reason == "the disk is full"
    assert known["e"].ended == known["e"].created
    stop_jobs(Server(job(tmp_path, "d", "running")), lambda line: None)
    assert len(remembered(str(tmp_path))) == 5, "none twice"
