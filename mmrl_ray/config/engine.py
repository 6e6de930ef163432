"""`rollout.engine:` and `serving.policy.engine:` — what samples, and which of its arguments are a user's."""

from __future__ import annotations

from typing import Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from mmrl_ray.config.sections import Section, refuse

_RESERVED = {
    "model": "it is model.path",
    "tokenizer": "it is the model's",
    "revision": "it is model.revision",
    "trust_remote_code": "code of a checkpoint is never run",
    "logprobs_mode": "log-probs are those of the distribution that is sampled from",
    "enable_lora": "the adapter is the policy",
    "max_lora_rank": "it is model.lora.r",
    "worker_extension_cls": "adapters come in memory",
    "limit_mm_per_prompt": "pictures are the prompt's",
    "mm_processor_kwargs": "it is model.processor",
    "generation_config": "a checkpoint's own temperature and filters are not the policy's",
    "speculative_config": "drafts change what is sampled from",
    "logits_processors": "they change what is sampled from",
    "disable_log_stats": "its counters are among the run's metrics",
    "distributed_executor_backend": "the parts of a model are processes beside the worker, and end with it",
    "data_parallel_size": "rollout.workers has more engines",
}
"""vLLM's arguments that are not a user's, and why."""
_VLLM_ALONE = (
    *("python", "tensor_parallel_size", "gpu_memory_utilization", "max_model_len", "max_num_seqs", "enforce_eager"),
    "args",
)
_TOLD = ("dtype", "quantization")
"""Arguments of vLLM's, or what a server's are."""
_OPENAI_ALONE = ("url", "adapters", "model", "api_key_env")
_NEEDED = {"url": "of a vLLM server", "adapters": "a folder that the server and the rollout workers see"}


def _url_problems(url: str) -> dict[str, bool]:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        return {"engine.url is no URL: write http://host:port": True}
    return {
        f"engine.url={url}: write http://host:port or https://host": not usable and "@" not in url,
        "engine.url holds a user or a password, and a config is written into the run's folder: name the environment "
        "variable of a key in engine.api_key_env": "@" in url or bool(parts.query),
    }


class EngineSection(Section):
    """What samples. Whatever it is, the worker's own model scores: reference log-probs, states."""

    kind: Literal["local", "vllm", "openai"] = "local"
    """`local`: the worker itself, exact, and the same bit for bit each time. `vllm`: vLLM in a process beside the
    worker, for GPUs; without value heads, and a resumed run does not sample the same tokens again. `openai`: the same
    on a vLLM server that somebody else runs."""
    python: str | None = None
    """With `vllm`: an interpreter that has it; by default the one that `mmrl engine install vllm` has made."""
    tensor_parallel_size: int | None = Field(None, ge=1)
    """vLLM's argument, as those below: GPUs that share the model; as many as `resources.rollout.gpus`. On CPUs, as many
    processes."""
    gpu_memory_utilization: float | None = Field(None, gt=0, le=1)
    """Share of a GPU's memory (or a CPU's machine's) that it takes; the worker's own model lies beside it. On CPUs, by
    default, it has room for keys and values of an assignment instead, of 1 GiB at most (`args.kv_cache_memory_bytes`).
    """
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """The worker's own by default; another makes log-probs of another policy. With `openai`: the one that the server
    was started with."""
    quantization: str | None = None
    """None by default. With `openai`: the one that the server was started with."""
    max_model_len: int | None = Field(None, ge=1)
    """Tokens of a prompt and its completion; the model's context by default, on CPUs as far as 1 GiB goes."""
    max_num_seqs: int | None = Field(None, ge=1)
    """Completions at a time; on CPUs those of an assignment by default."""
    enforce_eager: bool | None = None
    """Without compiling and CUDA graphs: it starts in seconds, and samples slower on a GPU."""
    start_timeout_s: float = Field(240.0, gt=0)
    """An engine that has not loaded and compiled the model by then, or a server that does not answer, is an error."""
    args: dict[str, Any] = {}
    """Further arguments of vLLM's `EngineArgs`, by its names for them; one that it does not know is refused."""
    url: str | None = None
    """With `openai`: of the server, with or without `/v1`."""
    adapters: str | None = None
    """With `openai`: a folder that rollout workers write versions of the adapter to and the server reads them from,
    under the same path. What a run leaves there at its end may be deleted."""
    model: str | None = None
    """With `openai`: the server's name for the model without adapter; by default the first that it serves."""
    api_key_env: str | None = None
    """With `openai`: the environment variable that holds the server's key, where rollout workers run."""

    @property
    def told(self) -> str | None:
        """What a run should know of it before it begins."""
        if self.kind == "local":
            return None
        return (
            "vLLM samples: a resumed run goes on with other tokens than it would have sampled, each group by the "
            "version that its step says; value heads do not decode"
        )

    @property
    def arguments(self) -> dict[str, Any]:
        """vLLM's, those that are written."""
        named = {name: getattr(self, name) for name in (*_VLLM_ALONE, *_TOLD) if name not in ("python", "args")}
        return {**{name: value for name, value in named.items() if value is not None}, **self.args}

    def itemsize(self, own: int) -> int:
        """Bytes of a number of vLLM's, where one of the worker's has `own`."""
        return own if self.dtype is None else {"float32": 4}.get(self.dtype, 2)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        keys = {"vllm": (*_VLLM_ALONE, *_TOLD), "openai": (*_OPENAI_ALONE, *_TOLD)}
        own = keys.get(self.kind, ())
        refuse(
            {
                **{
                    f"{', '.join(others)}: keys of engine.kind={kind}, and this is kind={self.kind}": bool(others)
                    for kind, names in keys.items()
                    if (others := [n for n in names if n not in own and getattr(self, n) not in (None, {})])
                },
                **{f"args.{name} is not yours to choose: {why}": name in self.args for name, why in _RESERVED.items()},
                **{f"args.{name}: write it as engine.{name}": name in self.args for name in (*_VLLM_ALONE, *_TOLD)},
                **{
                    f"engine.kind=openai needs {name}: {what}": self.kind == "openai" and getattr(self, name) is None
                    for name, what in _NEEDED.items()
                },
                **(_url_problems(self.url) if self.url is not None else {}),
            }
        )
        return self
