"""Commands that make datasets, and commands around preferences: into the store and out of it, pairs out of a run."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from mmrl_ray.cli.program import AsJson, command, data_app, import_app, preferences_app, show_json
from mmrl_ray.errors import ConfigError, PreferenceError

if TYPE_CHECKING:
    from mmrl_ray.data.importers import ImportSummary
    from mmrl_ray.preferences.schema import Pair, Preference, PreferenceStats, Share
    from mmrl_ray.preferences.store import Written

_OUT = Annotated[Path, typer.Option("--out", help="Folder (or one .parquet file) to write; must not exist yet.")]
_EMBED = Annotated[bool, typer.Option("--embed/--no-embed", help="Image bytes in the shards, or files beside them.")]
_BUDGET = Annotated[int, typer.Option("--max-quarantined", min=0, help="Broken images to leave out before giving up.")]
_STORE = Annotated[
    str,
    typer.Option("--store", metavar="URL", envvar="MMRL_PREFERENCES", help="The store, for SQLAlchemy."),
]
_DEFAULT = "sqlite:///preferences.db"
_FILE = Annotated[Path, typer.Argument(metavar="FILE", help="A file of preferences, .parquet or .jsonl.")]
_SEED = Annotated[int, typer.Option("--seed", help="Of whatever is drawn.")]


@command(import_app, "coco")
def import_coco(
    images: Annotated[
        Path, typer.Option("--images", help="Image folder; for Karpathy's splits the one above train2014/.")
    ],
    out: _OUT,
    annotations: Annotated[Path | None, typer.Option("--annotations", help="A captions_*.json file.")] = None,
    karpathy: Annotated[Path | None, typer.Option("--karpathy", help="dataset_coco.json instead.")] = None,
    split: Annotated[
        str | None, typer.Option("--split", help="Of Karpathy's: train+restval (default), val, test.")
    ] = None,
    embed: _EMBED = True,
    max_quarantined: _BUDGET = 20,
) -> None:
    """Import COCO captions."""
    from mmrl_ray.data.importers import import_coco as run

    if (annotations is None) == (karpathy is None):
        raise ConfigError("give either --annotations captions_*.json or --karpathy dataset_coco.json")
    what = functools.partial(run, annotations, images, out, karpathy=karpathy, split=split)
    _import(functools.partial(what, embed=embed, max_quarantined=max_quarantined))


@command(import_app, "jsonl")
def import_jsonl(
    file: Annotated[Path, typer.Argument(metavar="FILE", help='Lines like {"image": "a.jpg", "captions": ["…"]}.')],
    out: _OUT,
    images: Annotated[
        Path | None, typer.Option("--images", help="What image paths start from; else FILE's folder.")
    ] = None,
    embed: _EMBED = True,
    max_quarantined: _BUDGET = 20,
) -> None:
    """Import JSON lines with image paths."""
    from mmrl_ray.data.importers import import_jsonl as run

    _import(functools.partial(run, file, out, images=images, embed=embed, max_quarantined=max_quarantined))


@command(data_app, "scenes")
def scenes(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder that gets train/ and eval/.")],
    train: Annotated[int, typer.Option("--train", min=1, help="Training images.")] = 2000,
    held_out: Annotated[int, typer.Option("--eval", min=1, help="Held-out images.")] = 200,
    image_size: Annotated[int, typer.Option("--image-size", min=32, max=1024, help="Pixels a side.")] = 64,
    max_objects: Annotated[int, typer.Option("--max-objects", min=1, max=3, help="Objects a picture has at most.")] = 3,
    seed: Annotated[int, typer.Option("--seed")] = 0,
) -> None:
    """Generate the scenes dataset: coloured shapes with five captions each."""
    from mmrl_ray.config.sections import ScenesSection
    from mmrl_ray.data.scenes.generator import write_scenes

    section = ScenesSection(train=train, eval=held_out, image_size=image_size, seed=seed, max_objects=max_objects)
    written = write_scenes(section, out / "train", out / "eval")
    typer.echo(f"{out}: {train:,} training and {held_out:,} held-out images{'' if written else ', there already'}")


@command(data_app, "preferences")
def preferences(
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder that gets train.parquet, eval.parquet and clean.parquet.")
    ],
    train: Annotated[int, typer.Option("--train", min=1, help="Training images, five pairs each.")] = 2000,
    held_out: Annotated[int, typer.Option("--eval", min=1, help="Held-out images.")] = 200,
    rated: Annotated[float, typer.Option("--rated", min=0, max=1, help="Share of pairs with ratings, too.")] = 0.5,
    image_size: Annotated[int, typer.Option("--image-size", min=32, max=1024, help="Pixels a side.")] = 64,
    max_objects: Annotated[int, typer.Option("--max-objects", min=1, max=3, help="Objects a picture has at most.")] = 3,
    seed: Annotated[int, typer.Option("--seed")] = 0,
) -> None:
    """Generate preferences about scenes: a true caption against one with a fault, by a noisy rater."""
    from mmrl_ray.config.sections import ScenesSection
    from mmrl_ray.preferences.scene_preferences import write_scene_preferences

    section = ScenesSection(train=train, eval=held_out, image_size=image_size, seed=seed, max_objects=max_objects)
    rows = write_scene_preferences(section, out, rated=rated)
    typer.echo(f"{out}: " + ", ".join(f"{count:,} pairs in {name}.parquet" for name, count in rows.items()))


def _import(run: Callable[..., ImportSummary]) -> None:
    """Runs an importer with live progress; tells what was written and what was left out."""
    from mmrl_ray.telemetry.terminal import RunProgress

    with RunProgress() as shown:
        update = shown.phase("import")
        summary = run(progress=lambda done, total: update(done, total or 0, {}))
    typer.echo(f"{summary.out}: {summary.rows:,} images, {summary.references:,} references")
    for record in summary.quarantined:
        typer.echo(f"left out: {record.sample_id} ({record.where}): {record.reason}", err=True)
    if summary.unlisted.captions:
        from mmrl_ray.data.samples import some

        ids = some(summary.unlisted.image_ids)
        typer.echo(f"left out: {summary.unlisted.captions:,} captions of images that are not listed: {ids}", err=True)


@command(preferences_app, "import")
def import_(
    file: _FILE,
    store: _STORE = _DEFAULT,
    replace: Annotated[
        bool, typer.Option("--replace", help="Where a rater said otherwise before, the new say counts.")
    ] = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave bad rows out; otherwise one stops it all.")
    ] = False,
    rating_scale: Annotated[
        tuple[float, float] | None,
        typer.Option("--rating-scale", help="Lowest and highest rating of a new store; 0 to 1 else."),
    ] = None,
) -> None:
    """Bring preferences in, and pairs that wait for a label: all of a file or nothing. Twice is once."""
    from mmrl_ray.preferences.files import read_preferences
    from mmrl_ray.preferences.store import PreferenceStore

    bad: list[PreferenceError] = []
    on_bad = bad.append if skip_bad else None
    with PreferenceStore(store, rating_scale=rating_scale) as opened:
        written = opened.add(read_preferences(file, on_bad), replace=replace, on_bad=on_bad)
    for error in bad:
        typer.echo(f"left out: {error}", err=True)
    typer.echo(f"{store}: {_told(written)}{f', {len(bad)} bad rows left out' if bad else ''}")


@command(preferences_app, "export")
def export(
    file: _FILE,
    store: _STORE = _DEFAULT,
    unlabelled: Annotated[
        bool, typer.Option("--unlabelled", help="Instead, pairs that nobody has labelled, in blinded order.")
    ] = False,
    decided: Annotated[bool, typer.Option("--decided", help="Without ties.")] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of the blinded order.")] = 0,
) -> None:
    """Write preferences, with their pictures, for `mmrl reward train` or any other program."""
    from mmrl_ray.preferences.files import write_preferences
    from mmrl_ray.preferences.schema import blinded
    from mmrl_ray.preferences.store import PreferenceStore

    with PreferenceStore(store, must_exist=True) as opened:
        items: Iterable[Pair | Preference]
        if unlabelled:
            items = (blinded(pair, seed) for pair in opened.unlabelled(pictures=True))
        else:
            items = (each for each in opened.preferences(pictures=True) if not (decided and each.choice == "tie"))
        count = write_preferences(file, items)
    typer.echo(f"{file}: {count:,} {'pairs to label' if unlabelled else 'preferences'}")


@command(preferences_app, "stats")
def stats(store: _STORE = _DEFAULT, as_json: AsJson = False) -> None:
    """How many there are, how far raters agree, and whether the caption shown first has an advantage."""
    from mmrl_ray.preferences.schema import preference_stats
    from mmrl_ray.preferences.store import PreferenceStore

    with PreferenceStore(store, must_exist=True) as opened:
        pairs, found = opened.count_pairs(), preference_stats(opened.preferences())
    if as_json:
        show_json({"pairs": pairs, **dataclasses.asdict(found)})
        return
    for line in _lines(pairs, found):
        typer.echo(line)


@command(preferences_app, "sample")
def sample(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder.")],
    pairs: Annotated[int, typer.Option("--pairs", min=1, help="Pairs to take.")] = 100,
    seed: _SEED = 0,
    strategy: Annotated[str, typer.Option("--strategy", help="random, closest (rewards) or disagreement.")] = "random",
    by_reward: Annotated[
        bool, typer.Option("--label-by-reward", help="Label them by the run's own reward, as the rater reward:RUN.")
    ] = False,
    store: _STORE = _DEFAULT,
) -> None:
    """Take pairs of captions out of a run's rollout log into the store, to be labelled."""
    from mmrl_ray.preferences.dataset import Strategy, sample_pairs
    from mmrl_ray.preferences.store import PreferenceStore
    from mmrl_ray.run_records.run_dir import RunDir

    known = {name: name for name in get_args(Strategy)}
    if strategy not in known:
        raise ConfigError(f"--strategy {strategy}: choose one of {', '.join(known)}")
    found = sample_pairs(RunDir.at(run), pairs, seed=seed, strategy=known[strategy], by_reward=by_reward)
    with PreferenceStore(store) as opened:
        written = opened.add(found)
    fewer = (
        "" if len(found) == pairs else f" (of {pairs:,} asked for: the run's log has no more groups of two captions)"
    )
    typer.echo(f"{store}: {len(found):,} pairs of {run}{fewer}: {_told(written)}")


