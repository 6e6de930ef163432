"""`mmrl serve` as a user has it: the official client, new versions, a lost replica, and the Serve config file."""

from __future__ import annotations

import base64
import json
import os
import resource
import signal
import socket
import tempfile
import threading
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import torch
import yaml
from prometheus_client.parser import text_string_to_metric_families

from mmrl_ray.config.serving import ServeConfig
from mmrl_ray.data.samples import Sample
from mmrl_ray.metrics.text import CorpusStatistics
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.prompts import encode_prompts
from mmrl_ray.processes import free_port
from mmrl_ray.rewards.build import build_reward
from mmrl_ray.serving.haproxy import clear_leftovers
from mmrl_ray.serving.launch import check_serve_config
from tests.integration.serving.conftest import PROMPT, REFERENCES, START_S, Server, start, wait_for
from tests.support.prometheus import exported
from tests.unit.cli.program import mmrl
from tests.unit.data.pictures import picture

torch.set_num_threads(1)
TOKENS = 8


def image(number: int) -> bytes:
    return picture(number, size=(64, 64))


def messages(number: int) -> Any:
    uri = "data:image/png;base64," + base64.b64encode(image(number)).decode()
    return [
        {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": PROMPT}],
        }
    ]


def client(server: Server, key: str | None = None, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key or server.key, **{"max_retries": 0, **options})


def ask(api: openai.OpenAI, number: int, **options: Any) -> Any:
    settings = {"model": "tiny", "temperature": 0, "max_tokens": TOKENS, **options}
    return api.chat.completions.create(messages=messages(number), **settings)


def greedy(policy: Policy, number: int) -> str:
    """What transformers itself generates."""
    (prompt,) = encode_prompts(policy, [Sample("s", (image(number),), PROMPT)])
    inputs = {"input_ids": prompt.input_ids[None], "pixel_values": prompt.model_inputs["pixel_values"]}
    settings = {"do_sample": False, "max_new_tokens": TOKENS, "suppress_tokens": [policy.placeholder_id]}
    with torch.no_grad():
        out = policy.model.generate(**inputs, **settings)
    return policy.tokenizer.decode(out[0, prompt.input_ids.numel() :], skip_special_tokens=True).strip()


