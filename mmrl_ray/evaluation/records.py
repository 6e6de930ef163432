"""What an evaluation leaves in the run folder: captions with their scores, and states.

    eval/NAME.parquet       the captions and their scores; the pictures worth showing lie under `images/`
    analysis/NAME.parquet   the states of the captions, so that a report needs no model

Plain nested types, so that duckdb, pandas and Hugging Face `datasets` open the files as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from mmrl_ray.analysis.correlation import Correlation, correlations
from mmrl_ray.data.images import image_extension, image_hash
from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import RunError, one_line
from mmrl_ray.evaluation.scores import CaptionScore, Evaluation, paired
from mmrl_ray.experience.carriers import MODALITIES, CaptionState, RewardBreakdown
from mmrl_ray.metrics.statistics import resolution
from mmrl_ray.metrics.text import Tokenizer
from mmrl_ray.run_records.run_dir import RunDir

FOLDER = "eval"
IMAGES = "images"
SHOWN = 12
"""Samples a report shows."""

_SEED_KEY = "mmrl.bootstrap_seed"
_TOKENIZER_KEY = "mmrl.tokenizer"
_PART = pa.struct([("name", pa.string()), ("value", pa.float64()), ("weight", pa.float64())])
_SCORE = pa.struct([("name", pa.string()), ("value", pa.float64())])
EVAL_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("sample_place", pa.string()),  # shard and row, by which a row is known: ids may repeat
        pa.field("image_hashes", pa.list_(pa.string()), nullable=False),  # SHA-256 of each encoded picture
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("references", pa.list_(pa.string()), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("reward", pa.float64()),  # null where the reward failed on the caption
        pa.field("no_reward", pa.string()),  # why
        pa.field("reward_sigma", pa.float64()),
        pa.field("reward_parts", pa.list_(_PART), nullable=False),  # weight null for parts of parts
        pa.field("scores", pa.list_(_SCORE), nullable=False),  # cider_d, rouge_l, caption/words, …
    ]
)
STATES_FOLDER = "analysis"
MAX_STATES = 512
"""Samples whose states are kept: enough for a map and a correlation, a few MB of a large model."""

_CEILING = 0.001
"""p-values below are only said to be below."""
_VECTOR = pa.list_(pa.float32())
STATE_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("sample_place", pa.string()),  # shard and row, by which a row is known: ids may repeat
        pa.field("action", _VECTOR, nullable=False),  # mean embedding of the caption's tokens
        *(pa.field(name, _VECTOR, nullable=False) for name in MODALITIES),  # mean input embedding of the modality
        pa.field("hidden", _VECTOR, nullable=False),  # mean last hidden state behind the caption's tokens
    ]
)


def save_evaluation(run: RunDir, name: str, evaluation: Evaluation, samples: Sequence[Sample]) -> None:
    """Writes `eval/NAME.parquet` and stores the pictures that a report will show.

    Those are the first ones and, when `name` is "after" and "before" is there, the samples that changed most: a
    large split's pictures need not be copied into every run.

    Raises:
        RunError: the folder cannot be written.
    """
    table = pa.Table.from_pylist([_row(c) for c in evaluation.captions], schema=EVAL_SCHEMA)
    table = table.replace_schema_metadata({_SEED_KEY: str(evaluation.seed), _TOKENIZER_KEY: evaluation.tokenizer.value})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    run.write_bytes(f"{FOLDER}/{name}.parquet", sink.getvalue().to_pybytes())
    shown = [*evaluation.captions[:SHOWN]]
    shown += [c for chosen in doubtful(evaluation.captions).values() for c in chosen]
    before = load_evaluation(run, "before") if name == "after" else None
    if before is not None:
        chosen = highlights(before.captions, evaluation.captions)
        shown += [after for pairs in chosen.values() for _, after in pairs]
    _store_images(run, samples, {digest for c in shown for digest in c.image_hashes})


def load_evaluation(run: RunDir, name: str) -> Evaluation | None:
    """What `save_evaluation` wrote under that name; None when it is not there, a RunError where it cannot be read."""
    file = f"{FOLDER}/{name}.parquet"
    if not run.exists(file):
        return None
    try:
        table = pq.read_table(pa.BufferReader(run.read_bytes(file)))
        metadata = table.schema.metadata or {}
        seed = int(metadata.get(_SEED_KEY.encode(), 0))
        tokenizer = Tokenizer(metadata.get(_TOKENIZER_KEY.encode(), Tokenizer.WORD_RUNS.encode()).decode())
        return Evaluation(tuple(_caption_score(row) for row in table.to_pylist()), seed, tokenizer)
    except (pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise RunError(f"{run.full_path(file)} is not an evaluation ({one_line(error)}); evaluate again") from error


def highlights(
    before: Sequence[CaptionScore], after: Sequence[CaptionScore], count: int = SHOWN
) -> dict[str, list[tuple[CaptionScore, CaptionScore]]]:
    """About `count` (before, after) pairs: a third each of the best gains, the middle, and the worst losses.

    Under the keys "best", "middle" and "worst"; no sample twice, best and worst first where samples are few.
    """
    gains = [
        (new.reward.total - old.reward.total, (old, new))
        for old, new in paired(before, after)
        if old.reward is not None and new.reward is not None
    ]
    ranked = [pair for _, pair in sorted(gains, key=lambda each: -each[0])]
    third = max(1, min(count // 3, -(-len(ranked) // 3)))
    best = ranked[:third]
    rest = ranked[third:]
    worst = rest[-third:][::-1] if rest else []
    between = rest[: len(rest) - len(worst)]
    start = max(0, (len(between) - third) // 2)
    return {"best": best, "middle": between[start : start + third], "worst": worst}


def doubtful(captions: Sequence[CaptionScore], count: int = SHOWN // 3) -> dict[str, list[CaptionScore]]:
    """Up to `count` captions each that the reward is least sure of: by its σ, and by how much its parts disagree.

    Under the keys "sigma" (without those whose reward has none) and "disagreement" (without any where there are not
    two parts that vary).
    """
    rewards = [(c.reward, c) for c in captions if c.reward is not None]
    unsure = sorted(((reward.sigma, c) for reward, c in rewards if reward.sigma is not None), key=lambda pair: -pair[0])
    distances = _disagreements([reward for reward, _ in rewards])
    apart = sorted(zip(distances, (c for _, c in rewards), strict=True), key=lambda pair: -pair[0])
    return {
        "sigma": [c for _, c in unsure[:count]],
        "disagreement": [c for distance, c in apart[:count] if distance > 0],
    }


def _disagreements(rewards: Sequence[RewardBreakdown]) -> list[float]:
    """Of each reward, the largest difference between two parts, in standard deviations of the part over all of them.

    Parts are those with a weight; of a lone one its own parts, but for the length, a penalty.
    """
    if not rewards:
        return []
    parts, weights = rewards[0].parts, rewards[0].weights
    names = [name for name, weight in weights.items() if weight]
    if len(names) == 1:
        names = [name for name in parts if name.startswith(f"{names[0]}/") and not name.endswith("/length")]
    names = [name for name in names if all(name in reward.parts for reward in rewards)]
    values = np.array([[reward.parts[name] for name in names] for reward in rewards]).reshape(len(rewards), -1)
    spread = values.std(axis=0)
    varying = np.ptp(values, axis=0) > resolution(np.abs(values).max(axis=0))
    if varying.sum() < 2:
        return [0.0] * len(rewards)
    standard = (values - values.mean(axis=0))[:, varying] / spread[varying]
    return np.ptp(standard, axis=1).tolist()


def find_image(run: RunDir, digest: str, names: Sequence[str]) -> bytes | None:
    """The stored picture of that hash; `names` is `run.list("images")`."""
    name = next((n for n in names if n.split(".", 1)[0] == digest), None)
    return None if name is None else run.read_bytes(f"{IMAGES}/{name}")


def _store_images(run: RunDir, samples: Sequence[Sample], wanted: set[str]) -> None:
    """Those with a hash in `wanted`."""
    there = {name.split(".", 1)[0] for name in run.list(IMAGES)}
    for sample in samples:
        for image in sample.images:
            digest = image_hash([image])
            if digest in wanted and digest not in there:
                run.write_bytes(f"{IMAGES}/{digest}.{image_extension(image)}", image)
                there.add(digest)


def _row(score: CaptionScore) -> dict[str, Any]:
    reward = score.reward
    return {
        "sample_id": score.sample_id,
        "sample_place": score.place or None,
        "image_hashes": list(score.image_hashes),
        "prompt": score.prompt,
        "references": list(score.references),
        "caption": score.caption,
        "reward": None if reward is None else reward.total,
        "no_reward": score.no_reward or None,
        "reward_sigma": None if reward is None else reward.sigma,
        "reward_parts": []
        if reward is None
        else [{"name": n, "value": v, "weight": reward.weights.get(n)} for n, v in reward.parts.items()],
        "scores": [{"name": n, "value": v} for n, v in score.scores.items()],
    }


def _caption_score(row: dict[str, Any]) -> CaptionScore:
    parts = row["reward_parts"]
    reward = (
        None
        if row["reward"] is None
        else RewardBreakdown(
            total=row["reward"],
            parts={p["name"]: p["value"] for p in parts},
            weights={p["name"]: p["weight"] for p in parts if p["weight"] is not None},
            sigma=row["reward_sigma"],
        )
    )
    return CaptionScore(
        sample_id=row["sample_id"],
        image_hashes=tuple(row["image_hashes"]),
        prompt=row["prompt"],
        references=tuple(row["references"]),
        caption=row["caption"],
        reward=reward,
        scores={s["name"]: s["value"] for s in row["scores"]},
        place=row.get("sample_place") or "",
        no_reward=row.get("no_reward") or "",
    )


@dataclass(frozen=True)
class States:
    """N captions of one policy; `d` is the language model's width."""

    sample_ids: tuple[str, ...]
    actions: torch.Tensor
    """float32 [N, d]."""
    modalities: Mapping[str, torch.Tensor]
    """float32 [N, d] each."""
    hidden: torch.Tensor
    """float32 [N, d]."""
    places: tuple[str, ...] = ()
    """Of each row in its data set; none in files from before they were written."""

    @classmethod
    def of(cls, samples: Sequence[Sample], states: Sequence[CaptionState]) -> States:
        """One or more states, each of the sample at its place in the list."""
        return cls(
            sample_ids=tuple(sample.id for sample in samples),
            actions=torch.stack([state.action for state in states]),
            modalities={name: torch.stack([state.modalities[name] for state in states]) for name in MODALITIES},
            hidden=torch.stack([state.hidden for state in states]),
            places=tuple(sample.place for sample in samples) if all(sample.place for sample in samples) else (),
        )

    def same_rows(self, other: States) -> bool:
        """Whether both are of the same rows, in the same order."""
        same_places = self.places == other.places or not (self.places and other.places)
        return self.sample_ids == other.sample_ids and same_places

    @cached_property
    def correlations(self) -> dict[str, Correlation]:
        """|ρ| of what is said with each modality and with all (docs/equations.md 17); nan for a single caption."""
        if len(self.sample_ids) < 2:
            return {name: Correlation(math.nan, math.nan) for name in MODALITIES}
        return correlations(self.actions, self.modalities)


