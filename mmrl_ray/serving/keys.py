"""The gateway's keys: made, listed, revoked and checked in a database that several processes share.

A key is 256 random bits. What is stored is their SHA-256: a slow password hash makes guessing dear where there are few
candidates, but nobody guesses 256 bits, and a hash of microseconds leaves the gateway its throughput.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import re
import secrets
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from sqlalchemy import Column, DateTime, Engine, Index, MetaData, Row, String, Table, create_engine, select
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.schema import CreateIndex, CreateTable

from mmrl_ray.errors import ConfigError, ServingError

KeyRole = Literal["infer", "feedback", "admin"]

CACHE_S = 2.0
"""A key that was good is taken as good for so long: a revoked one works no longer than this."""
_MARK = "mmrl-"
_PREFIX_CHARS = len(_MARK) + 6
_KEY = re.compile(_MARK + r"[A-Za-z0-9_-]{43}")
_BUSY_S = 10.0
"""How long an SQLite file may be locked by another process."""

_METADATA = MetaData()
_KEYS = Table(
    "mmrl_keys",
    _METADATA,
    Column("id", String(16), primary_key=True),
    Column("name", String(64), nullable=False),
    Column("roles", String(64), nullable=False),
    Column("prefix", String(_PREFIX_CHARS), nullable=False),
    Column("digest", String(64), nullable=False),
    Column("created", DateTime(timezone=True), nullable=False),
    Column("expires", DateTime(timezone=True)),
    Column("revoked", DateTime(timezone=True)),
)
_BY_PREFIX = Index("mmrl_keys_by_prefix", _KEYS.c.prefix)


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """What is known of a key; the key itself is not."""

    id: str
    name: str
    roles: frozenset[KeyRole]
    prefix: str
    """The key's first characters, to tell keys apart."""
    created: datetime
    expires: datetime | None = None
    revoked: datetime | None = None

    def allows(self, role: KeyRole) -> bool:
        """Whether this key may do what takes `role`; an admin may do everything."""
        return role in self.roles or "admin" in self.roles

    def works_at(self, now: datetime) -> bool:
        """Neither revoked nor expired."""
        return self.revoked is None and (self.expires is None or now < self.expires)


