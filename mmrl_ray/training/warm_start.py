"""The model that reinforcement learning starts from: a built-in one made on the spot, and the supervised warm start.

    config ──key──▶ cache has KEY/warm_start.json? ──yes──▶ that folder
                         └─no─▶ build or load ──train──▶ .tmp-… ──rename──▶ KEY/
                                  └──▶ KEY.partial.pt, there or in the run, from which one that was stopped goes on

A finished warm start is an ordinary Hugging Face folder (model, processor, chat template) named by a hash of all that
made it. It appears by a rename, so that one which is there is whole. A run keeps it as its own `base/`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from PIL import Image
from pyarrow import fs
from safetensors import SafetensorError

from mmrl_ray.config import Config
from mmrl_ray.config.sft import SFT_CACHE
from mmrl_ray.data import atomic
from mmrl_ray.data.images import encode_png, image_hash
from mmrl_ray.data.samples import Quarantine, QuarantineRecord, Sample, dataset_fingerprint, iter_references, read_split
from mmrl_ray.data.scenes.generator import scenes_vocabulary, write_scenes
from mmrl_ray.errors import DataError, ModelError, RunError, one_line
from mmrl_ray.evaluation.looking import policy_sight
from mmrl_ray.evaluation.samples import caption_samples
from mmrl_ray.evaluation.scores import Blindness, blindness
from mmrl_ray.evaluation.sight import NEVER_SAW, told_blind
from mmrl_ray.policy.checkpoint import commit_of
from mmrl_ray.policy.load import load_policy
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.model_folder import files_of_base, same_inputs, write_model, write_rest
from mmrl_ray.policy.prompts import encode_prompts
from mmrl_ray.policy.tiny import BUILTIN_TINY_LLAVA, build_tiny_llava, words_of
from mmrl_ray.policy.tokens import load_processor
from mmrl_ray.run_records.run_dir import BASE, RunDir
from mmrl_ray.telemetry.terminal import ProgressFn, RunProgress
from mmrl_ray.training.sft import Trained, train_supervised
from mmrl_ray.training.sft_state import Checkpoint

logger = logging.getLogger(__name__)

FACTS = "warm_start.json"
"""In the folder: what it was made from, its first and last loss, looks at held-out pictures, the rows that it left out,
seconds."""
LOG = "sft.jsonl"
"""Beside it: a line a step, and one a look at held-out pictures."""

TINY_LLAVA: Mapping[str, Any] = {
    "patch_size": 16,
    "hidden": 128,
    "layers": 4,
    "vision_hidden": 96,
    "vision_layers": 3,
    "initializer_range": 0.08,
}
"""The size of `builtin:tiny-llava`: 1.2 M parameters, 16 image tokens for a picture."""
_TINY_WORDS = 8000
"""The most frequent words of the training references that a tiny model knows where the data set is not scenes."""
_LOOKED_AT = 48
"""Pictures that a new warm start is asked for captions of."""
_PARTIAL = ".partial.pt"
"""Ends the name of the file that an unfinished warm start goes on from."""
_FORMAT = 1
"""Raised when the same settings come to mean another model."""
_WHOLE = 16 << 20
"""Files of a model folder up to this size enter the key by content, larger ones by size and time of change."""


def warm_start(
    cfg: Config,
    *,
    progress: ProgressFn | None = None,
    notice: Callable[[str], None] | None = None,
    say: Callable[[str], None] | None = None,
    keep_in: Path | None = None,
) -> str:
    """What `model.path` stands for: a folder with a model ready for reinforcement learning.

    A built-in model is made and, with an `sft` section, the model is trained; both are kept in `sft.cache` and found
    there the next time. A checkpoint without `sft` is returned as it was written (it may be a hub id). Writes the
    scenes first where the config asks for them. `notice` is told before anything is made, `say` what is awaited when
    the user stops it. What an unfinished one goes on from is kept in the folder `keep_in`, which outlives the cache, or
    else in the cache.

    Raises:
        ModelError: no such built-in model, or the checkpoint cannot be used.
        DataError: the training split cannot be used.
        NonFiniteError: training diverged.
        RunError: the cache cannot be written.
    """
    if not _is_made(cfg):
        return cfg.model.path
    if cfg.data.scenes is not None:
        if notice is not None and not Path(cfg.data.train).exists():
            notice(f"{cfg.data.train} is not there any more: the scenes are drawn anew")
        write_scenes(cfg.data.scenes, cfg.data.train, cfg.data.eval)
    cache, made_from = _cache(cfg), _made_from(cfg)
    target = cache / _key(made_from)
    partial = (keep_in or cache) / f"{target.name}{_PARTIAL}"
    if (target / FACTS).is_file():
        partial.unlink(missing_ok=True)
        return str(target)
    if notice is not None:
        steps = "" if cfg.sft is None else f", with {cfg.sft.total_steps:,} steps of warm start"
        notice(f"the model that it began with is not in {cache} any more: it is made anew{steps}")
    with _staging(cache) as scratch:
        checkpoint = Checkpoint(partial, made_from)
        if say is not None:
            _tell_of_others(checkpoint, say)
        if keep_in is not None:
            _take_over_partial(cache, partial)
        facts = _make(cfg, scratch, progress, checkpoint, say)
        (scratch / FACTS).write_text(json.dumps({"made_from": made_from, **facts}, indent=2) + "\n", encoding="utf-8")
        if not (target / FACTS).is_file():  # another process may have been faster
            atomic.commit_folder(scratch, target)
    partial.unlink(missing_ok=True)
    return str(target)


def base_of_run(
    cfg: Config,
    run: RunDir,
    *,
    progress: ProgressFn | None = None,
    notice: Callable[[str], None] | None = None,
    say: Callable[[str], None] | None = None,
    owned: bool = False,
) -> str:
    """The model that a run's adapter belongs to: the one kept with the run, else (of older runs) as `warm_start`.

    Of a run that does not lie on this machine it is found in `sft.cache`, or copied there. Whoever has `owned` the
    run's folder keeps there what an unfinished warm start goes on from.

    Raises:
        RunError: it cannot be read or kept.
        as `warm_start`: the run has no base of its own.
    """
    if not _is_made(cfg) or not run.exists(f"{BASE}/{FACTS}"):
        keep_in = run.local_path() if owned and run.is_local else None
        return warm_start(cfg, progress=progress, notice=notice, say=say, keep_in=keep_in)
    if run.is_local:
        return str(run.local_path(BASE))
    target = _cache(cfg) / _key(run.read_json(f"{BASE}/{FACTS}")["made_from"])
    if not (target / FACTS).is_file():
        with _staging(target.parent) as scratch:
            fs.copy_files(run.full_path(BASE), str(scratch), source_filesystem=run.filesystem)
            atomic.commit_folder(scratch, target)
    return str(target)


def keep_base(cfg: Config, run: RunDir, folder: str) -> tuple[str, int]:
    """Keeps what `warm_start` has made with the run, as `base/`, so that the run outlives the cache.

    On the cache's own file system they are hard links, which take no room; anywhere else copies. A model that was
    not made here is left where it is.

    Returns:
        where the run finds it, and the bytes in `base/`.

    Raises:
        RunError: it cannot be written.
    """
    source = Path(folder)
    if not _is_made(cfg):
        return folder, 0
    files = [file for file in source.iterdir() if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    if run.exists(f"{BASE}/{FACTS}"):
        return (str(run.local_path(BASE)) if run.is_local else folder), size
    if not run.is_local:
        run.filesystem.create_dir(run.full_path(BASE), recursive=True)
        for file in sorted(files, key=lambda file: file.name == FACTS):  # the last to come: where it is, all is
            target = run.full_path(f"{BASE}/{file.name}")
            fs.copy_files(str(file), target, destination_filesystem=run.filesystem)
        return folder, size
    with run.staging_folder() as scratch:
        for file in files:
            try:
                os.link(file, scratch / file.name)
            except OSError:  # another file system, or one without hard links
                shutil.copy2(file, scratch / file.name)
        atomic.commit_folder(scratch, run.local_path(BASE))
    return str(run.local_path(BASE)), size


def same_base(one: str, other: str) -> bool:
    """Whether two models are one: by what they were made from where `warm_start` made them, else by where they lie."""
    made = warm_start_facts(one).get("made_from"), warm_start_facts(other).get("made_from")
    return one == other if made == (None, None) else made[0] == made[1]


def base_for_use(cfg: Config, run: RunDir, shown: RunProgress | None = None) -> str:
    """`base_of_run` for who only uses a run: what is gone of its data and its base is made anew, which is said.

    By `shown`, or by a progress of its own.
    """
    if shown is None:
        with RunProgress() as own:
            return base_for_use(cfg, run, own)
    with shown.busy("looking for the model that the run began with"):
        return base_of_run(
            cfg,
            run,
            progress=shown.phase("warm start", lazily=True),
            notice=lambda text: shown.warn(f"{cfg.run.name}: {text}"),
            say=shown.note,
        )


def warm_start_facts(folder: str | Path) -> dict[str, Any]:
    """What a folder from `warm_start` says of itself; nothing for any other model."""
    file = Path(folder) / FACTS
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def warm_start_left_out(folder: str | Path) -> tuple[QuarantineRecord, ...]:
    """Rows that the warm start of that folder could not use; none of any other model."""
    return tuple(QuarantineRecord(**record) for record in warm_start_facts(folder).get("left_out", ()))


def warm_start_blindness(folder: str | Path) -> Blindness | None:
    """What was found of the captions of a folder from `warm_start`, if they do not depend on the picture."""
    found = warm_start_facts(folder).get("blind")
    return None if found is None else Blindness(**found)


def warm_start_unseeing(folder: str | Path) -> str | None:
    """Why the look at a folder from `warm_start` found its policy blind, in words; None where it did not."""
    reasons = (warm_start_facts(folder).get("sight") or {}).get("blind")
    return told_blind("warm start", reasons, NEVER_SAW) if reasons else None


def _blindness(policy: Policy, cfg: Config) -> tuple[Blindness | None, dict[str, Any] | None]:
    """Of greedy captions of a few held-out pictures, or of training ones where none are held out; and a look at what
    the policy makes of other pictures than their own."""
    try:
        source = cfg.data.eval or cfg.data.train
        broken = Quarantine(cfg.data.max_quarantined, source=source)
        samples = read_split(source, prompt=cfg.data.prompt, limit=_LOOKED_AT, quarantine=broken)
        longest = cfg.rollout.max_new_tokens
        captions = caption_samples(policy, samples, max_new_tokens=longest)
        sight, _ = policy_sight(policy, samples, max_new_tokens=longest, temperature=cfg.rollout.temperature)
    except (DataError, ModelError) as error:  # the run's own evaluation says more of it
        logger.warning(f"the warm start's captions were not looked at: {error}")
        return None, None
    reasons = sight.blind(cfg.learner.blind_check.min_gap)
    found = blindness(
        ([image_hash([image]) for image in sample.images], sample.references, caption)
        for sample, caption in zip(samples, captions, strict=True)
    )
    return found, {**sight.to_json(), "blind": reasons}


def _make(
    cfg: Config, folder: Path, progress: ProgressFn | None, checkpoint: Checkpoint, say: Callable[[str], None] | None
) -> dict[str, Any]:
    """Fills `folder` with model and processor; returns how it went."""
    started = time.monotonic()
    if cfg.sft is None:
        model_folder(cfg, folder)
        return {"seconds": time.monotonic() - started}
    untrained = folder / "untrained"
    path = model_folder(cfg, untrained)
    # Weights that train are float32, whatever they are used in later; a frozen base under an adapter need not be. None
    # is quantised: what RL starts from is, when it is loaded.
    dtype = cfg.model.dtype if cfg.sft.is_adapter_alone else "float32"
    policy = load_policy(cfg.model.model_copy(update={"path": path, "dtype": dtype, "quantization": None}))
    left_out: list[dict[str, str]] = []
    trained = train_supervised(
        policy, cfg, cfg.sft, progress, lambda record: left_out.append(record.as_dict()), checkpoint, say
    )
    _save(policy, folder, path, cfg.model.revision)
    shutil.rmtree(untrained, ignore_errors=True)
    _write_log(trained, folder)
    (found, sight), losses = _blindness(policy, cfg), trained.losses
    return {
        "blind": None if found is None else asdict(found),
        "sight": sight,
        "steps": len(losses),
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "held_out": trained.looks,
        "left_out": left_out,
        "seconds": time.monotonic() - started,
    }


def _save(policy: Policy, folder: Path, base: str, revision: str | None) -> None:
    """The whole folder; `base` is the model that was trained, by its folder or id."""
    write_model(policy, folder)
    files, settings = files_of_base(base, revision), policy.processor_settings
    write_rest(policy, files, folder, settings)
    if settings and not _makes_the_same(policy, folder):
        write_rest(policy, files, folder, {})


def _makes_the_same(policy: Policy, folder: Path) -> bool:
    """Whether the processor in the folder makes by itself what the policy's makes with the config's settings."""
    picture = encode_png(Image.effect_noise((640, 480), 64).convert("RGB"))
    sample = Sample(id="a picture", images=(picture,), prompt="What is this?")
    try:
        processor = load_processor(str(folder), policy.hf_model.config)
        alone = replace(policy, processor=processor, tokenizer=processor.tokenizer, processor_settings={})
        (written,), (ours,) = encode_prompts(alone, [sample]), encode_prompts(policy, [sample])
    except (DataError, ModelError, OSError, ValueError) as error:
        logger.warning(f"model.processor is not written into {folder.name}'s processor: {one_line(error)}")
        return False
    return same_inputs(written, ours)


def _write_log(trained: Trained, folder: Path) -> None:
    lines = sorted([*trained.steps, *({"held_out": look, "step": look["step"]} for look in trained.looks)], key=_place)
    (folder / LOG).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _place(line: Mapping[str, Any]) -> tuple[int, bool]:
    return line["step"], "held_out" in line


def model_folder(cfg: Config, scratch: Path) -> str:
    """The model's folder or hub id as the config has it; a built-in one is made, untrained, in `scratch`.

    Raises:
        ModelError: no such built-in model.
        DataError: its words come from the training references, and those cannot be read.
    """
    if not _is_builtin(cfg):
        return cfg.model.path
    _refuse_unknown(cfg.model.path)
    return str(build_tiny_llava(scratch, vocabulary=_vocabulary(cfg), seed=cfg.run.seed, **TINY_LLAVA))


def _refuse_unknown(path: str) -> None:
    if path != BUILTIN_TINY_LLAVA:
        raise ModelError(f"no built-in model {path!r}; there is {BUILTIN_TINY_LLAVA}")


def _tell_of_others(checkpoint: Checkpoint, say: Callable[[str], None]) -> None:
    """Where one begins anew because the settings are not those that an unfinished one had."""
    if checkpoint.file.is_file():
        return
    for file, changed in checkpoint.others(f"*{_PARTIAL}"):
        say(
            f"the warm start begins anew: {file} is an unfinished one with other settings "
            f"({', '.join(changed)}); to go on with that, stop and write them as they were"
        )


def _take_over_partial(cache: Path, partial: Path) -> None:
    """Makes the cache's unfinished warm start (of `mmrl sft`) a run's, where that has none; others of it go."""
    for other in partial.parent.glob(f"*{_PARTIAL}"):
        if other != partial:  # of other settings, before a resume that changed them
            other.unlink()
    found = cache / partial.name
    if found.exists() and not partial.exists():
        scratch = partial.with_name(f"{atomic.SCRATCH_PREFIXES[0]}{partial.name}")
        shutil.copyfile(found, scratch)
        os.replace(scratch, partial)


def _is_made(cfg: Config) -> bool:
    """Whether the run's base is made here, and not just named by the config."""
    return cfg.sft is not None or _is_builtin(cfg)


