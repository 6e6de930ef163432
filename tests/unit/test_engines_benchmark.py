"""`benchmarks/engines.py`: its sampling with the tiny model and the local engine, and its clients against a stub."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from aiohttp import web
from PIL import Image

from mmrl_ray.config.sections import ScenesSection
from mmrl_ray.data.scenes.generator import generate_scenes
from mmrl_ray.data.writing import write_parquet

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import engines
import serve

ROOT = Path(__file__).parents[2]


def test_sampling_is_measured_in_processes_that_say_the_same() -> None:
    command = [sys.executable, "benchmarks/engines.py", "--small", "--engines", "local", "--only", "sampling"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, "--cores", "2"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    rows = found["sampling"]
    assert [(row["name"], row["size"]) for row in rows] == [
        (name, size) for name in ("local", "local, 2 processes") for size in (2, 3)
    ]
    for row in rows:
        assert 1 <= row["tokens"] <= 8
        assert row["per_second"] > 0
        assert row["cpu_ms"] > 0
        assert row["memory"] > 100 << 20, "a process has torch at least"
    assert rows[2]["memory"] > 1.5 * rows[0]["memory"], "two processes"
    assert found["same_texts"] == {"local": 1, "local, 2 processes": 1}
    assert found["ratio"] is None, "there is nothing to compare"


class Stub:
    """Answers a picture with the number that `pictures_of` wrote into it, as soon as all clients of its load wait."""

    def __init__(self, *loads: tuple[int, int]) -> None:
        """Loads of (clients, requests), one after the other."""
        self.most: list[int] = [0] * len(loads)
        """By load, requests under way at the same time."""
        self._load_of = [load for load, (_, requests) in enumerate(loads) for _ in range(requests)]
        self._together = [asyncio.Barrier(clients) for clients, _ in loads]
        self._under_way = 0

    async def answer(self, request: web.Request) -> web.Response:
        asked = await request.json()
        uri = asked["messages"][0]["content"][0]["image_url"]["url"]
        with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as picture:
            low, high = picture.convert("RGB").tobytes()[:2]
        number = low + 256 * high
        load = self._load_of[number]
        self._under_way += 1
        self.most[load] = max(self.most[load], self._under_way)
        async with asyncio.timeout(60):
            await self._together[load].wait()
        self._under_way -= 1
        return web.json_response({"choices": [{"message": {"content": f" {asked['model']} {number}"}}]})


@contextmanager
def running(stub: Stub) -> Iterator[str]:
    loop = asyncio.new_event_loop()
    app = web.Application(client_max_size=1 << 24)
    app.router.add_post("/v1/chat/completions", stub.answer)
    runner = web.AppRunner(app)
    port = serve.free_port()
    loop.run_until_complete(runner.setup())
    loop.run_until_complete(web.TCPSite(runner, "127.0.0.1", port).start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def test_each_load_has_its_clients_and_every_request_its_picture(tmp_path: Path) -> None:
    write_parquet(tmp_path / "data.parquet", generate_scenes(ScenesSection(train=4, eval=1, image_size=32))[0])
    pictures = serve.pictures_of(tmp_path / "data.parquet", 16 + 4 + 64)
    stub = Stub((16, 16), (1, 4), (8, 64))
    with running(stub) as url:
        server = serve.Server(url, "tuned", {})
        rows, texts = engines.measure_server("stub", server, pictures, ((1, 4), (8, 64)), 2.5)
    assert texts == {i: f"tuned {i}" for i in range(16 + 4 + 64)}
    assert stub.most == [16, 1, 8]
    assert [(row.name, row.size, row.start_s) for row in rows] == [("stub", 1, 2.5), ("stub", 8, 2.5)]
    for row in rows:
        assert row.p50_ms is not None
        assert row.p99_ms is not None
        assert 0 < row.p50_ms <= row.p99_ms
        assert row.per_second <= 2000 * row.size / row.p50_ms, "half of them take as long, at least"


def test_the_ratio_is_that_of_the_best_of_each() -> None:
    rows = [
        engines.Row(name, size, per_second, 1.0, 1.0)
        for name, size, per_second in [
            ("local", 4, 3.0),
            ("local, 2 processes", 4, 6.0),
            ("vLLM, eager", 4, 2.0),
            ("vLLM, compiled", 4, 4.0),
            ("local", 16, 5.0),
        ]
    ]
    assert engines.ratios(rows) == pytest.approx({4: 1.5})