class KeyStore:
    """Keys in a database; safe to use from several threads and processes.

    Raises (every method): `ServingError` the database cannot be reached.
    """

    def __init__(
        self,
        url: str,
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """Opens the database, and makes the table where there is none.

        Args:
            url: SQLAlchemy's; `sqlite:////path/keys.db`, `postgresql+psycopg://user:password@host/name`.
            clock: for how long a key stays in the cache.
            now: for expiry.

        Raises:
            ConfigError: no such URL, or its driver is not installed.
        """
        self._clock = clock
        self._now = now
        self._known: dict[bytes, tuple[KeyRecord, float]] = {}
        try:
            self._url = make_url(url)
            _make_private(self._url)
            lite = self._url.get_backend_name() == "sqlite"
            arguments: dict[str, Any] = {"timeout": _BUSY_S} if lite else {}
            self._engine: Engine = create_engine(self._url, connect_args=arguments, pool_pre_ping=not lite)
        except (ArgumentError, NoSuchModuleError, ModuleNotFoundError) as error:
            raise ConfigError(f"key database: {error}; write for example sqlite:////path/keys.db") from error
        with self._explained():
            _make_table(self._engine)

    def create(self, name: str, roles: Collection[KeyRole], expires: datetime | None = None) -> tuple[str, KeyRecord]:
        """A new key, which is told here and never again, and its record.

        Raises:
            ConfigError: no name, no or unknown roles, or an expiry that is past or has no time zone.
        """
        now = self._now()
        unknown = sorted(set(roles) - set(get_args(KeyRole)))
        if unknown or not roles:
            raise ConfigError(f"roles {unknown or '(none)'}: name one or more of {', '.join(get_args(KeyRole))}")
        if not 0 < len(name) <= 64 or not name.isprintable():
            raise ConfigError(f"key name {name[:80]!r}: write 1 to 64 printable characters")
        if expires is not None and (expires.tzinfo is None or expires <= now):
            raise ConfigError(f"expiry {expires}: write a time to come, with its time zone")
        key = _MARK + secrets.token_urlsafe(32)
        record = KeyRecord(
            id=secrets.token_hex(6),
            name=name,
            roles=frozenset(roles),
            prefix=key[:_PREFIX_CHARS],
            created=now,
            expires=expires,
        )
        row = asdict(record) | {"roles": ",".join(sorted(roles)), "digest": _digest(key).hex()}
        with self._explained(), self._engine.begin() as connection:
            connection.execute(_KEYS.insert().values(row))
        return key, record

    def try_writing(self) -> None:
        """Writes a row and takes it back.

        Raises:
            ServingError: the database takes none: it is full, locked or read-only.
        """
        row = dict.fromkeys(("name", "roles", "prefix", "digest"), "") | {"id": secrets.token_hex(6)}
        with self._explained(), self._engine.connect() as connection:
            connection.execute(_KEYS.insert().values(row | {"created": self._now()}))
            connection.rollback()

    def list(self) -> tuple[KeyRecord, ...]:
        """All keys, revoked ones too, oldest first."""
        with self._explained(), self._engine.connect() as connection:
            rows = connection.execute(select(_KEYS).order_by(_KEYS.c.created, _KEYS.c.id)).all()
        return tuple(map(_record, rows))

    def revoke(self, key_id: str) -> KeyRecord:
        """Ends a key, here at once and elsewhere within `CACHE_S`; one that was revoked stays so.

        Raises:
            ConfigError: no key of that id.
        """
        mine = _KEYS.c.id == key_id
        with self._explained(), self._engine.begin() as connection:
            connection.execute(_KEYS.update().where(mine, _KEYS.c.revoked.is_(None)).values(revoked=self._now()))
            row = connection.execute(select(_KEYS).where(mine)).one_or_none()
        self._known.clear()
        if row is None:
            raise ConfigError(f"no key has the id {key_id[:64]!r}: `mmrl keys list` shows them")
        return _record(row)

    def cached(self, key: str) -> KeyRecord | None:
        """What `verify` would say, where that takes no look into the database."""
        known = self._known.get(_digest(key))
        if known is None or known[1] <= self._clock() or not known[0].works_at(self._now()):
            return None
        return known[0]

    def was_good(self, key: str) -> bool:
        """Whether the last look into the database, however long ago, found this key to work."""
        return _digest(key) in self._known

    def verify(self, key: str) -> KeyRecord | None:
        """The record of a key that works, or None."""
        if (known := self.cached(key)) is not None:
            return known
        if not _KEY.fullmatch(key):
            return None
        digest, asked = _digest(key), self._clock()
        with self._explained(), self._engine.connect() as connection:
            # Found by what is public of it, so that how long the search takes tells nothing of the rest.
            rows = connection.execute(select(_KEYS).where(_KEYS.c.prefix == key[:_PREFIX_CHARS])).all()
        same = [row for row in rows if hmac.compare_digest(bytes.fromhex(row.digest), digest)]
        record = _record(same[0]) if same else None
        if record is None or not record.works_at(self._now()):
            self._known.pop(digest, None)
            return None
        self._known[digest] = (record, asked + CACHE_S)
        return record

    def close(self) -> None:
        """Lets go of the database."""
        self._engine.dispose()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except SQLAlchemyError as error:
            cause = str(getattr(error, "orig", None) or error).splitlines()[0]
            place = self._url.render_as_string(hide_password=True)
            raise ServingError(f"key database {place}: {cause}") from error


def default_database() -> str:
    """URL of the SQLite file that is used where no database is named."""
    home = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return f"sqlite:///{Path(home) / 'mmrl_ray' / 'keys.db'}"


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def _make_private(url: URL) -> None:
    """An SQLite file is its owner's alone from the moment it exists; SQLite gives its side files the same mode."""
    if url.get_backend_name() != "sqlite" or not url.database or url.database == ":memory:":
        return
    path = Path(url.database)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        path.chmod(0o600)
    except OSError as error:
        raise ServingError(f"key database {path}: {error.strerror}") from error


def _make_table(engine: Engine) -> None:
    for attempt in range(2):
        try:
            with engine.begin() as connection:
                connection.execute(CreateTable(_KEYS, if_not_exists=True))
                connection.execute(CreateIndex(_BY_PREFIX, if_not_exists=True))
            return
        except SQLAlchemyError:
            # PostgreSQL lets two processes that make one table at the same time collide; it is there then.
            if attempt:
                raise


def _record(row: Row[Any]) -> KeyRecord:
    return KeyRecord(
        id=row.id,
        name=row.name,
        roles=frozenset(role for role in get_args(KeyRole) if role in row.roles.split(",")),
        prefix=row.prefix,
        created=_utc(row.created),
        expires=None if row.expires is None else _utc(row.expires),
        revoked=None if row.revoked is None else _utc(row.revoked),
    )


def _utc(moment: datetime) -> datetime:
    """SQLite keeps no time zone; what was written is UTC."""
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
