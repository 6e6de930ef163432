"""Which checkpoints a run has, and which of them is meant: the best, the last, or that of a step. No torch.

    checkpoints/step-000040/   whole: adapter, optimiser, everything that a resume needs
    adapter/                   of a finished run: the best where it was evaluated while it learned, else the last
    adapter-last/              of a finished run that was: the last
    eval/steps.jsonl           what held-out captions were worth at which step, and which step was the best by then

A value-based run has `agent/` in place of `adapter/`, and is not evaluated while it learns.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mmrl_ray.config import Config
from mmrl_ray.errors import CheckpointError, ConfigError, RunError
from mmrl_ray.run_records.run_dir import (
    ADAPTER_FOLDER,
    CHECKPOINTS,
    CONFIG_FILE,
    LAST_ADAPTER_FOLDER,
    MANIFEST,
    RunDir,
    checkpoint_name,
    checkpoint_steps,
)
from mmrl_ray.run_records.step_log import EVALUATIONS, LOOKS, note_event

logger = logging.getLogger(__name__)

BEST, LAST = "best", "last"
_OF_A_RESUME = ("state.safetensors", "state.json", "controller")
"""In a checkpoint, beside its adapter."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """A folder of a run that holds an adapter (or an agent), and what it is."""

    folder: str
    """Its name in the run."""
    step: int | None
    """Finished steps; None where an older folder does not say."""
    notes: tuple[str, ...] = ()
    """What whoever uses it should know."""


def choose_checkpoint(
    run: RunDir, which: str | None = None, *, final: str = ADAPTER_FOLDER, holds: str = CONFIG_FILE
) -> Chosen:
    """The folder that `--checkpoint WHICH` means; without it what a run is used with: its final one, or the newest.

    Args:
        which: `best`, `last`, or the number of a step in digits.
        final: the folder of a finished run; `agent` of a value-based one.
        holds: a file without which such a folder does not count.

    Raises:
        ConfigError: `which` is none of these.
        RunError: there is no such checkpoint: says which there are.
        CheckpointError: it is damaged.
    """
    if which is None:
        return _default(run, final, holds)
    found = _named(run, which, final, holds)
    if run.exists(f"{final}/{holds}"):
        return replace(found, notes=(f"--checkpoint {which}: this is its {found.folder}, of step {found.step}",))
    return replace(found, notes=(_unfinished(found.step),))


def _named(run: RunDir, which: str, final: str, holds: str) -> Chosen:
    if which not in (BEST, LAST) and not (which.isascii() and which.isdigit()):
        raise ConfigError(f"--checkpoint {which}: write best, last or the number of a step; {_there_is(run, final)}")
    known = _finals(run, final, holds)
    if which == LAST:
        newest = newest_valid_checkpoint(run) if checkpoint_steps(run) else None
        found = [*known, *([Chosen(checkpoint_name(newest), newest)] if newest is not None else [])]
        if not found:
            raise RunError(f"{run.location} has no checkpoint yet: let it train with --resume")
        return max(found, key=lambda each: -1 if each.step is None else each.step)  # of equal ones the final
    step = best_step(run) if which == BEST else int(which)
    if step is None:
        raise RunError(
            f"{run.location} has no best checkpoint: it was not evaluated while it learned (eval.every), or not yet; "
            f"{_there_is(run, final)}"
        )
    for each in known:
        if each.step == step:
            return each
    if step not in checkpoint_steps(run):
        raise RunError(f"{run.location} has no checkpoint of step {step}; {_there_is(run, final)}")
    run.verify_manifest(checkpoint_name(step))
    return Chosen(checkpoint_name(step), step)


def _default(run: RunDir, final: str, holds: str) -> Chosen:
    if run.exists(f"{final}/{holds}"):
        step, last = _step_of(run, final), _step_of(run, LAST_ADAPTER_FOLDER)
        is_earlier = final == ADAPTER_FOLDER and last is not None and step != last
        told = f"this is the run's best checkpoint, of step {step}; its last, of step {last}, is --checkpoint last"
        return Chosen(final, step, (told,) if is_earlier else ())
    newest = newest_valid_checkpoint(run)
    if newest is None:
        raise RunError(
            f"{run.location} has no {final} and no checkpoint yet: let it train with --resume, or name a model"
        )
    return Chosen(checkpoint_name(newest), newest, (_unfinished(newest),))


def _unfinished(step: int | None) -> str:
    return f"the run is not finished: this is its checkpoint of step {step}"


def _finals(run: RunDir, final: str, holds: str) -> list[Chosen]:
    names = [final, *([LAST_ADAPTER_FOLDER] if final == ADAPTER_FOLDER else [])]
    return [Chosen(name, _step_of(run, name)) for name in names if run.exists(f"{name}/{holds}")]


def _step_of(run: RunDir, folder: str) -> int | None:
    """What its manifest says; None where there is none."""
    if not run.exists(f"{folder}/{MANIFEST}"):
        return None
    step = run.read_json(f"{folder}/{MANIFEST}").get("step")
    return None if step is None else int(step)


def _there_is(run: RunDir, final: str) -> str:
    """The checkpoints of a run, in words."""
    finals = [_step_of(run, name) for name in (final, LAST_ADAPTER_FOLDER)]
    steps = sorted({*checkpoint_steps(run), *(step for step in finals if step is not None)})
    if not steps:
        return "it has none"
    best = best_step(run)
    return f"there are {', '.join([*([f'best (step {best})'] if best is not None else []), LAST, *map(str, steps)])}"


def own_folder(location: str) -> tuple[str, str] | None:
    """(the run's location, the folder's name in it) of a place that is one of a run's own adapters by its name."""
    head, _, tail = location.rstrip("/").rpartition("/")
    if tail in (ADAPTER_FOLDER, LAST_ADAPTER_FOLDER):
        return head, tail
    above, _, middle = head.rpartition("/")
    return (above, f"{CHECKPOINTS}/{tail}") if middle == CHECKPOINTS else None


