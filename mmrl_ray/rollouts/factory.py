"""From a run's config to the engine of one worker; picklable, and called in the worker's own process.

Who makes one needs nothing of the model: that is imported where the engine is built.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmrl_ray.config import Config
from mmrl_ray.config.schema import torch_threads
from mmrl_ray.rewards.base import RewardFn

if TYPE_CHECKING:
    from mmrl_ray.rollouts.engine import RolloutEngine
    from mmrl_ray.rollouts.teacher import TeacherClient

_MB = 2**20


@dataclass(frozen=True)
class PolicyEngineFactory:
    """An `EngineFactory` of real engines."""

    cfg: Config
    """`model.path` is the folder (or hub id) that reinforcement learning starts from."""
    reward: RewardFn
    """Made once by the driver (`rewards/build.py`)."""
    teacher: TeacherClient | None = None
    """Where the run has one."""

    def __call__(self, worker: str) -> RolloutEngine:
        """Loads the model, adds the adapter, and puts the rest around it.

        Raises:
            MMRLError: model or adapter cannot be used, or the run asks for what its generation engine cannot do.
        """
        import torch

        from mmrl_ray.policy.generation.base import GenerationEngine
        from mmrl_ray.policy.generation.local import LocalEngine
        from mmrl_ray.policy.load import load_policy
        from mmrl_ray.policy.lora.adapter import add_run_adapter
        from mmrl_ray.policy.lora.routing import VersionedPolicy
        from mmrl_ray.policy.memory import DecodeLimits
        from mmrl_ray.policy.prompt_pool import PromptPool
        from mmrl_ray.policy.vision import VisionCache
        from mmrl_ray.rollouts.engine import RolloutEngine
        from mmrl_ray.rollouts.scorer import Scorer
        from mmrl_ray.rollouts.stored import PairEngine, StoredEngine

        # By where an algorithm's samples come from.
        engines = {"rollouts": RolloutEngine, "pairs": PairEngine, "stored": StoredEngine}
        cfg = self.cfg
        threads = torch_threads(cfg, cfg.resources.rollout, os.cpu_count() or 1)
        torch.set_num_threads(threads)
        policy = load_policy(cfg.model, device="cuda" if cfg.resources.rollout.gpus else "cpu")
        add_run_adapter(policy, cfg)
        prompts = PromptPool(policy, cfg.resources.rollout.prompt_processes)
        versions, cache = VersionedPolicy(policy), VisionCache(cfg.rollout.vision_cache_mb * _MB)
        greedy = cfg.learner.advantage == "greedy"
        generator: GenerationEngine
        if cfg.rollout.engine.kind == "vllm":
            from mmrl_ray.policy.generation.vllm.engine import start_engine

            generator = start_engine(
                policy,
                cfg.rollout.engine,
                cache,
                revision=cfg.model.revision,
                threads=threads,
                timeout_s=cfg.rollout.assignment_timeout_s,
                rows=cfg.rollout.groups_per_assignment * (cfg.rollout.group_size + greedy),
                takes_turns=cfg.resources.takes_turns,
                embeds=True,
            )
        elif cfg.rollout.engine.kind == "openai":
            from mmrl_ray.policy.generation.vllm.remote import start_remote

            generator = start_remote(
                policy,
                cfg.rollout.engine,
                cache,
                run=cfg.run.name,
                versions=cfg.rollout.max_staleness + 1,
                timeout_s=cfg.rollout.assignment_timeout_s,
            )
        else:
            limits = DecodeLimits.of(policy, cfg.rollout.max_new_tokens)
            rows = max(limits.max_rows, cfg.rollout.group_size + greedy)
            generator = LocalEngine(versions, cache, max_rows=rows, prefill_tokens=limits.prefill_tokens)
        generator.require(greedy_extra=greedy, value_guided=cfg.learner.family.decoding_beta > 0)
        if cfg.reward.host == "inline" and any(part.kind == "learned" for part in cfg.reward.parts.values()):
            from mmrl_ray.reward_model.vision_source import share_tower

            share_tower(policy)
        return engines[cfg.learner.family.samples](
            generator,
            Scorer(versions, cache, temperature=cfg.rollout.temperature, engine=generator, prompts=prompts),
            self.reward,
            worker=worker,
            reward_cfg=cfg.reward,
            ship_vision_bytes=cfg.rollout.ship_vision_mb * _MB,
            teacher=self.teacher,
            takes_turns=cfg.resources.takes_turns,
        )
