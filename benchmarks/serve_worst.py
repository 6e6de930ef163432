"""An honest client beside one that does its worst, without a key and then with one.

    python benchmarks/serve_worst.py
    python benchmarks/serve_worst.py --only chats --only rewards --seconds 15

`mmrl serve` on the tiny model of the quickstart with a reward, with its defaults. The honest client asks for greedy
captions one after the other, from its own address and with its own key: 30 s alone, then 60 s beside each attacker. The
attacker has another address of this machine and runs at the lowest priority, since it would have a machine of its own.

Without a key: headers and bodies that never end, wrong keys, huge headers, pages. With a key: heavy pictures to score,
as many as a request may have, the longest chats, streams that are left, broken JSON. `--only` takes the attacks apart:
each named one runs alone beside the honest client.

An attack is void where the server refuses what it is to work on: each begins with one request of its kind, and the
benchmark fails if a path that should answer 200 never did. Prints a table; the last line is one JSON object, `ratio`
the larger of the two p95 over that alone.
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
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import aiohttp
from PIL import Image
from rich.console import Console
from rich.table import Table
from serve import Load, Server, body, ours, pictures_of

from mmrl_ray.config.sections import ScenesSection
from mmrl_ray.data.scenes.generator import generate_scenes, scenes_vocabulary
from mmrl_ray.data.writing import write_parquet
from mmrl_ray.metrics.text import CorpusStatistics
from mmrl_ray.policy.tiny import build_tiny_llava

ADDRESS = "127.0.0.2"
SIDE = 7000
"""Of heavy pictures: 49 million pixels, just below what is accepted."""
LONGEST = 420
"""Tokens of a completion: what the prompt leaves of the model's context."""
PAUSE_S = 0.05
_TRIES = 5
CHAT, REWARDS, SCORE = "/v1/chat/completions", "/v1/rewards", "/v1/score"


@dataclass
class Seen:
    """What an attacker was answered."""

    counts: Counter[str] = field(default_factory=Counter)
    """By path and status, or by error."""
    refusals: dict[str, str] = field(default_factory=dict)
    """The first of each."""


Attack = Callable[[aiohttp.ClientSession, Server, Seen], Awaitable[None]]


# -- the honest client -------------------------------------------------------------------------------------------------


async def honest(server: Server, bodies: list[bytes], seconds: float) -> tuple[list[float], int]:
    """Seconds of each answer, and how many requests had none."""
    taken, lost, deadline = [], 0, time.monotonic() + seconds
    headers = {"Content-Type": "application/json", **server.headers}
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as session:
        while time.monotonic() < deadline:
            began = time.perf_counter()
            try:
                async with session.post(f"{server.url}{CHAT}", data=random.choice(bodies), headers=headers) as response:
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


def half_headers(session: aiohttp.ClientSession, server: Server, seen: Seen) -> Awaitable[None]:
    return raw(server, b"GET /health/live HTTP/1.1\r\nHost: a\r\n", b"X: y\r\n")


def slow_body(session: aiohttp.ClientSession, server: Server, seen: Seen) -> Awaitable[None]:
    head = b"POST /v1/rewards HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    key = server.headers.get("Authorization", f"Bearer mmrl-{secrets.token_urlsafe(32)}")
    return raw(server, head + f"Authorization: {key}\r\nContent-Length: 9000000\r\n\r\n".encode(), b" ")


async def call(
    session: aiohttp.ClientSession,
    server: Server,
    seen: Seen,
    path: str,
    *,
    leave: bool = False,
    **options: Any,
) -> None:
    """One request; with `leave` the connection is cut once its answer begins."""
    headers = {**server.headers, **options.pop("headers", {})}
    method = "POST" if "data" in options else "GET"
    async with session.request(method, f"{server.url}{path}", headers=headers, **options) as response:
        known = f"{path[:40]} {response.status}"
        seen.counts[known] += 1
        if leave and response.status == 200:
            response.close()
            return
        said = await response.read()
        if response.status >= 400:
            seen.refusals.setdefault(known, said.decode(errors="replace")[:300])