def test_the_official_client_gets_what_transformers_generates(server: Server) -> None:
    api = client(server)
    answer = ask(api, 1)
    assert answer.choices[0].message.content.strip() == greedy(server.made.policy, 1)
    assert answer.system_fingerprint == f"tiny@{server.made.step}"
    chunks = list(ask(api, 1, stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == answer.choices[0].message.content
    assert chunks[-1].usage == answer.usage
    models = {model.id: model.to_dict() for model in api.models.list()}
    assert set(models) == {"base", "tiny"}
    assert (models["tiny"]["step"], models["tiny"]["parent"]) == (server.made.step, "base")


def test_requests_that_are_never_finished_keep_nobody_out(server: Server) -> None:
    """Without a key: headers that end in the middle, more of them than HAProxy takes connections as Ray sets it up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    address = server.url.removeprefix("http://").split(":")
    halves: list[socket.socket] = []
    try:
        for _ in range(min(4200, hard - 500)):
            place = (f"127.0.0.{2 + len(halves) % 2}", 0)  # one address gets half of what there is
            half = socket.create_connection((address[0], int(address[1])), timeout=60, source_address=place)
            half.sendall(b"GET /health/live HTTP/1.1\r\nHost: 127")
            halves.append(half)
        assert httpx.get(f"{server.url}/health/live", timeout=60).status_code == 200
        for half in (halves[0], halves[-1]):
            assert half.recv(100).startswith(b"HTTP/1.1 408")
        assert ask(client(server), 1).choices[0].message.content
    finally:
        for half in halves:
            half.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_what_it_counts_reaches_prometheus_through_ray(server: Server) -> None:
    ask(client(server), 1)
    ask(client(server), 2)
    asked = {"method": "POST", "route": "/v1/chat/completions", "status": "200"}
    shown = httpx.get(f"{server.url}/metrics", headers={"Authorization": f"Bearer {server.key}"}, timeout=60).text
    by_gateway = sum(
        sample.value
        for family in text_string_to_metric_families(shown)
        for sample in family.samples
        if sample.name == "mmrl_gateway_requests_total" and sample.labels == asked
    )
    assert by_gateway >= 2
    found: dict[str, float] = {}

    def all_there() -> bool:
        found.clear()
        for _, sample in exported(server.metrics_port()):
            if sample.name != "ray_mmrl_gateway_requests_total" or sample.labels.items() >= asked.items():
                found[sample.name] = found.get(sample.name, 0) + sample.value
        return (
            found.get("ray_mmrl_gateway_requests_total", 0) >= by_gateway
            and found.get("ray_mmrl_policy_sampled_tokens_total", 0) >= 2
            and found.get("ray_mmrl_policy_requests_total", 0) >= by_gateway
        )

    try:
        wait_for(all_there, "metrics at Ray's port", 40.0)
    finally:
        print("found:", found)


def test_errors_have_their_types_through_all_processes(server: Server) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        ask(client(server), 1, model="nobody")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        ask(client(server, "mmrl-" + "x" * 43), 1)
    with pytest.raises(openai.BadRequestError):
        ask(client(server), 1, max_tokens=500)  # beyond the model's context


def test_an_answer_has_one_id_and_rays_own_paths_are_closed(server: Server) -> None:
    for given in ("mine-1", "a b"):
        answer = httpx.get(f"{server.url}/version", headers={"x-request-id": given})
        assert len(answer.headers.get_list("x-request-id")) == 1
        assert (answer.headers["x-request-id"] == given) == (given == "mine-1")
    for path in ("/-/routes", "/-/healthz"):
        assert httpx.get(f"{server.url}{path}").json()["error"]["code"] == "invalid_api_key"


def test_the_printed_curl_line_gives_a_caption(server: Server) -> None:
    (line,) = [said for said in server.said if said.startswith("curl ")]
    assert line == (
        f'curl -H "Authorization: Bearer {server.key}" -F image=@photo.jpg -F model=tiny {server.url}/v1/captions'
    )
    headers = {"Authorization": f"Bearer {server.key}"}
    files = {"image": ("photo.png", image(2)), "model": (None, "tiny")}
    answer = httpx.post(f"{server.url}/v1/captions", headers=headers, files=files, timeout=60)  # type: ignore[arg-type]
    assert answer.status_code == 200, answer.text
    assert answer.json()["captions"][0]["text"]


def test_rewards_are_those_of_the_run(server: Server) -> None:
    captions, references = ["a red circle", "squares"], ["a circle"]
    uri = "data:image/png;base64," + base64.b64encode(image(1)).decode()
    answer = httpx.post(
        f"{server.url}/v1/rewards",
        headers={"Authorization": f"Bearer {server.key}"},
        json={"inputs": [{"image": uri, "captions": captions, "references": references}]},
        timeout=60,
    )
    assert answer.status_code == 200, answer.text
    cfg = ServeConfig.model_validate(_printed(server)["applications"][0]["args"]["config"])
    assert cfg.reward is not None
    reward = build_reward(cfg.reward, CorpusStatistics.from_references(REFERENCES))
    expected = [reward.score_batch([Sample("s", (), "", tuple(references))], [c])[0].total for c in captions]
    assert [each["total"] for each in answer.json()["data"][0]["rewards"]] == expected


_PRINTED: dict[str, Any] = {}


def _printed(server: Server) -> dict[str, Any]:
    if not _PRINTED:
        done = mmrl("serve", server.made.run.location, "--print-config")
        assert done.exit_code == 0, done.output
        _PRINTED.update(yaml.safe_load(done.output[done.output.index("proxy_location") :]))
    return _PRINTED


def test_the_printed_config_file_is_whole(server: Server) -> None:
    config = _printed(server)
    check_serve_config(config)
    (application,) = config["applications"]
    assert [each["name"] for each in application["deployments"]] == ["gateway", "policy", "reward"]
    assert application["args"]["config"]["adapters"] == {"tiny": server.made.run.location}


class Load:
    """Clients that retry as the official client does by default, and what they got."""

    def __init__(self, server: Server, clients: int) -> None:
        self.answers: list[tuple[int, str, str]] = []
        self.errors: list[str] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(server, i)) for i in range(clients)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(120)

    def _run(self, server: Server, number: int) -> None:
        api = client(server, max_retries=4)
        while not self._stop.is_set():
            try:
                answer = ask(api, number)
            except openai.OpenAIError as error:
                self.errors.append(repr(error))
            else:
                self.answers.append((number, answer.system_fingerprint, answer.choices[0].message.content.strip()))


def test_a_new_version_comes_on_under_load_and_no_answer_mixes_two(server: Server) -> None:
    texts = {("tiny@3", n): greedy(server.made.policy, n) for n in range(3)}
    with Load(server, 3) as load:
        wait_for(lambda: len(load.answers) > 6, "answers")
        server.made.publish(5)
        texts |= {("tiny@5", n): greedy(server.made.policy, n) for n in range(3)}
        wait_for(lambda: [v for _, v, _ in load.answers[-12:]] == ["tiny@5"] * 12, "answers of the new version")
    assert load.errors == []
    assert {v for _, v, _ in load.answers} == {"tiny@3", "tiny@5"}
    assert [(v, n, text) for n, v, text in load.answers if text != texts[v, n]] == []


def test_a_policy_replica_that_is_killed_costs_no_answer(server: Server) -> None:
    with Load(server, 3) as load:
        wait_for(lambda: len(load.answers) > 6, "answers")
        victim = server.pids("policy")[0]
        os.kill(victim, signal.SIGKILL)
        then = len(load.answers)
        wait_for(lambda: len(load.answers) > then + 20, "answers afterwards")
        wait_for(lambda: len([p for p in server.pids("policy") if p != victim]) == 2, "a new replica", 120)
    assert load.errors == []
    assert {v for _, v, _ in load.answers} == {"tiny@5"}


def left_of(pid: int) -> list[Path]:
    """Temporary folders that say that they are this process's."""
    owners = Path(tempfile.gettempdir()).glob("mmrl-haproxy-*/owner.json")
    return [owner.parent for owner in owners if json.loads(owner.read_text())["pid"] == pid]


def test_a_signal_while_it_loads_ends_it_and_leaves_nothing(server: Server, tmp_path: Path) -> None:
    process = start(["serve", str(server.made.base), "--port", str(free_port())], tmp_path)
    below: list[psutil.Process] = []

    def started() -> bool:
        below[:] = psutil.Process(process.pid).children(recursive=True)
        return any(child.name() == "raylet" for child in below)

    wait_for(started, "a Ray", START_S)
    assert left_of(process.pid)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode in (0, 130, signal.SIGTERM), output  # the last while Ray starts, which takes the signal
    assert "Traceback" not in output
    assert psutil.wait_procs(below, timeout=30)[1] == []
    assert left_of(process.pid) == []


def test_a_driver_that_is_killed_leaves_nothing_behind(server: Server) -> None:
    below = psutil.Process(server.process.pid).children(recursive=True)
    assert any("haproxy" in child.name() for child in below)
    server.process.kill()
    server.process.wait(10)
    # Ray's two agents, which listen to nobody else, would give their GCS a minute to come back.
    assert psutil.wait_procs(below, timeout=15)[1] == []
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health/live")
    clear_leftovers()
    assert left_of(server.process.pid) == []
