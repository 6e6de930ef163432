"""Does a student come nearer to its teacher? `configs/distill.yaml`, measured on held-out pictures.

    python benchmarks/distill.py                       # after `make quickstart`
    python benchmarks/distill.py --steps 20 --set learner.distill.signal=loss

Of the student before and after, and of the teacher itself: captions sampled at the rollouts' temperature, and of each
token log π − log π_T, whose mean over them is the reverse KL a token; beside it the estimator k3 of the same, which
varies less. Intervals are 95 % bootstrap ones over the pictures. Greedy held-out rewards are those of the runs' own
evaluations. A run that is finished is taken as it is. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from mmrl_ray.config import Config
from mmrl_ray.config.load import load_config
from mmrl_ray.config.sections import TeacherSection
from mmrl_ray.data.samples import Sample, read_split
from mmrl_ray.evaluation.model_source import open_target
from mmrl_ray.evaluation.records import load_evaluation
from mmrl_ray.experience.carriers import SamplingParams, derive_seed
from mmrl_ray.metrics.statistics import Interval, bootstrap_mean
from mmrl_ray.policy.generation.base import DecodeRequest
from mmrl_ray.policy.generation.decode import Decoder, decode_groups
from mmrl_ray.policy.load import load_policy
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.prompts import encode_prompts
from mmrl_ray.rollouts.teacher import Teacher
from mmrl_ray.run_records.run_dir import BASE, RunDir
from mmrl_ray.training.train import SUMMARY, train

CONFIG = Path(__file__).parents[1] / "configs" / "distill.yaml"
_TOGETHER = 16
"""Pictures a pass."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help="of the student; those of the config by default")
    parser.add_argument("--pictures", type=int, default=100)
    parser.add_argument("--completions", type=int, default=4, help="sampled of each picture")
    parser.add_argument("--name", default="distill", help="of the run")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the config")
    given = parser.parse_args()
    steps = [] if given.steps is None else [f"learner.steps={given.steps}"]
    cfg = load_config(CONFIG, [f"run.name={given.name}", *steps, *given.set])
    run = finished(cfg)
    assert cfg.teacher is not None
    assert cfg.data.eval is not None
    teacher = Teacher(cfg.teacher, device="cpu")
    samples = read_split(cfg.data.eval, prompt=cfg.data.prompt)[: given.pictures]
    told: dict[str, dict[str, Any]] = {}
    policies = {"student before": base_of(run, cfg), "student after": open_target(run.location).policy}
    policies["teacher"] = Teacher(TeacherSection.model_validate(cfg.teacher.model_dump()), device="cpu").policy
    for name, policy in policies.items():
        kls = divergences(policy, teacher, samples, cfg, given.completions)
        told[name] = {kind: rounded(bootstrap_mean(values, seed=0)) for kind, values in kls.items()}
        print(f"{name:<16} reverse KL a token {shown(told[name]['k1'])}, by k3 {shown(told[name]['k3'])}")
    for name in ("before", "after"):
        evaluation = load_evaluation(run, name)
        assert evaluation is not None
        told[f"student {name}"]["reward"] = rounded(evaluation.measures["reward"])
        print(f"student {name:<8} greedy held-out reward {shown(told[f'student {name}']['reward'])}")
    print(json.dumps(told))


def divergences(
    student: Policy, teacher: Teacher, samples: list[Sample], cfg: Config, completions: int
) -> dict[str, list[float]]:
    """By estimator, of each picture: the mean over the tokens of its captions."""
    found: dict[str, list[float]] = {"k1": [], "k3": []}
    decoder = Decoder(student, vision_cache=None, max_rows=_TOGETHER * completions)
    for start in range(0, len(samples), _TOGETHER):
        part = samples[start : start + _TOGETHER]
        sampling = [
            SamplingParams(cfg.rollout.temperature, cfg.rollout.max_new_tokens, seed=derive_seed("distill", sample.id))
            for sample in part
        ]
        prompts = encode_prompts(student, part)
        with torch.no_grad():
            requests = [DecodeRequest(p, completions, s) for p, s in zip(prompts, sampling, strict=True)]
            outputs = decode_groups(decoder, requests)
        tokens = [[c.token_ids for c in output.completions] for output in outputs]
        scored = teacher.logprobs(part, tokens, cfg.rollout.temperature)
        for output, rows in zip(outputs, scored, strict=True):
            assert not isinstance(rows, str), rows
            d = torch.cat([c.logprobs - row for c, row in zip(output.completions, rows, strict=True)]).double()
            found["k1"].append(d.mean().item())
            found["k3"].append((torch.expm1(-d) + d).mean().item())
    return found


def base_of(run: RunDir, cfg: Config) -> Policy:
    """What the student began as."""
    return load_policy(cfg.model.model_copy(update={"path": str(run.local_path(BASE))}), device="cpu")


def finished(cfg: Config) -> RunDir:
    """The folder of a run that took all its steps, made now where it is not there."""
    folder = Path(cfg.run.root) / cfg.run.name
    there = (folder / SUMMARY).is_file()
    if not there or RunDir.open(cfg.run.root, cfg.run.name).read_json(SUMMARY)["status"] != "finished":
        train(cfg, resume=folder.is_dir())
    return RunDir.open(cfg.run.root, cfg.run.name)


def rounded(interval: Interval) -> list[float]:
    return [round(value, 4) for value in (interval.mean, interval.low, interval.high)]


def shown(interval: list[float]) -> str:
    return "{:.3f} [{:.3f}, {:.3f}]".format(*interval)


if __name__ == "__main__":
    main()
