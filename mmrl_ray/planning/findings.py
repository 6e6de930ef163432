"""What a dry run finds out: of the run's folder, data, reward, model and teacher, without weights.

What cannot be found out here (a hub that is out of reach, a dataset that is not there yet) is noted, not guessed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import torch
from PIL import Image

from mmrl_ray.analysis.sight import arrange
from mmrl_ray.config import Config
from mmrl_ray.config.paths import is_hub_id, sqlite_file
from mmrl_ray.data.images import encode_png
from mmrl_ray.data.samples import Sample, iter_references, told
from mmrl_ray.data.scenes.generator import generate_scenes
from mmrl_ray.data.shards import ParquetDataset
from mmrl_ray.errors import (
    AdapterError,
    ConfigError,
    DataError,
    MMRLError,
    ModelError,
    RewardError,
    RunError,
)
from mmrl_ray.planning.preflight import (
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
from mmrl_ray.rewards.base import RewardFailure
from mmrl_ray.rewards.build import check_reward, try_functions
from mmrl_ray.rewards.text import FormatReward
from mmrl_ray.run_records.run_dir import RunDir
from mmrl_ray.run_records.run_owner import living_owner
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


def find_out(cfg: Config, *, resume: bool) -> DryRun:
    """Looks at run folder, data, reward, model and teacher; `resume` says that the run is to go on."""
    found = DryRun()
    _look_at_run_folder(cfg, resume, found)
    _look_at_data(cfg, found)
    _look_at_pairs(cfg, found)
    _look_at_stored(cfg, found)
    _look_at_reward(cfg, found)
    with tempfile.TemporaryDirectory(prefix="mmrl-") as scratch:
        _look_at_model(cfg, Path(scratch), found)
    _try_formats(cfg, found)
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
                found.tried.append(f"{name} of {shortened(caption)!r}, on sample {found.sample.id}: {score.total:g}")
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
        found.teacher = f"{count / 1e6:,.1f} M parameters, {size_words(size)} an actor"
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
                f"as {shortened(texts[0])!r}: unless captions are meant to be unlike them, this part gives every one 0"
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


def shortened(value: object, limit: int = 200) -> str:
    """Its text, cut where it is long."""
    text = str(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def size_words(count: float) -> str:
    """Bytes in words."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
