"""The store: idempotent, all or nothing, one say a rater, safe for several writers; on SQLite and on PostgreSQL."""

from __future__ import annotations

import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from mmrl_ray.errors import ConfigError, ConflictError, PreferenceError, UnknownPairError
from mmrl_ray.preferences.schema import Pair, Preference, first_shown
from mmrl_ray.preferences.store import PreferenceStore, Written
from tests.unit.preferences.examples import pair, picture, preference


def test_the_same_preference_twice_is_one_row(store: PreferenceStore) -> None:
    said = [preference(first="b", ratings=(0.9, 0.25)), preference("b", "bob")]
    assert store.add(said) == Written(new=2, pairs=1)
    assert store.add([*said, *said]) == Written(same=4)
    found = list(store.preferences(pictures=True))
    assert {(p.rater, p.says, p.shown_first) for p in found} == {
        ("ann", ("a", 0.9, 0.25), "b"),
        ("bob", ("b", None, None), None),
    }
    assert all(p.pair.image == picture() and p.pair.source == "again@3/s1" for p in found)


def test_moments_come_back_as_they_were_whatever_their_zone(store: PreferenceStore) -> None:
    moment = datetime(2030, 5, 6, 7, 8, 9, 123456, tzinfo=timezone(timedelta(hours=5, minutes=30)))
    store.add([replace(preference(), created=moment)])
    (found,) = store.preferences()
    assert found.created == moment
    assert found.created.tzinfo == UTC


def test_captions_the_other_way_round_are_the_same_pair(store: PreferenceStore) -> None:
    store.add([preference("a", "ann", ratings=(0.8, 0.1), first="a")])
    turned = preference("a", "ann", ratings=(0.8, 0.1), first="a").flipped()
    assert (turned.pair.caption_a, turned.choice, turned.rating_a, turned.shown_first) == ("a square", "b", 0.1, "b")
    assert store.add([turned]) == Written(same=1)
    store.add([replace(turned, rater="bob")])
    by_rater = {p.rater: p for p in store.preferences()}
    assert by_rater["bob"].says == ("a", 0.8, 0.1)
    assert by_rater["bob"].shown_first == "a"
    assert by_rater["bob"].pair.caption_a == "a red square"


def test_a_conflict_is_told_with_the_captions_as_they_were_written(store: PreferenceStore) -> None:
    first = preference("a", ratings=(0.75, 0.25))
    store.add([first])
    a, b = first.pair.caption_a, first.pair.caption_b
    other = preference("b", ratings=(0.0, 1.0)).flipped()  # a file whose columns are the other way round
    with pytest.raises(ConflictError) as error:
        store.add([other])
    assert str(error.value).startswith(
        f"'ann' says 'a' (ratings 1.0, 0.0) of {b!r} against {a!r}, but said 'b' (ratings 0.25, 0.75) before"
    )


@pytest.mark.parametrize("at_once", [True, False])
def test_another_answer_of_the_same_rater_is_refused_replaces_or_is_left_out(
    store: PreferenceStore, at_once: bool
) -> None:
    first, second = preference("a"), preference("b", where="votes.jsonl, line 7")
    if at_once:
        with pytest.raises(ConflictError, match=r"votes\.jsonl, line 7: 'ann' says 'b'.*but said 'a'"):
            store.add([first, second])
        assert list(store.preferences()) == []
    store.add([first])
    with pytest.raises(ConflictError, match="replace the old"):
        store.add([preference(rater="new"), second])
    assert [p.rater for p in store.preferences()] == ["ann"]  # nothing of the refused call stayed
    told: list[PreferenceError] = []
    assert store.add([second], on_bad=told.append) == Written(bad=1)
    assert ["votes.jsonl, line 7" in str(error) for error in told] == [True]
    assert [p.choice for p in store.preferences()] == ["a"]
    assert store.add([second, second], replace=True) == Written(replaced=1, same=1)
    assert [p.choice for p in store.preferences()] == ["b"]


def test_a_picture_that_nobody_brought_is_refused(store: PreferenceStore) -> None:
    bare = replace(pair(where="votes.parquet, row 3"), image=None)
    with pytest.raises(PreferenceError, match=r"votes\.parquet, row 3: picture [0-9a-f]{64} is unknown"):
        store.add([pair(shade=1), Preference(bare, "a", "ann")])
    assert store.count_pairs() == 0
    told: list[PreferenceError] = []
    bad = [Preference(bare, "a", "ann"), preference(rater="bob", shade=2, ratings=(7, None))]
    assert store.add([bad[0], preference(shade=2), bad[1]], on_bad=told.append) == Written(new=1, pairs=1, bad=2)
    assert len(told) == 2
    store.add([pair()])
    assert store.add([Preference(bare, "a", "ann")]) == Written(new=1)


