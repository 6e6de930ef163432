"""`mmrl train --dry-run`: what a run would do and need, without weights and without writing anything.

No Ray is started; the one at `--address`, where it is given, is asked what it has.

What cannot be found out here (a hub that is out of reach, a dataset that is not there yet) is said, not guessed.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import psutil
import torch
from PIL import Image
from rich.console import Console

from mmrl_ray.analysis.sight import arrange
from mmrl_ray.config import Config
from mmrl_ray.config.load import dump_config
from mmrl_ray.config.paths import is_hub_id, sqlite_file
from mmrl_ray.config.policy import ModelSection
from mmrl_ray.config.schema import cpu_processes, demands_of, torch_threads
from mmrl_ray.data.images import encode_png, image_format
from mmrl_ray.data.samples import Sample, iter_references, told
from mmrl_ray.data.scenes.generator import generate_scenes
from mmrl_ray.data.shards import ParquetDataset
from mmrl_ray.errors import (
    AdapterError,
    ConfigError,
    DataError,
    MMRLError,
    ModelError,
    ProcessError,
    RewardError,
    RunError,
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
from mmrl_ray.planning.preflight import (
    check_engine,
    check_references,
    check_teacher,
    evaluation_split,
    first_sample,
    held_out_quarantine,
    trained_on,
)
from mmrl_ray.policy.load import load_skeleton, try_quickly
from mmrl_ray.policy.lora.targets import left_out_line, resolve_targets
from mmrl_ray.policy.memory import ModelShape, model_shape, weight_bytes
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.parts import model_parts, refuse_unknown_parts
from mmrl_ray.policy.prompts import check_context, encode_caption, encode_prompts
from mmrl_ray.policy.quantized import require
from mmrl_ray.policy.tokens import answer_opening
from mmrl_ray.report.facts import reward_lines
from mmrl_ray.rewards.base import RewardFailure
from mmrl_ray.rewards.build import check_reward, try_functions
from mmrl_ray.rewards.text import FormatReward
from mmrl_ray.rollouts.pool_settings import SharedGpu, shared_gpus_of
from mmrl_ray.run_records.run_dir import RunDir
from mmrl_ray.run_records.run_owner import living_owner
from mmrl_ray.telemetry.terminal import say
from mmrl_ray.tracking.places import places_of, tracking_lines
from mmrl_ray.training.offline import check_pairs, check_stored
from mmrl_ray.training.warm_start import model_folder

_TEXTS_TRIED = 32
"""References that patterns are tried on."""


@dataclass
class DryRun:
    """What was found out."""

    rows: int | None = None
    """Of the training split."""
    sample: Sample | None = None
    opening: str = ""
    """What the model's template writes before an answer."""
    shape: ModelShape | None = None
    left_out: str | None = None
    """Weights that the adapter does not sit on."""
    teacher: str | None = None
    """Its size."""
    prompt_tokens: int | None = None
    image_tokens: int = 0
    caption_tokens: int | None = None
    """Of the longest of some references."""
    parts: Mapping[str, int] | None = None
    """Numbers in each part of the model, where there is a warm start."""
    context: int = 0
    """Tokens that the model has room for."""
    embeds: bool = False
    """Whether vLLM, where it samples, is given features in the place of pictures."""
    blocking: list[str] = field(default_factory=list)
    """What would stop the run as things are."""
    unchecked: list[str] = field(default_factory=list)
    """What could not be looked at from here, and why."""
    warnings: list[str] = field(default_factory=list)
    """What lets the run go on, and is probably not what is meant."""
    held_out: list[str] = field(default_factory=list)
    """What there is to know about the held-out samples: broken ones, and those that are trained on."""
    tried: list[str] = field(default_factory=list)
    """What functions of the user's have for one caption."""
    unplaced: list[str] = field(default_factory=list)
    """Actors that the cluster has no room for; they block, too."""
    lacking: list[str] = field(default_factory=list)
    """What this machine has too little of, or does not reach; it blocks here, too, and nowhere else."""

    @property
    def refused(self) -> list[str]:
        """What would stop the run on every machine."""
        return [line for line in self.blocking if line not in self.lacking]


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
    found = DryRun()
    _look_at_run_folder(cfg, resume, found)
    _look_at_data(cfg, found)
    _look_at_pairs(cfg, found)
    _look_at_stored(cfg, found)
    _look_at_reward(cfg, found)
    with tempfile.TemporaryDirectory(prefix="mmrl-") as scratch:
        _look_at_model(cfg, Path(scratch), found)
    _try_formats(cfg, found)
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


