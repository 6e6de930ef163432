"""Keys: shown once, hashed, expiring, revoked soon and for all processes."""

from __future__ import annotations

import hashlib
import hmac
import re
import sqlite3
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from mmrl_ray.errors import ConfigError, ServingError
from mmrl_ray.serving import keys as keys_module
from mmrl_ray.serving.keys import CACHE_S, KeyStore, default_database


class Clock:
    def __init__(self) -> None:
        self.seconds = 100.0
        self.moment = datetime(2030, 1, 1, tzinfo=UTC)

    def monotonic(self) -> float:
        return self.seconds

    def now(self) -> datetime:
        return self.moment


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'state' / 'keys.db'}"


def opened(url: str, clock: Clock) -> KeyStore:
    return KeyStore(url, clock=clock.monotonic, now=clock.now)


def test_a_key_is_told_once_and_only_its_hash_is_kept(url: str, clock: Clock, tmp_path: Path) -> None:
    store = opened(url, clock)
    key, record = store.create("laptop", {"infer"})
    assert re.fullmatch(r"mmrl-[A-Za-z0-9_-]{43}", key)
    assert key.startswith(record.prefix)
    assert len(record.prefix) < 14
    assert store.list() == (record,)
    assert store.verify(key) == record
    stored = (tmp_path / "state" / "keys.db").read_bytes()
    assert key.encode() not in stored
    assert key.removeprefix("mmrl-")[8:].encode() not in stored
    (digest,) = sqlite3.connect(tmp_path / "state" / "keys.db").execute("select digest from mmrl_keys").fetchone()
    assert digest == hashlib.sha256(key.encode()).hexdigest()


def test_two_keys_differ_and_nothing_near_a_key_works(url: str, clock: Clock) -> None:
    store = opened(url, clock)
    key, record = store.create("a", {"infer"})
    other, _ = store.create("b", {"infer"})
    assert key != other
    last = "A" if key[-1] != "A" else "B"
    for wrong in ("", key[:-1], key + "A", key[:-1] + last, key.upper(), record.prefix, "mmrl-" + "\ud800" * 43):
        assert store.verify(wrong) is None


def test_compares_in_constant_time(url: str, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []
    real = hmac.compare_digest

    def compare(left: bytes, right: bytes) -> bool:
        compared.append((left, right))
        return real(left, right)

    monkeypatch.setattr(keys_module.hmac, "compare_digest", compare)
    store = opened(url, clock)
    key, record = store.create("a", {"infer"})
    last = "A" if key[-1] != "A" else "B"
    assert store.verify(key[:-1] + last) is None
    assert store.verify(key) == record
    digest = hashlib.sha256(key.encode()).digest()
    assert [pair[0] for pair in compared] == [digest, digest]


def test_roles(url: str, clock: Clock) -> None:
    store = opened(url, clock)
    _, infer = store.create("a", ["infer"])
    _, both = store.create("b", ["infer", "feedback"])
    _, admin = store.create("c", ["admin"])
    assert [infer.allows(role) for role in ("infer", "feedback", "admin")] == [True, False, False]
    assert [both.allows(role) for role in ("infer", "feedback", "admin")] == [True, True, False]
    assert all(admin.allows(role) for role in ("infer", "feedback", "admin"))


@pytest.mark.parametrize(
    ("name", "roles", "message"),
    [
        ("", {"infer"}, "key name ''"),
        ("a\nb", {"infer"}, "printable"),
        ("x" * 65, {"infer"}, "1 to 64"),
        ("a", set(), r"roles \(none\)"),
        ("a", {"root"}, r"roles \['root'\]"),
    ],
)
def test_what_cannot_be_created(url: str, clock: Clock, name: str, roles: set, message: str) -> None:
    store = opened(url, clock)
    with pytest.raises(ConfigError, match=message):
        store.create(name, roles)
    assert store.list() == ()


def test_an_expired_key_is_refused_at_once_though_it_was_cached(url: str, clock: Clock) -> None:
    store = opened(url, clock)
    with pytest.raises(ConfigError, match="time zone"):
        store.create("a", {"infer"}, clock.moment.replace(tzinfo=None) + timedelta(days=1))
    with pytest.raises(ConfigError, match="time to come"):
        store.create("a", {"infer"}, clock.moment)
    key, record = store.create("a", {"infer"}, clock.moment + timedelta(hours=1))
    assert store.verify(key) == record
    assert store.list()[0].expires == record.expires
    clock.moment += timedelta(hours=1)
    assert store.cached(key) is None
    assert store.verify(key) is None


def test_a_revoked_key_dies_elsewhere_within_the_cache_time(url: str, clock: Clock) -> None:
    here, there = opened(url, clock), opened(url, clock)
    key, record = here.create("a", {"infer"})
    kept, _ = here.create("b", {"infer"})
    assert here.verify(key) == there.verify(key) == record
    revoked = here.revoke(record.id)
    assert revoked.revoked == clock.moment
    assert here.verify(key) is None
    assert there.verify(key) == record, "the other process has not looked again yet"
    clock.seconds += CACHE_S
    assert there.verify(key) is None
    assert there.verify(kept) is not None
    assert {each.name: bool(each.revoked) for each in there.list()} == {"a": True, "b": False}
    clock.moment += timedelta(days=1)
    assert here.revoke(record.id).revoked == revoked.revoked, "when it was revoked first"
    with pytest.raises(ConfigError, match="no key has the id 'nobody'"):
        here.revoke("nobody")


def test_a_cached_key_takes_no_look_into_the_database(url: str, clock: Clock, tmp_path: Path) -> None:
    store = opened(url, clock)
    key, record = store.create("a", {"infer"})
    assert store.cached(key) is None
    assert store.verify(key) == record
    store.close()
    (tmp_path / "state" / "keys.db").write_bytes(b"no database")
    assert store.cached(key) == store.verify(key) == record
    clock.seconds += CACHE_S
    with pytest.raises(ServingError, match="key database"):
        store.verify(key)


def test_the_file_is_its_owners_alone(url: str, clock: Clock, tmp_path: Path) -> None:
    opened(url, clock).create("a", {"infer"})
    for path in (tmp_path / "state").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700


def test_several_threads_and_processes_share_one_file(url: str, clock: Clock) -> None:
    code = f"from mmrl_ray.serving.keys import KeyStore; s = KeyStore({url!r}); s.create('p', ['infer']); s.list()"
    others = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    store = opened(url, clock)

    def make(number: int) -> None:
        for _ in range(5):
            key, record = store.create(f"thread {number}", {"infer"})
            assert store.verify(key) == record

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(make, range(4)))
    assert [other.wait(60) for other in others] == [0, 0]
    assert len(store.list()) == 22


@pytest.mark.parametrize("url", ["nonsense", "nosuchdb://host/name"])
def test_no_such_database_is_one_line(url: str, clock: Clock) -> None:
    with pytest.raises(ConfigError, match="key database: ") as caught:
        opened(url, clock)
    assert "\n" not in str(caught.value)


def test_an_unreachable_file_is_named(tmp_path: Path, clock: Clock) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ServingError, match=r"file/keys\.db"):
        opened(f"sqlite:///{tmp_path}/file/keys.db", clock)


def test_the_default_lies_in_the_users_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_database() == f"sqlite:///{tmp_path}/mmrl_ray/keys.db"
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_database() == f"sqlite:///{tmp_path}/home/.local/share/mmrl_ray/keys.db"
