"""`mmrl reward train` and `mmrl reward evaluate`: config in, a reward's folder with its report out. Without Ray.

How good a learned reward is on data that it was not trained on: order, likelihood, and whether its σ holds.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch
from rich.console import Console

from mmrl_ray.config.reward_model import RewardDataSection, RewardModelConfig
from mmrl_ray.data.held_out import overlap_with_hashes
from mmrl_ray.data.images import image_hash
from mmrl_ray.data.samples import Quarantine, Sample, dataset_fingerprint, some
from mmrl_ray.errors import DataError
from mmrl_ray.experience.carriers import derive_seed
from mmrl_ray.losses.uncertainty import gaussian_nll, preference_nll
from mmrl_ray.metrics.statistics import RESAMPLES, bootstrap_mean
from mmrl_ray.metrics.text import Tokenizer
from mmrl_ray.preferences.schema import wilson
from mmrl_ray.reward_model.data import Judgement, RewardData, read_judgements
from mmrl_ray.reward_model.fit import train_reward_model
from mmrl_ray.reward_model.model import (
    MODALITIES,
    RewardModel,
    Scores,
    load_reward_model,
    refuse_occupied,
    save_reward_model,
)
from mmrl_ray.reward_model.vision_source import Pixels, PolicyVision, RewardModelSpec, VisionSource, source_of
from mmrl_ray.telemetry.terminal import PlainTable, ProgressFn, say

_SHARES = 1_000_000
_OF_NET = ("fusion", "vision", "image_size", "width", "layers", "heads", "ensemble", "prior", "max_words")
"""What a reward's spec says in the words of `RewardNetSection`."""
COVERAGES = (0.5, 0.8, 0.95)
"""Of the central intervals whose coverage is counted."""


def train_reward(
    cfg: RewardModelConfig,
    *,
    progress: ProgressFn | None = None,
    busy: Callable[[str], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, Any]:
    """Reads the data, trains, looks at the held-out split, and writes `cfg.out`; returns the report that it holds.

    `busy` is entered with a name of what goes on before and after the steps that `progress` is told of.

    Raises:
        ModelError: `cfg.out` is there already, or the vision checkpoint cannot be used.
        DataError: the data cannot be read.
        QuarantineError: more broken rows than `data.max_quarantined`.
        NonFiniteError: training diverged.
    """
    refuse_occupied(cfg.out)
    started = time.monotonic()
    quarantine = Quarantine(cfg.data.max_quarantined)
    with busy("reading the data"):
        train, held_out = _splits(cfg, quarantine)
    with busy("loading the vision model"):
        source = _source(cfg)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(cfg.seed, "reward model"))
        model = RewardModel(_spec(cfg, train, source))
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    read = time.monotonic()
    losses = train_reward_model(model, source, train, cfg.training, seed=cfg.seed, progress=progress)
    trained = time.monotonic()
    with busy("scoring the held-out data"):
        figures = evaluate_reward_model(model, source, held_out)
    report = {
        "held_out": figures,
        "training": {
            "steps": len(losses),
            "loss_first": losses[0],
            "loss_last": losses[-1],
            "pictures": len(train.pictures),
            "captions": len(train.captions),
            "pairs": len(train.pairs),
            "ratings": len(train.ratings),
        },
        "left_out": _left_out(quarantine),
        "seconds": {"reading": read - started, "training": trained - read, "evaluating": time.monotonic() - trained},
        "config": cfg.model_dump(mode="json"),
    }
    save_reward_model(model, cfg.out, report)
    return report


def evaluate_reward(folder: str | Path, data: RewardDataSection, *, cache_mb: int = 1024) -> dict[str, Any]:
    """The figures of a trained reward on all of `data.train`.

    Raises:
        ModelError: the folder cannot be used.
        DataError: the data cannot be read.
        QuarantineError: more broken rows than the budget.
    """
    model = load_reward_model(folder)
    quarantine = Quarantine(data.max_quarantined)
    judgements = read_judgements(data.train, data, quarantine)
    source = source_of(model.spec, cache_mb << 20)
    figures = evaluate_reward_model(model, source, RewardData.of_judgements(judgements))
    return {"held_out": figures, "left_out": _left_out(quarantine)}


