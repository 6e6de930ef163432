"""The commands of a served model: what they ask for, what they print, and what of a key they never print again."""

from __future__ import annotations

import json
import re
import threading
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from mmrl_ray import client as client_module
from mmrl_ray.serving.keys import KeyStore
from tests.unit.cli.program import Patch, mmrl
from tests.unit.data.pictures import picture

# -- serve -------------------------------------------------------------------------------------------------------------


def test_serve_hands_over_what_was_asked(patched: Patch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        (tmp_path / "runs" / name).mkdir(parents=True)
    serve = patched("mmrl_ray.training.serve.serve")
    assert mmrl("serve", "runs/a").exit_code == 0
    plain = {"address": None, "host": None, "port": None, "insecure": False, "checkpoint": None, "print_config": False}
    plain["overrides"] = ()
    serve.assert_called_once_with(["runs/a"], **plain)
    where = (
        "--address",
        "auto",
        "--host",
        "0.0.0.0",
        "--port",
        9000,
        "--insecure",
        "--print-config",
        "--checkpoint",
        "last",
    )
    assert mmrl("serve", "runs/a", "runs/b", *where, "--set", "serving.refresh_s=1").exit_code == 0
    serve.assert_called_with(
        ["runs/a", "runs/b"],
        address="auto",
        host="0.0.0.0",
        port=9000,
        insecure=True,
        checkpoint="last",
        print_config=True,
        overrides=["serving.refresh_s=1"],
    )
    assert mmrl("serve").exit_code == 2
    assert mmrl("serve", "runs/a", "--port", 70_000).exit_code == 2


# -- keys --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def database(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/store/keys.db"


def test_a_key_is_printed_once_and_works_until_revoked(database: str) -> None:
    made = mmrl("keys", "create", "alice", "--role", "feedback", "--role", "infer", "--database", database)
    assert made.exit_code == 0, made.stderr
    key = made.stdout.removesuffix("\n")
    assert "\n" not in key
    record = KeyStore(database).verify(key)
    assert record is not None
    assert (record.name, record.roles, record.expires) == ("alice", {"feedback", "infer"}, None)
    assert made.stderr == f"{record.id}: key of alice (feedback,infer); it is not shown again\n"

    listed = mmrl("keys", "list", "--database", database)
    header, line = listed.stdout.splitlines()
    assert header.split() == ["ID", "BEGINS", "NAME", "ROLES", "CREATED", "ENDS"]
    assert line.split() == [
        record.id,
        f"{key[:11]}…",
        "alice",
        "feedback,infer",
        f"{record.created:%Y-%m-%d}",
        "never",
    ]
    revoked = mmrl("keys", "revoke", record.id, "--database", database)
    assert revoked.stdout == f"{record.id}: key of alice is revoked; gateways refuse it within 2 s\n"
    assert KeyStore(database).verify(key) is None
    again = mmrl("keys", "list", "--database", database)
    assert "revoked 20" in again.stdout
    (told,) = json.loads(mmrl("keys", "list", "--database", database, "--json").stdout)
    assert (told["id"], told["roles"], told["expires"]) == (record.id, ["feedback", "infer"], None)
    assert datetime.fromisoformat(told["revoked"]) >= datetime.fromisoformat(told["created"]) == record.created
    for done in (listed, revoked, again):
        assert key[12:] not in done.stdout + done.stderr


def test_a_key_infers_unless_told_and_may_end_by_itself(database: str) -> None:
    mmrl("keys", "create", "bob", "--days", 2, "--database", database)
    (record,) = KeyStore(database).list()
    assert record.roles == {"infer"}
    assert record.expires is not None
    assert (record.expires - record.created).total_seconds() == pytest.approx(2 * 86_400, abs=60)
    assert f"{record.expires:%Y-%m-%d}" in mmrl("keys", "list", "--database", database).stdout


def test_keys_lie_in_the_users_data_folder_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert mmrl("keys", "create", "carol").exit_code == 0
    assert (tmp_path / "mmrl_ray" / "keys.db").stat().st_mode & 0o077 == 0
    assert "carol" in mmrl("keys", "list").stdout


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("create", "x", "--role", "boss"), 2, "name one or more of infer, feedback, admin"),
        (("create", ""), 2, "key name"),
        (("create", "x", "--days", 0), 2, "days"),
        (("revoke", "nobody"), 2, "no key has the id 'nobody'"),
    ],
)
def test_wrong_key_commands(database: str, arguments: tuple[Any, ...], code: int, told: str) -> None:
    done = mmrl("keys", *arguments, "--database", database)
    assert done.exit_code == code
    assert told in done.stderr
    assert done.stdout == ""
    assert KeyStore(database).list() == ()


