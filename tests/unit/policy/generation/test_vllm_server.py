"""A vLLM server's HTTP without a server: what is asked again, given up, refused, and never believed."""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from pydantic import ValidationError

from mmrl_ray.config.engine import EngineSection
from mmrl_ray.config.learner import RolloutSection
from mmrl_ray.config.load import load_config
from mmrl_ray.config.sections import LoraSection
from mmrl_ray.errors import AdapterError, ConfigError, MMRLError, ModelError, ProcessError
from mmrl_ray.experience.carriers import SamplingParams
from mmrl_ray.planning.preflight import check_engine
from mmrl_ray.policy.generation.base import DecodeRequest
from mmrl_ray.policy.generation.vllm.remote import RemoteEngine
from mmrl_ray.policy.generation.vllm.server import GENERATE, VllmServer
from mmrl_ray.policy.generation.vllm.shared_adapters import SharedAdapters
from mmrl_ray.policy.lora.adapter import adapter_config, adapter_state, add_adapter
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.prompts import encode_prompts
from mmrl_ray.policy.vision import VisionCache
from mmrl_ray.processes import free_port
from tests.support.tiny_models import make_samples

Answer = Callable[[httpx.Request], httpx.Response | Awaitable[httpx.Response]]
URL = "http://vllm.example:8000/v1"
CARDS = {"data": [{"id": "base", "parent": None, "max_model_len": 99}, {"id": "mine", "parent": "base"}]}


def server_of(answer: Answer, *, tries: int = 3, timeout_s: float = 30.0, **more: Any) -> VllmServer:
    async def handle(request: httpx.Request) -> httpx.Response:
        found = answer(request)
        return found if isinstance(found, httpx.Response) else await found

    return VllmServer(URL, timeout_s=timeout_s, tries=tries, transport=httpx.MockTransport(handle), **more)


def error(status: int, message: str) -> httpx.Response:
    return httpx.Response(status, json={"error": {"message": message, "type": "any", "code": status}})


def test_what_may_pass_is_asked_again_but_not_for_ever() -> None:
    asked: list[str] = []
    troubles: list[Exception | httpx.Response] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.path)
        trouble = troubles.pop(0) if troubles else httpx.Response(200, json={"version": "0.32.1"})
        if isinstance(trouble, Exception):
            raise trouble
        return trouble if request.url.path == "/version" else httpx.Response(200, json=CARDS)

    server = server_of(answer)
    troubles += [httpx.ConnectError("refused"), httpx.Response(503)]
    assert server.check(None) == ("base", 99)
    assert asked == ["/version"] * 3 + ["/v1/models"]
    asked.clear()
    troubles += [httpx.RemoteProtocolError("cut off")] * 3
    with pytest.raises(ProcessError, match=r"vllm\.example.*cut off; is the vLLM server still running\?"):
        server.check(None)
    assert len(asked) == 3
    asked.clear()
    troubles[:] = [error(500, "EngineDeadError")]
    with pytest.raises(ProcessError, match=r"failed \(status 500\): EngineDeadError"):
        server_of(lambda request: troubles[0]).generate([{}])  # type: ignore[arg-type, return-value]


def test_one_that_hangs_is_given_up_and_so_is_all_that_is_under_way() -> None:
    given_up: list[str] = []

    async def answer(request: httpx.Request) -> httpx.Response:
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            given_up.append(request.url.path)
            raise
        return httpx.Response(200)

    server = server_of(answer, timeout_s=0.2)
    with pytest.raises(ProcessError, match=r"no answer within 0\.2 s"):
        server.generate([{}, {}])
    assert given_up == [GENERATE] * 2
    with pytest.raises(ProcessError, match="no vLLM server answers there"):
        server.wait(0.1)

    async def one_fails(request: httpx.Request) -> httpx.Response:
        return error(400, "no") if json.loads(request.content) else await answer(request)

    given_up.clear()
    with pytest.raises(ConfigError, match=r"refuses a request \(status 400\): no"):
        server_of(one_fails).generate([{}, {"n": 1}])


def test_a_proxy_in_between_is_told_and_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://me:secret@proxy:3128")
    for direct in ("", "vllm.example"):
        monkeypatch.setenv("no_proxy", direct)
        with pytest.raises(ProcessError, match=r"status 502") as caught:
            server_of(lambda request: httpx.Response(502)).wait(0.0)
        assert ("NO_PROXY=vllm.example asks it directly" in str(caught.value)) is not bool(direct)
        assert "secret" not in str(caught.value)


