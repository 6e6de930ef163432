"""vLLM in the place of the local decode loop of a server: the same book of groups, rows made in the engine's process.

    admit ──▶ waiting ──rows free──▶ begin ──┐             ┌──▶ tokens since the last news ──▶ events ──▶ take
                                             news (one request a step)
    cancel, a stop string ──────────▶ abort ─┘

The process goes on sampling between two requests, so what this thread does costs it nothing. Text, and what ends it, is
found here, token by token, as for the local loop; a row of the engine that runs on behind a stop string is ended with
the next request. Of each row the seed is its own: a hash of the group's seed and the row's place.

vLLM shares its passes among all rows, so that callers are told apart by their rows alone (`DecodeQueue`, `by_cost`).
"""

from __future__ import annotations

import logging
import time
from typing import Any

import numpy as np
import torch

from mmrl_ray.config.engine import EngineSection
from mmrl_ray.errors import AdapterError, ConfigError, ModelError
from mmrl_ray.experience.carriers import EncodedPrompt, SamplingParams
from mmrl_ray.policy.generation.base import DecodeRequest, Event, Failure
from mmrl_ray.policy.generation.decode import decode_groups
from mmrl_ray.policy.generation.queue import DecodeQueue, Group, GroupBook
from mmrl_ray.policy.generation.rules import GenerationRules, generation_rules
from mmrl_ray.policy.generation.vllm.engine import read_by_vllm, room_on_cpu, start_process
from mmrl_ray.policy.generation.vllm.exchange import drawing_of, prompt_tensors, source_of
from mmrl_ray.policy.generation.vllm.mmrl_vllm_worker import RULES
from mmrl_ray.policy.generation.vllm.process import VllmProcess
from mmrl_ray.policy.lora.files import AdapterFiles
from mmrl_ray.policy.lora.routing import BASE
from mmrl_ray.policy.model import Policy

logger = logging.getLogger(__name__)

_TEMPERATURES = 0.01, 2.0
"""vLLM takes a lower one for the first, and none above the second."""
_COUNT_EVERY_S = 1.0


