"""What the Serve-hosted reward adds to scoring: a batch of 128 captions by the handle, and in this process, in one run.

    python benchmarks/reward_handle.py

The default reward with the scenes' references. Prints a table; the last line is one JSON object, in milliseconds.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from mmrl_ray.config import Config
from mmrl_ray.config.sections import ScenesSection
from mmrl_ray.data.scenes.generator import generate_scenes
from mmrl_ray.metrics.text import CorpusStatistics
from mmrl_ray.rewards.build import build_reward
from mmrl_ray.run_records.run_dir import STATISTICS, RunDir
from mmrl_ray.training.cluster import ray_session
from mmrl_ray.training.serve_apps import RunReward

BATCH = 128
REPEATS = 200


def milliseconds(work: Callable[[], object]) -> list[float]:
    """Wall time of each call, after a warm-up."""
    for _ in range(20):
        work()
    taken = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        taken.append(1000 * (time.perf_counter() - began))
    return taken


def main() -> None:
    samples = list(generate_scenes(ScenesSection(train=BATCH // 8, eval=1))[0])
    known = CorpusStatistics.from_references([s.references for s in samples])
    batch = [sample for sample in samples for _ in range(8)]
    captions = [sample.references[i % 5] for i, sample in enumerate(batch)]
    assert len(captions) == BATCH
    with tempfile.TemporaryDirectory(prefix="mmrl-bench-") as folder:
        cfg = Config.model_validate(
            {
                "run": {"name": "bench", "root": folder},
                "model": {"path": "none"},
                "data": {"train": "none"},
                "learner": {"steps": 1, "groups_per_step": 1},
            }
        )
        run = RunDir.create(folder, "bench")
        run.write_text(STATISTICS, known.to_json())
        local = build_reward(cfg.reward, known)
        with ray_session(cfg), RunReward(cfg, run, known) as hosted:
            hosted.wait()
            served = milliseconds(lambda: hosted.reward.score_batch(batch, captions))
            alone = milliseconds(lambda: local.score_batch(batch, captions))
            assert hosted.reward.score_batch(batch, captions) == local.score_batch(batch, captions)
    figures = {
        "added_ms": statistics.median(served) - statistics.median(alone),
        "served_ms": statistics.median(served),
        "served_p99_ms": statistics.quantiles(served, n=100)[98],
        "scoring_ms": statistics.median(alone),
    }
    table = Table(title=f"{BATCH} captions a batch, {REPEATS} batches")
    table.add_column("")
    table.add_column("ms", justify="right")
    for name, value in figures.items():
        table.add_row(name, f"{value:.1f}")
    Console().print(table)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