def test_ratings_have_a_scale_that_the_store_keeps(url: str) -> None:
    with PreferenceStore(url, rating_scale=(1, 5)) as store:
        assert store.add([preference(ratings=(5, 1))]).new == 1
        with pytest.raises(PreferenceError, match=r"rating_b=5\.5 is off the scale of .*, 1 to 5"):
            store.add([preference(rater="bob", ratings=(5, 5.5))])
    with PreferenceStore(url) as again:
        assert again.rating_scale == (1.0, 5.0)
    with pytest.raises(ConfigError, match="ratings from 1 to 5, not from 0 to 1"):
        PreferenceStore(url, rating_scale=(0, 1))
    with pytest.raises(ConfigError, match="5 to 1"):
        PreferenceStore(url, rating_scale=(5, 1))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), "5", True])
def test_a_rating_that_is_no_number_is_refused(wrong: object) -> None:
    with pytest.raises(PreferenceError, match=r"row 4: rating_a is .*: write a finite number"):
        Preference(pair(where="row 4"), "a", "ann", rating_a=wrong)  # type: ignore[arg-type]


def test_what_makes_no_pair_is_refused() -> None:
    with pytest.raises(PreferenceError, match="line 2: both captions are 'a cat'"):
        pair("a cat", " a cat ", where="line 2")
    for text_ in ("half \ud800", "nul \0"):
        with pytest.raises(PreferenceError, match=r"caption_b .* is no text"):
            pair("a cat", text_)
    for choice in ("c", None, ""):
        with pytest.raises(PreferenceError, match="is none of a, b, tie"):
            Preference(pair(), choice, "ann")  # type: ignore[arg-type]
    for rater in ("", "x" * 129, "two\nlines", None):
        with pytest.raises(PreferenceError, match="printable characters"):
            Preference(pair(), "a", rater)  # type: ignore[arg-type]


def test_raters_are_led_through_all_pairs_those_least_labelled_first(store: PreferenceStore) -> None:
    pairs = [pair(shade=shade) for shade in range(3)]
    store.add(pairs)
    assert store.count_pairs() == 3
    seen = set()
    for _ in pairs:
        due = store.next_pair("ann")
        assert due is not None
        assert due.image == next(p.image for p in pairs if p.id == due.id)
        store.add([Preference(due, "a", "ann")])
        seen.add(due.id)
    assert seen == {p.id for p in pairs}
    assert store.next_pair("ann") is None
    fresh = pair(shade=9)
    store.add([fresh])
    assert store.next_pair("bob").id == fresh.id  # type: ignore[union-attr]
    assert [p.id for p in store.unlabelled()] == [fresh.id]
    assert store.pair(fresh.id).caption_a == "a red square"
    with pytest.raises(UnknownPairError, match="no pair has the id 'x'"):
        store.pair("x")


def test_raters_who_ask_at_the_same_time_get_different_pairs_until_a_lease_lapses(url: str) -> None:
    now = datetime(2030, 1, 1, tzinfo=UTC)
    with PreferenceStore(url, now=lambda: now) as store:
        store.add(pair(shade=shade) for shade in range(3))
        due = {name: store.next_pair(name, lease_s=60).id for name in ("ann", "bob", "eve")}  # type: ignore[union-attr]
        assert len(set(due.values())) == 3
        assert store.next_pair("ann", lease_s=60).id == due["ann"]  # type: ignore[union-attr]
        # Nothing is free for a fourth, who may label all of them nevertheless.
        assert store.next_pair("kim").id in due.values()  # type: ignore[union-attr]
        now += timedelta(seconds=61)
        assert store.next_pair("kim").id == min(due.values())  # type: ignore[union-attr]
        store.add([Preference(store.pair(due["bob"]), "a", "bob")])
        assert store.next_pair("bob").id != due["bob"]  # type: ignore[union-attr]


