"""`report.html`: one self-contained page about a run, made from its folder and nothing else.

Works for a run that is half finished or failed: every section shows what there is, and the page says what is missing.
Nothing in the page points outside it; captions and every other text of a run are escaped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from mmrl_ray import __version__
from mmrl_ray.algorithms.base import Panel
from mmrl_ray.algorithms.registry import own_panels
from mmrl_ray.config.problems import parse_yaml
from mmrl_ray.errors import MMRLError, RunError
from mmrl_ray.evaluation.records import load_evaluation, load_states
from mmrl_ray.evaluation.scores import Evaluation, evaluation_blindness
from mmrl_ray.evaluation.sight import NEVER_SAW, STOPPED, told_blind
from mmrl_ray.report.charts import charts, constants, held_out_charts, sight_charts
from mmrl_ray.report.facts import event_rows, fact_blocks, happened, quarantine_rows
from mmrl_ray.report.panels import caption_groups, correlation_table, measure_table, state_map
from mmrl_ray.run_records.checkpoint_choice import evaluation_lines
from mmrl_ray.run_records.run_dir import RunDir
from mmrl_ray.run_records.step_log import EVENTS, LOOKS, METRICS_FILE, QUARANTINE_FILE

REPORT = "report.html"
T = TypeVar("T")


def write_report(run: RunDir | str | Path) -> str:
    """Writes `report.html` into the run folder, whatever state the run is in; returns where it lies.

    Raises:
        RunError: there is no such folder, or the page cannot be written.
    """
    run = run if isinstance(run, RunDir) else RunDir.at(run)
    run.write_text(REPORT, render_report(run))
    return run.full_path(REPORT)


def render_report(run: RunDir) -> str:
    """The page, as text.

    Raises:
        RunError: a file of the run folder cannot be read at all.
    """
    problems: list[str] = []
    summary = _tried(problems, _summary, run) or {}
    metrics, events, quarantined = (
        _tried(problems, run.read_lines, name) or [] for name in (METRICS_FILE, EVENTS, QUARANTINE_FILE)
    )
    before, after = (_tried(problems, _evaluation, run, name) for name in ("before", "after"))
    sides = {side: found for side in ("before", "after") if (found := _tried(problems, load_states, run, side))}
    judged, looks = _tried(problems, evaluation_lines, run) or [], _tried(problems, run.read_lines, LOOKS) or []
    table = measure_table(before, after)
    config = run.read_text("config.yaml") if run.exists("config.yaml") else ""
    event_list, events_left = event_rows(events)
    quarantine_list, quarantine_left = quarantine_rows(quarantined)
    return _template().render(
        name=run.name,
        version=__version__,
        stylesheet=Markup(_read("report.css")),  # the package's own file
        lede=_lede(table, len(metrics)),
        state=_state(summary, metrics),
        chips=list(_chips(metrics, before or after)),
        warnings=[*_warnings(before, after), *_blind(looks)],
        missing=[*problems, *_missing(run, summary, metrics, before, after)],
        table=table,
        groups=caption_groups(run, before, after),
        state_map=state_map(sides),
        correlations=correlation_table(sides),
        charts=[*held_out_charts(judged), *sight_charts(looks), *charts(metrics, _own_panels(config))],
        constants=[f"{name} {value:.4g}" for name, value in constants(metrics).items()],
        facts=fact_blocks(summary, metrics, events, quarantined, config),
        happened=happened(events, metrics, quarantined),
        events=event_list,
        events_left_out=events_left,
        quarantined=quarantine_list,
        quarantined_left_out=quarantine_left,
        config=config,
    )


def _own_panels(config: str) -> tuple[Panel, ...]:
    """Charts of a user's own algorithm, where the config and its class can be read here."""
    with suppress(MMRLError):  # on another machine it may not be; the report's own charts are there
        return own_panels(parse_yaml(config, "config").value)
    return ()


def _warnings(before: Evaluation | None, after: Evaluation | None) -> Iterator[str]:
    """What a reader has to know before any figure."""
    for name, evaluation in (("before", before), ("after", after)):
        if evaluation is not None and (found := evaluation_blindness(evaluation)) is not None:
            yield found.told(f"evaluation {name} training")
        if evaluation is not None and evaluation.unrewarded:
            yield f"Evaluation {name} training: {evaluation.told_unrewarded()}."