def test_a_key_comes_from_the_environment_and_goes_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers.get("authorization"))
        return httpx.Response(401, json={"error": "Unauthorized"})

    monkeypatch.setenv("ONE_KEY", "hush-hush\n")
    with pytest.raises(ConfigError, match=r"401: not with the key that ONE_KEY holds") as told:
        server_of(answer, api_key_env="ONE_KEY").check(None)
    with pytest.raises(ConfigError, match=r"it wants a key; .*rollout\.engine\.api_key_env"):
        server_of(answer).generate([{}])
    assert seen == ["Bearer hush-hush", None]
    assert "hush-hush" not in str(told.value)
    monkeypatch.setenv("ONE_KEY", "hush\nX-Other: hush")
    for name in ("ONE_KEY", "NO_SUCH_KEY"):
        with pytest.raises(ConfigError, match=f"api_key_env={name}") as told:
            server_of(answer, api_key_env=name)
        assert "hush" not in str(told.value)


def likely(**places: float) -> httpx.Response:
    top = [{"token_id": int(name[1:]), "logprob": value} for name, value in places.items()]
    choices = [{"logprobs": {"content": [{**top[0], "top_logprobs": top}]}}]
    return httpx.Response(200, json={"prompt_token_ids": [0], "choices": choices})


@pytest.mark.parametrize(
    ("path", "found", "said"),
    [
        ("/version", httpx.Response(404, json={"detail": "Not Found"}), "is no vLLM server"),
        ("/version", httpx.Response(200, text="<html>"), "is no vLLM server"),
        ("/version", httpx.Response(200, json={"version": "0.31.2"}), r"vLLM 0\.31\.2; its API is known from 0\.32 on"),
        ("/v1/models", httpx.Response(200, json={"data": CARDS["data"][1:]}), "serves no model"),
        (GENERATE, httpx.Response(404, json={"detail": "Not Found"}), "--enable-scale-out"),
        (GENERATE, likely(t0=-1.2, t1=-2.0), "--logprobs-mode processed_logprobs"),  # raw: others have the rest
        (GENERATE, likely(t0=3.1, t1=0.2), "--logprobs-mode processed_logprobs"),  # logits
        (GENERATE, likely(t0=math.log(0.7), t5=math.log(0.3)), "--logprobs-mode processed_logprobs"),
        (GENERATE, httpx.Response(200, json={"choices": [{"text": "a dog"}]}), "no token ids with log-probs"),
    ],
)
def test_a_server_that_cannot_be_used_is_refused_with_what_it_lacks(
    path: str, found: httpx.Response, said: str
) -> None:
    good = {
        "/version": httpx.Response(200, json={"version": "0.33.0+cu130"}),
        "/v1/models": httpx.Response(200, json=CARDS),
        GENERATE: likely(t0=math.log(0.7), t1=math.log(0.3)),
    }

    def check(answers: dict[str, httpx.Response]) -> None:
        server = server_of(lambda request: answers[request.url.path])
        server.check_logprobs(server.check(None)[0])

    check(good)
    with pytest.raises(ConfigError, match=said):
        check({**good, path: found})


@pytest.mark.parametrize(
    ("found", "kind", "said"),
    [
        (httpx.Response(200, text="Success"), None, ""),
        (error(400, "The lora adapter 'a' has already been loaded."), None, ""),
        (httpx.Response(404, json={"detail": "Not Found"}), ConfigError, "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"),
        (error(500, "LoRA is not enabled. Use --enable-lora"), ConfigError, "--enable-lora"),
        (error(404, "Loading lora a failed: No adapter found for /a"), AdapterError, "one folder under one path"),
        (error(500, "LoRA rank 4 is greater than max_lora_rank 1."), AdapterError, "--max-lora-rank 4"),
        (httpx.Response(500, text="Internal Server Error"), AdapterError, "did not load the adapter"),
    ],
)
def test_an_adapter_that_did_not_arrive_is_an_error(
    found: httpx.Response, kind: type[MMRLError] | None, said: str
) -> None:
    server = server_of(lambda request: found)
    if kind is None:
        server.load("a", "/a", rank=4)
        return
    with pytest.raises(kind, match=said):
        server.load("a", "/a", rank=4)


@pytest.fixture(scope="module")
def policy(load_once: Policy) -> Policy:
    return load_once


