"""Every metric there is, once: what is exported, what the dashboard may ask for, and what the tests hold both to.

On Ray, Prometheus sees `ray_` before each name and `_total` after a counter's, or a histogram's `_bucket`, `_count` and
`_sum`. Ray's agent makes a histogram's sum out of the middles of its buckets, so seconds that are to be added up are
counters here, and histograms are for quantiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0)


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the table."""

    name: str
    """Ends with its unit where it has one: seconds, tokens, bytes."""
    kind: Kind
    text: str
    labels: tuple[str, ...]
    """`run`, `worker`, `rank` and `model` are the process's own; whoever measures gives the others."""
    buckets: tuple[float, ...] = ()
    """Upper bounds of a histogram's."""

    @property
    def series(self) -> frozenset[str]:
        """What Prometheus calls it when Ray exports it."""
        if self.kind == "gauge":
            return frozenset((f"ray_{self.name}",))
        ends = ("total",) if self.kind == "counter" else ("bucket", "count", "sum")
        return frozenset(f"ray_{self.name}_{end}" for end in ends)


def _counter(name: str, text: str, *labels: str) -> Metric:
    return Metric(f"mmrl_{name}", "counter", text, labels)


def _gauge(name: str, text: str, *labels: str) -> Metric:
    return Metric(f"mmrl_{name}", "gauge", text, labels)


def _histogram(name: str, text: str, *labels: str) -> Metric:
    return Metric(f"mmrl_{name}", "histogram", text, labels, _SECONDS)


# -- the controller: one step of learning ------------------------------------------------------------------------------
FINISHED_STEPS = _gauge("finished_steps", "Optimiser steps finished", "run")
PLANNED_STEPS = _gauge("planned_steps", "Optimiser steps that the run is to take", "run")
POLICY_VERSION = _gauge("policy_version", "Newest policy version", "run")
REWARD_MEAN = _gauge("reward_mean", "Mean total reward of the newest step", "run")
REWARD_STD = _gauge("reward_std", "Standard deviation of the total reward in the newest step", "run")
REWARD_PART = _gauge("reward_part", "Mean of one part of the reward in the newest step", "run", "part")
LOSS = _gauge("loss", "Loss of the newest step, all terms", "run")
LOSS_TERM = _gauge("loss_term", "One term of the newest step's loss", "run", "term")
KL = _gauge("kl", "Estimated KL divergence from the reference, a token", "run")
ENTROPY = _gauge("entropy", "Entropy of the policy, a token", "run")
GRAD_NORM = _gauge("grad_norm", "Norm of the gradient before clipping", "run")
LEARNING_RATE = _gauge("learning_rate", "Learning rate of the newest step", "run")
SAMPLER_GAP_MAX = _gauge(
    "sampler_gap_max_nats", "Largest |log(learner / sampler)| of a token in the newest step's on-policy groups", "run"
)
SAMPLER_GAP_MEAN = _gauge("sampler_gap_mean_nats", "The same, mean over those tokens", "run")
STALENESS_MEAN = _gauge("staleness_mean", "Policy versions between sampling and learning, mean over a step", "run")
STALENESS_MAX = _gauge("staleness_max", "Policy versions between sampling and learning, largest of a step", "run")
COMPLETION_LENGTH = _gauge("completion_length_tokens", "Mean length of the newest step's completions", "run")
COMPLETION_FINISHED = _gauge("completion_finished_ratio", "Completions that ended by themselves", "run")
SHARED_PREFIX = _gauge("shared_prefix", "Whether every forward of the step ran on the shared prefix", "run")
FIGURE = _gauge("figure", "Any other figure of the newest step, by its name in metrics.jsonl", "run", "name")
STEP_SECONDS = _histogram("step_seconds", "Wall time from one step's end to the next", "run")
PHASE_SECONDS = _counter(
    "phase_seconds", "Seconds by phase, of workers and learner alike, as in metrics.jsonl", "run", "phase"
)
GROUPS = _counter("groups", "Groups that steps were made of, masked ones included", "run")
COMPLETIONS = _counter("completions", "Completions learned from", "run")
LEARNED_TOKENS = _counter("learned_tokens", "Tokens learned from", "run", "kind")
MASKED_GROUPS = _counter("masked_groups", "Groups left out of learning: too few rewards in them", "run")
MASKED_CAPTIONS = _counter("masked_captions", "Completions without a reward, left out of learning", "run")
DROPPED_GROUPS = _counter("dropped_groups", "Groups too stale for their step, and sampled again", "run")
QUARANTINED_SAMPLES = _counter("quarantined_samples", "Samples that could not be used", "run")

