"""Captions a second over HTTP, against `transformers serve` with the same model, images and texts, in one run.

    python benchmarks/serve.py --peer transformers

Two models: the 16 M-parameter LLaVA of `rl_step.py` (P = 261), and the tiny one of the quickstart, where nearly
everything is overhead. Greedy captions of at most 24 tokens, a different picture in every request, 16 clients at the
same time and then one. Each server runs by itself and is warmed up. Ours has a replica of the policy for each core, of
one thread and whatever is idle (`--replicas` and `--threads` say otherwise); `transformers serve` knows no replicas,
and has the threads that it takes by default. Both must say the same.

    python benchmarks/serve.py --pictures

Instead, what it takes to make a picture of 1,024 × 1,024 ready with Qwen2.5-VL's processor, as a server and as a
rollout worker do, by none, one and two processes: CPU time of the process that has the model, of the others, and how
long a step of a thread beside, 2 ms for a GPU and 0.5 ms of Python, is kept from its interpreter.

Prints a table; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import numpy as np
import psutil
import pyarrow.parquet as pq
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from rl_step import COMPLETION, PROMPT, build_inputs

from mmrl_ray.config.sections import ScenesSection
from mmrl_ray.data.decoder_pool import DecoderPool
from mmrl_ray.data.samples import Sample
from mmrl_ray.data.scenes.generator import generate_scenes, scenes_vocabulary
from mmrl_ray.data.writing import write_parquet
from mmrl_ray.policy.tiny import build_tiny_llava

CLIENTS = 16
_STEP_S = 0.002
START_S = 180.0
STOP_S = 60.0


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str
    model: str
    headers: dict[str, str]


@dataclass(frozen=True)
class Load:
    """What one model is asked."""

    name: str
    folder: Path
    pictures: Sequence[bytes]
    many: int
    """Requests of the 16 clients together."""
    one: int
    """Requests of the one client."""


@dataclass(frozen=True)
class Measured:
    """One server on one model."""

    per_second: float
    """With 16 clients."""
    p50_ms: float
    """With one client."""
    p99_ms: float
    """With 16 clients."""
    texts: dict[int, str]


def pictures_of(data: Path, count: int) -> list[bytes]:
    """`count` PNG files, no two alike: the data set's pictures with one pixel of each changed."""
    files = [row["image"]["bytes"] for row in pq.read_table(data).to_pylist()]
    made = []
    for i in range(count):
        with Image.open(io.BytesIO(files[i % len(files)])) as opened:
            image = opened.convert("RGB")
        image.putpixel((0, 0), (i & 255, i >> 8, 7))
        out = io.BytesIO()
        image.save(out, "PNG")
        made.append(out.getvalue())
    return made


def body(model: str, picture: bytes, prompt: str = PROMPT, max_tokens: int = COMPLETION) -> bytes:
    """One greedy chat completion."""
    uri = "data:image/png;base64," + base64.b64encode(picture).decode()
    content = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": prompt}]
    message = {"role": "user", "content": content}
    return json.dumps(
        {"model": model, "messages": [message], "max_tokens": max_tokens, "temperature": 0, "stream": False}
    ).encode()


async def ask(server: Server, bodies: Sequence[tuple[int, bytes]], clients: int) -> tuple[float, list[float], Any]:
    """(wall seconds, seconds of each request, text by request); each client asks again once it is answered."""
    waiting, taken, texts = iter(bodies), [], {}
    headers = {"Content-Type": "application/json", **server.headers}

    async def client(session: aiohttp.ClientSession) -> None:
        for i, data in waiting:
            began = time.perf_counter()
            async with session.post(f"{server.url}/v1/chat/completions", data=data, headers=headers) as response:
                answer = await response.json()
                if response.status != 200:
                    raise RuntimeError(f"{server.url}: {response.status} {answer}")
            taken.append(time.perf_counter() - began)
            texts[i] = answer["choices"][0]["message"]["content"].strip()

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=300)) as session:
        began = time.perf_counter()
        await asyncio.gather(*(client(session) for _ in range(clients)))
        return time.perf_counter() - began, taken, texts