# -- caption and score by URL ------------------------------------------------------------------------------------------


class Gateway:
    """Answers every HTTP client of this process, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[httpx.Request] = []
        self._lock = threading.Lock()

    def __call__(self, request: httpx.Request) -> httpx.Response:
        request.read()
        with self._lock:
            self.asked.append(request)
        if request.url.path == "/v1/captions":
            number = next(n for n in range(100) if picture(n) in request.content)
            wanted = int((re.search(rb'name="n"\r\n\r\n(\d+)', request.content) or (b"", b"1"))[1])
            texts = [f" picture {number} ", *(f"again {i}" for i in range(1, wanted))]
            captions = [{"index": i, "text": text, "finish_reason": "stop"} for i, text in enumerate(texts)]
            return httpx.Response(
                200, json={"model": "m", "version": 3, "image_hash": "ab", "captions": captions, "usage": {}}
            )
        item = json.loads(request.content)["inputs"][0]
        rewards = [
            {
                "index": index,
                "total": len(text) / 8,
                "parts": {"b": 0.5, "a": 1},
                "weights": {"b": 1.0},
                "sigma": (None, 0.25)[index],
            }
            for index, text in enumerate(item["captions"])
        ]
        return httpx.Response(200, json={"version": "v", "data": [{"image_hash": "ab", "rewards": rewards}]})


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> Gateway:
    made = Gateway()
    real = httpx.Client
    monkeypatch.setattr(
        client_module.httpx, "Client", lambda **options: real(**{**options, "transport": httpx.MockTransport(made)})
    )
    monkeypatch.setenv("MMRL_API_KEY", "mmrl-secret")
    return made


def test_captions_come_in_the_order_of_the_images(gateway: Gateway, tmp_path: Path) -> None:
    paths = []
    for number in range(20):
        paths.append(tmp_path / f"{number}.png")
        paths[-1].write_bytes(picture(number))
    done = mmrl("caption", "--url", "http://gate:8000", "--model", "cats", "--prompt", "What is it?", *paths)
    assert done.exit_code == 0, done.stderr
    assert done.stdout == "".join(f"{path}: picture {number}\n" for number, path in enumerate(paths))
    assert len(gateway.asked) == 20
    for request in gateway.asked:
        assert request.headers["authorization"] == "Bearer mmrl-secret"
        assert b"cats" in request.content
        assert b"What is it?" in request.content
    assert mmrl("caption", "--url", "http://gate:8000", paths[3]).stdout == "picture 3\n"
    several = mmrl("caption", "--url", "http://gate:8000", "-n", 3, "--temperature", 0.5, paths[3])
    assert several.stdout == "picture 3\nagain 1\nagain 2\n"
    assert re.search(rb'name="temperature"\r\n\r\n0\.5\r', gateway.asked[-1].content)


def test_one_missing_file_is_one_line(gateway: Gateway, tmp_path: Path) -> None:
    done = mmrl("caption", "--url", "http://gate:8000", tmp_path / "no.png")
    assert (done.exit_code, done.stderr) == (
        1,
        f"error: image {tmp_path}/no.png cannot be read: No such file or directory\n",
    )
    assert gateway.asked == []


def test_a_run_cannot_be_captioned_with_by_url(gateway: Gateway) -> None:
    done = mmrl("caption", "--url", "http://gate:8000", "--run", "runs/x", "a.png")
    assert done.exit_code == 2
    assert "either --url URL" in done.stderr
    assert mmrl("caption", "--url", "gate:8000", "a.png").exit_code == 2


def test_scores_are_printed_with_their_parts(gateway: Gateway, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(picture(1))
    done = mmrl(
        "score", "--url", "http://gate:8000", path, "a cat", "a red dog", "--reference", "x", "--reference", "y"
    )
    assert done.exit_code == 0, done.stderr
    assert done.stdout == ("0.6250  a cat  (b=0.5000  a=1.0000)\n1.1250 ± 0.2500  a red dog  (b=0.5000  a=1.0000)\n")
    (item,) = json.loads(gateway.asked[0].content)["inputs"]
    assert (item["captions"], item["references"]) == (["a cat", "a red dog"], ["x", "y"])
    assert item["image"].startswith("data:image/png;base64,")
    assert mmrl("score", path, "a cat").exit_code == 2  # no --url
