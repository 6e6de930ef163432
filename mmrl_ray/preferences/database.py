"""The tables of preferences, in SQLite or PostgreSQL, how they are opened, and their rows as pairs.

    mmrl_pictures ◀── mmrl_pairs ◀── mmrl_preferences          mmrl_preference_store: version, rating scale
     by hash           by content      one a pair and rater
                           ▲───────── mmrl_leases: who has which pair on the screen, and until when

SQLite is set to write-ahead logging, so that readers and a writer do not wait for each other, and writers take their
turn at the beginning of a transaction: two that had begun by reading could not both go on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    DateTime,
    Engine,
    Float,
    ForeignKey,
    Index,
    LargeBinary,
    MetaData,
    Row,
    String,
    Table,
    Text,
    UniqueConstraint,
    create_engine,
    event,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.schema import CreateIndex, CreateTable

from mmrl_ray.errors import ConfigError, ConflictError, PreferenceStoreError, said
from mmrl_ray.preferences.schema import Pair, Preference

SCHEMA_VERSION = 1
BUSY_S = 30.0
"""How long a writer waits for others of the same SQLite file."""

METADATA = MetaData()
STORE = Table(
    "mmrl_preference_store",
    METADATA,
    Column("id", BigInteger, primary_key=True, autoincrement=False),  # always 1
    Column("version", BigInteger, nullable=False),
    Column("rating_low", Float(53), nullable=False),
    Column("rating_high", Float(53), nullable=False),
)
PICTURES = Table(
    "mmrl_pictures",
    METADATA,
    Column("hash", String(64), primary_key=True),
    Column("data", LargeBinary, nullable=False),
)
PAIRS = Table(
    "mmrl_pairs",
    METADATA,
    Column("id", String(32), primary_key=True),
    Column("image_hash", String(64), ForeignKey(PICTURES.c.hash), nullable=False),
    Column("prompt", Text, nullable=False),
    Column("caption_a", Text, nullable=False),
    Column("caption_b", Text, nullable=False),
    Column("source", Text, nullable=False),
    Column("created", DateTime(timezone=True), nullable=False),
)
PREFERENCES = Table(
    "mmrl_preferences",
    METADATA,
    Column("id", String(32), primary_key=True),
    Column("pair_id", String(32), ForeignKey(PAIRS.c.id), nullable=False),
    Column("rater", String(128), nullable=False),
    Column("choice", String(3), nullable=False),
    Column("rating_a", Float(53)),
    Column("rating_b", Float(53)),
    Column("shown_first", String(1)),
    Column("created", DateTime(timezone=True), nullable=False),
    UniqueConstraint("pair_id", "rater"),
)
LEASES = Table(
    "mmrl_leases",
    METADATA,
    Column("pair_id", String(32), ForeignKey(PAIRS.c.id), primary_key=True),
    Column("rater", String(128), nullable=False),
    Column("until", DateTime(timezone=True), nullable=False),
)
_INDEXES = (Index("mmrl_preferences_by_rater", PREFERENCES.c.rater),)


def open_database(url: str, *, must_exist: bool = False) -> Engine:
    """An engine whose tables are there.

    Raises:
        ConfigError: no such URL, its driver is not installed, or it is neither SQLite nor PostgreSQL.
        PreferenceStoreError: the database cannot be reached, or is an SQLite file that is not there but `must_exist`.
    """
    try:
        parsed = make_url(url)
        backend = parsed.get_backend_name()
        if backend not in ("sqlite", "postgresql"):
            raise ConfigError(f"preference store {shown(parsed)}: {backend} is neither sqlite nor postgresql")
        if backend == "sqlite":
            if must_exist and not Path(parsed.database or "").is_file():
                raise PreferenceStoreError(
                    f"preference store {shown(parsed)}: there is no such file; `mmrl preferences import` and "
                    "`mmrl preferences sample` make one"
                )
            _make_folder(parsed)
            engine = create_engine(parsed, connect_args={"timeout": BUSY_S})
            _tune_sqlite(engine)
        else:
            engine = create_engine(parsed, pool_pre_ping=True)
    except (ArgumentError, NoSuchModuleError) as error:
        raise ConfigError(f"preference store: {error}; write for example sqlite:///preferences.db") from error
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"preference store: {error}; install the driver with: pip install 'mmrl_ray[postgres]', and write "
            "postgresql+psycopg://user@host/name"
        ) from error
    with explained(engine.url):
        _make_tables(engine)
    return engine


@contextlib.contextmanager
def explained(url: URL) -> Iterator[None]:
    """Turns what the database says into one line.

    Raises:
        PreferenceStoreError: it said something.
    """
    try:
        yield
    except SQLAlchemyError as error:
        raise PreferenceStoreError(
            f"preference store {shown(url)}: {said(getattr(error, 'orig', None) or error)}"
        ) from error


def insert_absent(connection: Connection, table: Table, rows: list[dict[str, Any]]) -> set[str]:
    """Inserts the rows whose keys are not there yet; returns the keys of those it inserted."""
    if not rows:
        return set()
    key = next(iter(table.primary_key.columns))
    # In the order of keys, so that two writers of the same rows wait for each other instead of locking crosswise.
    ordered = sorted(rows, key=lambda row: row[key.name])
    insert: Any = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
    statement = insert(table).values(ordered).on_conflict_do_nothing().returning(key)
    return set(connection.execute(statement).scalars())


def take_lease(connection: Connection, pair_id: str, rater: str, now: datetime, until: datetime) -> bool:
    """Gives the pair to this rater, unless another one has it now. One statement, so that of two takers one gets it."""
    insert: Any = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
    statement = insert(LEASES).values(pair_id=pair_id, rater=rater, until=until)
    taken = statement.on_conflict_do_update(
        index_elements=[LEASES.c.pair_id],
        set_={"rater": rater, "until": until},
        where=(LEASES.c.rater == rater) | (LEASES.c.until <= now),
    ).returning(LEASES.c.pair_id)
    return connection.execute(taken).one_or_none() is not None


def shown(url: URL) -> str:
    """The URL without its password."""
    return url.render_as_string(hide_password=True)


def _make_folder(url: URL) -> None:
    if not url.database or url.database == ":memory:":
        return
    try:
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PreferenceStoreError(f"preference store {url.database}: {error.strerror}") from error


def _tune_sqlite(engine: Engine) -> None:
    @event.listens_for(engine, "connect")
    def connected(connection: Any, record: Any) -> None:
        connection.isolation_level = None  # transactions begin where SQLAlchemy says so, below
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA foreign_keys=ON")

    @event.listens_for(engine, "begin")
    def begun(connection: Connection) -> None:
        writes = connection.get_execution_options().get("mmrl_writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _make_tables(engine: Engine) -> None:
    for attempt in range(2):
        try:
            with engine.execution_options(mmrl_writes=True).begin() as connection:
                for table in METADATA.sorted_tables:
                    connection.execute(CreateTable(table, if_not_exists=True))
                for index in _INDEXES:
                    connection.execute(CreateIndex(index, if_not_exists=True))
            return
        except SQLAlchemyError:
            # PostgreSQL lets two processes that make one table at the same time collide; it is there then.
            if attempt:
                raise


def pair_of(item: Pair | Preference) -> Pair:
    """The pair that a row is about."""
    return item if isinstance(item, Pair) else item.pair


def pair_from(row: Row[Any]) -> Pair:
    """With its picture where the row has it."""
    pair = Pair(row.image_hash, row.prompt, row.caption_a, row.caption_b, row.source)
    return replace(pair, image=row.data) if "data" in row._fields else pair


def conflict(preference: Preference, before: tuple[Any, ...], flipped: bool = False) -> ConflictError:
    """An error that tells what the rater said now, and `before`; both with the captions exchanged if so asked."""
    choice, *ratings = before
    if flipped:
        preference, ratings = preference.flipped(), ratings[::-1]
        choice = {"a": "b", "b": "a"}.get(choice, choice)
    pair = preference.pair
    problem = (
        f"{preference.rater!r} says {preference.choice!r} (ratings {preference.rating_a}, {preference.rating_b}) of "
        f"{pair.caption_a!r:.60} against {pair.caption_b!r:.60}, but said {choice!r} "
        f"(ratings {', '.join(map(str, ratings))}) before: leave it out, or ask for the new one to replace the old"
    )
    return ConflictError(f"{pair.where}: {problem}" if pair.where else problem)


def utc(moment: datetime) -> datetime:
    """SQLite keeps no time zone; what was written is UTC."""
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