def measure(server: Server, load: Load) -> Measured:
    """Warm-up, then 16 clients, then one."""
    bodies = [(i, body(server.model, picture)) for i, picture in enumerate(load.pictures)]
    warm, many, one = bodies[:CLIENTS], bodies[CLIENTS : CLIENTS + load.many], bodies[CLIENTS + load.many :]
    asyncio.run(ask(server, warm, CLIENTS))
    asyncio.run(ask(server, warm, 1))
    wall, taken, texts = asyncio.run(ask(server, many, CLIENTS))
    _, alone, more = asyncio.run(ask(server, one[: load.one], 1))
    p99 = statistics.quantiles(taken, n=100)[98]
    return Measured(len(many) / wall, 1000 * statistics.median(alone), 1000 * p99, {**texts, **more})


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def process(command: list[str], log: Path, ready: str, env: dict[str, str]) -> Iterator[None]:
    """A server from when it answers on `ready` until the block ends; only what was started here is ended."""
    with log.open("wb") as out:
        started = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env)
        try:
            deadline = time.monotonic() + START_S
            while not answers(ready):
                if started.poll() is not None or time.monotonic() > deadline:
                    sys.exit(f"{command[:3]} did not start:\n{log.read_text(errors='replace')[-8000:]}")
                time.sleep(0.2)
            yield
        finally:
            started.send_signal(signal.SIGINT)
            try:
                started.wait(STOP_S)
            except subprocess.TimeoutExpired:
                started.kill()
                started.wait(STOP_S)


