"""The training loop of a learned reward: pairs by Thurstone's likelihood, ratings by the Gaussian one
(docs/equations.md 15), and beside them the alignment of words with what they look like.

`n` captions, `p` pairs and `r` ratings a step, `K` heads.

`Alignment` of the tokens of pictures and captions, while a reward trains, is no part of the reward itself.
Which of two captions somebody liked better is one noisy bit, and the bits alone take very long to teach what words look
like: on the generated scenes a reward trained on them stays at chance for thousands of captions. That a caption
belongs to its picture rather than to the others of the step says much more, and comes for nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from mmrl_ray.config.reward_model import RewardOptimiserSection
from mmrl_ray.errors import NonFiniteError
from mmrl_ray.experience.carriers import derive_seed
from mmrl_ray.losses.schedule import cosine_scheduler
from mmrl_ray.losses.uncertainty import gaussian_nll, preference_nll
from mmrl_ray.reward_model.data import Batch, Batches, RewardData
from mmrl_ray.reward_model.model import Encoded, HeadOutputs, Member, RewardModel
from mmrl_ray.reward_model.vision_source import RewardModelSpec, VisionSource
from mmrl_ray.telemetry.terminal import ProgressFn

REPORT_EVERY = 25
"""Steps between two calls of the progress function, where they are not long ones."""
_TELL_S = 5.0
_BETAS = (0.9, 0.95)
"""AdamW's. A training is a thousand steps or so: torch's 0.999 would scale its end by gradients of its beginning."""
_FIRST_LOG_TEMPERATURE = 2.0


def train_reward_model(
    model: RewardModel,
    source: VisionSource,
    data: RewardData,
    cfg: RewardOptimiserSection,
    *,
    seed: int,
    progress: ProgressFn | None = None,
) -> list[float]:
    """Trains `model` in place; returns the loss of each step. The same arguments give the same weights on the CPU.

    The members of an ensemble are trained one after the other, each on batches in an order of its own; the loss of a
    step is then the mean over them.

    Raises:
        NonFiniteError: the loss or the gradient norm is NaN or infinite.
    """
    words = model.vocabulary.encode(data.captions, model.spec.max_words)
    total = cfg.steps * len(model.members)
    losses: list[list[float]] = []
    shown = time.monotonic()
    model.train()
    for k, member in enumerate(model.members):
        # The first is as a model without others would be.
        own_seed = seed if k == 0 else derive_seed(seed, "reward member", k)
        objective = _Objective(model.spec, data, cfg, len(member.means), own_seed, model.device)
        batches = Batches(data, cfg.images_per_step, own_seed)
        mine: list[float] = []
        for loss, lr in _train_member(member, objective, batches, words, source, cfg):
            mine.append(loss)
            done = k * cfg.steps + len(mine)
            is_late = time.monotonic() - shown >= _TELL_S
            if progress is not None and (done % REPORT_EVERY == 0 or done in (1, total) or is_late):
                shown = time.monotonic()
                recent = mine[-REPORT_EVERY:]
                progress(done, total, {"loss": sum(recent) / len(recent), "lr": lr})
        losses.append(mine)
    model.eval()
    return [sum(step) / len(step) for step in zip(*losses, strict=True)]


def _train_member(
    member: Member,
    objective: _Objective,
    batches: Batches,
    words: torch.Tensor,
    source: VisionSource,
    cfg: RewardOptimiserSection,
) -> Iterator[tuple[float, float]]:
    """The loss and the next learning rate of each step, as it is done."""
    device = objective.device
    parameters = [*member.parameters(), *objective.alignment.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=cfg.lr, betas=_BETAS, weight_decay=cfg.weight_decay)
    scheduler = cosine_scheduler(optimizer, total_steps=cfg.steps, lr_min=cfg.lr_min, warmup_steps=cfg.warmup_steps)
    for step in range(cfg.steps):
        batch = batches.next()
        some = words[batch.captions]
        longest = int((some != 0).sum(dim=1).max())
        ids = some[:, :longest].to(device)
        encoded = member.encode(source.inputs(batch.pictures, device), ids)
        loss = objective(encoded, member.judge(encoded, batch.of.to(device), ids), batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm)
        for name, value in (("loss", loss.item()), ("gradient norm", float(norm))):
            if not math.isfinite(value):
                raise NonFiniteError(f"reward step {step}: {name} is {value}; lower training.lr or look at the data")
        optimizer.step()
        scheduler.step()
        yield loss.item(), float(scheduler.get_last_lr()[0])


class _Objective:
    """−log likelihood of a batch (means over its pairs, its ratings, the heads), and the alignment of its captions."""

    def __init__(
        self,
        spec: RewardModelSpec,
        data: RewardData,
        cfg: RewardOptimiserSection,
        heads: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self._spec, self._cfg, self.device = spec, cfg, device
        ratings = torch.tensor(data.ratings, dtype=torch.float32)
        self._ratings = (ratings - spec.center) / spec.spread
        self._preferred = torch.tensor(data.preferred, dtype=torch.float32)
        self._liked = torch.tensor(data.liked())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "reward alignment"))
            self.alignment = Alignment(spec.width).to(device)
        # A bootstrap a head (Efron 1979, in Poisson counts): where the data says little, its heads come to differ.
        random = np.random.default_rng(derive_seed(seed, "reward heads"))
        self._pair_counts, self._rating_counts = (
            torch.from_numpy(random.poisson(1.0, (heads, rows)) if heads > 1 else np.ones((1, rows), int))
            for rows in (len(data.pairs), len(data.ratings))
        )

    def __call__(self, encoded: Encoded, outputs: HeadOutputs, batch: Batch) -> torch.Tensor:
        heads = zip(outputs.mean.unbind(1), outputs.log_variance.unbind(1), strict=True)
        terms = [self._head(mean, log_variance, k, batch) for k, (mean, log_variance) in enumerate(heads)]
        loss = torch.stack(terms).mean()
        liked = self._liked[batch.captions]
        if self._cfg.alignment and liked.any() and len(batch.pictures) > 1:
            of, liked = batch.of.to(loss.device), liked.to(loss.device)
            loss = loss + self._cfg.alignment * self.alignment(*encoded, of, liked)
        return loss

    def _head(self, mean: torch.Tensor, log_variance: torch.Tensor, k: int, batch: Batch) -> torch.Tensor:
        loss = mean.sum() * 0.0  # for a batch of which this head sees nothing
        device = mean.device
        seen = torch.repeat_interleave(self._pair_counts[k, batch.pair_rows])
        if len(seen):
            first, second = batch.pairs[seen].to(device).unbind(1)
            preferred = self._preferred[batch.pair_rows[seen]].to(device)
            won = preference_nll(mean[first], log_variance[first], mean[second], log_variance[second])
            lost = preference_nll(mean[second], log_variance[second], mean[first], log_variance[first])
            loss = loss + (preferred * won + (1 - preferred) * lost).mean()
        seen = torch.repeat_interleave(self._rating_counts[k, batch.rating_rows])
        if len(seen):
            rated = batch.rated[seen].to(device)
            target = self._ratings[batch.rating_rows[seen]].to(device)
            loss = loss + self._cfg.rating_weight * gaussian_nll(mean[rated], log_variance[rated], target)
        if not len(self._ratings) and self._spec.sigma_trained:
            # Pairs alone leave the scale free: twice all means and all σ say the same.
            loss = loss + self._cfg.sigma_prior * 0.5 * log_variance.square().mean()
        return loss


class Alignment(nn.Module):
    """Token-wise contrast of captions with pictures (FILIP, Yao et al. 2022, arXiv:2111.07783), one direction of it.

    The similarity of a caption and a picture is the mean over the caption's tokens of the largest cosine to one of the
    picture's tokens, each after a projection, times a learned scale.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.image = nn.Linear(dim, dim, bias=False)
        self.text = nn.Linear(dim, dim, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(_FIRST_LOG_TEMPERATURE))

    def similarity(
        self, image: torch.Tensor, image_mask: torch.Tensor, text: torch.Tensor, text_mask: torch.Tensor
    ) -> torch.Tensor:
        """[n, B] of tokens [B, L, d] and [n, T, d] with their masks."""
        pictures = nn.functional.normalize(self.image(image), dim=-1)
        captions = nn.functional.normalize(self.text(text), dim=-1)
        cosines = torch.einsum("ntd,bld->nbtl", captions, pictures)
        best = cosines.masked_fill(~image_mask[None, :, None, :], -2.0).amax(dim=-1)
        counts = text_mask[:, None, :].to(best.dtype)
        return (best * counts).sum(dim=-1) / counts.sum(dim=-1) * self.log_scale.exp()

    def forward(
        self,
        image: torch.Tensor,
        image_mask: torch.Tensor,
        text: torch.Tensor,
        text_mask: torch.Tensor,
        of: torch.Tensor,
        liked: torch.Tensor,
    ) -> torch.Tensor:
        """Mean −log of the chances that a liked caption is given to its own picture, and is it that its picture takes.

        Args:
            of: int64 [n], each caption's picture.
            liked: bool [n]; one at least. A picture chooses among the one and those of its own that are not liked.
        """
        similarity = self.similarity(image, image_mask, text, text_mask)
        to_picture = nn.functional.cross_entropy(similarity[liked], of[liked])
        own = similarity.gather(1, of[:, None])[:, 0]
        others = (of[liked][:, None] == of[None, :]) & ~liked[None, :]
        rivals = own[None, :].expand(len(others), -1).masked_fill(~others, -torch.inf)
        to_caption = torch.logsumexp(torch.cat([own[liked][:, None], rivals], dim=1), dim=1) - own[liked]
        return to_picture + to_caption.mean()
