"""`mmrl train --dry-run`: what a run would do and need, without weights and without writing anything.

No Ray is started; the one at `--address`, where it is given, is asked what it has.

What cannot be found out here (a hub that is out of reach, a dataset that is not there yet) is said, not guessed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import psutil
import torch
from rich.console import Console

from mmrl_ray.config import Config
from mmrl_ray.config.load import dump_config
from mmrl_ray.config.policy import ModelSection
from mmrl_ray.config.schema import cpu_processes, demands_of, torch_threads
from mmrl_ray.data.images import image_format
from mmrl_ray.errors import (
    ConfigError,
    ProcessError,
)
from mmrl_ray.planning.estimate import (
    KEPT,
    BatchPlan,
    batch_plan,
    engine_memory,
    learner_memory,
    loading_memory,
    picture_memory,
    rollout_memory,
    warm_start_memory,
)
from mmrl_ray.planning.findings import DryRun, find_out, shortened, size_words
from mmrl_ray.planning.preflight import (
    check_engine,
)
from mmrl_ray.policy.memory import ModelShape
from mmrl_ray.report.facts import reward_lines
from mmrl_ray.rollouts.pool_settings import SharedGpu, shared_gpus_of
from mmrl_ray.telemetry.terminal import say
from mmrl_ray.tracking.places import places_of, tracking_lines


def dry_run(cfg: Config, *, resume: bool = False, address: str | None = None, console: Console | None = None) -> DryRun:
    """Prints the resolved config, one sample, the batch plan, the device plan and a memory estimate.

    Args:
        cfg: the run's.
        resume: it is to go on.
        address: a cluster that the run's actors are to fit on.
        console: where to print.

    Raises:
        RunError: the cluster at `address` cannot be joined.
    """
    console = console or Console(highlight=False)
    found = find_out(cfg, resume=resume)
    plan = batch_plan(cfg, found.prompt_tokens) if found.prompt_tokens is not None else None
    sections = {
        "Config": dump_config(cfg).rstrip("\n").split("\n"),
        "Sample": _sample_lines(found),
        "Held out": found.held_out,
        "Reward": [*reward_lines(cfg.reward.with_opening(found.opening)), *found.tried],
        "Batch plan": _batch_lines(cfg, plan, found) if cfg.agent is None else cfg.family.rounds_told(cfg),
        "Engine": _engine_lines(cfg, found, address),
        "Tracking": _tracking_lines(cfg, found),
        "Devices": _device_lines(cfg, found, address),
        "Memory": _memory_lines(cfg, plan, found, address),
        "Warnings": found.warnings,
        "Not checked": found.unchecked,
        "Not on this machine": found.lacking,
        "Would stop the run": found.refused,
    }
    for title, lines in sections.items():
        if lines:
            console.print()
            say(console, title, "bold")
            for line in lines:
                say(console, f"  {line}")
    return found


def _sample_lines(found: DryRun) -> list[str]:
    if found.sample is None:
        return ["none could be read"]
    sample = found.sample
    images = [f"{image_format(image)} of {len(image):,} bytes" for image in sample.images]
    return [
        f"id          {sample.id}",
        f"image       {', '.join(images)}",
        f"prompt      {sample.prompt}",
        *(f"reference   {text}" for text in sample.references),
        *([f"metadata    {shortened(dict(sample.metadata))}"] if sample.metadata else []),
    ]


def _batch_lines(cfg: Config, plan: BatchPlan | None, found: DryRun) -> list[str]:
    steps, groups = cfg.learner.steps, cfg.learner.groups_per_step
    completions = groups * cfg.rollout.group_size
    lines = [
        f"a step      {groups} images × {cfg.rollout.group_size} completions = {completions} completions",
        f"the run     {steps:,} steps, {steps * groups:,} images, {steps * completions:,} completions",
    ]
    if cfg.learner.dynamic_sampling:
        most = cfg.learner.max_oversampling
        lines.append(
            f"sampled     up to {most:g} times as many, until {groups} groups of a step differ in their rewards"
        )
    if found.rows is not None:
        lines.append(f"epochs      {steps * groups / found.rows:.2f} over {found.rows:,} training images")
    if plan is None:
        return [*lines, "tokens      unknown without a prompt of the model's own"]
    batches = " + ".join(str(count) for count in plan.micro_batches)
    return [
        *lines,
        f"assignments {plan.assignments} a step, up to {cfg.rollout.groups_per_assignment} groups each",
        f"prompt      {found.prompt_tokens} tokens, {found.image_tokens} of them image tokens",
        f"micro-batches {batches} over {cfg.learner.max_workers} learner worker(s) a step, at most "
        f"{plan.micro_batch_groups} groups, {plan.micro_batch_tokens:,} of {cfg.learner.token_budget:,} tokens",
        f"tokens      {plan.step_tokens:,} a step at most; {plan.naive_tokens:,} if prompts were not shared",
    ]


def _engine_lines(cfg: Config, found: DryRun, address: str | None) -> list[str]:
    """What samples, where it is not the worker itself."""
    told = cfg.rollout.engine.told
    if told is None:
        return []
    if address is not None or os.environ.get("RAY_ADDRESS"):
        found.unchecked.append("whether the cluster's nodes have an interpreter with vLLM, or reach its server")
        return [told]
    try:
        return [check_engine(cfg), told]
    except (ConfigError, ProcessError) as error:
        found.lacking.append(str(error))
        found.blocking.append(str(error))
        return [told]


def _tracking_lines(cfg: Config, found: DryRun) -> list[str]:
    """What is tracked where; a tracker that cannot be used here may be where the run is submitted to."""
    places = places_of(cfg)
    errors = [str(place.error) for place in places if place.error is not None]
    found.lacking += errors
    found.blocking += errors
    return list(tracking_lines(cfg, places))


def _device_lines(cfg: Config, found: DryRun, address: str | None) -> list[str]:
    demands = demands_of(cfg)
    lines = [f"{d.kind:<11} {d.count} × {d.cpus:g} CPU, {d.gpus:g} GPU{d.where}" for d in demands]
    cpus, gpus = sum(d.count * d.cpus for d in demands), sum(d.count * d.gpus for d in demands)
    lines.append(_threads_line(cfg, address))
    lines.append(f"placement   {cfg.resources.placement}; asked for together: {cpus:g} CPU, {gpus:g} GPU")
    try:
        shared_gpus_of(cfg)
    except ConfigError as error:
        found.blocking.append(str(error))
        return lines
    if address is not None:
        from mmrl_ray.planning.preflight import check_placement

        checked = check_placement(cfg, address)
        found.unplaced += checked.unplaced
        found.blocking += checked.blocking
        return [*lines, *checked.lines]
    if os.environ.get("RAY_ADDRESS"):
        found.unchecked.append("the devices of the Ray cluster at RAY_ADDRESS: add --address to compare with them")
        return lines
    here = torch.cuda.device_count()
    names = ", ".join(sorted({torch.cuda.get_device_name(i) for i in range(here)}))
    lines.append(f"this machine {os.cpu_count()} CPU, {here} GPU{f' ({names})' if names else ''}")
    if cpus > (os.cpu_count() or 1):
        lines.append("more CPUs are asked for than are here: workers will take turns")
    if gpus > here:
        short = (
            f"{gpus:g} GPU asked for and {here} here: set resources.learner.gpus and resources.rollout.gpus, "
            "or run on a cluster that has them"
        )
        found.lacking.append(short)
        found.blocking.append(short)
    return lines


def _threads_line(cfg: Config, address: str | None) -> str:
    learner, rollout = cfg.resources.learner, cfg.resources.rollout
    if address is not None or os.environ.get("RAY_ADDRESS"):
        return f"threads     of each process: its node's cores ÷ {cpu_processes(cfg)}, unless resources.*.threads says"
    cores = os.cpu_count() or 1
    each = [
        f"{torch_threads(cfg, share, cores)} a {name}" for name, share in (("learner", learner), ("worker", rollout))
    ]
    return f"threads     {', '.join(each)}: {cores} cores ÷ {cpu_processes(cfg)} processes, or resources.*.threads"


def _memory_lines(cfg: Config, plan: BatchPlan | None, found: DryRun, address: str | None) -> list[str]:
    shape = found.shape
    if shape is None:
        return ["unknown without the model's config"]
    lines = [
        f"base model  {shape.parameters / 1e6:,.1f} M parameters, {size_words(shape.weight_bytes)}{_kept(cfg.model)}",
        f"adapter     {shape.adapter_parameters / 1e6:,.2f} M parameters on {shape.adapted_layers} layers"
        f"{_adapter_kind(cfg, shape)}",
        *([f"            {found.left_out}"] if found.left_out is not None else []),
        *([f"teacher     {found.teacher}"] if found.teacher is not None else []),
    ]
    if cfg.agent is not None:
        return [lines[0], *cfg.family.memory_told(cfg, found.rows, shape.hidden)]
    if plan is None or found.prompt_tokens is None:
        return [*lines, "the rest is unknown without a prompt"]
    learner = learner_memory(cfg, shape, plan, found.prompt_tokens, found.image_tokens)
    is_here = address is None and not os.environ.get("RAY_ADDRESS")
    gpu_bytes = torch.cuda.get_device_properties(0).total_memory if is_here and torch.cuda.is_available() else None
    rollout = rollout_memory(
        cfg, shape, found.prompt_tokens, found.image_tokens, images=found.rows, gpu_bytes=gpu_bytes
    )
    lines += [*_one_worker("learner worker", learner), _loading_line(cfg, shape)]
    lines += _one_worker("rollout worker", rollout)
    machine = psutil.virtual_memory().total if is_here else None
    engine = engine_memory(
        cfg,
        shape,
        found.prompt_tokens,
        context=found.context,
        embeds=found.embeds,
        memory_bytes=gpu_bytes if cfg.resources.rollout.gpus else machine,
    )
    if engine:
        lines += _one_worker("vLLM engine, beside each rollout worker", engine)
        rollout = {**rollout, **{f"{part} of vLLM": value for part, value in engine.items()}}
    if cfg.resources.rollout.gpus:
        lines += [f"  {part:<26} {size_words(value):>10} of host memory" for part, value in picture_memory(cfg).items()]
    warm: Mapping[str, int] = {}
    if cfg.sft is not None:
        lengths = {"images": found.rows, "caption_tokens": found.caption_tokens}
        parts = found.parts
        warm = warm_start_memory(cfg, shape, found.prompt_tokens, found.image_tokens, parts=parts, **lengths)
        lines += _one_worker("warm start", warm)
        if any("vision" in stage.parts for stage in cfg.sft.phases):
            found.unchecked.append("what the vision tower keeps in memory while it trains, in the warm start")
    return [*lines, *(_capacity_lines(cfg, learner, rollout, warm, gpu_bytes) if is_here else ())]


def _kept(model: ModelSection) -> str:
    return "" if model.quantization is None else f", {model.quantization.told}"


def _adapter_kind(cfg: Config, shape: ModelShape) -> str:
    """What is not plain about it."""
    lora = cfg.model.lora
    found = [name for name in ("rslora", "dora", "rank_pattern", "alpha_pattern") if getattr(lora, name)]
    if lora.init != "default":
        found.append(f"init {lora.init}")
    if lora.dropout:
        where = "wherever it learns" if cfg.family.is_offline else "in the warm start alone"
        found.append(f"dropout {lora.dropout:g} {where}")
    if shape.saved_parameters:
        found.append(f"{shape.saved_parameters / 1e6:,.2f} M parameters of {', '.join(lora.modules_to_save)} whole")
    if lora.adapt_vision and shape.adapts_vision:
        found.append(
            "outside the language model, too, so that each picture's features are made anew in every pass: no cache, "
            "and what its layers keep is not in the estimate"
        )
    return f"; {', '.join(found)}" if found else ""


def _loading_line(cfg: Config, shape: ModelShape) -> str:
    each, most = loading_memory(cfg, shape), cfg.learner.max_workers
    together = f", {size_words(most * each)} for {most} on one node" if most > 1 else ""
    return f"while it loads, up to {size_words(each)} of its node's memory{together}"


def _one_worker(name: str, parts: Mapping[str, int]) -> list[str]:
    rows = [f"  {part:<26} {size_words(value):>10}" for part, value in parts.items()]
    return [f"one {name}, about {size_words(sum(parts.values()))}:", *rows]


def _capacity_lines(
    cfg: Config,
    learner: Mapping[str, int],
    rollout: Mapping[str, int],
    warm: Mapping[str, int],
    gpu_bytes: int | None,
) -> Sequence[str]:
    """Compares with this machine, which the workers would run on."""
    learns, samples = (sum(parts.values()) for parts in (learner, rollout))
    if cfg.resources.learner.gpus or cfg.resources.rollout.gpus:
        if gpu_bytes is None:
            return []
        needed, there, what = max(learns, samples), gpu_bytes, "one GPU"
        if cfg.resources.placement == "shared":
            workers = max((gpu.workers for gpu in _shared(cfg)), default=1)
            # In turns, each beside what the others keep.
            rest, beside = ({k: v for k, v in parts.items() if k in KEPT} for parts in (learner, rollout))
            needed = max(learns + workers * sum(beside.values()), workers * samples + sum(rest.values()))
            if cfg.rollout.max_staleness:
                needed = learns + workers * samples
    else:
        needed = cfg.learner.max_workers * learns + cfg.rollout.most_workers * samples
        there, what = psutil.virtual_memory().total, "this machine"
    needed = max(needed, sum(warm.values()))
    verdict = "fits" if needed < 0.9 * there else "may not fit"
    return [f"{what}: about {size_words(needed)} of {size_words(there)}, beside Ray: {verdict}"]


def _shared(cfg: Config) -> Sequence[SharedGpu]:
    try:
        return shared_gpus_of(cfg)
    except ConfigError:  # which is among what blocks
        return ()
