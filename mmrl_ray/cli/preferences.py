"""Commands around preferences: into the store and out of it, what is in it, and pairs out of a run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from mmrl_ray.cli.program import AsJson, command, preferences_app, show_json
from mmrl_ray.errors import ConfigError, PreferenceError

if TYPE_CHECKING:
    from mmrl_ray.preferences.schema import Pair, Preference
    from mmrl_ray.preferences.stats import PreferenceStats, Share
    from mmrl_ray.preferences.store import Written

_STORE = Annotated[
    str,
    typer.Option("--store", metavar="URL", envvar="MMRL_PREFERENCES", help="The store, for SQLAlchemy."),
]
_DEFAULT = "sqlite:///preferences.db"
_FILE = Annotated[Path, typer.Argument(metavar="FILE", help="A file of preferences, .parquet or .jsonl.")]
_SEED = Annotated[int, typer.Option("--seed", help="Of whatever is drawn.")]


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
    from mmrl_ray.preferences.stats import preference_stats
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