def test_raters_in_threads_get_different_pairs(url: str) -> None:
    with PreferenceStore(url) as store:
        store.add(pair(shade=shade) for shade in range(12))
        barrier = threading.Barrier(6)

        def ask(name: str) -> str:
            barrier.wait(30)
            due = store.next_pair(name)
            assert due is not None
            return due.id

        with ThreadPoolExecutor(6) as threads:
            found = list(threads.map(ask, (f"rater-{i}" for i in range(6))))
    assert len(set(found)) == 6


def test_a_rater_takes_back_what_they_said_last_and_nothing_else(url: str) -> None:
    moments = iter(datetime(2030, 1, 1, tzinfo=UTC) + timedelta(seconds=i) for i in range(1000))
    with PreferenceStore(url, now=lambda: next(moments)) as store:
        first, last, others = (
            Preference(pair(shade=shade), "a", name) for shade, name in ((1, "ann"), (2, "ann"), (2, "bob"))
        )
        for said in (first, last, others):
            store.add([said])
        with pytest.raises(ConflictError, match="said last"):
            store.undo(first.id, "ann")
        assert store.undo(others.id, "ann") is None
        assert store.undo(last.id, "ann") == last.pair.id
        assert store.undo(last.id, "ann") is None, "a second time nothing more goes"
        assert {(p.rater, p.pair.id) for p in store.preferences()} == {
            ("ann", first.pair.id),
            ("bob", others.pair.id),
        }
        assert store.next_pair("ann").id == last.pair.id  # type: ignore[union-attr]


def test_another_version_is_refused_with_the_remedy(url: str) -> None:
    PreferenceStore(url).close()
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE mmrl_preference_store SET version = 7"))
    engine.dispose()
    with pytest.raises(ConfigError, match=r"schema version 7, this program knows 1: use the version"):
        PreferenceStore(url)


def test_what_is_no_store_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="write for example sqlite:///"):
        PreferenceStore("no url at all")
    with pytest.raises(ConfigError, match="neither sqlite nor postgresql"):
        PreferenceStore("mysql://localhost/x")
    with pytest.raises(PreferenceError, match="preference store postgresql"):
        PreferenceStore("postgresql+psycopg://mmrl:secret@127.0.0.1:1/x?connect_timeout=2")
    (tmp_path / "file").write_text("no database, and rather long for one" * 20)
    with pytest.raises(PreferenceError, match="file is not a database"):
        PreferenceStore(f"sqlite:///{tmp_path / 'file'}")


def test_a_transaction_that_its_source_breaks_writes_nothing(store: PreferenceStore) -> None:
    def broken() -> object:
        yield from (preference(shade=shade) for shade in range(600))
        raise PreferenceError("line 601: nonsense")

    with pytest.raises(PreferenceError, match="line 601"):
        store.add(broken())  # type: ignore[arg-type]
    assert store.count_pairs() == 0


def _write(url: str, rater: str, count: int) -> int:
    with PreferenceStore(url) as store:
        # Every writer brings the same pairs, half of them in the opposite order, and one preference all share.
        order = range(count) if rater < "w3" else reversed(range(count))
        return sum(
            store.add([preference(rater=rater, shade=shade), preference(rater="all", shade=shade)]).new
            for shade in order
        )


def test_writers_in_several_processes_lose_and_double_nothing(url: str) -> None:
    raters, count = [f"w{i}" for i in range(5)], 12
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        new = pool.starmap(_write, [(url, rater, count) for rater in raters])
    assert sum(new) == (len(raters) + 1) * count
    with PreferenceStore(url) as store:
        assert store.count_pairs() == count
        assert len({p.id for p in store.preferences()}) == sum(new)


def test_the_blinded_order_is_fair_and_repeatable() -> None:
    ids = [pair(shade=shade).id for shade in range(2000)]
    shown = [first_shown(each, 3) for each in ids]
    assert shown == [first_shown(each, 3) for each in ids]
    assert shown[:3] == [first_shown(each, 3) for each in ids[:3]]
    assert 900 < shown.count("a") < 1100
    # Another seed is another order: about half of the pairs turn round.
    assert 900 < sum(x != first_shown(each, "ann") for x, each in zip(shown, ids, strict=True)) < 1100


def test_ids_are_the_contents_own() -> None:
    assert pair().id == pair("a square", "a red square").id
    assert Pair("h", "q", "ab", "c").id != Pair("h", "qa", "b", "c").id
    # Written down: other versions of this program must find the same rows.
    assert Pair("0" * 64, "q", "x", "y").id == "858dbd85aee8d4ea6a42fe9c3147a5bd"