@pytest.fixture(scope="module")
def load_once(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    from tests.support.tiny_models import load_family

    made = load_family("llava", tmp_path_factory.mktemp("llava"))
    add_adapter(made, LoraSection(r=2, alpha=4.0), seed=0)
    return made


def weights_of(policy: Policy, version: int) -> dict[str, torch.Tensor]:
    return {name: torch.full_like(tensor, version) for name, tensor in adapter_state(policy.model).items()}


class Fake:
    """Answers as vLLM does, but for what a test changes of it."""

    def __init__(self, expanded: list[int]) -> None:
        self.expanded, self.known, self.bodies = expanded, {"base"}, list[dict[str, Any]]()
        self.loads: list[str] = []
        self.change: Callable[[dict[str, Any]], object] = lambda answer: None

    def __call__(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        if request.url.path == "/v1/load_lora_adapter":
            self.loads.append(body["lora_name"])
            self.known.add(body["lora_name"])
            return httpx.Response(200, text="Success")
        if request.url.path == "/v1/unload_lora_adapter":
            self.known.discard(body["lora_name"])
            return httpx.Response(200, text="Success")
        self.bodies.append(body)
        if body["model"] not in self.known:
            return error(404, f"The model `{body['model']}` does not exist.")
        places = [{"token_id": token, "logprob": -0.5} for token in (7, 8)]
        rows = [
            {"index": i, "finish_reason": "length", "token_ids": [7, 8], "logprobs": {"content": list(places)}}
            for i in reversed(range(body["sampling_params"]["n"]))
        ]
        answer = {"model": body["model"], "prompt_token_ids": self.expanded, "choices": rows}
        self.change(answer)
        return httpx.Response(200, json=answer)


@pytest.fixture
def engine(policy: Policy, tmp_path: Path) -> tuple[RemoteEngine, Fake, DecodeRequest]:
    (sample,) = make_samples()[:1]
    (prompt,) = encode_prompts(policy, [sample])
    fake = Fake(prompt.input_ids.tolist())
    adapters = SharedAdapters(tmp_path / "adapters", "a-run", adapter_config(policy.model))
    made = RemoteEngine(policy, server_of(fake), adapters, VisionCache(0), model="base", room=99)
    request = DecodeRequest(
        made.prepared(prompt, sample), 3, SamplingParams(max_new_tokens=2, seed=5), greedy_extra=True
    )
    return made, fake, request


def test_what_is_asked_leaves_nothing_to_a_servers_own_defaults(
    policy: Policy, engine: tuple[RemoteEngine, Fake, DecodeRequest]
) -> None:
    made, fake, request = engine
    with pytest.raises(ProcessError, match="no version"):
        made.generate([request])
    made.load(0, None)
    (output,) = made.generate([request])
    assert [c.token_ids.tolist() for c in output.completions] == [[7, 8]] * 3
    assert output.greedy is not None
    samples, greedy = fake.bodies
    assert samples["token_ids"].count(policy.image_token_ids[0]) == 1  # not expanded
    assert samples["content_parts"][0]["url"].startswith("data:image/png;base64,")
    asked = samples["sampling_params"]
    assert {n: asked[n] for n in ("n", "seed", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")} == {
        **{"n": 3, "seed": 5, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    }
    assert set(asked["logit_bias"]) == {str(token) for token in policy.image_token_ids}
    assert (greedy["sampling_params"]["temperature"], greedy["sampling_params"]["n"]) == (0.0, 1)
    assert samples["model"] == "base"
    made.load(1, weights_of(policy, 1))
    made.generate([request])
    name = fake.bodies[-1]["model"]
    assert name.startswith("a-run-v1-")
    assert fake.bodies[-1]["cache_salt"] != samples["cache_salt"]
    fake.known = {"base"}  # it was restarted
    made.generate([request])
    assert fake.loads == [name, name]


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        (lambda a: a.update(model="a-run-v0-0"), ProcessError, "answered by 'a-run-v0-0'"),
        (lambda a: a["prompt_token_ids"].pop(), ModelError, "other tokens of a prompt"),
        (lambda a: a.update(prompt_token_ids=None), ProcessError, "unknown shape"),
        (lambda a: a["choices"].pop(), ProcessError, "gave 2 whole completions of 3"),
        (lambda a: a["choices"][0].update(finish_reason="abort"), ProcessError, "ended by"),
        (lambda a: a["choices"][0]["token_ids"].append(9), ProcessError, "gave 2 whole completions"),
        (lambda a: a["choices"][0]["logprobs"]["content"][0].update(logprob=-9999.0), ModelError, "NaN or infinity"),
        (lambda a: a["choices"][0].update(weight_versions=[{"version": "2"}, {"version": "3"}]), ModelError, "weights"),
    ],
)
def test_an_answer_that_is_not_what_was_asked_is_never_believed(
    engine: tuple[RemoteEngine, Fake, DecodeRequest],
    change: Callable[[dict[str, Any]], object],
    kind: type[MMRLError],
    said: str,
) -> None:
    made, fake, request = engine
    made.load(0, None)
    fake.change = lambda answer: change(answer) if len(answer["choices"]) == 3 else None
    with pytest.raises(kind, match=said):
        made.generate([request])


def test_one_of_several_workers_writes_a_version_and_it_stays_while_anybody_holds_it(
    policy: Policy, tmp_path: Path
) -> None:
    config = adapter_config(policy.model)
    one, other = (SharedAdapters(tmp_path, "a-run", config) for _ in range(2))
    held, again = one.hold(1, weights_of(policy, 1)), other.hold(1, weights_of(policy, 1))
    assert (held.name, held.path) == (again.name, again.path)
    assert {path.name for path in held.path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert one.hold(1, weights_of(policy, 2)).name != held.name  # other weights under an old number
    one.leave(held)
    with one.unused([held.name]) as unused:
        assert unused == []
    assert held.path.exists()
    other.leave(again)
    with one.unused([held.name]) as unused:
        assert unused == [held.name]
    assert not held.path.exists()
    assert other.hold(1, weights_of(policy, 1)).path.exists()  # and may come again
    assert one.before(1) == []
    assert held.name in one.before(2)
    assert SharedAdapters(tmp_path, "a", config).before(2) == []  # of another run


def test_a_version_that_two_write_at_once_is_never_taken_away(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = (SharedAdapters(tmp_path, "a-run", adapter_config(policy.model)) for _ in range(2))
    write, inodes = one._write, list[int]()

    def later(path: Path, files: dict[str, bytes]) -> None:
        inodes.append(other.hold(1, weights_of(policy, 1)).path.stat().st_ino)
        write(path, files)

    monkeypatch.setattr(one, "_write", later)
    assert one.hold(1, weights_of(policy, 1)).path.stat().st_ino == inodes[0]


def test_what_a_killed_worker_held_is_nobodys(policy: Policy, tmp_path: Path) -> None:
    adapters = SharedAdapters(tmp_path, "a-run", adapter_config(policy.model))
    held = adapters.hold(1, weights_of(policy, 1))
    adapters.leave(held)
    code = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'r+'); fcntl.flock(f, fcntl.LOCK_SH); print(flush=True); "
        "time.sleep(600)"
    )
    lock = tmp_path / f".{held.name}.lock"
    with subprocess.Popen([sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with adapters.unused([held.name]) as unused:
            assert unused == []
        os.kill(other.pid, signal.SIGKILL)
    with adapters.unused([held.name]) as unused:
        assert unused == [held.name]


def test_keys_of_a_server_are_checked_when_a_config_is_read(tmp_path: Path) -> None:
    good = {"kind": "openai", "url": URL, "adapters": "/shared/adapters"}
    EngineSection(**good, dtype="bfloat16", quantization="fp8")
    for change, said in (
        ({"url": None}, "needs url"),
        ({"adapters": None}, "needs adapters"),
        ({"url": "vllm:8000"}, "write http://host:port"),
        ({"url": "http://me:secret@vllm:8000"}, "name the environment"),
        ({"enforce_eager": True}, "enforce_eager: keys of engine.kind=vllm, and this is kind=openai"),
        ({"kind": "vllm"}, "url, adapters: keys of engine.kind=openai, and this is kind=vllm"),
        ({"kind": "local"}, "url, adapters: keys of engine.kind=openai, and this is kind=local"),
    ):
        with pytest.raises(ValidationError, match=said):
            EngineSection(**{**good, **change})
    with pytest.raises(ValidationError, match=r"above 2, the most that engine\.kind=openai takes"):
        RolloutSection(temperature=3.0, engine=EngineSection(**good))
    quickstart = Path(__file__).parents[4] / "configs" / "quickstart.yaml"
    written = ["rollout.engine.kind=openai", f"rollout.engine.url=http://127.0.0.1:{free_port()}"]
    cfg = load_config(quickstart, [*written, f"rollout.engine.adapters={tmp_path}"])
    with pytest.raises(
        ProcessError, match=r"rollout\.engine\.url=http://127\.0\.0\.1:\d+: no vLLM server answers there"
    ):
        check_engine(cfg)
