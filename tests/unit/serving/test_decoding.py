"""Pictures on their way into a gateway: counted, decoded once, within the request's time, and not for nobody."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from typing import Any

import httpx
import psutil
import pytest
from fastapi.testclient import TestClient

from mmrl_ray.config.serving import LimitsSection, ServingSection
from mmrl_ray.data.decoder_pool import DecoderPool, Decoding
from mmrl_ray.errors import ImageError
from mmrl_ray.serving.app import GatewayDeps, make_app
from mmrl_ray.serving.images import RequestDecoder
from tests.corpus.pictures import many_scans
from tests.support.fake_services import FakePolicy, FakeReward, running_gateway
from tests.unit.data.pictures import picture

SLOW = many_scans(30, 4000)
"""Seconds of CPU time."""


def uri(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def rewards(*images: str) -> dict[str, Any]:
    return {"inputs": [{"captions": ["a"], "image": image} for image in images]}


def scores(*images: str) -> dict[str, Any]:
    queries = [{"content": [{"type": "image_url", "image_url": {"url": image}}]} for image in images]
    return {"queries": queries, "documents": ["a"] * len(images)}


BODIES = {"/v1/rewards": rewards, "/v1/score": scores}


def settings(timeout_s: float = 60.0, **limits: Any) -> ServingSection:
    return ServingSection(request_timeout_s=timeout_s, limits=LimitsSection(**limits))


def app(cfg: ServingSection) -> Any:
    return make_app(GatewayDeps(FakePolicy(), FakeReward(), None, cfg, insecure=True))


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What was decoded."""
    found: list[bytes] = []
    check = DecoderPool.check

    def count(self: DecoderPool, data: bytes, **options: Any) -> None:
        found.append(data)
        check(self, data, **options)

    monkeypatch.setattr(DecoderPool, "check", count)
    return found


@pytest.mark.parametrize("path", BODIES)
def test_pictures_are_counted_before_one_is_decoded(path: str, checked: list[bytes]) -> None:
    client = TestClient(app(settings(max_scored_images=3, max_megapixels=0.0002)), base_url="http://127.0.0.1")
    same = uri(picture(1))
    assert client.post(path, json=BODIES[path](same, same, same)).status_code == 200
    assert client.post(path, json=BODIES[path](same, uri(picture(2)), uri(picture(3)))).status_code == 200
    checked.clear()
    too_many = client.post(path, json=BODIES[path](*map(uri, map(picture, range(10, 14)))))
    too_large = client.post(path, json=BODIES[path](uri(picture(4)), uri(picture(5, size=(20, 20)))))
    for answer, told in ((too_many, "4 images is above 3"), (too_large, "464 pixels together: at most 200")):
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "above_limit")
        assert told in answer.json()["error"]["message"]
    assert checked == []


@pytest.mark.parametrize("path", BODIES)
def test_a_picture_is_decoded_once(path: str, checked: list[bytes]) -> None:
    client = TestClient(app(settings()), base_url="http://127.0.0.1")
    one, other = picture(1), picture(2)
    for _ in range(2):
        assert client.post(path, json=BODIES[path](*[uri(one)] * 20, uri(other))).status_code == 200
    assert checked == [one, other]
    broken = picture(3, size=(64, 64))[:70]
    for _ in range(2):
        assert client.post(path, json=BODIES[path](uri(broken))).json()["error"]["code"] == "invalid_image"
    assert checked == [one, other, broken]


@pytest.mark.parametrize("path", BODIES)
def test_decoding_ends_with_the_requests_time(path: str) -> None:
    client = TestClient(app(settings(timeout_s=0.2)), base_url="http://127.0.0.1")
    answer = client.post(path, json=BODIES[path](uri(SLOW, "jpeg")))
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")


@pytest.mark.parametrize("path", BODIES)
def test_decoding_ends_with_its_client(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given_up = []
    give_up = Decoding.give_up

    def note(self: Decoding) -> None:
        given_up.append(self)
        give_up(self)

    monkeypatch.setattr(Decoding, "give_up", note)
    with running_gateway(app(settings())) as url, httpx.Client(base_url=url, timeout=60) as client:
        with pytest.raises(httpx.ReadTimeout):
            client.post(path, json=BODIES[path](uri(SLOW, "jpeg")), timeout=0.3)
        assert client.post(path, json=BODIES[path](uri(picture(7)))).status_code == 200
    assert len(given_up) == 1


def test_one_decoding_for_all_that_wait_and_none_for_nobody(checked: list[bytes]) -> None:
    def processes() -> set[int]:
        return {child.pid for child in psutil.Process().children(recursive=True)}

    async def work() -> None:
        decoder = RequestDecoder(pool=pool)
        digest = hashlib.sha256(SLOW).digest()
        first, second = (asyncio.create_task(decoder.check(SLOW, digest)) for _ in range(2))
        await asyncio.sleep(0.2)
        first.cancel()
        await asyncio.sleep(0.05)
        assert not second.done()
        busy = processes() - before
        second.cancel()
        await asyncio.wait([first, second])
        async with asyncio.timeout(30):
            while busy & processes():
                await asyncio.sleep(0.01)
        assert checked == [SLOW]
        with pytest.raises(ImageError):
            await decoder.check(picture(3, size=(64, 64))[:70], b"3")
        async with decoder.decoded([picture(1), picture(2), picture(1)]) as found:
            assert [picture.image().getpixel((0, 0)) for picture in found] == [(1, 0, 99), (2, 0, 99), (1, 0, 99)]
            assert found[0] is found[2]

    before, pool = processes(), DecoderPool()
    asyncio.run(work())
    pool.close()