def _told(written: Written) -> str:
    parts = {
        "new preferences": written.new,
        "that were there": written.same,
        "replaced": written.replaced,
    }
    known = [f"{count:,} {what}" for what, count in parts.items() if count]
    return ", ".join([*known, f"{written.pairs:,} new pairs"])


def _lines(pairs: int, found: PreferenceStats) -> list[str]:
    agreement, choices = found.agreement, found.choices
    lines = [
        f"pairs        {pairs:,}, {found.labelled_pairs:,} of them labelled",
        f"preferences  {found.preferences:,}: " + ", ".join(f"{name} {count:,}" for name, count in choices.items()),
        f"raters       {len(found.raters):,}",
        *(f"  {name}: {count:,}, {_first(first)}" for name, (count, first) in found.raters.items()),
    ]
    if agreement.pairs:
        alpha = "not defined" if math.isnan(agreement.alpha) else f"{agreement.alpha:.3f}"
        lines.append(
            f"agreement    {agreement.same:.1%} of the couples of raters of {agreement.pairs:,} pairs; "
            f"Krippendorff's alpha {alpha}"
        )
    else:
        lines.append("agreement    unknown: no pair was labelled by two raters")
    return [*lines, f"position     {_first(found.first)}{_verdict(found.first)}"]


def _first(share: Share) -> str:
    if not share.count:
        return "order of the captions unknown"
    return f"first caption chosen {share.value:.1%} of {share.count:,} [{share.low:.1%}, {share.high:.1%}]"


def _verdict(share: Share) -> str:
    if not share.count:
        return ""
    return ": no bias seen" if share.low <= 0.5 <= share.high else ": a position bias"
