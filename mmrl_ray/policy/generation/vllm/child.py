"""What runs in the process of a vLLM engine, see `engine.py`: one answer a request, while the engine goes on sampling.

    owner ── frames ──▶ this process: between two of vLLM's steps it takes a request, if there is one
                            load     an adapter, as a version of its own id, name and cache salt
                            submit   groups of a version: tickets
                            collect  tickets: completions, as soon as all of them are there
                            drop     a version, once the last group that it samples is done
                            news     rows that begin or end: tokens, as they are made (`streams.py`, for servers)
                            sleep, wake, counters

A frame is a safetensors file whose metadata holds the message as JSON: tensors lie in it as they are, and nothing is
ever unpickled. Everything is done by one thread in the order in which it came, so that a group is sampled by the
version that it names, whatever is loaded meanwhile.

The process has vLLM's packages; of this project it imports `child.py`, `errors.py`, and `installed.py` and `streams.py`
beside this file, which need none.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import select
import socket
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load, save

from mmrl_ray.child import receive, send
from mmrl_ray.errors import AdapterError, ConfigError, MMRLError, ProcessError, one_line
from mmrl_ray.policy.generation.vllm.installed import check_arguments, check_release, unusable
from mmrl_ray.policy.generation.vllm.streams import Streams

EXTENSION = "mmrl_vllm_worker"
FORBIDDEN_BIAS = -1e9
"""Added to the logit of a token that is never sampled: its probability is 0, and that of no other token changes."""
COUNTERS = ("prefix_cache_queries", "prefix_cache_hits", "mm_cache_queries", "mm_cache_hits", "num_preemptions")
"""Of vLLM's own metrics: tokens looked for in the prefix cache, pictures in the processor's cache."""


def pack(message: Mapping[str, Any], tensors: Mapping[str, torch.Tensor] | None = None) -> bytes:
    """A frame."""
    return save(
        {name: t.contiguous() for name, t in (tensors or {}).items()}, metadata={"message": json.dumps(message)}
    )


def unpack(frame: bytes | bytearray) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The message and the tensors of a frame."""
    length = int.from_bytes(frame[:8], "little")
    message: dict[str, Any] = json.loads(json.loads(bytes(frame[8 : 8 + length]))["__metadata__"]["message"])
    return message, load(bytes(frame))


def work(owner: socket.socket) -> None:
    """Starts the engine that the first frame asks for, then answers until the owner is gone."""
    first = receive(owner)
    if first is None:
        return
    try:
        engine = Engine(unpack(first)[0])
    except Exception as error:  # noqa: BLE001 - vLLM, its kernels and a model: anybody's code
        traceback.print_exc()
        send(owner, pack(_told(error)))
        return
    send(owner, pack(engine.facts))
    asked = select.poll()
    asked.register(owner, select.POLLIN | select.POLLHUP)
    while True:
        if engine.is_busy and not asked.poll(0):
            with suppress(ProcessError):  # whoever asks next is told
                engine.step()
            continue
        frame = receive(owner)
        if frame is None:
            return
        try:
            message, tensors = engine.answer(*unpack(frame))
        except Exception as error:  # noqa: BLE001 - as above
            if not isinstance(error, MMRLError):
                traceback.print_exc()
            message, tensors = _told(error), {}
        send(owner, pack(message, tensors))


def _told(error: Exception) -> dict[str, Any]:
    """An error of this project keeps its kind; any other is the engine's."""
    text = one_line(error)[:2000] or "no message"
    ours = isinstance(error, MMRLError)
    return {"error": text if ours else f"{type(error).__name__}: {text}", "kind": type(error).__name__ if ours else ""}


@dataclasses.dataclass
class Version:
    """An adapter by the names that vLLM knows it under, none of which any other version ever had."""

    salt: str
    """Keeps what the prefix cache has of it apart."""
    request: Any
    """vLLM's `LoRARequest`; None for the base."""
    groups: int = 0
    """Under way."""
    is_seated: bool = False
    """Whether it has one of vLLM's `max_loras` places. It keeps it while anything of it is under way: an adapter that
    vLLM moves to another place between two of its steps is mixed up with what comes into its own."""
    is_dropped: bool = False


