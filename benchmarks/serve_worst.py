"""An honest client beside one that does its worst, without a key and then with one.

    python benchmarks/serve_worst.py

`mmrl serve` on the tiny model of the quickstart, with its defaults. The honest client asks for greedy captions one
after the other, from its own address and with its own key: 30 s alone, then 60 s beside each attacker. The attacker has
another address of this machine and runs at the lowest priority, since it would have a machine of its own.

Without a key: headers and bodies that never end, wrong keys, huge headers, pages. With a key: heavy pictures to score,
as many as a request may have, the longest chats, streams that are left, broken JSON.

Prints a table; the last line is one JSON object, `ratio` the larger of the two p95 over that alone.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import json
import multiprocessing
import os
import random
import secrets
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from PIL import Image
from rich.console import Console
from rich.table import Table
from serve import Load, Server, body, ours, pictures_of

from mmrl_ray.config.data import ScenesSection
from mmrl_ray.data.scenes import generate_scenes, scenes_vocabulary
from mmrl_ray.data.writing import write_parquet
from mmrl_ray.policy.tiny import build_tiny_llava

ADDRESS = "127.0.0.2"
SIDE = 7000
"""Of heavy pictures: 49 million pixels, just below what is accepted."""
PAUSE_S = 0.05
Attack = Callable[[aiohttp.ClientSession, Server, "Counter[str]"], Awaitable[None]]


# -- the honest client -------------------------------------------------------------------------------------------------


async def honest(server: Server, bodies: list[bytes], seconds: float) -> tuple[list[float], int]:
    """Seconds of each answer, and how many requests had none."""
    taken, lost, deadline = [], 0, time.monotonic() + seconds
    headers = {"Content-Type": "application/json", **server.headers}
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as session:
        while time.monotonic() < deadline:
            began = time.perf_counter()
            try:
                url = f"{server.url}/v1/chat/completions"
                async with session.post(url, data=random.choice(bodies), headers=headers) as response:
                    await response.read()
                    lost += response.status != 200
            except aiohttp.ClientError:
                lost += 1
            taken.append(time.perf_counter() - began)
            await asyncio.sleep(PAUSE_S)
    return taken, lost


# -- the attackers -----------------------------------------------------------------------------------------------------


async def raw(server: Server, first: bytes, then: bytes) -> None:
    """A connection that sends `then` each second until it is closed."""
    place = urlsplit(server.url)
    reader, writer = await asyncio.open_connection(place.hostname, place.port, local_addr=(ADDRESS, 0))
    try:
        writer.write(first)
        while not reader.at_eof():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(reader.read(1000), 1.0)
            writer.write(then)
            await writer.drain()
    finally:
        writer.close()


def half_headers(session: aiohttp.ClientSession, server: Server, seen: Counter[str]) -> Awaitable[None]:
    return raw(server, b"GET /health/live HTTP/1.1\r\nHost: a\r\n", b"X: y\r\n")


def slow_body(session: aiohttp.ClientSession, server: Server, seen: Counter[str]) -> Awaitable[None]:
    head = b"POST /v1/rewards HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    key = server.headers.get("Authorization", f"Bearer mmrl-{secrets.token_urlsafe(32)}")
    return raw(server, head + f"Authorization: {key}\r\nContent-Length: 9000000\r\n\r\n".encode(), b" ")


async def call(
    session: aiohttp.ClientSession,
    server: Server,
    seen: Counter[str],
    path: str,
    *,
    leave: bool = False,
    **options: Any,
) -> None:
    """One request; with `leave` the connection is cut once its answer begins."""
    headers = {**server.headers, **options.pop("headers", {})}
    method = "POST" if "data" in options else "GET"
    async with session.request(method, f"{server.url}{path}", headers=headers, **options) as response:
        seen[f"{path.partition('?')[0]} {response.status}"] += 1
        if leave:
            response.close()
        else:
            await response.read()


async def wrong_key(session: aiohttp.ClientSession, server: Server, seen: Counter[str]) -> None:
    key = f"Bearer mmrl-{secrets.token_urlsafe(32)}"
    await call(session, server, seen, "/v1/models", headers={"Authorization": key})


async def page(session: aiohttp.ClientSession, server: Server, seen: Counter[str]) -> None:
    await call(
        session, server, seen, random.choice(["/docs", "/openapi.json", "/health/live", "/-/routes", "/a" * 4000])
    )


async def huge_header(session: aiohttp.ClientSession, server: Server, seen: Counter[str]) -> None:
    await call(session, server, seen, "/v1/models", headers={f"X-{n}": "x" * 4000 for n in range(60)})


async def huge_body(session: aiohttp.ClientSession, server: Server, seen: Counter[str]) -> None:
    await call(session, server, seen, "/v1/chat/completions", data=bytes(30_000_000), headers=_JSON)


_JSON = {"Content-Type": "application/json"}


def heavy() -> list[bytes]:
    """Files that weigh little and cost much."""
    made = []
    for image, kind, options in (
        (Image.new("RGB", (SIDE, SIDE)), "WEBP", {"lossless": True, "method": 0, "quality": 0}),
        (Image.new("I;16", (SIDE, SIDE)), "PNG", {}),
        (Image.new("RGB", (SIDE, SIDE)), "JPEG", {"progressive": True}),
    ):
        out = io.BytesIO()
        image.save(out, kind, **options)
        made.append(out.getvalue())
    small = io.BytesIO()
    Image.new("RGB", (24, 16)).save(small, "PNG")
    empty = struct.pack(">I", 0) + b"teSt" + struct.pack(">I", zlib.crc32(b"teSt"))
    made.append(small.getvalue()[:33] + empty * 1_000_000 + small.getvalue()[33:])
    small = io.BytesIO()
    Image.new("RGB", (24, 16)).save(small, "JPEG")
    made.append(b"\xff\xd8" + b"\xff" * 15_000_000 + small.getvalue()[2:])
    return made


def _uri(picture: bytes) -> str:
    # Some bytes behind its end make it a picture that nobody has seen yet.
    return "data:image/png;base64," + base64.b64encode(picture + secrets.token_bytes(8)).decode()


def scored(pictures: list[bytes]) -> Attack:
    async def attack(session: aiohttp.ClientSession, server: Server, seen: Counter[str]) -> None:
        chosen = [_uri(picture) for picture in random.sample(pictures[:3], 3)]
        if random.random() < 0.3:
            chosen = [_uri(random.choice(pictures[3:]))]
        inputs = [{"image": uri, "captions": ["a"], "references": ["a"]} for uri in chosen * (60 // len(chosen))]
        if len(chosen) == 1:
            inputs = inputs[:1]
        await call(session, server, seen, "/v1/rewards", data=json.dumps({"inputs": inputs}), headers=_JSON)

    return attack


def chatted(pictures: list[bytes], model: str, *, leave: bool) -> Attack:
    async def attack(session: aiohttp.ClientSession, server: Server, seen: Counter[str]) -> None:
        asked = json.loads(body(model, random.choice(pictures[:3]) + secrets.token_bytes(8)))
        asked |= {"n": 16, "max_tokens": 200, "temperature": 1.0, "stream": leave}
        await call(session, server, seen, "/v1/chat/completions", leave=leave, data=json.dumps(asked), headers=_JSON)

    return attack


async def broken(session: aiohttp.ClientSession, server: Server, seen: Counter[str]) -> None:
    data = b'{"messages": [' + b'{"a": [1]},' * 150_000
    await call(session, server, seen, "/v1/chat/completions", data=data, headers=_JSON)


async def remote(session: aiohttp.ClientSession, server: Server, seen: Counter[str]) -> None:
    inputs = [{"image": "https://192.0.2.1/slow.png", "captions": ["a"], "references": ["a"]}]
    await call(session, server, seen, "/v1/rewards", data=json.dumps({"inputs": inputs}), headers=_JSON)


async def again(attack: Attack, session: aiohttp.ClientSession, server: Server, seen: Counter[str]) -> None:
    while True:
        try:
            await attack(session, server, seen)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            seen[type(error).__name__] += 1
            await asyncio.sleep(0.1)


def attacker(server: Server, with_key: bool, seconds: float, told: Any) -> None:
    """In a process of its own."""
    os.nice(19)
    wanted: list[tuple[Attack, int]]
    if with_key:
        pictures = heavy()
        wanted = [(scored(pictures), 12), (chatted(pictures, server.model, leave=True), 8), (slow_body, 50)]
        wanted += [(chatted(pictures, server.model, leave=False), 16), (broken, 4), (remote, 4)]
    else:
        wanted = [(half_headers, 3000), (slow_body, 300), (wrong_key, 16), (page, 16), (huge_header, 8), (huge_body, 4)]

    async def run() -> None:
        seen: Counter[str] = Counter()
        connector = aiohttp.TCPConnector(limit=0, local_addr=(ADDRESS, 0))
        timeout = aiohttp.ClientTimeout(total=120)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            tasks = [asyncio.create_task(again(a, session, server, seen)) for a, count in wanted for _ in range(count)]
            told.send("ready")
            await asyncio.wait(tasks, timeout=seconds)
            told.send(dict(seen))
            os._exit(0)  # nobody waits for thousands of connections to be closed in good order

    asyncio.run(run())


def beside(server: Server, theirs: Server, with_key: bool, bodies: list[bytes], seconds: float) -> tuple[Any, Any]:
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=attacker, args=(theirs, with_key, seconds + 5, there), daemon=True
    )
    process.start()
    here.recv()
    found = asyncio.run(honest(server, bodies, seconds))
    seen = here.recv() if here.poll(120) else {}
    process.join(30)
    process.kill()
    return found, seen


def another_key(load: Load, folder: Path) -> str:
    command = [sys.executable, "-m", "mmrl_ray.cli", "keys", "create", "worst"]
    command += ["--database", f"sqlite:///{folder}/keys-{load.name}.db"]
    made = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return next(word for word in made.split() if word.startswith("mmrl-"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="mmrl-bench-"))
    figures: dict[str, tuple[list[float], int]] = {}
    attacks: dict[str, dict[str, int]] = {}
    try:
        tiny = build_tiny_llava(folder / "tiny", vocabulary=scenes_vocabulary())
        small = folder / "small.parquet"
        write_parquet(small, generate_scenes(ScenesSection(train=64, eval=1, image_size=64))[0])
        load = Load("tiny", tiny, pictures_of(small, 64), many=0, one=0)
        settings = ["serving.rate.requests_per_minute=60000", "serving.rate.burst=1000"]  # as shipped
        with ours(load, folder, settings) as server:
            bodies = [body(server.model, picture) for picture in load.pictures]
            asyncio.run(honest(server, bodies, 3))
            figures["alone"] = asyncio.run(honest(server, bodies, args.seconds / 2))
            for name, with_key in (("without a key", False), ("with a key", True)):
                headers = {"Authorization": f"Bearer {another_key(load, folder)}"} if with_key else {}
                theirs = Server(server.url, server.model, headers)
                figures[name], attacks[name] = beside(server, theirs, with_key, bodies, args.seconds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    report(figures, attacks)


def report(figures: dict[str, tuple[list[float], int]], attacks: dict[str, dict[str, int]]) -> None:
    """The table, then the JSON line."""
    table = Table("beside", "answers", "lost", "p50 ms", "p95 ms", title="an honest client")
    line: dict[str, Any] = {}
    for name, (taken, lost) in figures.items():
        p95 = 1000 * statistics.quantiles(taken, n=20)[18] if len(taken) > 1 else 1000 * sum(taken)
        table.add_row(name, str(len(taken)), str(lost), f"{1000 * statistics.median(taken):.1f}", f"{p95:.1f}")
        line |= {f"p95_ms {name}".replace(" ", "_"): p95, f"lost {name}".replace(" ", "_"): lost}
    Console().print(table)
    for name, seen in attacks.items():
        print(name, dict(sorted(seen.items())))
    alone = line["p95_ms_alone"]
    print(json.dumps({"ratio": max(line["p95_ms_without_a_key"], line["p95_ms_with_a_key"]) / alone, **line}))


if __name__ == "__main__":
    main()
