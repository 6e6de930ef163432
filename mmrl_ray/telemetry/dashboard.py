"""The Grafana dashboard: panels whose queries name what `table.py` exports, as Prometheus has it.

The shipped one is written by `python -m mmrl_ray.telemetry.dashboard > deploy/grafana/mmrl_ray.json`. A gauge is shown
by its largest value: after a process has been replaced, the old one's stays for some seconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

_COLUMNS = 3
_WIDTH, _HEIGHT = 24 // _COLUMNS, 8
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_RUN = 'run=~"$run"'
_MODEL = 'model=~"$model"'


def dashboard() -> dict[str, Any]:
    """What Grafana imports."""
    return {
        "title": "mmrl_ray",
        "uid": "mmrl-ray",
        "tags": ["mmrl_ray", "ray"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"},
                _variable("run", "Run", "label_values(ray_mmrl_finished_steps, run)"),
                _variable("model", "Served model", "label_values(ray_mmrl_policy_running_rows, model)"),
            ]
        },
        "panels": list(_panels()),
    }


def _variable(name: str, label: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": _SOURCE,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def _panels() -> Iterator[dict[str, Any]]:
    number, top = 0, 0
    for title, panels in ROWS:
        number += 1
        place = {"x": 0, "y": top, "w": 24, "h": 1}
        yield {"id": number, "type": "row", "title": title, "collapsed": False, "gridPos": place, "panels": []}
        top += 1
        for i, panel in enumerate(panels):
            number += 1
            place = {"x": i % _COLUMNS * _WIDTH, "y": top + i // _COLUMNS * _HEIGHT, "w": _WIDTH, "h": _HEIGHT}
            yield _graph(panel, number, place)
        top += -(-len(panels) // _COLUMNS) * _HEIGHT


def _graph(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    style: dict[str, Any] = {"lineWidth": 1, "fillOpacity": 30 if panel.stacked else 0, "spanNulls": True}
    style["stacking"] = {"mode": "normal" if panel.stacked else "none"}
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.text,
        "datasource": _SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": panel.unit, "custom": style}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + i), "expr": query, "legendFormat": legend, "datasource": _SOURCE}
            for i, (query, legend) in enumerate(panel.queries)
        ],
    }


if __name__ == "__main__":
    print(json.dumps(dashboard(), indent=1, ensure_ascii=False))


@dataclass(frozen=True, slots=True)
class Panel:
    """One graph: (query, legend) of each of its lines."""

    title: str
    queries: Sequence[tuple[str, str]]
    unit: str = "short"
    text: str = ""
    stacked: bool = False


def _last(name: str, by: str = "run", where: str = _RUN) -> str:
    """A gauge: the newest process that sets it, where one has taken another's place."""
    return f"max by ({by}) ({name}{{{where}}})"


def _rate(name: str, by: str, where: str = _RUN) -> str:
    return f"sum by ({by}) (rate({name}{{{where}}}[$__rate_interval]))"


def _quantile(q: float, name: str, by: str = "", where: str = _RUN) -> str:
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({q}, sum by ({labels}) (rate({name}_bucket{{{where}}}[$__rate_interval])))"


