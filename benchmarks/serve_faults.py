"""Load on a served policy while its adapter is replaced again and again and one of its replicas is killed.

    python benchmarks/serve_faults.py --seconds 60

Locust users ask for greedy captions of a small model with two policy replicas and retry as a client should (503, 429
and lost connections, within a deadline). Every few seconds a new version of the adapter is published; in the middle of
the run one policy replica gets SIGKILL. Each version says something else about each picture, and what it must say was
worked out before by Hugging Face's `generate`, so an answer made by two versions would be seen.

Prints a table; the last line is one JSON object: requests, retried attempts, lost requests, answers of mixed versions,
versions that answered.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gevent.monkey

gevent.monkey.patch_all(thread=False)  # before anything opens a socket: locust's users are greenlets

import psutil  # noqa: E402
import torch  # noqa: E402
from locust import HttpUser, constant, task  # noqa: E402
from locust.env import Environment  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from serve import Load, Server, body, ours  # noqa: E402

from mmrl_ray.config.sections import LoraSection, ModelSection, ScenesSection  # noqa: E402
from mmrl_ray.data.samples import Sample  # noqa: E402
from mmrl_ray.data.scenes.generator import generate_scenes, scenes_vocabulary  # noqa: E402
from mmrl_ray.learner.checkpoints import save_live_version  # noqa: E402
from mmrl_ray.policy.load import load_policy  # noqa: E402
from mmrl_ray.policy.lora.adapter import adapter_parameters, add_adapter  # noqa: E402
from mmrl_ray.policy.model import Policy  # noqa: E402
from mmrl_ray.policy.prompts import encode_prompts  # noqa: E402
from mmrl_ray.policy.tiny import build_tiny_llava  # noqa: E402
from mmrl_ray.run_records.run_dir import RunDir  # noqa: E402

ADAPTER = "live-policy"
PROMPT = "describe"
TOKENS = 12
PICTURES = 8
RETRY_S = 30.0
"""A client gives a request up after so long."""


@dataclass
class Tally:
    """What the users saw."""

    answered: int = 0
    attempts: int = 0
    lost: list[str] = field(default_factory=list)
    mixed: list[str] = field(default_factory=list)
    versions: Counter[int] = field(default_factory=Counter)


def set_version(policy: Policy, version: int) -> None:
    """Gives the adapter weights of its own for each version, large enough to change what is said."""
    generator = torch.Generator().manual_seed(version)
    with torch.no_grad():
        for parameter in adapter_parameters(policy.model):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def said(policy: Policy, samples: Sequence[Sample]) -> list[str]:
    """What `generate` makes of each picture."""
    texts = []
    for prompt in encode_prompts(policy, samples):
        out = policy.model.generate(
            input_ids=prompt.input_ids[None],
            pixel_values=prompt.model_inputs["pixel_values"],
            do_sample=False,
            max_new_tokens=TOKENS,
            suppress_tokens=list(policy.image_token_ids),  # the policy never says one; generate would
        )
        new = out[0, prompt.input_ids.numel() :]
        texts.append(policy.tokenizer.decode(new, skip_special_tokens=True).strip())
    return texts


def user_class(server: Server, bodies: Sequence[bytes], expected: dict[int, list[str]], tally: Tally) -> type[HttpUser]:
    """Users that ask for one picture after the other and check what they get."""

    class Captioner(HttpUser):
        host = server.url
        wait_time = constant(0)

        def on_start(self) -> None:
            self.turn = 0

        @task
        def caption(self) -> None:
            i = self.turn % PICTURES
            self.turn += 1
            deadline = time.monotonic() + RETRY_S
            headers = {"Content-Type": "application/json", **server.headers}
            last = ""
            while time.monotonic() < deadline:
                tally.attempts += 1
                with self.client.post(
                    "/v1/chat/completions", data=bodies[i], headers=headers, catch_response=True, timeout=RETRY_S
                ) as answer:
                    last = f"{answer.status_code} {answer.text[:200]}"
                    if answer.status_code == 200:
                        answer.success()
                        self.check(i, int(answer.headers["x-model-version"]), answer.json())
                        return
                    if answer.status_code not in (0, 429, 502, 503):
                        break
                    pause = float(answer.headers.get("Retry-After", 0.2)) if answer.headers else 0.2
                time.sleep(min(pause, 2.0))
            tally.lost.append(last)

        def check(self, i: int, version: int, answer: Any) -> None:
            text = answer["choices"][0]["message"]["content"].strip()
            tally.answered += 1
            tally.versions[version] += 1
            if text != expected[version][i]:
                tally.mixed.append(f"version {version}, picture {i}: {text!r} instead of {expected[version][i]!r}")

    return Captioner


def replica_pids() -> list[int]:
    """Policy replicas among the processes of this one's descendants."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            title = " ".join(process.cmdline())
            if title.startswith("ray::ServeReplica") and "policy" in title.lower():
                found.append(process.pid)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--users", type=int, default=8)
    parser.add_argument("--swap-every", type=float, default=5.0)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="mmrl-bench-"))
    try:
        result = run(folder, args.seconds, args.users, args.swap_every)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    table = Table(title=f"{args.seconds:g} s, {args.users} users, two replicas")
    table.add_column("")
    table.add_column("", justify="right")
    for name, value in result.items():
        table.add_row(name, str(value))
    Console().print(table)
    print(json.dumps(result))