class VllmServer:
    """A vLLM engine that answers for a policy, and the adapters on it (`AdapterHost`). For the decode thread."""

    def __init__(
        self, policy: Policy, process: VllmProcess, *, timeout_s: float, rules: GenerationRules | None = None
    ) -> None:
        """Takes over the process, which has the policy's model; of `policy` itself it uses no weight.

        Args:
            policy: a skeleton will do. It is told how much room the engine has for a prompt and its completion.
            process: what `start_server` starts.
            timeout_s: for each of its answers.
            rules: of the checkpoint, which the process was started to obey.
        """
        self.policy, self.process, self._timeout_s = policy, process, timeout_s
        self.rules = rules
        self.adapters: set[str] = set()
        """Names of those that are loaded."""
        policy.context_length = min(policy.context_length, int(process.facts["context"]))
        process.ask("load", version=BASE, adapter=None, timeout_s=timeout_s)

    def decoder(self, *, max_rows: int, adapters: bool) -> VllmDecoder:
        """A decode loop on this engine, in the place of the one before; `adapters` says whether groups name one."""
        return VllmDecoder(self, max_rows=max_rows, adapters=adapters)

    def ask(self, what: str, **message: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """`VllmProcess.ask`."""
        return self.process.ask(what, timeout_s=self._timeout_s, **message)

    def fitted(self, files: AdapterFiles) -> AdapterFiles:
        """As they are.

        Raises:
            AdapterError: they are decoded by value heads, or their layers have ranks or scales of their own.
        """
        if files.config.rank_pattern or files.config.alpha_pattern:
            raise AdapterError(
                "its layers have ranks or alphas of their own, and vLLM's adapters have one of each: serve it with "
                "serving.policy.engine.kind: local, or merged (mmrl export --merged)"
            )
        if files.heads is not None and files.heads.beta > 0:
            raise AdapterError(
                f"it is decoded by value heads (beta={files.heads.beta:g}), which the vLLM engine cannot do: serve it "
                "with serving.policy.engine.kind: local"
            )
        return files

    def put_on(self, name: str, files: AdapterFiles) -> None:
        """Loads them as a version by that name."""
        self.ask("load", version=name, adapter=read_by_vllm(files.config), tensors=dict(files.state))
        self.adapters.add(name)

    def take_off(self, name: str) -> None:
        """Drops the version, as soon as nothing that it samples is under way."""
        self.ask("drop", version=name)
        self.adapters.discard(name)

    def try_prompt(self, prompt: EncodedPrompt, sampling: SamplingParams) -> None:
        """Answers one before anybody asks.

        Raises:
            ModelError: vLLM takes no such prompt, reads it otherwise than this process, or its log-probs are NaN.
        """
        decode_groups(self.decoder(max_rows=1, adapters=False), [DecodeRequest(prompt, 1, sampling)])

    def close(self) -> None:
        """Ends the process."""
        self.process.close()


def start_server(
    policy: Policy,
    cfg: EngineSection,
    *,
    max_rows: int,
    adapters: tuple[int, int] | None,
    threads: int,
    timeout_s: float,
) -> VllmServer:
    """Starts an engine for a server, and waits until it has loaded the model.

    Args:
        policy: the model's skeleton.
        cfg: how vLLM is run.
        max_rows: completions at a time.
        adapters: how many of them there may be at a time, and of what rank; None where there are none at all.
        threads: of the process, where it computes on CPUs.
        timeout_s: for each of its answers.

    Raises:
        ConfigError, ProcessError: of `VllmProcess`.
    """
    rules = generation_rules(policy)
    ruled = {} if rules is None else {"logits_processors": [RULES]}
    # One place more: a new version of an adapter comes beside the one before.
    places = {} if adapters is None else {"max_loras": adapters[0] + 1}
    if adapters is not None and cfg.args.get("max_loras", adapters[0]) < adapters[0]:
        raise ConfigError(
            f"engine.args.max_loras={cfg.args['max_loras']} is below serving.max_adapters={adapters[0]}: an adapter "
            "could wait for its place as long as others are asked for; lower max_adapters, or leave max_loras out"
        )
    process = start_process(
        policy,
        cfg,
        {
            "max_num_seqs": max_rows,
            **places,
            **ruled,
            **({} if torch.cuda.is_available() else room_on_cpu(policy, cfg, max_rows)),
        },
        max_rank=None if adapters is None else adapters[1],
        revision=policy.revision,
        threads=threads,
        timeout_s=timeout_s,
        # The other of vLLM's runners takes them in another form.
        environment={} if rules is None else {"VLLM_USE_V2_MODEL_RUNNER": "0"},
    )
    try:
        return VllmServer(policy, process, timeout_s=timeout_s, rules=rules)
    except BaseException:
        process.close()
        raise


class VllmDecoder(GroupBook):
    """What `Decoder` does, by a vLLM engine. Not thread-safe.

    Its `counters` are steps, prompts and rows, and vLLM's own (`child.COUNTERS`), as they were up to a second ago.
    """

    def __init__(self, server: VllmServer, *, max_rows: int, adapters: bool) -> None:
        """`adapters` says whether groups name one."""
        queue = DecodeQueue(max_rows, by_cost=False)
        super().__init__(server.policy, queue, max_rows, names_adapters=adapters)
        self._server = server
        self._abort: list[tuple[int, int]] = []
        self._is_new = True
        self._counted = 0.0

    @property
    def running_rows(self) -> int:
        """Rows that get more tokens and have been begun."""
        waiting = sum(len(group.rows) for group in [*self._queue.waiting])
        return max(0, sum(group.unfinished for group in [*self._groups.values()]) - waiting)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to ask the engine."""
        return not self._abort and not any(group.unfinished for group in self._groups.values())

    def admit(self, prompt: EncodedPrompt, n: int, sampling: SamplingParams, **options: Any) -> int:
        """As `Decoder.admit`; the prompt comes with its source.

        Raises:
            ConfigError: as there, and for a temperature that vLLM would not keep to.
        """
        least, most = _TEMPERATURES
        if not sampling.greedy and not least <= sampling.temperature <= most:
            raise ConfigError(
                f"temperature={sampling.temperature:g}: the vLLM engine draws at {least:g} to {most:g}, and takes the "
                "likeliest tokens at 0"
            )
        return super().admit(prompt, n, sampling, **options)

    def step(self, failures: list[Failure] | None = None) -> list[Event]:
        """Hands over what has begun or ended since the last step; gives what the engine has made since.

        Raises:
            ProcessError: the engine is gone, or did not answer in time and has been ended.
        """
        failed: list[Failure] = []
        begin: list[dict[str, Any]] = []
        tensors: dict[str, torch.Tensor] = {}
        for group in self._queue.starting():
            begin.append(self._asked(group, len(begin), tensors))
            self.counters.update(prompts=1, rows=len(group.rows))
        now = time.monotonic()
        counts = now - self._counted >= _COUNT_EVERY_S
        abort, self._abort = self._abort, []
        answer, made = self._server.ask(
            "news", begin=begin, abort=abort, reset=self._is_new, counters=counts, tensors=tensors
        )
        self._is_new = False
        if counts:
            self._counted = now
            self.counters.update({name: int(value) - self.counters[name] for name, value in answer["counters"].items()})
        for handle, reason in answer["failed"]:
            self._fail({handle}, ModelError(f"vLLM refuses the request: {reason}"), failed)
        events: list[Event] = []
        drawn = iter(zip(made["tokens"].tolist(), made["logprobs"].tolist(), strict=True))
        for handle, place, count, finish, prompt, _ in answer["rows"]:
            tokens = [next(drawn) for _ in range(count)]
            events += self._told(handle, place, tokens, finish, prompt, failed)
        self.counters["steps"] += 1
        if failures is None and failed:
            raise failed[0].error
        if failures is not None:
            failures += failed
        return events

    def _free(self, group: Group) -> None:
        self._abort += [(group.handle, row.index) for row in group.rows]

    def _asked(self, group: Group, place: int, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        """A group as the process takes it; its prompt goes into `tensors`."""
        source, sampling = source_of(group.request.prompt), group.request.sampling
        tensors.update(prompt_tensors(source, place))
        rules = self._server.rules
        ruled: dict[str, Any] = {"min_tokens": sampling.min_new_tokens or 0}
        if rules is not None:  # which come before the least length, and may be undone by it
            lengths = {"min_new_tokens": sampling.min_new_tokens, "max_new_tokens": sampling.max_new_tokens}
            ruled = {"extra_args": {RULES: {"asked": dict(rules.asked), "eos": list(rules.eos), **lengths}}}
        return {
            "handle": group.handle,
            "version": group.adapter or BASE,
            "prompt": place,
            "images": len(source.images),
            "image_key": group.request.prompt.image_key,
            "seeds": [_seed(sampling.seed, row.index) for row in group.rows],
            "sampling": {**drawing_of(sampling, greedy=sampling.greedy), **ruled},
        }

    def _told(
        self,
        handle: int,
        place: int,
        tokens: list[tuple[int, float]],
        finish: str | None,
        prompt: int,
        failed: list[Failure],
    ) -> list[Event]:
        """What a row's next tokens are to whoever asked; nothing where it is wanted no more."""
        group = self._groups.get(handle)
        if group is None or group.rows[place].finish_reason is not None:
            return []
        row = group.rows[place]
        events: list[Event] = []
        expected = group.request.prompt.input_ids.numel()
        if prompt != expected:
            self._give_up(group, f"vLLM's processor makes {prompt} tokens of a prompt that has {expected} here", failed)
            return []
        for token, logprob in tokens:
            if row.finish_reason is not None:
                break
            if logprob != logprob:
                self._give_up(group, f"the model's log-probs are NaN at token {len(row.tokens)} of row {place}", failed)
                return events
            events.append(self._add_token(row, token, logprob))
        if row.finish_reason is None and finish is not None:
            self._give_up(group, f"vLLM ended row {place} before its time ({finish})", failed)
        elif row.finish_reason is not None and finish is None:
            self._abort.append((handle, place))
        return events

    def _give_up(self, group: Group, reason: str, failed: list[Failure]) -> None:
        self._free(group)
        self._fail({group.handle}, ModelError(reason), failed)


def _seed(seed: int, row: int) -> int:
    """63 bits, which vLLM takes."""
    return int(np.random.Philox(key=np.array([seed, row], dtype=np.uint64)).random_raw()) >> 1