async def wrong_key(session: aiohttp.ClientSession, server: Server, seen: Seen) -> None:
    key = f"Bearer mmrl-{secrets.token_urlsafe(32)}"
    await call(session, server, seen, "/v1/models", headers={"Authorization": key})


async def page(session: aiohttp.ClientSession, server: Server, seen: Seen) -> None:
    await call(
        session, server, seen, random.choice(["/docs", "/openapi.json", "/health/live", "/-/routes", "/a" * 4000])
    )


async def huge_header(session: aiohttp.ClientSession, server: Server, seen: Seen) -> None:
    await call(session, server, seen, "/v1/models", headers={f"X-{n}": "x" * 4000 for n in range(60)})


async def huge_body(session: aiohttp.ClientSession, server: Server, seen: Seen) -> None:
    await call(session, server, seen, CHAT, data=bytes(30_000_000), headers=_JSON)


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
    empty = struct.pack(">I", 0) + b"teSt" + struct.pack(">I", zlib.crc32(b"teSt"))
    made.append(small()[:33] + empty * 1_000_000 + small()[33:])
    out = io.BytesIO()
    Image.new("RGB", (24, 16)).save(out, "JPEG")
    made.append(b"\xff\xd8" + b"\xff" * 15_000_000 + out.getvalue()[2:])
    return made


def small() -> bytes:
    """A file that costs nothing."""
    out = io.BytesIO()
    Image.new("RGB", (24, 16)).save(out, "PNG")
    return out.getvalue()


def fresh(picture: bytes) -> bytes:
    """The same picture as a file that nobody has seen yet."""
    mark = secrets.token_bytes(8)
    if picture.startswith(b"\x89PNG"):
        chunk = struct.pack(">I", 8) + b"teSt" + mark + struct.pack(">I", zlib.crc32(b"teSt" + mark))
        return picture[:33] + chunk + picture[33:]
    if picture.startswith(b"\xff\xd8"):
        return picture[:2] + b"\xff\xfe" + struct.pack(">H", 10) + mark + picture[2:]
    size = struct.pack("<I", len(picture) + 8)
    return picture[:4] + size + picture[8:] + b"teSt" + struct.pack("<I", 8) + mark


