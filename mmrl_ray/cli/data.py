"""Commands that make datasets."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmrl_ray.cli.program import command, data_app, import_app
from mmrl_ray.errors import ConfigError

if TYPE_CHECKING:
    from mmrl_ray.data.importers import ImportSummary

_OUT = Annotated[Path, typer.Option("--out", help="Folder (or one .parquet file) to write; must not exist yet.")]
_EMBED = Annotated[bool, typer.Option("--embed/--no-embed", help="Image bytes in the shards, or files beside them.")]
_BUDGET = Annotated[int, typer.Option("--max-quarantined", min=0, help="Broken images to leave out before giving up.")]


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
        from mmrl_ray.data.quarantine import some

        ids = some(summary.unlisted.image_ids)
        typer.echo(f"left out: {summary.unlisted.captions:,} captions of images that are not listed: {ids}", err=True)