def print_report(report: dict[str, Any], console: Console | None = None) -> None:
    """The held-out figures as tables: one line for all, one a part; an accuracy with Wilson's 95 % interval."""
    console = console or Console()
    found = report["held_out"]
    pairs, ratings = found.get("pairs"), found.get("ratings")
    if pairs:
        table = _table("pairs", ("pairs", "accuracy", "95 % interval", "expected", "NLL"))
        for part, row in (("all", pairs), *pairs["parts"].items()):
            accuracy, expected, nll = (_figure(row[name]) for name in ("accuracy", "expected", "nll"))
            table.add_row(part, f"{row['count']:,}", accuracy, _interval(row), expected, nll)
        console.print(table)
    if ratings:
        table = _table("ratings", ("ratings", "RMSE", "95 % interval", "NLL", "in 50 %", "in 80 %", "in 95 %"))
        for name, row in (("all", ratings), *ratings["parts"].items()):
            coverage = row.get("coverage", {})
            figures = (row["rmse"], row.get("nll"), *(coverage.get(share) for share in ("0.5", "0.8", "0.95")))
            rmse, *others = map(_figure, figures)
            interval = " … ".join(map(_figure, row.get("rmse_interval", ()))) or "–"
            table.add_row(name, f"{row['count']:,}", rmse, interval, *others)
        console.print(table)
    for reason, count in report["left_out"]["reasons"].items():
        say(console, f"left out: {count} rows: {reason}")


def _splits(cfg: RewardModelConfig, quarantine: Quarantine) -> tuple[RewardData, RewardData]:
    """Training and held-out data; no picture is in both."""
    train = read_judgements(cfg.data.train, cfg.data, quarantine)
    if cfg.data.eval is not None:
        held_out = read_judgements(cfg.data.eval, cfg.data, quarantine)
        pictures = [Sample(image_hash(picture), picture, "") for picture in {row.picture: None for row in held_out}]
        both = overlap_with_hashes(pictures, (image_hash(row.picture) for row in train), cfg.data.train)
        if both.found:
            raise DataError(
                f"{len(both.found)} of {both.samples} pictures of {cfg.data.eval} are in {cfg.data.train}, too: "
                f"nothing is held out; the first: {some(both.found, 3)}"
            )
    else:
        held_out = [row for row in train if _is_held_out(row, cfg)]
        train = [row for row in train if not _is_held_out(row, cfg)]
        if not train or not held_out:
            raise DataError(f"{cfg.data.train} has too few pictures to hold {cfg.data.held_out:g} of them out")
    return RewardData.of_judgements(train), RewardData.of_judgements(held_out)


def _is_held_out(row: Judgement, cfg: RewardModelConfig) -> bool:
    place = derive_seed(cfg.seed, "held out", image_hash(row.picture)) % _SHARES
    return place < cfg.data.held_out * _SHARES


def _source(cfg: RewardModelConfig) -> VisionSource:
    budget = cfg.vision_cache_mb << 20
    return Pixels(cfg.net.image_size, budget) if cfg.net.vision is None else PolicyVision.load(cfg.net.vision, budget)


def _spec(cfg: RewardModelConfig, data: RewardData, source: VisionSource) -> RewardModelSpec:
    net = cfg.net
    center, spread = data.center_and_spread()
    fingerprints = {
        name: {"path": path, "fingerprint": dataset_fingerprint(path)}
        for name, path in (("train", cfg.data.train), ("eval", cfg.data.eval))
        if path is not None
    }
    policy = source if isinstance(source, PolicyVision) else None
    return RewardModelSpec(
        **{name: getattr(net, name) for name in _OF_NET},
        vision_key=policy.policy.revision_key if policy else None,
        feature_dim=policy.feature_dim if policy else None,
        vocabulary=data.vocabulary(net.vocabulary),
        tokenizer=Tokenizer.UNICODE,
        center=center,
        spread=spread,
        sigma_trained=net.sigma,
        data={**fingerprints, "pairs": len(data.pairs), "ratings": len(data.ratings), "scale": cfg.data.rating_scale},
    )


def _left_out(quarantine: Quarantine) -> dict[str, Any]:
    reasons = Counter(record.reason for record in quarantine.records)
    return {
        "rows": len(quarantine),
        "reasons": dict(reasons.most_common()),
        "records": [record.as_dict() for record in quarantine.records],
    }


def _table(title: str, columns: tuple[str, ...]) -> PlainTable:
    return PlainTable("part", *columns, right=columns, title=f"held-out {title}")