def _uri(picture: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(fresh(picture)).decode()


def chosen(pictures: list[bytes]) -> list[str]:
    """Three large ones, twenty times each, or one whose file is as large as may be."""
    if random.random() < 0.7:
        return [_uri(picture) for picture in pictures[:3]] * 20
    return [_uri(random.choice(pictures[3:]))]


def rewarded(pictures: list[bytes]) -> Attack:
    async def attack(session: aiohttp.ClientSession, server: Server, seen: Seen) -> None:
        inputs = [{"image": uri, "captions": ["a"], "references": ["a"]} for uri in chosen(pictures)]
        await call(session, server, seen, REWARDS, data=json.dumps({"inputs": inputs}), headers=_JSON)

    return attack


def scored(pictures: list[bytes]) -> Attack:
    async def attack(session: aiohttp.ClientSession, server: Server, seen: Seen) -> None:
        parts = [{"type": "image_url", "image_url": {"url": uri}} for uri in chosen(pictures)]
        queries = [{"content": [part, {"type": "text", "text": "a"}]} for part in parts]
        asked = {"queries": queries, "documents": ["a"] * len(queries)}
        await call(session, server, seen, SCORE, data=json.dumps(asked), headers=_JSON)

    return attack


def chatted(pictures: list[bytes], model: str, *, leave: bool = False) -> Attack:
    """The longest chats there are about these pictures."""

    async def attack(session: aiohttp.ClientSession, server: Server, seen: Seen) -> None:
        asked = json.loads(body(model, fresh(random.choice(pictures)), max_tokens=LONGEST))
        asked |= {"n": 16, "temperature": 1.0, "stream": leave}
        await call(session, server, seen, CHAT, leave=leave, data=json.dumps(asked), headers=_JSON)

    return attack


async def broken(session: aiohttp.ClientSession, server: Server, seen: Seen) -> None:
    """As many values as are parsed, in two ways, and far more."""
    data = random.choice(
        [b'{"messages": [' + b'{"a": [1]},' * count for count in (16_000, 150_000)]
        + [b'{"messages": [' + b"1," * 160_000 + b'{"role": "user", "content": "a"}]}']
    )
    await call(session, server, seen, CHAT, data=data, headers=_JSON)


async def remote(session: aiohttp.ClientSession, server: Server, seen: Seen) -> None:
    inputs = [{"image": "https://192.0.2.1/slow.png", "captions": ["a"], "references": ["a"]}]
    await call(session, server, seen, REWARDS, data=json.dumps({"inputs": inputs}), headers=_JSON)


async def again(attack: Attack, session: aiohttp.ClientSession, server: Server, seen: Seen) -> None:
    while True:
        try:
            await attack(session, server, seen)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            seen.counts[type(error).__name__] += 1
            await asyncio.sleep(0.1)


class Kind(NamedTuple):
    """One way to do harm."""

    make: Callable[[list[bytes], str], Attack]
    """From heavy pictures and the model's name."""
    clients: int
    with_key: bool
    works_on: str | None = None
    """The path that answers 200, without which the attack is void."""


KINDS = {
    "half headers": Kind(lambda pictures, model: half_headers, 3000, False),
    "slow bodies without a key": Kind(lambda pictures, model: slow_body, 300, False),
    "wrong keys": Kind(lambda pictures, model: wrong_key, 16, False),
    "pages": Kind(lambda pictures, model: page, 16, False),
    "huge headers": Kind(lambda pictures, model: huge_header, 8, False),
    "huge bodies": Kind(lambda pictures, model: huge_body, 4, False),
    "rewards": Kind(lambda pictures, model: rewarded(pictures), 8, True, REWARDS),
    "score": Kind(lambda pictures, model: scored(pictures), 4, True, SCORE),
    "chats": Kind(lambda pictures, model: chatted([small()], model), 16, True, CHAT),
    "chats about heavy pictures": Kind(lambda pictures, model: chatted(pictures[:3], model), 8, True, CHAT),
    "streams left": Kind(lambda pictures, model: chatted([small()], model, leave=True), 8, True, CHAT),
    "slow bodies": Kind(lambda pictures, model: slow_body, 50, True),
    "broken JSON": Kind(lambda pictures, model: broken, 4, True),
    "remote pictures": Kind(lambda pictures, model: remote, 4, True),
}


def attacker(server: Server, names: Sequence[str], seconds: float, told: Any) -> None:
    """In a process of its own, which has what others leave: in a session of its own, since Linux shares the cores out
    between sessions first (autogroup), and priorities count within one."""
    os.setsid()
    os.nice(19)
    with contextlib.suppress(OSError):
        Path("/proc/self/autogroup").write_text("19")
    pictures = heavy() if any(KINDS[name].with_key for name in names) else []

    async def run() -> None:
        seen = Seen()
        connector = aiohttp.TCPConnector(limit=0, local_addr=(ADDRESS, 0))
        timeout = aiohttp.ClientTimeout(total=120)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            for kind in (KINDS[name] for name in names if KINDS[name].works_on):  # one of each while there is room
                for _ in range(_TRIES):
                    await kind.make(pictures, server.model)(session, server, seen)
                    if seen.counts[f"{kind.works_on} 200"]:
                        break
            tasks = [
                asyncio.create_task(again(attack, session, server, seen))
                for kind in (KINDS[name] for name in names)
                for attack in [kind.make(pictures, server.model)] * kind.clients
            ]
            told.send("ready")
            await asyncio.wait(tasks, timeout=seconds)
            told.send(seen)
            os._exit(0)  # nobody waits for thousands of connections to be closed in good order

    asyncio.run(run())


def beside(
    server: Server, theirs: Server, names: Sequence[str], bodies: list[bytes], seconds: float
) -> tuple[Any, Seen]:
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=attacker, args=(theirs, names, seconds + 5, there), daemon=True
    )
    process.start()
    here.recv()
    found = asyncio.run(honest(server, bodies, seconds))
    seen = here.recv() if here.poll(120) else Seen()
    process.join(30)
    process.kill()
    return found, seen


