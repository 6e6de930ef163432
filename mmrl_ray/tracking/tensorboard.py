"""TensorBoard: event files in `tb/` of the run folder, written without torch. One file for each process that writes."""

from __future__ import annotations

import io
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.text.metadata import create_summary_metadata
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from mmrl_ray.errors import TrackerError
from mmrl_ray.tracking.base import About, Table, Tracker

_BINS = 30


class TensorBoard(Tracker):
    """Scalars, images, texts and histograms."""

    rewinds = True

    def __init__(self, about: About) -> None:
        """Raises a TrackerError where the run folder is not on this machine."""
        super().__init__(about)
        if about.folder is None:
            raise TrackerError("tracking: tensorboard writes into the run folder, which is not on this machine")
        self._folder = Path(about.folder) / "tb"
        self._writer: Any = None

    def check(self) -> str:
        """Where the event files will be."""
        return str(self._folder)

    def open(self) -> str | None:
        """Begins a file; the config stands in it as text."""
        self._writer = EventFileWriter(str(self._folder))
        if self.about.id is None:
            text = yaml.safe_dump(dict(self.about.config), sort_keys=False, allow_unicode=True)
            self._text("config", 0, "\n".join(f"    {line}" for line in text.splitlines()))
        self._writer.flush()
        return "tb"

    def rewind(self, step: int) -> None:
        """TensorBoard drops what it has read of that step and later ones."""
        self._add(step, session_log=SessionLog(status=SessionLog.START))

    def metrics(self, step: int, figures: Mapping[str, float]) -> None:
        """A scalar each."""
        self._summary(step, [Summary.Value(tag=name, simple_value=value) for name, value in figures.items()])

    def table(self, name: str, step: int, table: Table) -> None:
        """Each picture below a tag of its own, so that the slider shows it over the steps; the rest as one text."""
        values = []
        for place, picture in enumerate(table.pictures()):
            with Image.open(io.BytesIO(picture.png)) as image:
                width, height = image.size
            shown = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=picture.png)
            values.append(Summary.Value(tag=f"{name}/{place}", image=shown))
        self._summary(step, values)
        self._text(name, step, _markdown(table))

    def histogram(self, name: str, step: int, values: Sequence[float]) -> None:
        """Of equal bins."""
        found = np.asarray(values, dtype=np.float64)
        if not found.size:
            return
        counts, edges = np.histogram(found, bins=_BINS)
        proto = HistogramProto(
            min=found.min(),
            max=found.max(),
            num=found.size,
            sum=found.sum(),
            sum_squares=float(found @ found),
            bucket_limit=edges[1:].tolist(),
            bucket=counts.tolist(),
        )
        self._summary(step, [Summary.Value(tag=name, histo=proto)])

    def close(self, failed: bool) -> None:
        """Ends the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _text(self, name: str, step: int, text: str) -> None:
        tensor = TensorProto(
            dtype=DT_STRING,
            string_val=[text.encode()],
            tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)]),
        )
        metadata = create_summary_metadata(display_name="", description="")
        self._summary(step, [Summary.Value(tag=f"{name}/text_summary", metadata=metadata, tensor=tensor)])

    def _summary(self, step: int, values: Sequence[Any]) -> None:
        self._add(step, summary=Summary(value=values))

    def _add(self, step: int, **content: Any) -> None:
        self._writer.add_event(Event(wall_time=time.time(), step=step, **content))
        self._writer.flush()


def _markdown(table: Table) -> str:
    columns = [name for name in table.columns if name != "picture"]
    rows = [[_cell(row.get(name)) for name in columns] for row in table.texts()]
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
    return " ".join(text.replace("|", "\\|").split())
