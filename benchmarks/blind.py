"""The blindness alarm (`learner.blind_check`): what it costs, what it finds, and how often it is wrong.

    python benchmarks/blind.py cost
    python benchmarks/blind.py alarms

`cost`: seconds of CPU, of one process with one thread, of a step of the quickstart (rollouts and learner, by the
product's own engine, plan and learner step) and of a look: 32 held-out pictures captioned, their captions and
references scored beside their own pictures, another's and a grey one, with rewards, intervals, the line that is kept
and the checkpoint. `ratio` is what looks at their default cadence add to a step.

`alarms`: clean short runs of that kind with seeds of their own, and runs with a bug each, of

    zeroed      workers see features of 0
    swapped     workers see the picture of the next sample of a batch
    positions   workers' vision towers get the patches of a picture in the opposite order
    ignored     the reward is for one sentence, whatever the picture: no alarm while the policy looks all the same

Each bug but the last comes after the first look. Prints the gaps of each look, and after how many steps the alarm came.

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from held_out import CONFIG, WARM_UP, Measured, seconds

from mmrl_ray.analysis.sight import arrange
from mmrl_ray.config import Config
from mmrl_ray.config.blind import EVERY
from mmrl_ray.config.load import load_config
from mmrl_ray.data.samples import Sample
from mmrl_ray.evaluation.sight import Sight, look_line
from mmrl_ray.experience.carriers import GroupKey, RewardBreakdown, SamplingParams
from mmrl_ray.learner.checkpoints import save_checkpoint
from mmrl_ray.metrics.overlap import rouge_l
from mmrl_ray.rollouts.types import GroupRequest
from mmrl_ray.run_records.run_dir import RunDir
from mmrl_ray.training.warm_start import warm_start

sys.path.insert(0, str(Path(__file__).parents[1]))  # what tests use, too

from tests.support.blinded import features, positions, swapped, zeroed

SENTENCE = "a small red circle on the left ."


class Looked(Measured):
    """The quickstart in one process, with looks."""

    def __init__(self, cfg: Config, model: str, run: RunDir, reward: Any = None) -> None:
        super().__init__(cfg, model, run, reward)
        self.pairs = arrange(self.held_out, cfg.learner.blind_check.samples, cfg.run.seed).pairs
        self.lines: list[dict[str, Any]] = []

    def look(self) -> None:
        """All that `learner.blind_check` adds to the step that was taken last."""
        wanted, rollout = self.cfg.learner.blind_check, self.cfg.rollout
        greedy = SamplingParams(temperature=rollout.temperature, greedy=True, max_new_tokens=rollout.max_new_tokens)
        groups = self._sampled(
            "aside",
            [GroupRequest(GroupKey(-1, i), s, greedy, 1, other=other) for i, (s, other) in enumerate(self.pairs)],
        )
        sight = Sight(tuple(group.sight for group in groups), self.cfg.run.seed)
        line = look_line(self.number, sight, self.lines, min_gap=wanted.min_gap, keep=wanted.keep)
        self.run.append_line("blind.jsonl", line)
        self.lines.append(line)
        state = self.step.state()
        save_checkpoint(self.run, self.number, policy=self.learner, learner=state, controller={}, keep=1)


class OneSentence:
    """A reward for saying one sentence of whatever picture."""

    def score_batch(self, samples: Sequence[Sample], captions: Sequence[str]) -> list[RewardBreakdown]:
        """How much of the sentence each caption is."""
        found = [rouge_l(caption, (SENTENCE,)) for caption in captions]
        return [RewardBreakdown(value, {"said": value}, {"said": 1.0}) for value in found]


def cost(folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds of CPU of steps and looks, in turns."""
    cfg = _config(folder, 0)
    measured = Looked(cfg, warm_start(cfg), RunDir.create(folder, "run"))
    for _ in range(WARM_UP):
        measured.take_step()
    measured.look()
    steps, looks = [], []
    for _ in range(rounds):
        steps += [seconds(measured.take_step) for _ in range(2)]
        looks.append(seconds(measured.look))
    step, look = statistics.median(steps), statistics.median(looks)
    ratio = look / (EVERY * step)
    print(f"a step {step:.2f} s of CPU, a look at {len(measured.pairs)} samples {look:.2f} s")
    print(f"a look every {EVERY} steps adds {ratio:.1%} to a step in the mean")
    return {"step_s": steps, "look_s": looks, "every": EVERY, "ratio": ratio}


def alarms(folder: Path, runs: int, steps: int, every: int) -> dict[str, Any]:
    """Looks of clean runs, and how long it takes until each bug is found."""
    model = warm_start(_config(folder, 0))
    clean = []
    for seed in range(runs):
        found = _run(folder, model, f"clean-{seed}", seed, steps, every)
        clean.append(_alarm(found))
    print(f"clean runs: {runs}, of {steps} steps with a look every {every}; with an alarm: {runs - clean.count(None)}")
    after = {}
    for name in ("zeroed", "swapped", "positions", "ignored"):
        found = _run(folder, model, name, 0, 59 if name == "ignored" else 4 * every, every, bug=name)
        after[name] = _alarm(found)
        print(f"{name}: the alarm came after {after[name]} steps")
    return {"clean_runs": runs, "false_alarms": runs - clean.count(None), "found_after_steps": after, "every": every}


def _run(
    folder: Path, model: str, name: str, seed: int, steps: int, every: int, bug: str | None = None
) -> list[dict[str, Any]]:
    measured = Looked(
        _config(folder, seed), model, RunDir.create(folder, name), OneSentence() if bug == "ignored" else None
    )
    began = time.process_time()
    measured.look()
    measured.cache.clear()
    planted: Callable[[], AbstractContextManager[None]] = {
        "zeroed": lambda: features(zeroed),
        "swapped": lambda: features(swapped),
        "positions": lambda: positions(measured.sampler),
    }.get(bug or "", lambda: features(list))
    with planted():
        for step in range(1, steps + 1):
            measured.take_step()
            if step % every == 0:
                measured.look()
                if _alarm(measured.lines) is not None:
                    break
    for line in (measured.lines[0], measured.lines[-1]):
        gaps = "  ".join(f"{n.removeprefix('blind/')} {v:+.3f}" for n, v in line.items() if n.startswith("blind/"))
        print(f"{name:>10} step {line['step']:>3}  {gaps}  {'; '.join(line['blind'])}", flush=True)
    print(f"{name:>10} {time.process_time() - began:.0f} s of CPU", flush=True)
    return measured.lines


def _alarm(lines: Sequence[dict[str, Any]]) -> int | None:
    return next((line["step"] for line in lines if line["running"] >= 2), None)


def _config(folder: Path, seed: int) -> Config:
    places = [f"data.{split}={folder}/{split}" for split in ("train", "eval")]
    return load_config(CONFIG, [*places, f"run.seed={seed}", "learner.max_sampler_gap=0"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["cost", "alarms"])
    parser.add_argument("--rounds", type=int, default=5, help="of two steps and a look")
    parser.add_argument("--runs", type=int, default=20, help="clean ones")
    parser.add_argument("--steps", type=int, default=8, help="of a clean run")
    parser.add_argument("--every", type=int, default=2, help="steps between two looks")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="mmrl-bench-") as name:
        folder = Path(name)
        wanted = args.what == "cost"
        found = cost(folder, args.rounds) if wanted else alarms(folder, args.runs, args.steps, args.every)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