def _interval(row: Mapping[str, Any]) -> str:
    count = row.get("decided", 0)  # reports from before it was written have none
    if not count:
        return "–"
    right = round(row["accuracy"] * count)
    share = wilson([True] * right + [False] * (count - right))
    return f"{share.low:.3f} … {share.high:.3f}"


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def evaluate_reward_model(model: RewardModel, source: VisionSource, data: RewardData) -> dict[str, Any]:
    """JSON-able figures, over all and by part.

    `pairs`: count, decided (those that are no ties), accuracy of the decided, nll (mean −log Φ(z)), expected (the
    accuracy that the model itself expects, the mean of Φ(|z|); near the accuracy where σ fits). `ratings`: count, rmse
    and rmse_interval (95 %, by bootstrap), nll (docs/equations.md 15, in units of the ratings), coverage of the central
    50, 80 and 95 % intervals. What a split has none of is left out.
    """
    scores = model.score(source, [data.pictures[i] for i in data.of], data.captions)
    figures: dict[str, Any] = {"pictures": len(data.pictures), "captions": len(data.captions)}
    if data.pairs:
        figures["pairs"] = _with_parts(data.pair_parts, lambda rows: _pair_figures(scores, data, rows))
    if data.ratings:
        trained = model.spec.sigma_trained
        figures["ratings"] = _with_parts(
            data.rating_parts, lambda rows: _rating_figures(scores, data, rows, sigma_trained=trained)
        )
    if model.spec.sigma_trained:
        figures["sigma"] = {"mean": float(scores.sigma.mean()), "least": float(scores.sigma.min())}
        figures["sigma"]["greatest"] = float(scores.sigma.max())
    if scores.weights is not None:
        means = scores.weights.mean(dim=0).tolist()
        figures["fusion_weights"] = dict(zip(MODALITIES, means, strict=True))
    return figures


def _with_parts(parts: Sequence[str], figures: Callable[[list[int]], dict[str, Any]]) -> dict[str, Any]:
    rows: dict[str, list[int]] = {}
    for row, part in enumerate(parts):
        rows.setdefault(part, []).append(row)
    return {**figures(list(range(len(parts)))), "parts": {part: figures(rows[part]) for part in sorted(rows)}}


def _pair_figures(scores: Scores, data: RewardData, rows: list[int]) -> dict[str, Any]:
    first, second = torch.tensor([data.pairs[row] for row in rows]).unbind(1)
    preferred = torch.tensor([data.preferred[row] for row in rows], dtype=torch.float64)
    mean, sigma = scores.mean.double(), scores.sigma.double()
    log_variance = 2 * sigma.log()
    won = preference_nll(mean[first], log_variance[first], mean[second], log_variance[second])
    lost = preference_nll(mean[second], log_variance[second], mean[first], log_variance[first])
    decided = preferred != 0.5
    right = (mean[first] > mean[second]) == (preferred == 1.0)
    return {
        "count": len(rows),
        "decided": int(decided.sum()),
        "accuracy": float(right[decided].double().mean()) if decided.any() else None,
        "nll": float((preferred * won + (1 - preferred) * lost).mean()),
        "expected": float(torch.exp(-torch.minimum(won, lost)).mean()),
    }


def _rating_figures(scores: Scores, data: RewardData, rows: list[int], *, sigma_trained: bool) -> dict[str, Any]:
    captions = torch.tensor([data.rated[row] for row in rows])
    target = torch.tensor([data.ratings[row] for row in rows], dtype=torch.float64)
    mean, sigma = scores.mean[captions].double(), scores.sigma[captions].double()
    squares = bootstrap_mean((target - mean).square().tolist(), resamples=RESAMPLES)
    figures: dict[str, Any] = {"count": len(rows), "rmse": math.sqrt(squares.mean)}
    if squares.known:
        figures["rmse_interval"] = [math.sqrt(squares.low), math.sqrt(squares.high)]
    if sigma_trained:
        distance = (target - mean).abs() / sigma
        figures["nll"] = float(gaussian_nll(mean, 2 * sigma.log(), target))
        figures["coverage"] = {
            f"{share:g}": float((distance <= NormalDist().inv_cdf(0.5 + share / 2)).double().mean())
            for share in COVERAGES
        }
    return figures