def _look_at_run_folder(cfg: Config, resume: bool, found: DryRun) -> None:
    try:
        folder = RunDir.open(cfg.run.root, cfg.run.name)
    except RunError:
        if resume:
            found.blocking.append(f"there is no run {cfg.run.name} in {cfg.run.root} to resume")
        return
    if (owner := living_owner(folder)) is not None:
        found.blocking.append(f"run folder {folder.location} is being written by {owner}")
    elif not resume:
        found.blocking.append(f"run folder {folder.location} exists: add --resume, or choose another run.name")


def _look_at_data(cfg: Config, found: DryRun) -> None:
    try:
        found.rows = ParquetDataset(cfg.data.train).rows
        found.sample = first_sample(cfg)
        check_references(cfg)
    except DataError as error:
        if cfg.data.scenes is None or Path(cfg.data.train).exists():
            found.blocking.append(f"data.train: {error}")
        else:
            found.rows = cfg.data.scenes.train
            first = next(generate_scenes(cfg.data.scenes)[0])
            found.sample = replace(first, prompt=first.prompt or cfg.data.prompt)
            found.unchecked.append(f"data.train={cfg.data.train} is not there yet: the run will generate the scenes")
    if cfg.data.eval is not None and (cfg.data.scenes is None or Path(cfg.data.eval).exists()):
        try:
            _look_at_held_out(cfg, found)
        except DataError as error:
            found.blocking.append(f"data.eval: {error}")


def _look_at_held_out(cfg: Config, found: DryRun) -> None:
    quarantine = held_out_quarantine(cfg)
    samples = evaluation_split(cfg, quarantine)
    found.held_out.append(f"{len(samples):,} samples of {cfg.data.eval}")
    if (every := cfg.eval.every) is not None:
        ends = "" if cfg.eval.patience is None else f"; {cfg.eval.patience} in a row without a new best end the run"
        found.held_out.append(
            f"evaluated at every {every} of {cfg.learner.steps:,} steps, and by {cfg.eval.metric} the best becomes "
            f"adapter/{ends}"
        )
    if cfg.looks_every:
        arranged, blind = arrange(samples, cfg.learner.blind_check.samples, cfg.run.seed), cfg.learner.blind_check
        left_out = f"; {arranged.told}" if arranged.told else ""
        found.held_out.append(
            f"looked at before, after and every {cfg.looks_every} steps, whether the policy looks at its pictures: "
            f"{len(arranged.pairs)} samples{left_out}; an alarm is to {blind.on_blind}"
        )
    if len(quarantine):
        found.held_out.append(told(quarantine.records))
    try:
        found.held_out += [str(overlap) for overlap in trained_on(cfg, samples)]
    except MMRLError as error:
        found.unchecked.append(f"whether held-out pictures are trained on: {error}")


def _look_at_pairs(cfg: Config, found: DryRun) -> None:
    wanted = cfg.data.preferences
    if wanted is None:
        return
    file = sqlite_file(wanted.store)
    if file is not None and not Path(file).exists():
        found.unchecked.append(f"data.preferences.store={wanted.store} is not there yet: fill it first")
        return
    try:
        found.rows = check_pairs(cfg)
    except DataError as error:
        found.blocking.append(str(error))


def _look_at_stored(cfg: Config, found: DryRun) -> None:
    wanted = cfg.data.rollouts
    if wanted is None:
        return
    if "://" not in wanted.run and not Path(wanted.run).expanduser().exists():
        found.unchecked.append(f"data.rollouts.run={wanted.run} is not there yet: train that first")
        return
    try:
        found.rows = check_stored(cfg)
    except MMRLError as error:
        found.blocking.append(str(error))