def another_key(load: Load, folder: Path) -> str:
    command = [sys.executable, "-m", "mmrl_ray.cli", "keys", "create", "worst"]
    command += ["--database", f"sqlite:///{folder}/keys-{load.name}.db"]
    made = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return next(word for word in made.split() if word.startswith("mmrl-"))


def config_of(folder: Path, model: Path, references: Sequence[Sequence[str]]) -> Path:
    """A serve config with the reward of captions against references."""
    statistics_file, file = folder / "statistics.json", folder / "serve.yaml"
    statistics_file.write_text(CorpusStatistics.from_references(references).to_json())
    reward = {"parts": {"caption": {"kind": "caption"}, "cider": {"kind": "cider_d"}}}
    reward["weights"] = {"caption": 0.5, "cider": 0.5}
    file.write_text(json.dumps({"model": {"path": str(model)}, "reward": reward, "statistics": str(statistics_file)}))
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--only", action="append", choices=list(KINDS), help="this attack by itself; may be repeated")
    args = parser.parse_args()
    attacks = {name: [name] for name in args.only or ()} or {
        f"with{'' if with_key else 'out'} a key": [name for name, kind in KINDS.items() if kind.with_key == with_key]
        for with_key in (False, True)
    }
    folder = Path(tempfile.mkdtemp(prefix="mmrl-bench-"))
    figures: dict[str, tuple[list[float], int]] = {}
    answered: dict[str, Seen] = {}
    try:
        tiny = build_tiny_llava(folder / "tiny", vocabulary=scenes_vocabulary())
        small = folder / "small.parquet"
        rows = list(generate_scenes(ScenesSection(train=64, eval=1, image_size=64))[0])
        write_parquet(small, rows)
        config = config_of(folder, tiny, [row.references for row in rows])
        load = Load("tiny", tiny, pictures_of(small, 64), many=0, one=0)
        settings = ["serving.rate.requests_per_minute=60000", "serving.rate.burst=1000"]  # as shipped
        with ours(load, folder, settings, config) as server:
            bodies = [body(server.model, picture) for picture in load.pictures]
            asyncio.run(honest(server, bodies, 3))
            figures["alone"] = asyncio.run(honest(server, bodies, args.seconds / 2))
            for name, kinds in attacks.items():
                with_key = KINDS[kinds[0]].with_key
                headers = {"Authorization": f"Bearer {another_key(load, folder)}"} if with_key else {}
                theirs = Server(server.url, server.model, headers)
                figures[name], answered[name] = beside(server, theirs, kinds, bodies, args.seconds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    report(figures, answered)
    void = [
        f"{kind}: {KINDS[kind].works_on}"
        for name, kinds in attacks.items()
        for kind in kinds
        if KINDS[kind].works_on and not answered[name].counts[f"{KINDS[kind].works_on} 200"]
    ]
    if void:
        sys.exit(f"void, since nothing was answered with 200: {', '.join(void)}")


def report(figures: dict[str, tuple[list[float], int]], answered: dict[str, Seen]) -> None:
    """What the attackers were answered, the table, then the JSON line."""
    table = Table("beside", "answers", "lost", "p50 ms", "p95 ms", "p95 of alone", title="an honest client")
    line: dict[str, Any] = {}
    p95 = {
        name: 1000 * (statistics.quantiles(taken, n=20)[18] if len(taken) > 1 else sum(taken))
        for name, (taken, _) in figures.items()
    }
    ratios = {name: value / p95["alone"] for name, value in p95.items()}
    for name, (taken, lost) in figures.items():
        middle = f"{1000 * statistics.median(taken):.1f}"
        table.add_row(name, str(len(taken)), str(lost), middle, f"{p95[name]:.1f}", f"{ratios[name]:.1f}")
        line |= {f"p95_ms {name}".replace(" ", "_"): p95[name], f"lost {name}".replace(" ", "_"): lost}
    for name, seen in answered.items():
        print(name, dict(sorted(seen.counts.items())))
        for known, said in seen.refusals.items():
            print("  ", known, said)
    Console().print(table)
    print(json.dumps({"ratio": max(ratios.values()), **line}))


if __name__ == "__main__":
    main()