# -- the controller: workers and queues --------------------------------------------------------------------------------
WORKERS = _gauge("workers", "Rollout workers by what they do", "run", "state")
WORKERS_TARGET = _gauge("workers_target", "Rollout workers there should be", "run")
QUEUED_ASSIGNMENTS = _gauge("queued_assignments", "Assignments that wait for a worker", "run")
BUFFERED_GROUPS = _gauge("buffered_groups", "Groups in the buffer: arrived, or held a place for", "run", "state")
ASSIGNMENTS = _counter("assignments", "Assignments by what became of them", "run", "outcome")
EVENTS = _counter(
    "events", "What was written to events.jsonl, by kind, such as worker_lost or learner_restarted", "run", "kind"
)

# -- rollout workers ---------------------------------------------------------------------------------------------------
WORKER_SECONDS = _counter("worker_seconds", "Seconds of a rollout worker by phase", "run", "worker", "phase")
WORKER_GROUPS = _counter("worker_groups", "Groups that a rollout worker sampled", "run", "worker")
WORKER_TOKENS = _counter("worker_tokens", "Tokens that a rollout worker read and wrote", "run", "worker", "kind")
WORKER_VISION = _counter("worker_vision_lookups", "Look-ups in the vision cache", "run", "worker", "result")
WORKER_ENGINE = _counter(
    "worker_engine_lookups",
    "Look-ups in the caches of an engine of its own process (vLLM): prompt tokens, or pictures",
    *("run", "worker", "kind", "result"),
)
WORKER_PROMPTS_AHEAD = _counter(
    "worker_prompts_ahead", "Prompts with their pictures that were ready when they were needed", "run", "worker"
)
WORKER_REWARD_FAILURES = _counter("worker_reward_failures", "Completions whose reward failed", "run", "worker")
WORKER_BROKEN_SAMPLES = _counter("worker_broken_samples", "Samples that could not be encoded", "run", "worker")
WORKER_VERSION = _gauge("worker_policy_version", "Policy version that a rollout worker samples with", "run", "worker")
ASSIGNMENT_SECONDS = _histogram("assignment_seconds", "Work on one assignment", "run")

# -- learners ----------------------------------------------------------------------------------------------------------
LEARNER_SECONDS = _counter("learner_seconds", "Seconds of a learner by phase", "run", "rank", "phase")
LEARNER_STEPS = _counter("learner_steps", "Steps that a learner took part in", "run", "rank")
LEARNER_TOKENS = _counter("learner_tokens", "Tokens of a learner's own groups", "run", "rank", "kind")
CHECKPOINTS = _counter("checkpoints", "Checkpoints written", "run")
CHECKPOINT_SECONDS = _histogram("checkpoint_seconds", "Writing a checkpoint", "run")

# -- serving: the policy -----------------------------------------------------------------------------------------------
POLICY_REQUESTS = _counter("policy_requests", "Requests that a policy replica took", "model")
POLICY_FAILED = _counter("policy_failed_requests", "Requests that an error in the model ended", "model")
POLICY_TOKENS = _counter("policy_sampled_tokens", "Tokens sampled", "model")
POLICY_VISION = _counter("policy_vision_lookups", "Look-ups in the vision cache", "model", "result")
POLICY_UNDER_WAY = _gauge("policy_requests_under_way", "Requests of a policy replica by state", "model", "state")
POLICY_ROWS = _gauge("policy_running_rows", "Completions that are being decoded", "model")
POLICY_CACHE = _gauge("policy_vision_cache_bytes", "Vision features held", "model")

# -- serving: the gateway; the same at its own /metrics, without `ray_` ------------------------------------------------
GATEWAY_REQUESTS = _counter("gateway_requests", "Requests by route and status", "method", "route", "status")
GATEWAY_SECONDS = _histogram("gateway_request_seconds", "From the request's head to the answer's end", "route")
GATEWAY_UNDER_WAY = _gauge("gateway_requests_under_way", "Requests without an answer")
GATEWAY_FIRST_TOKEN = _histogram(
    "gateway_first_token_seconds", "From the request's head to the first text of a streamed answer"
)
GATEWAY_TOKENS = _counter("gateway_tokens", "Tokens by kind", "kind")
GATEWAY_SCORED = _counter("gateway_scored_captions", "Captions scored")

METRICS: tuple[Metric, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Metric))
"""All of the above."""