def _look_at_reward(cfg: Config, found: DryRun) -> None:
    try:
        check_reward(cfg.reward)
        if found.sample is None or not cfg.reward.functions:
            return
        caption = next(iter(found.sample.references), "a picture")
        for name, score in try_functions(cfg.reward, found.sample, caption).items():
            if isinstance(score, RewardFailure):
                found.blocking.append(f"reward.parts.{name}: {score.reason}")
            else:
                found.tried.append(f"{name} of {_short(caption)!r}, on sample {found.sample.id}: {score.total:g}")
    except ConfigError as error:
        found.blocking.append(str(error))


def _look_at_model(cfg: Config, scratch: Path, found: DryRun) -> None:
    try:
        section = cfg.model.model_copy(update={"path": model_folder(cfg, scratch)})
        policy = load_skeleton(section)
        tried = try_quickly(section if _can_quantize(cfg, found) else section.model_copy(update={"quantization": None}))
    except DataError as error:
        words = f"{cfg.model.path} takes its words from the training references"
        found.unchecked.append(f"model, prompt length and memory: {words}: {error}")
        return
    except (ConfigError, ModelError) as error:
        out_of_reach = is_hub_id(cfg.model.path) and isinstance(error.__cause__, OSError)
        what = "model, prompt length and memory: " if out_of_reach else ""
        (found.unchecked if out_of_reach else found.blocking).append(f"{what}{error}")
        return
    found.context = policy.context_length
    if cfg.rollout.engine.kind == "vllm":
        from mmrl_ray.policy.generation.vllm.exchange import takes_embeddings

        wanted = cfg.rollout.engine.args.get("enable_mm_embeds", not cfg.model.lora.adapt_vision)
        found.embeds = wanted and takes_embeddings(policy)
    if not tried:
        found.unchecked.append(f"the numbers in the weights of {cfg.model.path}, and a first trial of it")
    _look_at_parts(cfg, policy, found)
    try:
        found.shape = model_shape(policy.hf_model, cfg.model.lora, policy.dtype, cfg.model.quantization)
        found.left_out = left_out_line(policy.hf_model, resolve_targets(policy.hf_model, cfg.model.lora))
    except (AdapterError, ConfigError) as error:
        found.blocking.append(str(error))
    if found.sample is None:
        found.unchecked.append("the true length of prompts: taken for a blank picture of 640×480")
    _measure_prompt(cfg, policy, found.sample or _stand_in(cfg), found)
    _look_at_teacher(cfg, policy, found)


def _look_at_parts(cfg: Config, policy: Policy, found: DryRun) -> None:
    if cfg.sft is None:
        return
    found.parts = {name: sum(p.numel() for p in part.values()) for name, part in model_parts(policy.hf_model).items()}
    try:
        refuse_unknown_parts(policy.hf_model, cfg.model.path, cfg.sft)
    except ModelError as error:
        found.blocking.append(str(error))


def _can_quantize(cfg: Config, found: DryRun) -> bool:
    """Whether what keeps weights quantised is installed here; what is missing blocks a run on this machine."""
    places = [(cfg.model.quantization, cfg.model.path)]
    if cfg.teacher is not None:
        places.append((cfg.teacher.quantization, cfg.teacher.path))
    troubles = []
    for section, path in places:
        try:
            if section is not None:
                require(section, path, torch.device("cpu"))
        except ConfigError as error:
            troubles.append(str(error))
    found.lacking += troubles
    found.blocking += troubles
    return not troubles


def _look_at_teacher(cfg: Config, student: Policy, found: DryRun) -> None:
    teacher = cfg.teacher
    if teacher is None:
        return
    places = [place for place in (teacher.path, teacher.adapter) if place is not None and not is_hub_id(place)]
    missing = [place for place in places if not Path(place).expanduser().exists()]
    if missing:
        found.unchecked.append(f"teacher: {' and '.join(missing)}: not there yet; train or fetch it first")
        return
    try:
        policy = check_teacher(teacher, student)
        count = sum(weight.numel() for weight in policy.model.parameters())
        size, _ = weight_bytes(policy.hf_model, policy.dtype, teacher.quantization)
        found.teacher = f"{count / 1e6:,.1f} M parameters, {_size(size)} an actor"
    except (AdapterError, ConfigError, ModelError) as error:
        out_of_reach = is_hub_id(teacher.path) and isinstance(error.__cause__, OSError)
        (found.unchecked if out_of_reach else found.blocking).append(
            f"teacher: {error}" if out_of_reach else str(error)
        )


