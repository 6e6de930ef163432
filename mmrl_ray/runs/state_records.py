"""The states of an evaluation's captions in the run folder: `analysis/NAME.parquet`, so that a report needs no model.

Plain lists of numbers, so that duckdb, pandas and Hugging Face `datasets` open the files as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from mmrl_ray.analysis.correlation import Correlation, correlations
from mmrl_ray.analysis.rows import MODALITIES
from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import RunError
from mmrl_ray.experience.carriers import CaptionState
from mmrl_ray.run_dir import RunDir

FOLDER = "analysis"
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
    run.write_bytes(f"{FOLDER}/{name}.parquet", sink.getvalue().to_pybytes())


def load_states(run: RunDir, name: str) -> States | None:
    """What `save_states` wrote under that name; None when it is not there.

    Raises:
        RunError: the file cannot be read.
    """
    file = f"{FOLDER}/{name}.parquet"
    if not run.exists(file):
        return None
    try:
        table = pq.read_table(pa.BufferReader(run.read_bytes(file)), schema=STATE_SCHEMA)
        columns = {field.name: table.column(field.name).to_pylist() for field in STATE_SCHEMA}
        vectors = {key: torch.tensor(columns[key]) for key in columns if not key.startswith("sample_")}
        if any(vector.ndim != 2 or not bool(torch.isfinite(vector).all()) for vector in vectors.values()):
            raise ValueError("its vectors are not finite numbers of one length")
    except (pa.ArrowException, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise RunError(f"{run.full_path(file)} holds no states ({reason}); train again without it") from error
    modalities = {name: vectors[name] for name in MODALITIES}
    places = () if None in columns["sample_place"] else tuple(columns["sample_place"])
    return States(tuple(columns["sample_id"]), vectors["action"], modalities, vectors["hidden"], places)


def correlations_json(found: Mapping[str, Correlation]) -> dict[str, dict[str, float]]:
    """As they stand in `summary.json` and in what `mmrl evaluate` writes."""
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
