"""The corpus of bad inputs against a whole gateway with a real model behind it: each gets its 4xx, and it goes on."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from mmrl_ray.config.sections import LoraSection, ModelSection
from mmrl_ray.config.serving import RemoteImagesSection, ServingSection
from mmrl_ray.policy.load import load_policy
from mmrl_ray.policy.lora.adapter import add_adapter, save_adapter
from mmrl_ray.policy.lora.pool import AdapterPool
from mmrl_ray.policy.model import Policy
from mmrl_ray.run_records.run_dir import CONFIG_FILE, WEIGHTS_FILE
from mmrl_ray.serving.adapters import AdapterFolders
from mmrl_ray.serving.app import GatewayDeps, make_app
from mmrl_ray.serving.engine import Engine
from mmrl_ray.serving.routes import pictures
from tests.corpus import pictures as encoded
from tests.corpus.requests import CAPTIONS, CASES, CHAT, MODEL, Case, accepted, chat, image_part, user
from tests.corpus.uris import GOOD, GOOD_PICTURE, URLS
from tests.support.fake_services import FakeReward, running_gateway
from tests.support.tiny_models import build_family

DEADLINE_S = 20.0
"""Answers take milliseconds; what takes longer than a loaded machine explains, hangs."""
ALLOWED, INSIDE, PUBLIC = "allowed.example.com", "inside.example.com", "93.184.215.14"
REMOTE_S = 0.5
SAMPLED = {"temperature": "1", "seed": "3", "min_tokens": "4", "max_tokens": "6"}
"""A model that nobody trained would greedily say nothing."""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_family("llava", tmp_path_factory.mktemp("corpus"))


def load(folder: Path) -> Policy:
    return load_policy(ModelSection(path=str(folder), dtype="float32"), device="cpu")


@pytest.fixture(scope="module")
def runs(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of adapters: a sound one and others that no server may load."""
    root = tmp_path_factory.mktemp("runs")
    policy = load(model_folder)
    add_adapter(policy, LoraSection(r=4, alpha=8), seed=1)
    outside = root.parent / f"{root.name}-outside"
    for name in ("good", "rank", "pickle", "nan", "link", "other", "torn"):
        save_adapter(policy.model, outside if name == "link" else root / name)
    (root / "link").symlink_to(outside)
    config = json.loads((root / "rank" / CONFIG_FILE).read_text())
    (root / "rank" / CONFIG_FILE).write_text(json.dumps({**config, "r": 10**9}))
    other = {**config, "base_model_name_or_path": str(build_family("llava", root.parent / "else", seed=9))}
    (root / "other" / CONFIG_FILE).write_text(json.dumps(other))
    (root / "pickle" / WEIGHTS_FILE).write_bytes(encoded.BAD["pickle"]())
    weights = bytearray((root / "nan" / WEIGHTS_FILE).read_bytes())
    weights[-4:] = b"\xff\xff\xff\x7f"
    (root / "nan" / WEIGHTS_FILE).write_bytes(weights)
    (root / "torn" / WEIGHTS_FILE).write_bytes(weights[:-100])
    return root


@pytest.fixture(scope="module")
def engine(model_folder: Path, runs: Path) -> Iterator[Engine]:
    """What answers; tests/vllm has one of its own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    policy = load(model_folder)
    made = engine_of(policy, AdapterPool(policy, AdapterFolders({}, [str(runs)]), max_adapters=2, max_rank=64))
    yield made
    made.close()
    torch.set_num_threads(threads)


def engine_of(policy: Policy, pool: AdapterPool, **settings: Any) -> Engine:
    limits = {"vision_cache_bytes": 1 << 20, "max_rows": 16, "max_queue": 16, "timeout_s": DEADLINE_S}
    made = Engine(policy, pool, model_id=MODEL, created=1, **limits, **settings)
    made.start()
    return made


@pytest.fixture(scope="module")
def gateway(engine: Engine) -> Iterator[httpx.Client]:
    remote = RemoteImagesSection(enabled=True, allowed_domains=[ALLOWED, INSIDE], timeout_s=REMOTE_S)
    settings = ServingSection(remote_images=remote)
    app = make_app(GatewayDeps(engine, FakeReward(), None, settings, insecure=True))
    with running_gateway(app) as url, httpx.Client(base_url=url, timeout=DEADLINE_S) as client:
        yield client


@pytest.fixture(scope="module")
def caption(gateway: httpx.Client) -> Callable[[], str]:
    """What the model says of a sound picture."""

    def ask() -> str:
        answer = gateway.post(CAPTIONS, files={"image": GOOD_PICTURE}, data=SAMPLED)
        assert answer.status_code == 200, answer.text
        text = str(answer.json()["captions"][0]["text"])
        assert text
        return text

    ask.first = ask()  # type: ignore[attr-defined]
    return ask


def check(answer: httpx.Response, status: int) -> None:
    """An error as clients understand it, that tells nothing of the server."""
    assert answer.status_code == status, answer.text[:300]
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["code"], str)
    assert error["message"]
    assert "\n" not in error["message"]
    assert len(error["message"]) < 600
    assert "Traceback" not in answer.text


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    async def resolve(host: str, port: int) -> Sequence[str]:
        raise AssertionError(f"{host} was looked up")

    monkeypatch.setattr(pictures, "_resolve", resolve)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gets_its_4xx_and_the_server_goes_on(case: Case, gateway: httpx.Client, caption: Any) -> None:
    headers = [("content-type", case.content_type), *case.headers]
    try:
        answer = gateway.post(case.path, content=case.body(), headers=headers)
    except httpx.WriteError:  # refused while the body was on its way
        assert case.status == 413
    else:
        check(answer, case.status)
    assert caption() == caption.first


@pytest.mark.parametrize("name", accepted())
def test_what_clients_really_send_is_answered(name: str, gateway: httpx.Client) -> None:
    answer = gateway.post(CHAT, json=accepted()[name])
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("name", encoded.ODD)
def test_odd_pictures_are_captioned(name: str, gateway: httpx.Client) -> None:
    answer = gateway.post(CAPTIONS, files={"image": encoded.ODD[name]()}, data=SAMPLED)
    assert answer.status_code == 200, answer.text
    assert answer.json()["captions"][0]["text"]


def test_what_the_cases_are_changes_of_is_answered(gateway: httpx.Client) -> None:
    """Or else a case might be refused for something that all of them have."""
    assert gateway.post(CHAT, json=chat()).status_code == 200
    rewards = gateway.post("/v1/rewards", json={"captions": ["a"], "image": GOOD, "references": ["b"]})
    assert rewards.status_code == 200
    score = {"queries": {"content": [image_part(GOOD)]}, "documents": "a"}
    assert gateway.post("/v1/score", json=score).status_code == 200


# -- adapters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rank", "pickle", "nan", "link", "other", "torn", "../good", "./good", "good/"])
def test_an_adapter_that_must_not_be_loaded(name: str, gateway: httpx.Client, caption: Any) -> None:
    for _ in range(2):
        check(gateway.post(CHAT, json=chat(model=name)), 404)
    assert caption() == caption.first
    sound = gateway.post(CHAT, json=chat(model="good"))
    assert (sound.status_code, sound.json()["model"]) == (200, "good")


# -- pictures by URL, from a server that means harm --------------------------------------------------------------------


class Drip(httpx.AsyncByteStream):
    """A byte at a time, for ever."""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            yield b"\x89"
            await asyncio.sleep(0.01)


class Flood(httpx.AsyncByteStream):
    """As much as is taken."""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            yield b"\x89PNG" * 16_384


class Whole(httpx.AsyncByteStream):
    """An ordinary body."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield self._data