# -- what evaluations have found ---------------------------------------------------------------------------------------


def evaluation_lines(run: RunDir) -> list[dict[str, Any]]:
    """The lines of `eval/steps.jsonl`; none of a run that is not evaluated while it learns."""
    return run.read_lines(EVALUATIONS)


def best_step(run: RunDir) -> int | None:
    """The step of the best checkpoint so far; None before one was evaluated."""
    lines = evaluation_lines(run)
    return None if not lines or lines[-1].get("best") is None else int(lines[-1]["best"])


def deliver_best(run: RunDir, best: int, last: int) -> None:
    """Makes `adapter-last/` of what a run has just ended with, and `adapter/` of its best checkpoint.

    Raises:
        RunError: it cannot be written.
        CheckpointError: the best checkpoint is damaged.
    """
    if _step_of(run, ADAPTER_FOLDER) == last:
        _copy_adapter(run, ADAPTER_FOLDER, LAST_ADAPTER_FOLDER, last)
    if _step_of(run, ADAPTER_FOLDER) != best:
        run.verify_manifest(checkpoint_name(best))
        _copy_adapter(run, checkpoint_name(best), ADAPTER_FOLDER, best)


def _copy_adapter(run: RunDir, source: str, target: str, step: int) -> None:
    """What of a folder is no state of a learner, as another."""
    with run.staging_folder() as folder:
        for name in run.list(source):
            if name not in (MANIFEST, *_OF_A_RESUME):
                (folder / name).write_bytes(run.read_bytes(f"{source}/{name}"))
        run.commit_folder(target, folder, facts={"step": step})


def kept_for_evaluation(run: RunDir, cfg: Config) -> list[int]:
    """Steps whose checkpoints stay however old they are: the best, and those that were not judged yet."""
    best = None if cfg.eval.every is None else best_step(run)
    return [*([best] if best is not None else []), *steps_to_judge(run, cfg)]


def steps_to_judge(run: RunDir, cfg: Config, before: int | None = None) -> list[int]:
    """Checkpoints whose held-out captions were asked for, and not judged by lines up to step `before`."""
    waiting: set[int] = set()
    for file, is_due in ((EVALUATIONS, cfg.eval.is_due), (LOOKS, cfg.is_look_due)):
        lines = [line["step"] for line in run.read_lines(file) if before is None or line["step"] <= before]
        waiting |= {step for step in checkpoint_steps(run) if step > max(lines, default=0) and is_due(step)}
    return sorted(waiting)


# -- checkpoints that stay ---------------------------------------------------------------------------------------------


def newest_valid_checkpoint(run: RunDir) -> int | None:
    """The step of the newest checkpoint whose every hash holds; None when none was ever committed.

    A folder that fails is passed over with a warning and an event in `events.jsonl`. One without a manifest was never
    a checkpoint: its writer died before the commit.

    Raises:
        CheckpointError: there are checkpoints, and none is valid.
    """
    damaged = 0
    for step in reversed(checkpoint_steps(run)):
        try:
            run.verify_manifest(checkpoint_name(step))
        except CheckpointError as error:
            logger.warning("checkpoint of step %d is damaged, falling back to the one before: %s", step, error)
            note_event(run, "checkpoint_damaged", step=step, reason=str(error))
            damaged += run.exists(f"{checkpoint_name(step)}/{MANIFEST}")
        else:
            return step
    if damaged:
        raise CheckpointError(
            f"{run.full_path(CHECKPOINTS)}: none of the {damaged} checkpoints is valid; "
            "restore one from a backup, or remove them all to start this run over"
        )
    return None


def prune_checkpoints(run: RunDir, newest: int, keep: int, also: Sequence[int] = ()) -> None:
    """Leaves the newest `keep` up to `newest`, and those of `also`. Later ones are of a past that a fallback has left,
    and damaged."""
    run.verify_manifest(checkpoint_name(newest))  # before anything older goes
    steps = checkpoint_steps(run)
    kept = {*[s for s in steps if s <= newest][-keep:], *(s for s in also if s <= newest)}
    for step in steps:
        if step not in kept:
            run.delete(f"{checkpoint_name(step)}/{MANIFEST}")  # whoever dies between here and there leaves no half one
            run.delete(checkpoint_name(step))
