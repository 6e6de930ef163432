"""What a run learns from in place of its own rollouts: its copies of preference pairs and of another run's rollouts.

Both are copied into the run's folder at the start, so that a run that is resumed goes on in the very same ones,
whatever becomes of their source. Pairs come from the store as `preferences/train` and `preferences/held_out`: labels
that come later change no run, and no node but the driver's needs the database. Rollouts lie in `stored/train`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mmrl_ray.config import Config
from mmrl_ray.config.sections import PreferencesSection, RolloutsSection
from mmrl_ray.data.samples import Quarantine, Sample, read_split
from mmrl_ray.data.writing import ShardWriter
from mmrl_ray.errors import ConfigError, PreferenceError, RunError
from mmrl_ray.evaluation.scores import interval_json
from mmrl_ray.experience.carriers import RolloutGroup, SamplingParams
from mmrl_ray.metrics.statistics import RESAMPLES, bootstrap_difference, bootstrap_mean
from mmrl_ray.preferences.dataset import is_held_out, pair_of, write_split
from mmrl_ray.rollouts.controller_actor import ControllerClient
from mmrl_ray.run_records.rollout_log import LoggedPictures, logged_groups
from mmrl_ray.run_records.run_dir import ADAPTER_FOLDER, CONFIG_FILE, STARTING_ADAPTER, RunDir

if TYPE_CHECKING:
    from mmrl_ray.preferences.store import PreferenceStore

PAIRS, HELD_OUT = "preferences/train", "preferences/held_out"
_FILE = "eval/preferences_{name}.json"
STORED_FOLDER = "stored"
STORED = f"{STORED_FOLDER}/train"


def check_pairs(cfg: Config) -> int:
    """Labelled pairs in the store of a run that needs one; 0 of any other.

    Raises:
        PreferenceError: the store is not there, or has none.
    """
    if (wanted := cfg.data.preferences) is None:
        return 0
    with _store(wanted) as store:
        pairs = store.count_labelled()
    if not pairs:
        raise PreferenceError(f"data.preferences.store={wanted.store}: nobody has labelled a pair yet")
    return pairs


def _store(wanted: PreferencesSection) -> PreferenceStore:
    # Imported here: SQLAlchemy takes half a second, which other runs need not pay.
    from mmrl_ray.preferences.store import PreferenceStore

    return PreferenceStore(wanted.store, must_exist=True)


def trained_pictures(wanted: PreferencesSection) -> Iterator[str]:
    """Hash of each vote's picture, of those that a run trains on.

    Raises:
        PreferenceError: the store cannot be read.
    """
    with _store(wanted) as store:
        for each in store.preferences():
            if not is_held_out(each.pair.image_hash, wanted.held_out):
                yield each.pair.image_hash


def pair_data(cfg: Config, run: RunDir) -> tuple[Config, list[Sample]]:
    """The config of a run that trains on pairs, its `data.train` its own copy of them; and the held-out pairs.

    Any other config is given back as it is, with no pairs.

    Raises:
        PreferenceError: the store cannot be read, or has nothing to train on.
        DataError: the copy cannot be written or read.
    """
    wanted = cfg.data.preferences
    if wanted is None:
        return cfg, []
    train, held_out = f"{run.location}/{PAIRS}", f"{run.location}/{HELD_OUT}"
    if not run.exists(PAIRS):
        run.delete(HELD_OUT)  # of a driver that was killed in between
        with _store(wanted) as store:
            write_split(store.preferences(pictures=True), train, held_out, share=wanted.held_out)
    pairs = []
    if run.exists(HELD_OUT):
        broken = Quarantine(cfg.data.max_quarantined, source=held_out)
        pairs = read_split(held_out, prompt=cfg.data.prompt, limit=cfg.eval.samples, quarantine=broken)
    return cfg.model_copy(update={"data": cfg.data.model_copy(update={"train": train})}), pairs


def measure_pairs(cfg: Config, run: RunDir, name: str, controller: ControllerClient, pairs: Sequence[Sample]) -> str:
    """Scores the held-out pairs by the newest policy, keeps the figures under `name`, and tells them in a line.

    Raises:
        RolloutError: the workers did not answer.
        RunError: the folder cannot be written.
    """
    sampling = SamplingParams(temperature=cfg.rollout.temperature, max_new_tokens=cfg.rollout.max_new_tokens)
    generated = controller.generate(pairs, sampling, completions=2)
    groups = controller.groups([scored.payload for scored in generated.groups if scored is not None])
    scale = cfg.learner.family.implicit_reward_scale
    margins = [margin for group in groups if (margin := _margin(group, scale)) is not None]
    left_out = len(generated.failures)
    run.write_json(_FILE.format(name=name), {"margins": margins, "seed": cfg.run.seed, "left_out": left_out})
    if not margins:
        return f"preferences ({name}): no held-out pair has a better caption"
    accuracy = bootstrap_mean([_correct(m) for m in margins], seed=cfg.run.seed, resamples=RESAMPLES)
    return f"preferences ({name}): {accuracy.mean:.1%} of {len(margins)} held-out pairs {accuracy.words('.1%')}"


def preferences_json(run: RunDir) -> dict[str, Any]:
    """`preferences` of the summary: accuracy and margin of the implicit reward on held-out pairs, and how they changed.

    Accuracy is the share of pairs whose better caption has the larger implicit reward; equal ones count ½, as all do
    before training, when the policy is the reference.
    """
    found: dict[str, Any] = {}
    columns: dict[str, dict[str, list[float]]] = {}
    for name in ("before", "after"):
        if not run.exists(_FILE.format(name=name)):
            continue
        told = run.read_json(_FILE.format(name=name))
        if margins := told["margins"]:
            columns[name] = {"accuracy": [_correct(m) for m in margins], "margin": margins}
            measures = {
                key: interval_json(bootstrap_mean(values, seed=told["seed"], resamples=RESAMPLES))
                for key, values in columns[name].items()
            }
            found[name] = {"pairs": len(margins), "left_out": told["left_out"], **measures}
    if len(columns) == 2 and len(columns["before"]["margin"]) == len(columns["after"]["margin"]):
        found["difference"] = {
            key: interval_json(
                bootstrap_difference(values, columns["after"][key], seed=told["seed"], resamples=RESAMPLES)
            )
            for key, values in columns["before"].items()
        }
    return found


def has_measured(run: RunDir, name: str) -> bool:
    """Whether `measure_pairs` has kept figures under that name."""
    return run.exists(_FILE.format(name=name))


def _margin(group: RolloutGroup, beta: float) -> float | None:
    """Implicit reward of the better caption less that of the other; None for a tie."""
    pair = pair_of(group.sample)
    assert pair is not None
    if pair.preferred[0] == 0.5:
        return None
    rewards = []
    for completion in group.completions:
        assert completion.reference_logprobs is not None
        rewards.append(beta * float((completion.logprobs.double() - completion.reference_logprobs.double()).sum()))
    margin = rewards[0] - rewards[1]
    return margin if pair.preferred[0] > 0.5 else -margin


def _correct(margin: float) -> float:
    return 1.0 if margin > 0 else 0.5 if margin == 0 else 0.0


def check_stored(cfg: Config) -> int:
    """Groups of the log that a run learns from; 0 of any run that learns from none.

    Raises:
        RunError: that run is not there, or has no log.
        ConfigError: none of its steps is among those asked for, its groups are of another size, or its adapter is
            asked for and is not there or of another shape.
    """
    if (wanted := cfg.data.rollouts) is None:
        return 0
    source = RunDir.at(wanted.run)
    count = 0
    for rows in _groups(source, wanted, ()):
        count += 1
        if len(rows) != cfg.rollout.group_size:
            raise ConfigError(
                f"rollout.group_size={cfg.rollout.group_size}, and the groups of {wanted.run} have {len(rows)} "
                f"completions: write rollout.group_size: {len(rows)}"
            )
    if not count:
        last = "its end" if wanted.last_step is None else f"step {wanted.last_step}"
        raise ConfigError(f"the rollout log of {wanted.run} has no group from step {wanted.first_step} to {last}")
    if wanted.policy == "adapter":
        _check_adapter(cfg, source)
    return count


def logged_pictures(wanted: RolloutsSection) -> Iterator[str]:
    """Hash of each group's picture, of those that a run learns from.

    Raises:
        RunError: that run is not there, or has no log.
    """
    return (rows[0]["image_hash"] for rows in _groups(RunDir.at(wanted.run), wanted, ("image_hash",)))


def stored_data(cfg: Config, run: RunDir) -> Config:
    """The config of a run that learns from stored rollouts, its `data.train` its own copy of them.

    Any other config is given back as it is.

    Raises:
        RunError: the other run cannot be read.
        DataError: the copy cannot be written.
    """
    if (wanted := cfg.data.rollouts) is None:
        return cfg
    if not run.exists(STORED):
        source = RunDir.at(wanted.run)
        if wanted.policy == "adapter":
            run.write_bytes(f"{STORED_FOLDER}/{STARTING_ADAPTER}", source.read_bytes(STARTING_ADAPTER))
        several = any(name.endswith(".json") for name in source.list("images"))
        # The last to come: where it is, all is.
        with ShardWriter(f"{run.location}/{STORED}", several_images=several) as writer:
            for sample in _samples(source, wanted):
                writer.write(sample)
    rollouts = wanted.model_copy(update={"run": f"{run.location}/{STORED_FOLDER}"})
    data = cfg.data.model_copy(update={"train": f"{run.location}/{STORED}", "rollouts": rollouts})
    return cfg.model_copy(update={"data": data})


def greedy_sampling(cfg: Config, *, has_learned: bool) -> SamplingParams:
    """How held-out captions are made; with values, where the algorithm has some and anything was learned yet."""
    rollout = cfg.rollout
    return SamplingParams(
        temperature=rollout.temperature,
        max_new_tokens=rollout.max_new_tokens,
        greedy=True,
        value_beta=cfg.learner.family.decoding_beta if has_learned else 0.0,
    )


def _samples(source: RunDir, wanted: RolloutsSection) -> Iterator[Sample]:
    # Imported here: with the engine's half of the project, of which other runs' drivers need nothing.
    from mmrl_ray.rollouts.stored import COLUMNS, sample_of

    pictures = LoggedPictures(source)
    for rows in _groups(source, wanted, COLUMNS):
        yield sample_of(rows, pictures[rows[0]["image_hash"]])


def _groups(source: RunDir, wanted: RolloutsSection, columns: tuple[str, ...]) -> Iterator[list[dict[str, Any]]]:
    for rows in logged_groups(source, columns):
        step = rows[0]["step"]
        if step >= wanted.first_step and (wanted.last_step is None or step <= wanted.last_step):
            yield rows


def _check_adapter(cfg: Config, source: RunDir) -> None:
    name = f"{ADAPTER_FOLDER}/{CONFIG_FILE}"
    if not source.exists(name) or not source.exists(STARTING_ADAPTER):
        raise ConfigError(
            f"data.rollouts.policy=adapter, and {source.location} has no {ADAPTER_FOLDER}/: let it finish with "
            "mmrl train --resume, or write policy: base"
        )
    try:
        written = json.loads(source.read_text(name))
        theirs = (written["r"], float(written["lora_alpha"]))
        kinds = ("use_dora", "use_rslora", "modules_to_save", "rank_pattern", "alpha_pattern")
        kind = {name: written.get(name) or None for name in kinds}
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{source.full_path(name)} cannot be read: {error}") from error
    lora = cfg.model.lora
    if theirs != (lora.r, lora.alpha):
        raise ConfigError(
            f"model.lora has r={lora.r} and alpha={lora.alpha:g}, the adapter of {source.location} has r={theirs[0]} "
            f"and alpha={theirs[1]:g}: write the same"
        )
    ours = {
        "use_dora": lora.dora or None,
        "use_rslora": lora.rslora or None,
        "rank_pattern": lora.rank_pattern or None,
        "alpha_pattern": lora.alpha_pattern or None,
    }
    unlike = [name for name, value in ours.items() if value != kind[name]]
    if bool(lora.modules_to_save) != bool(kind["modules_to_save"]):
        unlike.append("modules_to_save")
    if unlike:
        raise ConfigError(
            f"model.lora is of another kind than the adapter of {source.location}, which differs in "
            f"{', '.join(unlike)}: write the same as that run's config"
        )