def _moved(to: str) -> httpx.Response:
    return httpx.Response(302, headers={"location": to})


HARM: dict[str, Callable[[httpx.Request], httpx.Response]] = {
    "redirect-to-metadata": lambda _: _moved("http://169.254.169.254/latest/meta-data/"),
    "redirect-to-a-private-address": lambda _: _moved("https://10.0.0.1/"),
    "redirect-to-a-private-name": lambda _: _moved(f"https://{INSIDE}/"),
    "redirect-for-ever": lambda _: _moved("/again"),
    "rebinding": lambda _: _moved(f"https://{ALLOWED}/rebound"),
    "slow-drip": lambda _: httpx.Response(200, stream=Drip()),
    "flood": lambda _: httpx.Response(200, stream=Flood()),
    "gzip-bomb": lambda _: httpx.Response(200, headers={"content-encoding": "gzip"}, stream=Flood()),
    "announced-terabyte": lambda _: httpx.Response(200, headers={"content-length": str(2**40)}, stream=Drip()),
    "html": lambda _: httpx.Response(200, stream=Whole(b"<!DOCTYPE html>")),
    "error": lambda _: httpx.Response(500, stream=Whole(GOOD_PICTURE)),
}


@pytest.mark.parametrize("name", HARM)
def test_a_server_that_means_harm(
    name: str, gateway: httpx.Client, caption: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    names = {ALLOWED: [[PUBLIC]], INSIDE: [["10.0.0.8"]]}
    if name == "rebinding":
        names[ALLOWED].append(["127.0.0.1"])

    async def resolve(host: str, port: int) -> Sequence[str]:
        return names[host].pop(0) if len(names[host]) > 1 else names[host][0]

    def serve(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.host)
        return HARM[name](request)

    monkeypatch.setattr(pictures, "_resolve", resolve)
    monkeypatch.setattr(pictures, "_transport", lambda: httpx.MockTransport(serve))
    check(gateway.post(CHAT, json=chat(messages=user(image_part(f"https://{ALLOWED}/a.png")))), 400)
    assert set(asked) == {PUBLIC}
    assert caption() == caption.first


def test_a_server_that_means_well(gateway: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    async def resolve(host: str, port: int) -> Sequence[str]:
        return [PUBLIC]

    def serve(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, stream=Whole(GOOD_PICTURE))

    monkeypatch.setattr(pictures, "_resolve", resolve)
    monkeypatch.setattr(pictures, "_transport", lambda: httpx.MockTransport(serve))
    by_url = gateway.post(CHAT, json=chat(messages=user(image_part(f"https://{ALLOWED}/a.png")))).json()
    inline = gateway.post(CHAT, json=chat(messages=user(image_part(GOOD)))).json()
    assert by_url["choices"] == inline["choices"]
    assert base64.b64decode(GOOD.split(",")[1]) == GOOD_PICTURE


def test_urls_are_refused_while_they_are_off(runs: Path) -> None:
    class Nobody:
        """Answers nothing: no request may get so far."""

    app = make_app(GatewayDeps(Nobody(), None, None, ServingSection(), insecure=True))  # type: ignore[arg-type]
    with running_gateway(app) as url, httpx.Client(base_url=url, timeout=DEADLINE_S) as client:
        for image in (*URLS, f"https://{ALLOWED}/a.png"):
            check(client.post(CHAT, json=chat(messages=user(image_part(image)))), 400)
