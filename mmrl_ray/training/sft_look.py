"""Looks at held-out pictures while a supervised training goes on: the loss of their references, and greedy captions.

The loss is the mean over all tokens of all references, by the same code as in training; captions are scored by the
measures of an evaluation. Nothing of the training depends on a look, nor a look on what was looked at before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from mmrl_ray.config import Config
from mmrl_ray.data.samples import Quarantine, Sample, iter_references, read_split, told
from mmrl_ray.errors import DataError
from mmrl_ray.evaluation.samples import BATCH, caption_samples
from mmrl_ray.evaluation.scores import evaluation_blindness, rewarded_captions
from mmrl_ray.experience.carriers import RewardFailure
from mmrl_ray.metrics.overlap import CiderD
from mmrl_ray.metrics.text import CorpusStatistics
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.prompts import check_context, encode_caption, encode_prompts
from mmrl_ray.policy.scoring.prefix import ScorePath, score_completions
from mmrl_ray.policy.vision import VisionCache, vision_features
from mmrl_ray.training.sft_data import micro_batches

_NO_REWARD = RewardFailure("a warm start has no reward")


class HeldOut:
    """The first rows of `data.eval`, and what is needed to measure captions of them."""

    def __init__(self, cfg: Config, limit: int | None) -> None:
        """Reads the rows, and counts the words of the training references, by which CIDEr-D weighs words.

        Raises:
            DataError: there is no held-out split, it cannot be read, or a row of it has no references.
            QuarantineError: more broken rows than are tolerated.
        """
        if cfg.data.eval is None:
            raise DataError("sft.eval_every looks at held-out pictures, and there are none: write data.eval")
        broken = Quarantine(cfg.data.max_quarantined, source=cfg.data.eval)
        self._samples: Sequence[Sample] = read_split(
            cfg.data.eval, prompt=cfg.data.prompt, limit=limit, quarantine=broken
        )
        self.note = told(broken.records) if len(broken) else None
        """What was left out, in words."""
        bare = next((sample.id for sample in self._samples if not sample.references), None)
        if bare is not None:
            raise DataError(
                f"sample {bare!r} of {cfg.data.eval} has no references to measure by; add some, leave it out, or "
                "take sft.eval_every away"
            )
        references = iter_references(cfg.data.train)
        statistics = CorpusStatistics.from_references(references, language_order=cfg.reward.language_order)
        self._cider, self._tokenizer = CiderD(statistics), statistics.tokenizer
        self._cfg = cfg

    def look(
        self, policy: Policy, cache: VisionCache, path: ScorePath, budget: int, tell: Callable[[], None]
    ) -> dict[str, Any]:
        """`loss` (nats a token), measures of greedy captions by their names, and `blind` where they do not depend on
        the picture. `tell` is called as it goes.

        Args:
            policy: in whatever state its training is; no gradient is made.
            cache: for vision features, where nothing before the language model trains.
            path: by which captions are scored.
            budget: tokens of a pass.

        Raises:
            ContextLengthError: a prompt and its caption exceed the model's context.
            ModelError: a row cannot be encoded.
        """
        cfg = self._cfg
        with torch.no_grad():
            loss = self._loss(policy, cache, path, budget, tell)
            captions = caption_samples(
                policy,
                self._samples,
                max_new_tokens=cfg.rollout.max_new_tokens,
                vision_cache=cache,
                progress=lambda *_: tell(),
            )
        failed = [_NO_REWARD] * len(captions)
        evaluation = rewarded_captions(self._samples, captions, failed, self._cider, self._tokenizer, seed=cfg.run.seed)
        wanted = [name for name in cfg.eval.logged if name in evaluation.names and not name.startswith("reward")]
        measures = {name: found.mean for name in wanted if (found := evaluation.measure(name)) is not None}
        blind = evaluation_blindness(evaluation)
        return {
            "samples": len(captions),
            "loss": loss,
            **measures,
            **({"blind": blind.told("these captions")} if blind is not None else {}),
        }

    def _loss(
        self, policy: Policy, cache: VisionCache, path: ScorePath, budget: int, tell: Callable[[], None]
    ) -> float:
        total, tokens = 0.0, 0
        for start in range(0, len(self._samples), BATCH):  # pictures of so many are in memory at a time
            samples = self._samples[start : start + BATCH]
            prompts = encode_prompts(policy, samples)
            texts = [[encode_caption(policy, text) for text in sample.references] for sample in samples]
            batch = list(zip(prompts, texts, strict=True))
            for prompt, each in batch:
                check_context(policy, prompt, max(text.numel() for text in each))
            for indices in micro_batches(batch, budget):
                tell()
                chosen = [prompts[i] for i in indices]
                features = vision_features(policy, chosen, cache) if policy.inject_vision else None
                scores = score_completions(policy, chosen, features, [texts[i] for i in indices], 1.0, path=path)
                total -= float(scores.logprobs.sum(dtype=torch.float64))
                tokens += int(scores.mask.sum())
        return total / tokens