def run(folder: Path, seconds: float, users: int, swap_every: float) -> dict[str, Any]:
    """The whole experiment."""
    model = build_tiny_llava(folder / "model", vocabulary=scenes_vocabulary())
    samples = [
        Sample(s.id, s.images, PROMPT) for s in generate_scenes(ScenesSection(train=PICTURES, eval=1, image_size=64))[0]
    ]
    policy = load_policy(ModelSection(path=str(model), dtype="float32"), device="cpu")
    add_adapter(policy, LoraSection(r=4, alpha=8), 0)
    runs = RunDir.create(str(folder / "adapters"), ADAPTER)
    runs.write_text("config.yaml", "{}\n")
    expected: dict[int, list[str]] = {}
    versions = int(seconds / swap_every) + 2
    for version in range(1, versions + 1):
        set_version(policy, version)
        expected[version] = said(policy, samples)

    def publish(version: int) -> None:
        set_version(policy, version)
        save_live_version(runs, policy, version)

    publish(1)
    tally = Tally()
    load = Load("faults", model, [], 0, 0)
    more = ["serving.policy.min_replicas=2", "serving.policy.max_replicas=2", "serving.refresh_s=0.5"]
    more += [f"serving.adapters_root={folder / 'adapters'}"]
    with ours(load, folder, more) as server:
        bodies = [body(ADAPTER, s.images[0], PROMPT, TOKENS) for s in samples]
        environment = Environment(user_classes=[user_class(server, bodies, expected, tally)])
        runner = environment.create_local_runner()
        runner.start(users, spawn_rate=users)
        killed = False
        began = time.monotonic()
        version = 1
        while time.monotonic() - began < seconds:
            gevent.sleep(swap_every)
            version += 1
            # Not in a greenlet of the users: it computes.
            worker = threading.Thread(target=publish, args=(version,))
            worker.start()
            worker.join()
            if not killed and time.monotonic() - began > seconds / 2:
                os.kill(replica_pids()[0], signal.SIGKILL)
                killed = True
        runner.quit()
    return {
        "requests": tally.answered + len(tally.lost),
        "retried": tally.attempts - tally.answered - len(tally.lost),
        "lost": len(tally.lost),
        "mixed": len(tally.mixed),
        "versions": len(tally.versions),
        "killed_replicas": int(killed),
        "first_lost": tally.lost[:1],
        "first_mixed": tally.mixed[:1],
    }


if __name__ == "__main__":
    main()