def save_states(run: RunDir, name: str, states: States) -> None:
    """Writes `analysis/NAME.parquet`.

    Raises:
        RunError: the folder cannot be written.
    """
    columns = [states.actions, *(states.modalities[name] for name in MODALITIES), states.hidden]
    places = pa.array(states.places or [None] * len(states.sample_ids), pa.string())
    arrays = [
        pa.array(states.sample_ids),
        places,
        *(pa.array(list(column.numpy()), type=_VECTOR) for column in columns),
    ]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_arrays(arrays, schema=STATE_SCHEMA), sink, compression="zstd")
    run.write_bytes(f"{STATES_FOLDER}/{name}.parquet", sink.getvalue().to_pybytes())


def load_states(run: RunDir, name: str) -> States | None:
    """What `save_states` wrote under that name; None when it is not there, a RunError where it cannot be read."""
    file = f"{STATES_FOLDER}/{name}.parquet"
    if not run.exists(file):
        return None
    try:
        table = pq.read_table(pa.BufferReader(run.read_bytes(file)), schema=STATE_SCHEMA)
        columns = {field.name: table.column(field.name).to_pylist() for field in STATE_SCHEMA}
        vectors = {key: torch.tensor(columns[key]) for key in columns if not key.startswith("sample_")}
        if any(vector.ndim != 2 or not bool(torch.isfinite(vector).all()) for vector in vectors.values()):
            raise ValueError("its vectors are not finite numbers of one length")
    except (pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise RunError(f"{run.full_path(file)} holds no states ({one_line(error)}); train again without it") from error
    modalities = {name: vectors[name] for name in MODALITIES}
    places = () if None in columns["sample_place"] else tuple(columns["sample_place"])
    return States(tuple(columns["sample_id"]), vectors["action"], modalities, vectors["hidden"], places)


def correlations_json(found: Mapping[str, Correlation]) -> dict[str, dict[str, float]]:
    """Correlations as they stand in `summary.json` and in what `mmrl evaluate` writes."""
    return {name: {"rho": each.rho, "p_value": each.p_value} for name, each in found.items()}


def correlation_lines(found: Mapping[str, Correlation]) -> list[tuple[str, str, str]]:
    """(modality, |ρ|, p) in words, for a table."""
    return [
        (name, "–", "one side does not vary")
        if math.isnan(each.rho)
        else (name, f"{each.rho:.3f}", f"p < {_CEILING:g}" if each.p_value < _CEILING else f"p = {each.p_value:.3f}")
        for name, each in found.items()
    ]


def states_json(sides: Mapping[str, States | None]) -> dict[str, Any]:
    """`correlations` of the summary: those of each side that there is."""
    return {name: correlations_json(states.correlations) for name, states in sides.items() if states is not None}