def _blind(looks: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Looks at the policy's sight that say it is blind: the first, and the last."""
    for place, line in {0: looks[0], len(looks) - 1: looks[-1]}.items() if looks else ():
        if line["blind"]:
            never = all(each["blind"] for each in looks)
            what = "before learning" if place == 0 else f"step {line['step']}, {line['running']} looks running"
            yield told_blind(what, line["blind"], NEVER_SAW if never else STOPPED)


def _template() -> Any:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_read("report.html.j2"))


def _read(name: str) -> str:
    return files("mmrl_ray.report").joinpath("templates", name).read_text(encoding="utf-8")


def _tried(problems: list[str], read: Callable[..., T], *args: Any) -> T | None:
    """What `read` finds; None, with one more problem to tell, where the file is broken."""
    try:
        return read(*args)
    except RunError as error:
        problems.append(str(error))
        return None


def _summary(run: RunDir) -> dict[str, Any]:
    summary = run.read_json("summary.json") if run.exists("summary.json") else {}
    return summary if isinstance(summary, dict) else {}


def _evaluation(run: RunDir, name: str) -> Evaluation | None:
    evaluation = load_evaluation(run, name)
    return evaluation if evaluation is not None and evaluation.captions else None


def _lede(table: dict[str, Any], steps: int) -> str:
    row = next((r for r in table["rows"] if r["name"] == "reward"), None)
    if row is None:
        return f"{steps} finished steps; nothing was evaluated."
    if not table["paired"]:
        when = "before" if table["before"] else "after"
        value = row["before"] if table["before"] else row["after"]
        return f"Total reward on the held-out split was {value} {when} reinforcement learning; {steps} steps finished."
    return (
        f"Total reward on the held-out split went from {row['before']} to {row['after']} "
        f"({row['difference']}) in {steps} steps; {row['sentence']}."
    )


def _state(summary: dict[str, Any], metrics: list[dict[str, Any]]) -> dict[str, str]:
    """A finished run has a summary that does not say otherwise."""
    said = str(summary.get("status", "finished" if summary else ""))
    if said == "finished":
        return {"kind": "good", "text": "finished"}
    if said:
        return {"kind": "flat" if said == "interrupted" else "bad", "text": said.split(":", 1)[0]}
    return {"kind": "flat", "text": "not finished" if metrics else "not started"}


def _chips(metrics: list[dict[str, Any]], evaluation: Evaluation | None) -> Iterator[str]:
    if metrics:
        yield f"{len(metrics)} step{'s' if len(metrics) != 1 else ''}"
    if evaluation is not None:
        yield f"{len(evaluation.captions)} held-out samples"
    if metrics and isinstance(metrics[-1].get("shared_prefix"), bool | int):
        yield "shared prefix" if metrics[-1]["shared_prefix"] else "naive path"


def _missing(
    run: RunDir,
    summary: dict[str, Any],
    metrics: list[dict[str, Any]],
    before: Evaluation | None,
    after: Evaluation | None,
) -> Iterator[str]:
    """What a finished run would have, and this folder lacks; first of all why, where that is known."""
    status = str(summary.get("status", ""))
    if ":" in status:  # "failed: why"
        yield f"The run did not finish. {status[0].upper()}{status[1:]}"
    if not run.exists("config.yaml"):
        yield "config.yaml: the configuration is unknown."
    if not metrics:
        yield "metrics.jsonl has no line: no step was finished, so there are no curves."
    if before is None:
        yield "The evaluation before training (eval/before.parquet): gains cannot be told."
    if after is None:
        yield "The evaluation after training (eval/after.parquet): the run has not got there, or it has no data.eval."
    if not summary:
        yield "summary.json: the run did not finish; its times and peak memory are unknown."
    if not run.exists("adapter") and not run.exists("agent"):
        yield "adapter/: there is no final adapter; the newest one lies in checkpoints/, if there are any."
