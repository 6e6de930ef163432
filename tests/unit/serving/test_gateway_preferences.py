"""Preferences at the gateway: for feedback keys alone, blinded, each rater once; errors as OpenAI writes them."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from mmrl_ray.config.serving import ServingSection
from mmrl_ray.errors import PreferenceStoreError
from mmrl_ray.preferences.schema import blinded, preference_stats
from mmrl_ray.preferences.store import PreferenceStore
from mmrl_ray.serving.app import GatewayDeps, make_app
from mmrl_ray.serving.keys import KeyStore
from tests.support.fake_services import FakePolicy, png
from tests.unit.preferences.examples import pair

PATH = "/v1/preferences"


def url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


NEW: dict[str, Any] = {"image": url(png()), "captions": ["a red square", "a square"], "choice": "first"}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[PreferenceStore]:
    with PreferenceStore(f"sqlite:///{tmp_path}/preferences.db") as store:
        yield store


@pytest.fixture
def keys(tmp_path: Path) -> Iterator[KeyStore]:
    keys = KeyStore(f"sqlite:///{tmp_path}/keys.db")
    yield keys
    keys.close()


def client(keys: KeyStore, store: PreferenceStore | None, name: str = "ann", role: Any = "feedback") -> TestClient:
    key, _ = keys.create(name, [role])
    app = make_app(GatewayDeps(FakePolicy(), None, keys, ServingSection(), preferences=store))
    return TestClient(app, raise_server_exceptions=False, headers={"authorization": f"Bearer {key}"})


def test_raters_label_pairs_in_a_blinded_order_that_is_recorded(keys: KeyStore, store: PreferenceStore) -> None:
    pairs = {each.id: each for each in (pair(shade=shade) for shade in range(12))}
    store.add(pairs.values())
    orders = {}
    for name in ("ann", "bob"):
        rater = client(keys, store, name)
        while (answer := rater.get(f"{PATH}/next")).status_code == 200:
            shown = answer.json()
            assert rater.get(f"{PATH}/next").json() == shown  # asking again shows the same
            asked = pairs[shown["id"]]
            assert shown["captions"] == [blinded(asked, name).caption_a, blinded(asked, name).caption_b]
            assert base64.b64decode(shown["image"].partition(",")[2]) == asked.image
            orders[name, asked.id] = shown["captions"]
            # Ann likes what says more; Bob takes the first, whatever it is.
            choice = "first" if name == "bob" or shown["captions"][0] == "a red square" else "second"
            said = rater.post(PATH, json={"pair": asked.id, "choice": choice, "ratings": [1, 0]})
            assert said.json()["status"] == "new"
            assert said.json()["rater"] == name
        assert (answer.status_code, answer.content) == (204, b"")
    found = preference_stats(store.preferences())
    assert found.raters["bob"] == (12, found.raters["bob"][1])
    assert found.raters["bob"][1].value == 1.0
    assert {p.choice for p in store.preferences() if p.rater == "ann"} == {"a"}
    assert {first for (name, _), (first, _) in orders.items() if name == "ann"} == {"a red square", "a square"}
    assert any(orders["ann", each] != orders["bob", each] for each in pairs)
    rated = [p for p in store.preferences() if p.rater == "bob"]
    assert all((p.rating_a, p.rating_b) == ((1, 0) if p.choice == "a" else (0, 1)) for p in rated)


def test_a_new_pair_is_stored_once_and_a_change_of_mind_is_asked_for(keys: KeyStore, store: PreferenceStore) -> None:
    rater = client(keys, store)
    first = rater.post(PATH, json=NEW)
    assert (first.status_code, first.json()["status"]) == (200, "new")
    assert rater.post(PATH, json=NEW).json() == {**first.json(), "status": "same"}
    # The other way round it is the same pair, and the same opinion.
    turned = {**NEW, "captions": NEW["captions"][::-1], "choice": "second"}
    assert rater.post(PATH, json=turned).json() == {**first.json(), "status": "same"}
    other = {**NEW, "choice": "tie"}
    refused = rater.post(PATH, json=other)
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "conflict")
    assert rater.post(PATH, json={**other, "replace": True}).json()["status"] == "replaced"
    assert [p.choice for p in store.preferences()] == ["tie"]
    again = rater.post(PATH, json={**other, "user": "dora"})
    assert again.json()["rater"] == "ann/dora"
    known = {**NEW, "image": None, "image_hash": store.pair(first.json()["pair"]).image_hash, "user": "eve"}
    del known["image"]
    assert rater.post(PATH, json=known).json()["status"] == "new"


@pytest.mark.parametrize(
    ("body", "status", "code", "message"),
    [
        ({**NEW, "captions": ["same", " same "]}, 400, "invalid_value", "both captions are 'same'"),
        ({**NEW, "ratings": [0.5, 1.5]}, 400, "invalid_value", "rating_b=1.5 is off the scale"),
        ({**NEW, "image": url(b"no picture")}, 400, "invalid_image", ""),
        ({**NEW, "image_hash": "0" * 64}, 400, "invalid_value", "one of `image` and `image_hash`"),
        (
            {"captions": ["x", "y"], "choice": "first", "image_hash": "0" * 64},
            400,
            "invalid_value",
            "unknown to the store",
        ),
        ({"pair": "nobody", "choice": "first"}, 404, "pair_not_found", "no pair has the id 'nobody'"),
        ({**NEW, "pair": "x"}, 400, "invalid_value", "send either `pair`, or `captions`"),
        ({"choice": "first"}, 400, "invalid_value", "send either `pair`, or `captions`"),
        ({**NEW, "choice": "a"}, 400, "invalid_value", "choice"),
        ({**NEW, "captions": ["one"]}, 400, "invalid_value", "captions"),
        ({**NEW, "user": "two words"}, 400, "invalid_value", "user"),
        ({**NEW, "rater": "somebody else"}, 400, "unknown_parameter", "rater"),
        ({**NEW, "captions": ["x" * 20_000, "y"]}, 400, "above_limit", "characters"),
    ],
)
def test_what_is_wrong_is_told_and_stores_nothing(
    keys: KeyStore, store: PreferenceStore, body: dict[str, Any], status: int, code: str, message: str
) -> None:
    answer = client(keys, store).post(PATH, json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert message in answer.json()["error"]["message"]
    assert store.count_pairs() == 0


def test_two_raters_get_different_pairs_and_one_takes_back_a_vote(keys: KeyStore, store: PreferenceStore) -> None:
    store.add(pair(shade=shade) for shade in range(4))
    ann, bob = client(keys, store, "ann"), client(keys, store, "bob")
    due = ann.get(f"{PATH}/next").json()["id"]
    assert bob.get(f"{PATH}/next").json()["id"] != due
    said = ann.post(PATH, json={"pair": due, "choice": "first"}).json()
    assert ann.get(f"{PATH}/next").json()["id"] != due
    assert bob.delete(f"{PATH}/{said['id']}").json()["error"]["code"] == "preference_not_found"
    undone = ann.delete(f"{PATH}/{said['id']}")
    assert undone.json() == {**said, "status": "undone"}
    assert ann.delete(f"{PATH}/{said['id']}").status_code == 404
    assert store.count_labelled() == 0
    earlier = ann.post(PATH, json={"pair": due, "choice": "second"}).json()["id"]
    assert ann.post(PATH, json=NEW).status_code == 200
    assert ann.delete(f"{PATH}/{earlier}").status_code == 409


def test_nan_is_no_rating(keys: KeyStore, store: PreferenceStore) -> None:
    raw = '{"captions": ["x", "y"], "choice": "first", "image_hash": "%s", "ratings": [NaN, 1]}' % ("0" * 64)
    answer = client(keys, store).post(PATH, content=raw, headers={"content-type": "application/json"})
    assert answer.status_code == 400


@pytest.mark.parametrize(("role", "status"), [("infer", 403), ("feedback", 204), ("admin", 204)])
def test_only_feedback_keys_come_in(keys: KeyStore, store: PreferenceStore, role: str, status: int) -> None:
    assert client(keys, store, role=role).get(f"{PATH}/next").status_code == status
    bare = TestClient(make_app(GatewayDeps(FakePolicy(), None, keys, ServingSection(), preferences=store)))
    assert bare.post(PATH, json=NEW).status_code == 401


def test_without_a_store_there_is_nothing_at_this_path(keys: KeyStore) -> None:
    for answer in (client(keys, None).get(f"{PATH}/next"), client(keys, None).post(PATH, json=NEW)):
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "preferences_not_served")


def test_a_store_out_of_reach_is_503_and_tells_no_address(
    keys: KeyStore, store: PreferenceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object, **__: object) -> None:
        raise PreferenceStoreError("preference store postgresql://secret-host/x: connection refused")

    monkeypatch.setattr(store, "add", gone)
    answer = client(keys, store).post(PATH, json=NEW)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "preferences_unavailable")
    assert "secret-host" not in answer.text
    assert "retry-after" in answer.headers


def test_a_relative_file_is_refused_since_replicas_have_folders_of_their_own() -> None:
    assert ServingSection(preferences="sqlite:////data/p.db").preferences == "sqlite:////data/p.db"
    with pytest.raises(ValueError, match=r"preferences=sqlite:///p\.db is relative"):
        ServingSection(preferences="sqlite:///p.db")
