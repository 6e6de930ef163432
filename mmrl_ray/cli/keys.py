"""Commands that make, list and end the gateway's keys."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from mmrl_ray.cli.groups import keys_app
from mmrl_ray.cli.guard import command
from mmrl_ray.cli.options import AsJson, show_columns, show_json

if TYPE_CHECKING:
    from mmrl_ray.serving.keys import KeyRecord, KeyRole, KeyStore

_DATABASE = Annotated[
    str | None,
    typer.Option("--database", metavar="URL", help="Where the keys are, for SQLAlchemy; the gateway's default else."),
]


@command(keys_app, "create")
def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose key it is; for the list.")],
    roles: Annotated[
        list[str] | None, typer.Option("--role", help="infer (by default), feedback or admin; may be repeated.")
    ] = None,
    days: Annotated[int | None, typer.Option("--days", min=1, max=36_500, help="It ends after so many days.")] = None,
    database: _DATABASE = None,
) -> None:
    """Make a key and print it, this one time."""
    expires = None if days is None else datetime.now(UTC) + timedelta(days=days)
    key, record = _store(database).create(name, cast("list[KeyRole]", roles or ["infer"]), expires)
    typer.echo(f"{record.id}: key of {record.name} ({_roles(record)}); it is not shown again", err=True)
    typer.echo(key)


@command(keys_app, "list")
def show(database: _DATABASE = None, as_json: AsJson = False) -> None:
    """List the keys that were made, but for what is secret in them."""
    now = datetime.now(UTC)
    found = _store(database).list()
    if as_json:
        show_json([_facts(record) for record in found])
        return
    rows = [("ID", "BEGINS", "NAME", "ROLES", "CREATED", "ENDS")]
    rows += [(r.id, f"{r.prefix}…", r.name, _roles(r), f"{r.created:%Y-%m-%d}", _end(r, now)) for r in found]
    show_columns(rows)


@command(keys_app, "revoke")
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="As `mmrl keys list` shows it.")],
    database: _DATABASE = None,
) -> None:
    """End a key for good."""
    from mmrl_ray.serving.keys import CACHE_S

    record = _store(database).revoke(key_id)
    typer.echo(f"{record.id}: key of {record.name} is revoked; gateways refuse it within {CACHE_S:g} s")


def _store(database: str | None) -> KeyStore:
    from mmrl_ray.serving.keys import KeyStore, default_database

    return KeyStore(database or default_database())


def _facts(record: KeyRecord) -> dict[str, Any]:
    times = {name: getattr(record, name) for name in ("created", "expires", "revoked")}
    facts = {"id": record.id, "prefix": record.prefix, "name": record.name, "roles": sorted(record.roles)}
    return facts | {name: None if time is None else time.isoformat() for name, time in times.items()}


def _roles(record: KeyRecord) -> str:
    return ",".join(sorted(record.roles))


def _end(record: KeyRecord, now: datetime) -> str:
    if record.revoked is not None:
        return f"revoked {record.revoked:%Y-%m-%d}"
    if record.expires is None:
        return "never"
    return f"{'expired ' if record.expires <= now else ''}{record.expires:%Y-%m-%d}"
