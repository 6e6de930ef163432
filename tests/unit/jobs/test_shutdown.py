"""A Ray that ends lets its jobs checkpoint, and their runs remember them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mmrl_ray.jobs.records import Job, JobFacts
from mmrl_ray.jobs.shutdown import remembered, stop_jobs
from mmrl_ray.run_dir import RunDir


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