def answers(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(url, timeout=2).status_code < 500
    return False


@contextlib.contextmanager
def peer(load: Load, folder: Path) -> Iterator[Server]:
    port = free_port()
    program = str(Path(sys.executable).with_name("transformers"))
    command = [program, "serve", str(load.folder), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--device", "cpu", "--dtype", "float32"]
    with process(command, folder / "peer.log", f"http://127.0.0.1:{port}/health", dict(os.environ)):
        yield Server(f"http://127.0.0.1:{port}", str(load.folder), {})


@contextlib.contextmanager
def ours(load: Load, folder: Path, settings: Sequence[str] = (), config: Path | None = None) -> Iterator[Server]:
    """`mmrl serve` on the load's model, or on a config that names it."""
    port = free_port()
    database = f"sqlite:///{folder}/keys-{load.name}.db"
    program = [sys.executable, "-m", "mmrl_ray.cli"]
    made = subprocess.run(
        [*program, "keys", "create", "bench", "--database", database], capture_output=True, text=True, check=True
    )
    key = next(word for line in made.stdout.splitlines() for word in line.split() if word.startswith("mmrl-"))
    command = [
        *program,
        "serve",
        str(config or load.folder),
        "--port",
        str(port),
        "--set",
        f"serving.database={database}",
    ]
    # The limits of one key are for the many who share a server.
    command += ["--set", "serving.rate.requests_per_minute=1000000", "--set", "serving.rate.burst=100000"]
    command += [part for setting in settings for part in ("--set", setting)]
    with process(command, folder / "ours.log", f"http://127.0.0.1:{port}/health/live", dict(os.environ)):
        server = Server(f"http://127.0.0.1:{port}", "", {"Authorization": f"Bearer {key}"})
        deadline = time.monotonic() + START_S
        while httpx.get(f"{server.url}/health/ready", headers=server.headers, timeout=60).status_code != 200:
            if time.monotonic() > deadline:
                sys.exit("the server did not get ready:\n" + (folder / "ours.log").read_text()[-3000:])
            time.sleep(0.2)
        models = httpx.get(f"{server.url}/v1/models", headers=server.headers, timeout=60).json()
        yield Server(server.url, models["data"][0]["id"], server.headers)


def build_loads(folder: Path) -> list[Load]:
    large = folder / "large"
    large.mkdir()
    model, data = build_inputs(large, 16)
    tiny = build_tiny_llava(folder / "tiny", vocabulary=scenes_vocabulary())
    small = folder / "small.parquet"
    write_parquet(small, generate_scenes(ScenesSection(train=64, eval=1, image_size=64))[0])
    return [
        Load("16M", model, pictures_of(data, CLIENTS + 384 + 16), many=384, one=16),
        Load("tiny", tiny, pictures_of(small, CLIENTS + 1600 + 100), many=1600, one=100),
    ]


def photograph(seed: int, side: int = 1024) -> bytes:
    """A JPEG of some 220 KB."""
    noise = np.random.default_rng(seed).integers(0, 256, (side // 16, side // 16, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC).save(out, "JPEG", quality=90)
    return out.getvalue()


@dataclass(frozen=True)
class Prepared:
    """Pictures made ready, one after the other asked for."""

    main_ms: float
    """CPU time of the process that has the model, a picture."""
    others_ms: float
    """CPU time of its processes, a picture."""
    late_ms: float
    """What a step of a thread beside, as of one that decodes on a GPU, waits for the interpreter."""
    wall_ms: float


def prepare(make: Callable[[bytes], object], pictures: Sequence[bytes], at_once: int) -> Prepared:
    """`make` over the pictures, so many at a time, beside a thread that never waits."""
    make(pictures[0])
    stop, ran = threading.Event(), []

    def clocks() -> np.ndarray[Any, Any]:
        """Of this thread: wall, on a core, waiting for one; in seconds."""
        on, waiting = Path("/proc/thread-self/schedstat").read_text().split()[:2]
        return np.array([time.perf_counter(), int(on) / 1e9, int(waiting) / 1e9])

    def decode() -> None:
        began, steps = clocks(), 0
        while not stop.is_set():
            time.sleep(_STEP_S)  # for a GPU: others have the interpreter, and may keep it
            for _ in range(20_000):
                pass
            steps += 1
        wall, busy, waited = clocks() - began
        ran.append((busy, (wall - busy - waited - steps * _STEP_S) / steps))

    def others() -> float:
        times = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
        return sum(each.user + each.system for each in times)

    def beside(work: Callable[[], object]) -> tuple[float, float, float]:
        stop.clear()
        thread = threading.Thread(target=decode)
        cpu, outside = time.process_time(), others()
        thread.start()
        work()
        stop.set()
        thread.join()
        busy, late = ran.pop()
        return time.process_time() - cpu - busy, others() - outside, late

    _, _, idle = beside(lambda: time.sleep(1.0))
    began = time.perf_counter()
    with ThreadPoolExecutor(at_once) as threads:
        main, outside, late = beside(lambda: [*threads.map(make, pictures)])
    wall, count = time.perf_counter() - began, len(pictures)
    return Prepared(1e3 * main / count, 1e3 * outside / count, 1e3 * (late - idle), 1e3 * wall / count)


def measure_pictures(folder: Path) -> None:
    """The table of `--pictures`."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from mmrl_ray.policy.prompt_pool import PromptPool
    from tests.support.tiny_models import load_family

    torch.set_num_threads(1)
    size = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
    policy = load_family("qwen2_5_vl", folder / "model", processor={"size": size})
    pictures, prompt, decoders = [photograph(i) for i in range(24)], "describe the image .", DecoderPool()
    figures: dict[str, dict[int, Prepared]] = {"server": {}, "rollout worker": {}}
    for processes in (0, 1, 2):
        pool = PromptPool(policy, processes)
        pool.wait()

        def serve(data: bytes, pool: PromptPool = pool) -> object:
            return pool.conversation([("user", [0, prompt])], [data], [decoders.decode_shared(data)])

        def roll_out(data: bytes, pool: PromptPool = pool) -> object:
            return pool.encode(Sample("a", (data,), prompt))

        figures["server"][processes] = prepare(serve, pictures, processes or 2)  # as many threads
        figures["rollout worker"][processes] = prepare(roll_out, pictures, max(processes, 1))
        pool.close()
    decoders.close()
    table = Table(title="a 1,024 × 1,024 JPEG with Qwen2.5-VL's processor")
    columns = ("in a", "processes", "CPU ms, here", "CPU ms, in processes", "step late by ms", "ms a picture")
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right")
    for name, by_processes in figures.items():
        for processes, p in by_processes.items():
            row = (f"{p.main_ms:.1f}", f"{p.others_ms:.1f}", f"{p.late_ms:.2f}", f"{p.wall_ms:.0f}")
            table.add_row(name, str(processes), *row)
    Console().print(table)
    print(json.dumps({f"{name} {n}": vars(p) for name, found in figures.items() for n, p in found.items()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=["transformers", "none"], default="transformers")
    parser.add_argument(
        "--replicas", type=int, default=os.cpu_count() or 1, help="of our policy; the cores are shared out among them"
    )
    parser.add_argument("--threads", type=int, help="of each replica, and no others; by default also idle cores")
    parser.add_argument("--pictures", action="store_true", help="what it takes to make a picture ready, instead")
    args = parser.parse_args()
    if args.pictures:
        with tempfile.TemporaryDirectory(prefix="mmrl-bench-") as made:
            measure_pictures(Path(made))
        return
    replicas = [f"serving.policy.{bound}_replicas={args.replicas}" for bound in ("min", "max")]
    if args.threads is not None:
        replicas.append(f"serving.policy.resources.threads={args.threads}")
    folder = Path(tempfile.mkdtemp(prefix="mmrl-bench-"))
    figures: dict[str, dict[str, Measured]] = {}
    try:
        for load in build_loads(folder):
            figures[load.name] = {}
            for name, start in (("mmrl_ray", partial(ours, settings=replicas)), ("transformers serve", peer)):
                if name == "mmrl_ray" or args.peer == "transformers":
                    with start(load, folder) as server:
                        figures[load.name][name] = measure(server, load)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    report(figures)


def report(figures: dict[str, dict[str, Measured]]) -> None:
    """The table, then the JSON line."""
    table = Table(title=f"greedy captions of at most {COMPLETION} tokens over HTTP")
    columns = ("model", "server", f"captions a second, {CLIENTS} clients", "p99 ms", "p50 ms, one client")
    for column in columns:
        table.add_column(column, justify="left" if column in columns[:2] else "right")
    for model, servers in figures.items():
        for name, m in servers.items():
            table.add_row(model, name, f"{m.per_second:.1f}", f"{m.p99_ms:.0f}", f"{m.p50_ms:.1f}")
    Console().print(table)
    line: dict[str, Any] = {
        "p50_ms": figures["16M"]["mmrl_ray"].p50_ms,
        "p99_ms": figures["16M"]["mmrl_ray"].p99_ms,
        "tiny_p50_ms": figures["tiny"]["mmrl_ray"].p50_ms,
    }
    if "transformers serve" in figures["16M"]:
        (large, large_peer), (tiny, tiny_peer) = (
            (figures[m]["mmrl_ray"], figures[m]["transformers serve"]) for m in ("16M", "tiny")
        )
        same = [large.texts[i] == text for i, text in large_peer.texts.items()]
        line = {
            "ratio": large.per_second / large_peer.per_second,
            "ratio_tiny": tiny.per_second / tiny_peer.per_second,
            "ratio_one_client": large_peer.p50_ms / large.p50_ms,
            "tiny_p50_above_peer_ms": tiny.p50_ms - tiny_peer.p50_ms,
            "same_texts": sum(same) / len(same),
            **line,
        }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