def _cache(cfg: Config) -> Path:
    return Path(cfg.sft.cache if cfg.sft is not None else SFT_CACHE).expanduser().absolute()


def _key(made_from: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:20]


def _is_builtin(cfg: Config) -> bool:
    return cfg.model.path.startswith("builtin:")


def _made_from(cfg: Config) -> dict[str, Any]:
    """Everything that the result depends on, as JSON."""
    found: dict[str, Any] = {"format": _FORMAT, "seed": cfg.run.seed, "model": _model_identity(cfg)}
    if _is_builtin(cfg):
        found["words"] = hashlib.sha256("\n".join(_vocabulary(cfg)).encode()).hexdigest()
    if cfg.sft is not None:
        found |= {
            "sft": cfg.sft.identity,
            "data": dataset_fingerprint(cfg.data.train),
            "prompt": cfg.data.prompt,
            "processor": cfg.model.processor,
            "lora": cfg.model.lora.model_dump() if any(stage.mode == "lora" for stage in cfg.sft.phases) else None,
            "dtype": cfg.model.dtype if cfg.sft.is_adapter_alone else None,
        }
    return found


def _model_identity(cfg: Config) -> dict[str, Any]:
    path = cfg.model.path
    if _is_builtin(cfg):
        _refuse_unknown(path)
        return {"builtin": path, **TINY_LLAVA}
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return {"hub": path, "revision": cfg.model.revision, "commit": commit_of(path, cfg.model.revision)}
    return {"files": {file.name: _file_identity(file) for file in sorted(folder.iterdir()) if file.is_file()}}


def _file_identity(file: Path) -> str:
    stat = file.stat()
    return atomic.sha256_of(file) if stat.st_size <= _WHOLE else f"{stat.st_size}@{stat.st_mtime_ns}"


def _vocabulary(cfg: Config) -> list[str]:
    """The words of a tiny model, the prompt's among them."""
    if cfg.data.scenes is not None:
        return [*words_of([cfg.data.prompt]), *scenes_vocabulary()]
    texts = (text for references in iter_references(cfg.data.train) for text in references)
    return [*words_of([cfg.data.prompt]), *words_of(texts)[:_TINY_WORDS]]


@contextmanager
def _staging(cache: Path) -> Iterator[Path]:
    """A scratch folder in the cache, gone afterwards unless it was renamed into place."""
    try:
        with atomic.scratch_folder(cache) as scratch:
            yield scratch
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"the warm start cannot be kept in {cache}: {one_line(error)}; make room or set sft.cache"
        ) from error
