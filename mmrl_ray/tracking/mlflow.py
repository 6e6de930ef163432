"""MLflow, by its client: a server, SQLite or a folder. `mlflow-skinny` is enough.

It has neither tables nor histograms of its own: captions are a page with pictures and a JSON table among the artifacts,
and of all values of a step the quantiles are metrics.
"""

from __future__ import annotations

import base64
import html
import json
import os
import posixpath
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mmrl_ray.errors import TrackerError, first_line
from mmrl_ray.tracking.base import About, Picture, Table, Tracker

_PARAMS = 100
"""Of one request, as of MLflow's limits."""
_METRICS = 1000
_LONGEST = 500
"""Characters of a parameter: servers of before MLflow 2.8 take no more. `config.yaml` has all of them."""
_NOT_IN_NAMES = re.compile(r"[^\w\-. :/]")
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_STYLE = "<style>td,th{padding:4px 8px;text-align:left;vertical-align:top;font:13px sans-serif}</style>"


class Mlflow(Tracker):
    """A run of an experiment."""

    def __init__(self, about: About, *, uri: str | None) -> None:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # the run's own retries come on top
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        import mlflow.entities
        import mlflow.exceptions

        super().__init__(about)
        self._mlflow: Any = mlflow
        self._uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('mlflow.db').absolute()}"
        self._client: Any = None
        self._id = ""

    def check(self) -> str:
        """Asks the store for an experiment.

        Raises:
            TrackerError: it is out of reach.
        """
        try:
            self._connect().get_experiment_by_name(self.about.project)
        except Exception as error:
            raise TrackerError(
                f"tracking: mlflow: {self._uri} cannot be used ({first_line(error)}): start that server, or "
                "write tracking.mlflow.uri: sqlite:///mlflow.db"
            ) from error
        return f"{self._uri}, experiment {self.about.project}"

    def open(self) -> str:
        """Begins the run, or goes on with the one of that id; a config that has changed is a tag, for parameters are
        written once."""
        client, experiment = self._connect(), self._experiment()
        known: Mapping[str, str] = {}
        id = self._id or self.about.id  # the first is of an attempt that did not come to its end
        try:
            known = {} if id is None else client.get_run(id).data.params
            self._id = id or ""
        except self._mlflow.exceptions.MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            self._id = ""
        if self._id:
            client.update_run(self._id, status="RUNNING")
        else:
            self._id = client.create_run(experiment, run_name=self.about.run).info.run_id
            folder = self.about.folder
            if folder is not None:
                client.set_tag(self._id, "mmrl.folder", folder)
        for write in (partial(self._write_params, known), self._write_config):
            try:
                write()
            except Exception as error:  # noqa: BLE001 - services have limits of their own, and figures matter more
                print(f"the config is left out: {error}", file=sys.stderr)
        return self._id

    def _write_config(self) -> None:
        text = yaml.safe_dump(dict(self.about.config), sort_keys=False, allow_unicode=True)
        self._client.log_text(self._id, text, "config.yaml")

    def _write_params(self, known: Mapping[str, str]) -> None:
        client = self._client
        params = {name: value[:_LONGEST] for name, value in _leaves(self.about.config)}
        fresh = [self._mlflow.entities.Param(name, value) for name, value in params.items() if name not in known]
        for start in range(0, len(fresh), _PARAMS):
            client.log_batch(self._id, params=fresh[start : start + _PARAMS])
        changed = [
            self._mlflow.entities.RunTag(f"changed.{name}", value)
            for name, value in params.items()
            if known.get(name, value) != value
        ]
        if changed:
            client.log_batch(self._id, tags=changed[:_PARAMS])

    def next_step(self) -> int | None:
        """The step after the last whose version is there."""
        history = self._client.get_metric_history(self._id, "policy_version")
        return max((metric.step for metric in history), default=-1) + 1

    def metrics(self, step: int, figures: Mapping[str, float]) -> None:
        """In one request; a name has letters, digits and `-_. :/` alone."""
        now = int(time.time() * 1000)
        metrics = [self._mlflow.entities.Metric(_name(name), value, now, step) for name, value in figures.items()]
        for start in range(0, len(metrics), _METRICS):
            self._client.log_batch(self._id, metrics=metrics[start : start + _METRICS])

    def table(self, name: str, step: int, table: Table) -> None:
        """`NAME/step-N.html`, with pictures, and `NAME/step-N.json`, without."""
        file = f"{_name(name)}/step-{step:06d}"
        columns = [column for column in table.columns if column != "picture"]
        rows = [[row.get(column) for column in columns] for row in table.texts()]
        self._client.log_text(self._id, json.dumps({"columns": columns, "data": rows}), f"{file}.json")
        self._client.log_text(self._id, _page(table), f"{file}.html")

    def histogram(self, name: str, step: int, values: Sequence[float]) -> None:
        """Quantiles: `NAME/p05` to `NAME/p95`."""
        if values:
            found = np.quantile(np.asarray(values, dtype=np.float64), _QUANTILES)
            self.metrics(step, {f"{name}/p{q * 100:02.0f}": float(v) for q, v in zip(_QUANTILES, found, strict=True)})

    def summary(self, figures: Mapping[str, Any]) -> None:
        """Tags below `final.`."""
        tags = [
            self._mlflow.entities.RunTag(f"final.{_name(name).replace('/', '.')}", str(value))
            for name, value in figures.items()
        ]
        for start in range(0, len(tags), _PARAMS):
            self._client.log_batch(self._id, tags=tags[start : start + _PARAMS])

    def artifact(self, name: str, kind: str, path: Path) -> None:
        """Below its name."""
        if path.is_dir():
            self._client.log_artifacts(self._id, str(path), name)
        else:
            self._client.log_artifact(self._id, str(path))

    def close(self, failed: bool) -> None:
        """Says how it ended."""
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")

    def _connect(self) -> Any:
        if self._client is None:
            self._mlflow.set_tracking_uri(self._uri)  # where artifacts go is asked for by it
            self._client = self._mlflow.MlflowClient(self._uri)
        return self._client

    def _experiment(self) -> str:
        found = self._client.get_experiment_by_name(self.about.project)
        if found is None:
            try:
                return str(self._client.create_experiment(self.about.project))
            except self._mlflow.exceptions.MlflowException:  # another run made it meanwhile
                found = self._client.get_experiment_by_name(self.about.project)
                if found is None:
                    raise
        return str(found.experiment_id)


def _name(name: str) -> str:
    return posixpath.normpath(_NOT_IN_NAMES.sub("_", name)).replace("../", "").lstrip("/") or "_"


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """`learner.lr` and such, with their values as text."""
    if isinstance(value, Mapping) and value:
        for key, each in value.items():
            yield from _leaves(each, f"{path}.{key}" if path else str(key))
    else:
        yield _name(path), str(value)


def _page(table: Table) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in table.columns)
    rows = ("".join(f"<td>{_cell(cell)}</td>" for cell in row) for row in table.rows)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f"<!doctype html><meta charset=utf-8>{_STYLE}<table><tr>{head}</tr>{body}</table>"


def _cell(cell: Any) -> str:
    if isinstance(cell, Picture):
        return f'<img alt="" src="data:image/png;base64,{base64.b64encode(cell.png).decode()}">'
    if isinstance(cell, float):
        return f"{cell:.4g}"
    return "" if cell is None else html.escape(str(cell))