ROWS: Sequence[tuple[str, Sequence[Panel]]] = (
    (
        "Learning",
        (
            Panel(
                "Reward",
                [(_last("ray_mmrl_reward_mean"), "{{run}}"), (_last("ray_mmrl_reward_std"), "{{run}} std")],
                text="Mean of the total reward over the newest step's completions, and its standard deviation.",
            ),
            Panel("Parts of the reward", [(_last("ray_mmrl_reward_part", "run, part"), "{{run}} {{part}}")]),
            Panel(
                "Steps",
                [
                    (_last("ray_mmrl_finished_steps"), "{{run}} finished"),
                    (_last("ray_mmrl_planned_steps"), "{{run}} planned"),
                    (_last("ray_mmrl_policy_version"), "{{run}} policy version"),
                ],
            ),
            Panel(
                "Loss",
                [
                    (_last("ray_mmrl_loss"), "{{run}}"),
                    (_last("ray_mmrl_loss_term", "run, term"), "{{run}} {{term}}"),
                ],
            ),
            Panel("KL from the reference", [(_last("ray_mmrl_kl"), "{{run}}")], text="Estimated, a token."),
            Panel("Entropy", [(_last("ray_mmrl_entropy"), "{{run}}")], text="Of the policy, a token."),
            Panel("Gradient norm", [(_last("ray_mmrl_grad_norm"), "{{run}}")], text="Before clipping."),
            Panel("Learning rate", [(_last("ray_mmrl_learning_rate"), "{{run}}")]),
            Panel(
                "Sampler against learner",
                [
                    (_last("ray_mmrl_sampler_gap_max_nats"), "{{run}} largest"),
                    (_last("ray_mmrl_sampler_gap_mean_nats"), "{{run}} mean"),
                ],
                text="|log(learner ÷ sampler)| of on-policy tokens, in nats: rounding alone, or the run stops.",
            ),
            Panel(
                "Staleness",
                [
                    (_last("ray_mmrl_staleness_mean"), "{{run}} mean"),
                    (_last("ray_mmrl_staleness_max"), "{{run}} max"),
                ],
                text="Policy versions between sampling and learning.",
            ),
            Panel("Other figures", [(_last("ray_mmrl_figure", "run, name"), "{{run}} {{name}}")]),
        ),
    ),
    (
        "Rollouts",
        (
            Panel(
                "Learned from, a second",
                [
                    (_rate("ray_mmrl_completions_total", "run"), "{{run}} completions"),
                    (_rate("ray_mmrl_groups_total", "run"), "{{run}} groups"),
                ],
            ),
            Panel(
                "Tokens learned from, a second",
                [(_rate("ray_mmrl_learned_tokens_total", "run, kind"), "{{run}} {{kind}}")],
            ),
            Panel(
                "Completions",
                [
                    (_last("ray_mmrl_completion_length_tokens"), "{{run}} mean tokens"),
                ],
            ),
            Panel(
                "Shares",
                [
                    (_last("ray_mmrl_completion_finished_ratio"), "{{run}} ended by themselves"),
                    (_last("ray_mmrl_shared_prefix"), "{{run}} shared prefix"),
                ],
                unit="percentunit",
            ),
            Panel(
                "Left out, in all",
                [
                    (f"sum by (run) (ray_mmrl_masked_groups_total{{{_RUN}}})", "{{run}} masked: no reward"),
                    (f"sum by (run) (ray_mmrl_masked_captions_total{{{_RUN}}})", "{{run}} captions without a reward"),
                    (f"sum by (run) (ray_mmrl_dropped_groups_total{{{_RUN}}})", "{{run}} dropped: too stale"),
                    (f"sum by (run) (ray_mmrl_quarantined_samples_total{{{_RUN}}})", "{{run}} quarantined samples"),
                ],
            ),
            Panel(
                "Where the time goes",
                [(_rate("ray_mmrl_phase_seconds_total", "phase"), "{{phase}}")],
                text="Seconds a second; wait_plan is the learner's wait for workers, workers_idle theirs for it.",
                stacked=True,
            ),
        ),
    ),
    (
        "Learner",
        (
            Panel(
                "Step",
                [
                    (_quantile(0.5, "ray_mmrl_step_seconds", "run"), "{{run}} median"),
                    (_quantile(0.95, "ray_mmrl_step_seconds", "run"), "{{run}} 95 %"),
                ],
                unit="s",
            ),
            Panel(
                "Seconds by phase and rank",
                [(_rate("ray_mmrl_learner_seconds_total", "rank, phase"), "{{rank}} {{phase}}")],
                stacked=True,
            ),
            Panel(
                "Tokens a second by rank",
                [(_rate("ray_mmrl_learner_tokens_total", "rank, kind"), "{{rank}} {{kind}}")],
            ),
            Panel("Steps a second by rank", [(_rate("ray_mmrl_learner_steps_total", "run, rank"), "{{run}} {{rank}}")]),
            Panel(
                "Checkpoints",
                [(_quantile(0.95, "ray_mmrl_checkpoint_seconds", "run"), "{{run}} 95 % of their seconds")],
                unit="s",
            ),
            Panel(
                "Checkpoints written",
                [(f"sum by (run) (ray_mmrl_checkpoints_total{{{_RUN}}})", "{{run}}")],
            ),
        ),
    ),
    (
        "Workers",
        (
            Panel(
                "Rollout workers",
                [
                    (_last("ray_mmrl_workers", "run, state"), "{{run}} {{state}}"),
                    (_last("ray_mmrl_workers_target"), "{{run}} target"),
                ],
            ),
            Panel(
                "Queues",
                [
                    (_last("ray_mmrl_queued_assignments"), "{{run}} assignments that wait"),
                    (_last("ray_mmrl_buffered_groups", "run, state"), "{{run}} groups {{state}}"),
                ],
            ),
            Panel("Events", [(f"sum by (run, kind) (ray_mmrl_events_total{{{_RUN}}})", "{{run}} {{kind}}")]),
            Panel(
                "Workers lost",
                [(f'sum by (run) (ray_mmrl_events_total{{{_RUN}, kind="worker_lost"}})', "{{run}}")],
            ),
            Panel(
                "Assignments",
                [(f"sum by (run, outcome) (ray_mmrl_assignments_total{{{_RUN}}})", "{{run}} {{outcome}}")],
            ),
            Panel(
                "An assignment",
                [
                    (_quantile(0.5, "ray_mmrl_assignment_seconds", "run"), "{{run}} median"),
                    (_quantile(0.95, "ray_mmrl_assignment_seconds", "run"), "{{run}} 95 %"),
                ],
                unit="s",
            ),
            Panel(
                "Seconds by worker and phase",
                [(_rate("ray_mmrl_worker_seconds_total", "worker, phase"), "{{worker}} {{phase}}")],
                stacked=True,
            ),
            Panel("Groups a second", [(_rate("ray_mmrl_worker_groups_total", "worker"), "{{worker}}")]),
            Panel("Tokens a second", [(_rate("ray_mmrl_worker_tokens_total", "worker, kind"), "{{worker}} {{kind}}")]),
            Panel(
                "Vision cache: look-ups a second",
                [(_rate("ray_mmrl_worker_vision_lookups_total", "worker, result"), "{{worker}} {{result}}")],
            ),
            Panel(
                "Failures",
                [
                    (
                        f"sum by (worker) (ray_mmrl_worker_reward_failures_total{{{_RUN}}})",
                        "{{worker}} rewards",
                    ),
                    (f"sum by (worker) (ray_mmrl_worker_broken_samples_total{{{_RUN}}})", "{{worker}} broken samples"),
                ],
            ),
            Panel("Policy version", [(_last("ray_mmrl_worker_policy_version", "run, worker"), "{{run}} {{worker}}")]),
        ),
    ),
    (
        "Serving",
        (
            Panel(
                "Requests a second",
                [
                    (
                        _rate("ray_mmrl_gateway_requests_total", "route, method, status", ""),
                        "{{method}} {{route}} {{status}}",
                    )
                ],
            ),
            Panel(
                "Time to an answer, 95 %",
                [(_quantile(0.95, "ray_mmrl_gateway_request_seconds", "route", ""), "{{route}}")],
                unit="s",
            ),
            Panel(
                "Time to the first text",
                [
                    (_quantile(0.5, "ray_mmrl_gateway_first_token_seconds", "", ""), "median"),
                    (_quantile(0.95, "ray_mmrl_gateway_first_token_seconds", "", ""), "95 %"),
                ],
                unit="s",
            ),
            Panel(
                "Under way",
                [
                    ("sum(ray_mmrl_gateway_requests_under_way)", "at the gateway"),
                    (
                        f"sum by (model, state) (ray_mmrl_policy_requests_under_way{{{_MODEL}}})",
                        "{{model}} {{state}}",
                    ),
                    (f"sum by (model) (ray_mmrl_policy_running_rows{{{_MODEL}}})", "{{model}} rows decoded"),
                ],
            ),
            Panel(
                "Tokens a second",
                [
                    (_rate("ray_mmrl_gateway_tokens_total", "kind", ""), "{{kind}}"),
                    (_rate("ray_mmrl_policy_sampled_tokens_total", "model", _MODEL), "{{model}} sampled"),
                ],
            ),
            Panel(
                "Requests of the policy, a second",
                [
                    (_rate("ray_mmrl_policy_requests_total", "model", _MODEL), "{{model}}"),
                    (_rate("ray_mmrl_policy_failed_requests_total", "model", _MODEL), "{{model}} failed"),
                ],
            ),
            Panel(
                "Captions scored a second",
                [("sum(rate(ray_mmrl_gateway_scored_captions_total[$__rate_interval]))", "")],
            ),
            Panel(
                "Vision cache: look-ups a second",
                [(_rate("ray_mmrl_policy_vision_lookups_total", "model, result", _MODEL), "{{model}} {{result}}")],
            ),
            Panel(
                "Vision cache: bytes",
                [(f"sum by (model) (ray_mmrl_policy_vision_cache_bytes{{{_MODEL}}})", "{{model}}")],
                unit="bytes",
            ),
        ),
    ),
)