def _try_formats(cfg: Config, found: DryRun) -> None:
    """Tries patterns on what captions are meant to be like: where none matches, sampled ones hardly will."""
    parts = {name: part for name, part in cfg.reward.with_opening(found.opening).parts.items() if part.kind == "format"}
    texts = _some_references(cfg, found) if parts else []
    for name, part in parts.items():
        try:
            reward = FormatReward(part.pattern, prefix=part.prefix or "")
            matched = any(reward.value(text) for text in texts)
        except RewardError as error:
            found.warnings.append(f"reward.parts.{name}: {error}")
            continue
        if texts and not matched:
            began = f" after {part.prefix!r}, which the chat template writes, or alone" if part.prefix else ""
            found.warnings.append(
                f"reward.parts.{name}: pattern {part.pattern!r}{began} matches none of {len(texts)} references, such "
                f"as {_short(texts[0])!r}: unless captions are meant to be unlike them, this part gives every one 0"
            )


def _some_references(cfg: Config, found: DryRun) -> list[str]:
    """One each of the first rows, or of the one sample that there is."""
    try:
        cells = islice(iter_references(cfg.data.train), _TEXTS_TRIED)
        return [text for references in cells for text in references[:1]]
    except DataError:
        return list(found.sample.references[:1]) if found.sample is not None else []


def _measure_prompt(cfg: Config, policy: Policy, sample: Sample, found: DryRun) -> None:
    if cfg.reward.needs_opening and cfg.agent is None:
        found.opening = answer_opening(policy.processor)
    try:
        (prompt,) = encode_prompts(policy, [sample])
        found.prompt_tokens = prompt.input_ids.numel()
        found.image_tokens = int((prompt.input_ids == policy.placeholder_id).sum())
        check_context(policy, prompt, cfg.rollout.max_new_tokens)
    except (DataError, ModelError) as error:
        found.blocking.append(f"sample {sample.id}: {error}")
    if cfg.sft is not None:
        with suppress(DataError):  # the warm start leaves such a row out
            lengths = [encode_caption(policy, text).numel() for text in _some_references(cfg, found)]
            found.caption_tokens = max(lengths, default=None)


def _stand_in(cfg: Config) -> Sample:
    """A picture of a usual photograph's size, where no sample of the data can be had."""
    picture = encode_png(Image.new("RGB", (640, 480), (127, 127, 127)))
    return Sample(id="stand-in", images=(picture,), prompt=cfg.data.prompt)


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
        *([f"metadata    {_short(dict(sample.metadata))}"] if sample.metadata else []),
    ]


def _short(value: object, limit: int = 200) -> str:
    text = str(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


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
        f"base model  {shape.parameters / 1e6:,.1f} M parameters, {_size(shape.weight_bytes)}{_kept(cfg.model)}",
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
        lines += [f"  {part:<26} {_size(value):>10} of host memory" for part, value in picture_memory(cfg).items()]
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
    together = f", {_size(most * each)} for {most} on one node" if most > 1 else ""
    return f"while it loads, up to {_size(each)} of its node's memory{together}"


def _one_worker(name: str, parts: Mapping[str, int]) -> list[str]:
    rows = [f"  {part:<26} {_size(value):>10}" for part, value in parts.items()]
    return [f"one {name}, about {_size(sum(parts.values()))}:", *rows]


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
    return [f"{what}: about {_size(needed)} of {_size(there)}, beside Ray: {verdict}"]


def _shared(cfg: Config) -> Sequence[SharedGpu]:
    try:
        return shared_gpus_of(cfg)
    except ConfigError:  # which is among what blocks
        return ()


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
