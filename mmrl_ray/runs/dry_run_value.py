"""What `mmrl train --dry-run` says of a value-based run in place of token batches."""

from __future__ import annotations

from mmrl_ray.algorithms.dqn.algorithm import ValueBasedSection
from mmrl_ray.config import Config

_FLOAT32 = 4


def round_lines(cfg: Config, agent: ValueBasedSection) -> list[str]:
    """Rounds, words and transitions."""
    workers, updates, steps = cfg.rollout.first_workers, agent.updates, cfg.learner.steps
    said, rounds = workers * agent.pictures * agent.words, steps // updates
    return [
        f"a round     {workers} workers × {agent.pictures} pictures × {agent.words} words = {said:,} words, then "
        f"{updates} optimiser steps of {agent.batch_size} transitions",
        f"the run     {steps:,} steps in {rounds:,} rounds, about {rounds * said + agent.learning_starts:,} "
        f"words; the first {agent.learning_starts:,} before learning starts",
    ]


def agent_memory_lines(agent: ValueBasedSection, pictures: int | None, width: int) -> list[str]:
    """Bytes of features; `width` is the model's hidden width, which the tower's features are projected to."""
    each = agent.image_tokens * width * _FLOAT32
    lines = [
        f"replay buffer  {agent.buffer_words:,} words × {each:,} bytes = {agent.buffer_words * each / 1e6:,.0f} MB"
    ]
    if pictures is not None:
        kept = min(pictures, agent.max_pictures)
        lines.append(f"pictures       {kept:,} × {each:,} bytes = {kept * each / 1e6:,.0f} MB, once a node")
    return lines
