"""The engine on a vLLM server, against transformers' own `generate` and the learner's log-probs."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest

from mmrl_ray.config.engine import EngineSection
from mmrl_ray.config.sections import LoraSection
from mmrl_ray.errors import AdapterError, ConfigError, ContextLengthError, ModelError, ProcessError
from mmrl_ray.experience.carriers import EncodedPrompt
from mmrl_ray.policy.generation.base import DecodeRequest, GroupOutput
from mmrl_ray.policy.generation.vllm import mmrl_vllm_worker
from mmrl_ray.policy.generation.vllm.remote import RemoteEngine, start_remote
from mmrl_ray.policy.load import load_policy
from mmrl_ray.policy.lora.adapter import add_adapter
from mmrl_ray.policy.memory import CACHE_BLOCK
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.parity import choose_path
from mmrl_ray.policy.prompts import check_context
from mmrl_ray.policy.vision import VisionCache
from mmrl_ray.processes import free_port
from tests.support.tiny_models import section_of
from tests.vllm.compare import (
    BOUND,
    TEMPERATURE,
    gap,
    is_of_one_version,
    load,
    long_samples,
    prepared,
    requests,
    says_what_generate_says,
)
from tests.vllm.conftest import TIMEOUT_S
from tests.vllm.models import adapter_of, policy_of

KEY = "a-key-that-is-nobodys"
PLACES = 2
"""Adapters that the server computes with at a time."""


@dataclass
class Server:
    """A real one, which a test may stop and start with other arguments."""

    python: str
    model: str
    port: int
    log: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self, mode: str = "processed_logprobs") -> None:
        names = Path(mmrl_vllm_worker.__file__).parent  # what transformers 5.23 saves is read by this extension
        arguments = {
            **{"model": self.model, "host": "127.0.0.1", "port": self.port, "dtype": "float32", "max-model-len": 256},
            **{
                "max-num-seqs": 64,
                "kv-cache-memory-bytes": 1 << 28,
                "block-size": CACHE_BLOCK,
                "max-num-batched-tokens": 1024,
            },
            **{"max-loras": PLACES, "max-lora-rank": 8, "logprobs-mode": mode},
            **{"worker-extension-cls": "mmrl_vllm_worker.Adapters", "mm-processor-kwargs": '{"use_fast": false}'},
        }
        switches = ("enforce-eager", "enable-lora", "enable-scale-out", "no-enable-chunked-prefill")
        command = [self.python, "-m", "vllm.entrypoints.openai.api_server"]
        command += [f"--{name}={value}" for name, value in arguments.items()] + [f"--{name}" for name in switches]
        environment = {
            **os.environ,
            **{"PYTHONPATH": str(names), "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
            **{"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "VLLM_API_KEY": KEY},
            **{"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_LOGGING_LEVEL": "ERROR"},
        }
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(timeout=60)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    return policy_of("llava", tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def server(policy: Policy, python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(python, policy.path, free_port(), tmp_path_factory.mktemp("server") / "log")
    made.start()
    yield made
    made.stop()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


def begun(policy: Policy, server: Server, shared: Path, *, versions: int = 1, run: str = "a-run") -> RemoteEngine:
    os.environ["MMRL_TEST_KEY"] = KEY
    cfg = EngineSection(
        kind="openai", url=server.url, adapters=str(shared), api_key_env="MMRL_TEST_KEY", start_timeout_s=300.0
    )
    return start_remote(policy, cfg, VisionCache(0), run=run, versions=versions, timeout_s=TIMEOUT_S)


@pytest.fixture(scope="module")
def engine(policy: Policy, server: Server, shared: Path) -> Iterator[RemoteEngine]:
    made = begun(policy, server, shared)
    yield made
    made.close()


@pytest.fixture(scope="module")
def prompts(policy: Policy, engine: RemoteEngine) -> list[EncodedPrompt]:
    return prepared(policy, engine, long_samples())


def served(server: Server) -> set[str]:
    """Names of adapters that the server knows."""
    cards = httpx.get(f"{server.url}/models", headers={"authorization": f"Bearer {KEY}"}).json()["data"]
    return {card["id"] for card in cards if card["parent"] is not None}


def test_greedy_tokens_are_those_of_generate(
    policy: Policy, engine: RemoteEngine, prompts: list[EncodedPrompt]
) -> None:
    for version in (0, 1):
        load(policy, engine, version)
        says_what_generate_says(policy, engine, prompts)


def test_a_model_with_grids_is_the_same_policy_there(python: str, shared: Path, tmp_path: Path) -> None:
    """Qwen2.5-VL, whose pictures have as many tokens as their size makes of them."""
    policy = policy_of("qwen2_5_vl", tmp_path / "model")
    server = Server(python, policy.path, free_port(), tmp_path / "log")
    server.start()
    try:
        engine = begun(policy, server, shared, run="grids")
        samples = [replace(each, images=each.images * (1 + i % 2)) for i, each in enumerate(long_samples())]
        prompts = prepared(policy, engine, samples)
        assert len({prompt.input_ids.numel() for prompt in prompts}) > 1
        for version in (0, 1, 2):
            load(policy, engine, version)
            says_what_generate_says(policy, engine, prompts)
            is_of_one_version(policy, prompts, engine.generate(requests(prompts, seed=version)), version, (0, 1, 2))
        load(policy, engine, 0)
        assert choose_path(policy, prompts[:2], temperature=TEMPERATURE, engine=engine).sampler < BOUND
        engine.close()
    finally:
        server.stop()


def test_the_start_up_comparison_tries_an_adapter_too(
    policy: Policy, engine: RemoteEngine, prompts: list[EncodedPrompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    load(policy, engine, 1)
    assert choose_path(policy, prompts[:2], temperature=TEMPERATURE, engine=engine).sampler < BOUND
    whole = RemoteEngine._trial
    part = {name: tensor for name, tensor in whole(engine).items() if ".mlp." not in name}
    hold = engine._adapters.hold
    monkeypatch.setattr(engine._adapters, "hold", lambda version, weights: hold(version, part))  # the server has fewer
    with pytest.raises(ModelError, match=r"computes an adapter of \d+ layers otherwise"):
        choose_path(policy, prompts[:2], temperature=TEMPERATURE, engine=engine)
    monkeypatch.undo()
    assert gap(policy, prompts, engine.generate(requests(prompts))) < BOUND  # and nothing of it is left


def test_versions_swapped_while_other_workers_sample_are_neither_stale_nor_mixed(
    policy: Policy, server: Server, shared: Path, engine: RemoteEngine, prompts: list[EncodedPrompt]
) -> None:
    workers = [begun(policy, server, shared, run="three") for _ in range(3)]
    found: list[tuple[int, list[DecodeRequest], list[GroupOutput]]] = []
    errors: list[Exception] = []

    def work(place: int) -> None:
        try:
            for version in range(11 + place, 15 + place):  # at a time up to one more than there are places for
                workers[place].load(version, adapter_of(policy, version))
                asked = requests(prompts, seed=version, tokens=24)
                found.append((version, asked, workers[place].generate(asked)))
        except Exception as error:  # noqa: BLE001 - for the thread that looks
            errors.append(error)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(len(workers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(found) == 12
    tokens: dict[int, list[list[int]]] = {}
    for version, _, outputs in found:
        is_of_one_version(policy, prompts, outputs, version, (version - 1, version, version + 1))
        rows = [c.token_ids.tolist() for output in outputs for c in output.completions]
        assert tokens.setdefault(version, rows) == rows  # by whichever worker, beside whatever else
    for worker in workers:
        worker.close()
    left = {path.name for path in shared.glob("three-v*")}
    assert len(left) <= PLACES + 1  # what was too old when the last load came is gone, on both sides
    assert {name for name in served(server) if name.startswith("three-v")} == left


def test_tokens_of_pictures_are_never_sampled_and_seeds_repeat(
    policy: Policy, engine: RemoteEngine, prompts: list[EncodedPrompt]
) -> None:
    load(policy, engine, 1)
    first, again = (engine.generate(requests(prompts, n=24, tokens=24, temperature=2.0)) for _ in range(2))
    rows = [[c.token_ids.tolist() for output in each for c in output.completions] for each in (first, again)]
    assert rows[0] == rows[1]
    sampled = {token for row in rows[0] for token in row}
    assert not sampled & set(policy.image_token_ids)
    assert len(sampled) > policy.vocab_size // 2
    assert len({str(row) for row in rows[0]}) > len(rows[0]) // 2  # those of a group differ


def test_what_does_not_fit_is_refused_and_the_engine_goes_on(
    policy: Policy, server: Server, engine: RemoteEngine, shared: Path, tmp_path: Path, prompts: list[EncodedPrompt]
) -> None:
    load(policy, engine, 1)
    with pytest.raises(ContextLengthError, match="max-model-len"):
        engine.generate(requests(prompts, tokens=1000))
    with pytest.raises(ContextLengthError, match="context of 256"):
        check_context(policy, prompts[0], 250)  # so that a worker finds out sample by sample
    with pytest.raises(ConfigError, match="max_num_seqs"):
        engine.generate(requests(prompts, n=65))
    with pytest.raises(ConfigError, match=rf"--max-loras {PLACES + 1} or more"):
        begun(policy, server, shared, versions=PLACES)
    with pytest.raises(AdapterError, match=r"--max-lora-rank 16"):
        begun(_policy(policy, r=16), server, shared)
    smaller = policy_of("qwen2_5_vl", tmp_path)
    with pytest.raises(ConfigError, match=rf"vocabulary of {smaller.vocab_size} tokens"):
        begun(smaller, server, shared)
    elsewhere = begun(policy, server, shared, run="elsewhere")
    elsewhere._adapters._folder.joinpath("gone").mkdir()
    with pytest.raises(AdapterError, match="one folder under one path"):
        elsewhere._server.load("gone", str(shared / "not-there"), rank=4)
    elsewhere.close()
    assert gap(policy, prompts, engine.generate(requests(prompts))) < BOUND


def _policy(policy: Policy, r: int) -> Policy:
    other = load_policy(section_of("llava", Path(policy.path)), device="cpu")
    add_adapter(other, LoraSection(r=r, alpha=8.0), seed=0)
    return other


def test_other_weights_fail_the_start_up_comparison(
    policy: Policy, server: Server, shared: Path, prompts: list[EncodedPrompt]
) -> None:
    other = _policy(policy, r=4)
    with_noise = next(iter(other.hf_model.get_input_embeddings().parameters()))
    with_noise.data.mul_(1.05)
    engine = begun(other, server, shared, run="other")
    engine.load(0, None)
    with pytest.raises(ModelError, match=r"sampler differs from the model's own forward .* same weights and --dtype"):
        choose_path(other, prompts[:2], temperature=TEMPERATURE, engine=engine)
    engine.close()


def test_a_restarted_server_is_given_the_adapter_again_and_one_with_raw_logprobs_is_refused(
    policy: Policy, server: Server, shared: Path, engine: RemoteEngine, prompts: list[EncodedPrompt]
) -> None:
    load(policy, engine, 1)
    before = engine.generate(requests(prompts))
    server.stop()
    with pytest.raises(ProcessError, match="is the vLLM server still running"):
        engine.generate(requests(prompts))
    server.start(mode="raw_logprobs")
    with pytest.raises(ConfigError, match="--logprobs-mode processed_logprobs"):
        begun(policy, server, shared)
    assert not served(server)
    after = engine.generate(requests(prompts))
    assert [[c.token_ids.tolist() for c in each.completions] for each in after] == [
        [c.token_ids.tolist() for c in each.completions] for each in before
    ]
    (name,) = served(server)
    assert name == engine._held.name if engine._held else False
