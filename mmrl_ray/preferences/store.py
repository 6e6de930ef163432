"""The store of preferences: pairs in, what raters say about them in, both out again; safe for many processes.

A row is named by its content, so writing the same preference twice is writing it once. A rater has one say about a
pair: another one later is refused (`ConflictError`) unless the caller asks for it to replace the first. The captions
of a pair keep the order in which they first came; later rows that have them the other way round are turned round, their
choice, ratings and `shown_first` with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from dataclasses import replace as replaced
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any, Self

from sqlalchemy import Connection, Row, and_, case, delete, func, or_, select, update

from mmrl_ray.errors import ConfigError, ConflictError, PreferenceError, UnknownPairError
from mmrl_ray.preferences.database import (
    LEASES,
    PAIRS,
    PICTURES,
    PREFERENCES,
    SCHEMA_VERSION,
    STORE,
    conflict,
    explained,
    insert_absent,
    open_database,
    pair_from,
    pair_of,
    shown,
    take_lease,
    utc,
)
from mmrl_ray.preferences.schema import Pair, Preference

OnBad = Callable[[PreferenceError], None]
"""Hears of what is left out, and why."""
RATING_SCALE = (0.0, 1.0)
"""Of a store that is made without one."""
LEASE_S = 600.0
"""How long a pair that a rater was handed is kept from others."""
_SAID = ("choice", "rater", "rating_a", "rating_b", "shown_first")
"""Fields of a preference that are columns of their own, under the same names."""
_TAKES = 20
"""Tries to take a pair while other raters take theirs."""
_CHUNK = 500
"""Rows of one statement: SQLite takes 32,766 values."""


@dataclass(slots=True)
class Written:
    """What a call of `add` did."""

    new: int = 0
    """Preferences that were not there."""
    same: int = 0
    """Preferences that were there, word for word."""
    replaced: int = 0
    bad: int = 0
    """Left out: whatever would have been an error."""
    pairs: int = 0
    """Pairs that were not there."""


class PreferenceStore:
    """Pairs and what raters say about them, in one database. Use it as a context manager, or call `close`.

    Raises (every method): `PreferenceStoreError` the database cannot be reached.
    """

    def __init__(
        self,
        url: str,
        *,
        rating_scale: tuple[float, float] | None = None,
        must_exist: bool = False,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """Opens the database, and makes its tables where there are none.

        Args:
            url: SQLAlchemy's; `sqlite:///preferences.db`, `postgresql+psycopg://user@host/name`.
            rating_scale: (lowest, highest) rating; that of the store where it is there already, else 0 to 1.
            must_exist: do not make an SQLite file that is not there.

        Raises:
            ConfigError: no such URL or driver, or the store has another scale or another version.
        """
        self._now = now
        self._engine = open_database(url, must_exist=must_exist)
        self._writing = self._engine.execution_options(mmrl_writes=True)
        self._where = shown(self._engine.url)
        low, high = rating_scale or RATING_SCALE
        if not low < high:
            raise ConfigError(f"rating scale {low:g} to {high:g}: the lowest rating comes first, below the highest")
        with explained(self._engine.url), self._writing.begin() as connection:
            insert_absent(
                connection,
                STORE,
                [{"id": 1, "version": SCHEMA_VERSION, "rating_low": low, "rating_high": high}],
            )
            found = connection.execute(select(STORE)).one()
        if found.version != SCHEMA_VERSION:
            raise ConfigError(
                f"preference store {self._where} has schema version {found.version}, this program knows "
                f"{SCHEMA_VERSION}: use the version of mmrl_ray that made it, export, and import with this one"
            )
        self.rating_scale = (found.rating_low, found.rating_high)
        if rating_scale is not None and self.rating_scale != (low, high):
            raise ConfigError(
                f"preference store {self._where} has ratings from {found.rating_low:g} to {found.rating_high:g}, not "
                f"from {low:g} to {high:g}: leave the scale out, or write to another store"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the database."""
        self._engine.dispose()

    # -- in ----------------------------------------------------------------------------------------------------------

    def add(self, items: Iterable[Pair | Preference], *, replace: bool = False, on_bad: OnBad | None = None) -> Written:
        """Writes pairs that wait for a label, and preferences with their pairs, in one transaction: all or nothing.

        Args:
            items: in their order: of two that contradict each other, the second is the later one.
            replace: a rater's later say takes the place of the earlier one.
            on_bad: given, what cannot be stored is told to it and left out; otherwise it is raised.

        Raises:
            ConflictError: a rater has said otherwise before, and `replace` is off.
            PreferenceError: a picture that neither came along nor is there, or a rating off the scale. Whatever `items`
                raises is passed on, and nothing is written then either.
        """
        written = Written()
        rest = iter(items)
        with explained(self._engine.url), self._writing.begin() as connection:
            while chunk := list(islice(rest, _CHUNK)):
                self._add_chunk(connection, chunk, replace, on_bad, written)
        return written

    def _add_chunk(
        self,
        connection: Connection,
        chunk: Sequence[Pair | Preference],
        replace: bool,
        on_bad: OnBad | None,
        written: Written,
    ) -> None:
        def refuse(error: PreferenceError) -> None:
            if on_bad is None:
                raise error
            on_bad(error)
            written.bad += 1

        known = self._add_pictures(connection, [pair_of(item) for item in chunk])
        good = []
        for item in chunk:
            if (error := self._wrong(item, known)) is None:
                good.append(item)
            else:
                refuse(error)
        pairs = {item.id: item for item in map(pair_of, reversed(good))}
        written.pairs += len(insert_absent(connection, PAIRS, [self._pair_row(pair) for pair in pairs.values()]))
        first = select(PAIRS.c.id, PAIRS.c.caption_a).where(PAIRS.c.id.in_(pairs))
        stored = {row.id: row.caption_a for row in connection.execute(first)}
        said = [(each, each.pair.caption_a != stored[each.pair.id]) for each in good if isinstance(each, Preference)]
        for error in self._add_said(connection, said, replace, written):
            refuse(error)
        done = {each.rater for each, _ in said}
        connection.execute(delete(LEASES).where(LEASES.c.pair_id.in_(pairs), LEASES.c.rater.in_(done)))

    def _add_pictures(self, connection: Connection, pairs: Sequence[Pair]) -> set[str]:
        """Stores what came along; returns those of the pairs' pictures that are there now."""
        data = {pair.image_hash: pair.image for pair in pairs if pair.image is not None}
        insert_absent(connection, PICTURES, [{"hash": name, "data": image} for name, image in data.items()])
        asked = {pair.image_hash for pair in pairs} - data.keys()
        found = connection.execute(select(PICTURES.c.hash).where(PICTURES.c.hash.in_(asked))).scalars()
        return {*data, *found}

    def _add_said(
        self, connection: Connection, said: Sequence[tuple[Preference, bool]], replace: bool, written: Written
    ) -> Iterator[ConflictError]:
        """Writes them, with captions in the order of the stored pair where they come in the other one (True); yields
        what contradicts an earlier say and does not replace it, told in the order in which it came."""
        ordered = [(each.flipped() if is_flipped else each, is_flipped) for each, is_flipped in said]
        rows = {each.id: self._preference_row(each) for each, _ in reversed(ordered)}
        inserted = insert_absent(connection, PREFERENCES, list(rows.values()))
        found = connection.execute(select(PREFERENCES).where(PREFERENCES.c.id.in_(rows)))
        stored = {row.id: (row.choice, row.rating_a, row.rating_b) for row in found}
        for each, is_flipped in ordered:
            if each.says == stored[each.id]:
                is_new = each.id in inserted
                inserted.discard(each.id)
                written.new += is_new
                written.same += not is_new
            elif replace:
                changed = self._preference_row(each)
                connection.execute(update(PREFERENCES).where(PREFERENCES.c.id == each.id).values(changed))
                stored[each.id] = each.says
                written.replaced += 1
            else:
                yield conflict(each, stored[each.id], is_flipped)

    def _wrong(self, item: Pair | Preference, known: set[str]) -> PreferenceError | None:
        """What keeps it out of the store, other than what is in there already."""
        pair = pair_of(item)
        if pair.image_hash not in known:
            return pair.wrong(
                f"picture {pair.image_hash} is unknown to the store: give its bytes, or a path to its file"
            )
        low, high = self.rating_scale
        for name in ("rating_a", "rating_b") if isinstance(item, Preference) else ():
            rating = getattr(item, name)
            if rating is not None and not low <= rating <= high:
                return pair.wrong(
                    f"{name}={rating:g} is off the scale of {self._where}, {low:g} to {high:g}: bring it onto the "
                    "scale, or leave it out"
                )
        return None

    def _pair_row(self, pair: Pair) -> dict[str, Any]:
        return {c.name: getattr(pair, c.name) for c in PAIRS.c if c.name != "created"} | {"created": self._now()}

    def _preference_row(self, preference: Preference) -> dict[str, Any]:
        said = {name: getattr(preference, name) for name in ("id", *_SAID)}
        return {**said, "pair_id": preference.pair.id, "created": (preference.created or self._now()).astimezone(UTC)}

    def undo(self, preference_id: str, rater: str) -> str | None:
        """Takes back what `rater` said last, which must be this; its pair is theirs to label again.

        Returns:
            The pair's id; None where this rater has said nothing of that id.

        Raises:
            ConflictError: they have said something since.
        """
        mine = select(PREFERENCES.c.id, PREFERENCES.c.pair_id).where(PREFERENCES.c.rater == rater)
        with explained(self._engine.url), self._writing.begin() as connection:
            said = connection.execute(mine.where(PREFERENCES.c.id == preference_id)).one_or_none()
            if said is None:
                return None
            last = connection.execute(mine.order_by(PREFERENCES.c.created.desc(), PREFERENCES.c.id).limit(1)).one()
            if last.id != said.id:
                raise ConflictError(f"{said.id!r} is not what this rater said last, which alone can be undone")
            connection.execute(delete(PREFERENCES).where(PREFERENCES.c.id == said.id))
            now = self._now()
            take_lease(connection, said.pair_id, rater, now, now + timedelta(seconds=LEASE_S))
        return str(said.pair_id)

    # -- out ---------------------------------------------------------------------------------------------------------

    def pair(self, pair_id: str) -> Pair:
        """One pair, without its picture; an UnknownPairError where there is none of that id."""
        with explained(self._engine.url), self._engine.begin() as connection:
            row = connection.execute(select(PAIRS).where(PAIRS.c.id == pair_id)).one_or_none()
        if row is None:
            raise UnknownPairError(f"no pair has the id {pair_id!r:.70}: ask for the next one to label")
        return pair_from(row)

    def next_pair(self, rater: str, *, lease_s: float = LEASE_S) -> Pair | None:
        """With its picture, a pair that `rater` has not labelled: the one that the fewest have; None when all are done.

        For `lease_s` the pair is this rater's: asking again gives it again, and others get others as long as there are.
        """
        mine = select(PREFERENCES.c.pair_id).where(PREFERENCES.c.rater == rater)
        labels = (
            select(func.count()).select_from(PREFERENCES).where(PREFERENCES.c.pair_id == PAIRS.c.id).scalar_subquery()
        )
        with explained(self._engine.url), self._writing.begin() as connection:
            for _ in range(_TAKES):  # the last one shares the pair with whoever was quicker
                now = self._now()
                valid = LEASES.c.until > now
                own = and_(valid, LEASES.c.rater == rater)
                row = connection.execute(
                    select(
                        PAIRS,
                        PICTURES.c.data,
                        or_(LEASES.c.rater == rater, ~valid, LEASES.c.until.is_(None)).label("free"),
                    )
                    .join(PICTURES, PICTURES.c.hash == PAIRS.c.image_hash)
                    .outerjoin(LEASES, LEASES.c.pair_id == PAIRS.c.id)
                    .where(PAIRS.c.id.not_in(mine))
                    .order_by(case((own, 0), (and_(valid, LEASES.c.rater != rater), 2), else_=1), labels, PAIRS.c.id)
                    .limit(1)
                ).one_or_none()
                if row is None:
                    return None
                # Where others have all that is left on their screens, two raters see one pair: each may label it.
                until = now + timedelta(seconds=lease_s)
                if not row.free or take_lease(connection, row.id, rater, now, until):
                    break
        assert row is not None
        return replaced(pair_from(row), image=row.data)

    def preferences(self, *, pictures: bool = False) -> Iterator[Preference]:
        """All of them, by pair and rater; each with its picture if asked for."""
        columns: list[Any] = [PREFERENCES, *(c for c in PAIRS.c if c.name not in ("id", "created"))]
        query = select(*columns).join(PAIRS, PAIRS.c.id == PREFERENCES.c.pair_id)
        for row in self._rows(query.order_by(PREFERENCES.c.pair_id, PREFERENCES.c.rater), pictures):
            said = {name: getattr(row, name) for name in _SAID}
            yield Preference(pair_from(row), **said, created=utc(row.created))

    def unlabelled(self, *, pictures: bool = False) -> Iterator[Pair]:
        """Pairs that nobody has labelled, by id."""
        query = select(PAIRS).outerjoin(PREFERENCES, PREFERENCES.c.pair_id == PAIRS.c.id)
        query = query.where(PREFERENCES.c.id.is_(None)).order_by(PAIRS.c.id)
        return map(pair_from, self._rows(query, pictures))

    def count_pairs(self) -> int:
        """Labelled or not."""
        with explained(self._engine.url), self._engine.begin() as connection:
            return connection.execute(select(func.count()).select_from(PAIRS)).scalar_one()

    def count_labelled(self) -> int:
        """Pairs that somebody has labelled."""
        with explained(self._engine.url), self._engine.begin() as connection:
            return connection.execute(select(func.count(PREFERENCES.c.pair_id.distinct()))).scalar_one()

    def _rows(self, query: Any, pictures: bool) -> Iterator[Row[Any]]:
        """The query's rows as they come, in one transaction: what is written meanwhile is not among them."""
        if pictures:
            query = query.add_columns(PICTURES.c.data).join(PICTURES, PICTURES.c.hash == PAIRS.c.image_hash)
        with explained(self._engine.url), self._engine.execution_options(yield_per=_CHUNK).connect() as connection:
            yield from connection.execute(query)