@dataclasses.dataclass
class Group:
    """One that was submitted."""

    version: Version
    output: Any = None
    """vLLM's `RequestOutput`, when it is done."""


class Engine:
    """vLLM's engine in this process, and the versions that it samples by."""

    def __init__(self, asked: Mapping[str, Any]) -> None:
        """Loads the model.

        Args:
            asked: `args`, of vLLM's `EngineArgs`; `forbidden`, the tokens that are never sampled; `ends`, those that
                end a completion.

        Raises:
            ConfigError: there is no vLLM, or none that is known, or it has no such argument.
        """
        sys.path.append(str(Path(__file__).parent))
        check_release()
        try:
            from vllm import SamplingParams
            from vllm.engine.arg_utils import EngineArgs
            from vllm.lora.request import LoRARequest
            from vllm.platforms import current_platform
            from vllm.sampling_params import RequestOutputKind
            from vllm.v1.engine.llm_engine import LLMEngine

            extension = importlib.import_module(EXTENSION)
        except ImportError as error:
            raise ConfigError(unusable(one_line(error))) from error
        self._sampling, self._lora, self._kind = SamplingParams, LoRARequest, RequestOutputKind
        args = dict(asked["args"])
        if current_platform.is_cpu():
            # A prompt that is computed in two parts winds its generator back, which those of a CPU cannot: an error of
            # vLLM's that ends the engine.
            args.setdefault("enable_chunked_prefill", False)
        check_arguments(args)
        self._ends, self._bias = list(asked["ends"]), dict.fromkeys(asked["forbidden"], FORBIDDEN_BIAS)
        self._is_parted = args.get("tensor_parallel_size", 1) > 1
        if self._is_parted:
            extension.unlink_afterwards()
        self._engine = LLMEngine.from_engine_args(EngineArgs(**args))
        self._engine.collective_rpc("leave_nothing", args=())
        self._versions: dict[int | str, Version] = {}
        self._seated: list[Version] = []
        self._groups: dict[str, Group] = {}
        self._streams = Streams(self)
        self._tickets = self._ids = 0
        self._is_asleep = False
        self.broken: str | None = None
        """The end of the traceback that vLLM's engine ended with."""

    @property
    def facts(self) -> dict[str, Any]:
        """What the owner is told of the engine."""
        config = self._engine.vllm_config
        return {
            "vllm": check_release(),
            "pid": os.getpid(),
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "context": config.model_config.max_model_len,
            "prefix_caching": bool(config.cache_config.enable_prefix_caching),
            "embeds": bool(getattr(config.model_config.multimodal_config, "enable_mm_embeds", False)),
            "can_sleep": bool(config.model_config.enable_sleep_mode),
        }

    @property
    def is_busy(self) -> bool:
        """Whether there is anything to sample."""
        return self.broken is None and not self._is_asleep and self._engine.has_unfinished_requests()

    def step(self) -> None:
        """One of vLLM's: at most a token for each completion under way.

        Raises:
            ProcessError: vLLM's engine has failed, and can do nothing any more.
        """
        try:
            outputs = self._engine.step()
        except Exception as error:
            traceback.print_exc()
            self.broken = " ".join(traceback.format_exc().split())[-1500:]
            raise ProcessError(f"vLLM's engine ended: {self.broken}") from error
        for output in outputs:
            group = self._groups.get(output.request_id)
            if group is None:
                self._streams.take(output)
            elif output.finished:
                group.output = output
                self.left(group.version)

    def answer(
        self, message: dict[str, Any], tensors: dict[str, torch.Tensor]
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """What a request is answered.

        Raises:
            AdapterError, ProcessError: it cannot be done.
        """
        if self.broken is not None:
            raise ProcessError(f"vLLM's engine ended: {self.broken}")
        asked = message.pop("ask")
        if self._is_asleep and asked in ("load", "drop", "submit", "wake"):
            # Adapters have their places in the memory that is not there meanwhile: a copy into it ends the engine.
            self._engine.wake_up()
            self._is_asleep = False
        if asked == "load":
            self._load(message["version"], message["adapter"], tensors)
        elif asked == "drop":
            self._drop(message["version"])
        elif asked == "submit":
            return {"tickets": self._submit_all(message["groups"], tensors)}, {}
        elif asked == "collect":
            return self._collect(message["tickets"])
        elif asked == "news":
            return self._streams.news(message, tensors)
        elif asked == "counters":
            return {"counters": self.counters()}, {}
        elif asked == "sleep":
            self._sleep()
        elif asked != "wake":
            raise ProcessError(f"there is no request {asked!r}")
        return {}, {}

    def _load(self, version: int | str, config: dict[str, Any] | None, tensors: dict[str, torch.Tensor]) -> None:
        self._ids += 1
        name = f"version-{version}-{self._ids}"
        made = Version(salt=name, request=None)
        if config is not None:
            made.request = self._lora(lora_name=name, lora_int_id=self._ids, lora_path=f"memory:{name}")
            troubles = self._engine.collective_rpc("hold_adapter", args=(self._ids, tensors, config))
            if any(troubles):
                self._engine.collective_rpc("release_adapter", args=(self._ids,))
                raise AdapterError(f"version {version} of the adapter: {next(filter(None, troubles))}")
            try:
                self.seat(made)  # what does not fit is found now, if there is a place, and not by a group
            except Exception as error:
                if self.broken is not None:
                    raise
                if self._is_parted:  # the other parts' answers to this are taken for those to what is asked next
                    self.broken = one_line(error)
                else:
                    self._engine.collective_rpc("release_adapter", args=(self._ids,))
                raise AdapterError(f"version {version} of the adapter: {one_line(error)}") from error
        if version in self._versions:
            self._drop(version)
        self._versions[version] = made

    def _drop(self, version: int | str) -> None:
        found = self._versions.pop(version, None)
        if found is not None:
            found.is_dropped = True
            self._release(found)

    def _release(self, version: Version) -> None:
        """Lets vLLM forget it, once it was dropped and nothing that it samples is under way."""
        if version.is_dropped and not version.groups and version.request is not None:
            if version.is_seated:
                self._unseat(version)
            self._engine.collective_rpc("release_adapter", args=(version.request.lora_int_id,))

    def seat(self, version: Version) -> bool:
        """Whether it has a place, or could be given one: that of a version of which nothing is under way."""
        if version.request is None or version.is_seated:
            return True
        if len(self._seated) >= self._engine.vllm_config.lora_config.max_loras:
            idle = next((each for each in self._seated if not each.groups), None)
            if idle is None:
                return False
            self._unseat(idle)
        self._engine.add_lora(version.request)
        version.is_seated = True
        self._seated.append(version)
        return True

    def _unseat(self, version: Version) -> None:
        self._engine.remove_lora(version.request.lora_int_id)
        version.is_seated = False
        self._seated = [each for each in self._seated if each is not version]

    def left(self, version: Version) -> None:
        """Something that it samples is under way no more."""
        version.groups -= 1
        self._release(version)

    def _submit_all(self, groups: Sequence[Mapping[str, Any]], tensors: Mapping[str, torch.Tensor]) -> list[str]:
        """All of them, or on an error none."""
        tickets: list[str] = []
        try:
            for group in groups:
                tickets.append(self._submit(group, tensors))
        except Exception:
            self._engine.abort_request(tickets)
            for ticket in tickets:
                group_of = self._groups.pop(ticket)
                if group_of.output is None:
                    self.left(group_of.version)
            raise
        return tickets

    def version(self, name: int | str) -> Version:
        """One that is loaded, while there is an engine that samples; a ProcessError otherwise."""
        version = self._versions.get(name)
        if version is None:
            raise ProcessError(f"policy version {name} is not loaded; there are {sorted(map(str, self._versions))}")
        return version

    def rendered(self, asked: Mapping[str, Any], version: Version, tensors: Mapping[str, torch.Tensor]) -> Any:
        """A prompt as vLLM's engine takes it."""
        place = asked["prompt"]
        prompt = {
            "prompt_token_ids": tensors[f"{place}/ids"].tolist(),
            "multi_modal_data": {"image": _pictures(tensors, f"{place}/", asked["images"])},
            "multi_modal_uuids": {"image": [f"{asked['image_key']}-{i}" for i in range(asked["images"])]},
            "cache_salt": version.salt,
        }
        (rendered,) = self._engine.renderer.render_cmpl([prompt])
        return rendered

    def begin(
        self, name: str, rendered: Any, sampling: Mapping[str, Any], version: Version, *, streams: bool = True
    ) -> None:
        """Hands vLLM a request of a version that has a place; `left` is due when it is over."""
        asked = self._sampling(
            **sampling,
            logprobs=0,
            stop_token_ids=self._ends,
            ignore_eos=True,  # it is among those, if it is one of this policy's
            logit_bias=self._bias or None,
            detokenize=False,
            output_kind=self._kind.DELTA if streams else self._kind.FINAL_ONLY,
        )
        self._engine.add_request(name, rendered, asked, lora_request=version.request)
        version.groups += 1

    def abort(self, names: Sequence[str]) -> None:
        """Ends requests."""
        self._engine.abort_request(list(names))

    def _submit(self, asked: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
        version = self.version(asked["version"])
        while not self.seat(version):
            self.step()
        self._tickets += 1
        ticket = str(self._tickets)
        try:
            rendered = self.rendered(asked, version, tensors)
        except Exception as error:
            text = f"{type(error).__name__}: {one_line(error)[:500]}"
            raise ProcessError(f"vLLM refuses a prompt with {asked['images']} pictures: {text}") from error
        try:
            self.begin(ticket, rendered, asked["sampling"], version, streams=False)
        except (ValueError, TypeError) as error:
            raise ProcessError(f"vLLM refuses a prompt: {' '.join(str(error).split())}") from error
        self._groups[ticket] = Group(version)
        return ticket

    def _collect(self, tickets: Sequence[str]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        if unknown := [ticket for ticket in tickets if ticket not in self._groups]:
            raise ProcessError(f"there are no groups {unknown}")
        while any(self._groups[ticket].output is None for ticket in tickets):
            if self._is_asleep:
                raise ProcessError("the engine sleeps; wake it first")
            self.step()
        groups, tensors = [], {}
        for i, ticket in enumerate(tickets):
            output = self._groups.pop(ticket).output
            rows = sorted(output.outputs, key=lambda row: row.index)
            tensors[f"{i}/tokens"] = torch.tensor([t for row in rows for t in row.token_ids], dtype=torch.int64)
            tensors[f"{i}/logprobs"] = torch.tensor([p for row in rows for p in _logprobs(row)], dtype=torch.float32)
            groups.append(
                {
                    "lengths": [len(row.token_ids) for row in rows],
                    "finish": [row.finish_reason for row in rows],
                    "prompt": len(output.prompt_token_ids),
                    "cached": output.num_cached_tokens or 0,
                }
            )
        return {"groups": groups}, tensors

    def counters(self) -> dict[str, float]:
        """`COUNTERS`."""
        found = {metric.name.removeprefix("vllm:"): metric for metric in self._engine.get_metrics()}
        return {name: float(found[name].value) for name in COUNTERS if name in found}

    def _sleep(self) -> None:
        if self._engine.has_unfinished_requests():
            raise ProcessError("groups are under way; collect them before the engine sleeps")
        if self.facts["can_sleep"] and not self._is_asleep:
            self._engine.sleep(1)  # 2 would drop the weights, too, and have no file to read an adapter's base from
            self._is_asleep = True


def _pictures(tensors: Mapping[str, torch.Tensor], place: str, count: int) -> Any:
    """Those of a prompt, as vLLM takes them: pictures, or what a tower made of them, with their grids or without."""
    made, grid = tensors.get(f"{place}image_embeds"), tensors.get(f"{place}image_grid_thw")
    if made is None:
        return [Image.fromarray(tensors[f"{place}image/{i}"].numpy()) for i in range(count)]
    if grid is not None:
        return {"image_embeds": made, "image_grid_thw": grid}
    return list(made.split(tensors[f"{place}sizes"].tolist()))


def _logprobs(row: Any) -> list[float]:
    """Of the tokens of one completion, each that of the token that was drawn."""
    return [place[token].logprob for token, place in zip(row.token_ids, row.logprobs, strict=True)]
