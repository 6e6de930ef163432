"""An export on the Hugging Face Hub: what it is told in a card, a repository, and one commit that holds all of it.

The token is `huggingface_hub`'s own affair (`HF_TOKEN`, `hf auth login`) and in no message. What could go wrong after
an export that took minutes is asked before it: whether there is a token, and whether the Hub takes it. Files become
visible by one commit, the last thing that happens; weights and configs of an earlier export that the new one does not
replace go by the same commit: an `adapter_config.json` beside a merged model would be put on it, unasked.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, EvalResult, HfApi, ModelCardData, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from mmrl_ray.config.paths import place_name
from mmrl_ray.errors import ConfigError, ExportError, one_line
from mmrl_ray.export.card import Exported, Measure, license_of, measures_of
from mmrl_ray.policy.model_folder import PROCESSOR_FILES

_HEADLINES = ("cider_d", "bleu_4", "rouge_l", "reward")
"""Measures that the Hub is told, where they are known."""
_OF_A_MODEL = (
    *("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "config.json"),
    *("generation_config.json", "adapter_config.json", *PROCESSOR_FILES),
)
_FAILURES = (HfHubHTTPError, httpx.HTTPError, OSError, ValueError, RuntimeError)
"""What an upload raises."""
_BRIEF = 300
_UNAUTHORISED = (401, 403)


def metadata(exported: Exported) -> ModelCardData:
    """The front matter of a card, as the Hub reads it."""
    run, base = exported.run, exported.base
    _, after, _, _ = measures_of(run, exported.chosen)
    source = exported.cfg.data.eval
    results = [
        EvalResult(
            task_type="image-to-text",
            task_name="Image captioning",
            dataset_type=place_name(source),
            dataset_name=place_name(source),
            dataset_split="held out",
            metric_type=name,
            metric_name=name,
            metric_value=round(float(after[name]["value"]), 6),
            metric_args=_interval(after[name]),
        )
        for name in _HEADLINES
        if name in after and source is not None
    ]
    algorithm = exported.cfg.algorithm.rpartition(":")[2]
    return ModelCardData(
        model_name=run.name,
        base_model=base.hub_id,
        base_model_relation=None if base.hub_id is None else "finetune" if exported.merged else "adapter",
        library_name="transformers" if exported.merged else "peft",
        pipeline_tag="image-text-to-text",
        tags=[
            "image-captioning",
            "reinforcement-learning",
            "mmrl_ray",
            algorithm,
            *([] if exported.merged else ["lora"]),
        ],
        eval_results=results or None,
        **license_of(base),
    )


def _interval(measure: Measure) -> dict[str, Any] | None:
    if measure.get("low") is None or measure.get("high") is None:
        return None
    return {"interval": 0.95, "low": round(float(measure["low"]), 6), "high": round(float(measure["high"]), 6)}


@dataclass(frozen=True, slots=True)
class Delivery:
    """A repository to which an export can be sent."""

    repo: str
    private: bool
    api: Any
    """`HfApi`."""

    @classmethod
    def prepared(cls, repo: str, *, private: bool) -> Delivery:
        """Asks the Hub whether it knows the token, and creates nothing.

        Raises:
            ConfigError: the repository's name cannot be one, there is no token, or the Hub refuses it.
            ExportError: the Hub cannot be reached.
        """
        try:
            validate_repo_id(repo)
        except HFValidationError as error:
            raise ConfigError(f"--push-to-hub {repo}: write NAME or OWNER/NAME: {one_line(error)}") from error
        token = get_token()
        if token is None:
            raise ConfigError(
                f"--push-to-hub {repo} needs a token of the Hub, and there is none: log in with `hf auth login`, or "
                "set HF_TOKEN to one that may write"
            )
        api = HfApi(token=token)
        try:
            api.whoami()
        except OfflineModeIsEnabled as error:
            raise ConfigError(f"--push-to-hub {repo}: the Hub is switched off here: unset HF_HUB_OFFLINE") from error
        except HfHubHTTPError as error:
            if error.response is not None and error.response.status_code in _UNAUTHORISED:
                raise ConfigError(
                    "the Hub refuses the token: log in again with `hf auth login`, or set HF_TOKEN to another"
                ) from error
            raise ExportError(f"the Hub cannot be asked: {_told(error, token)}; try again later") from error
        except _FAILURES as error:
            raise ExportError(f"the Hub cannot be reached at {api.endpoint}: {_told(error, token)}") from error
        return cls(repo, private, api)

    def send(self, folder: Path) -> str:
        """Makes the repository, where there is none, and puts the export into it; returns its address.

        Raises:
            ExportError: it was not taken; the repository is as it was, or empty. Or it was to be private, and is there
                and public.
        """
        with self._explained(folder):
            made = self.api.create_repo(self.repo, private=True if self.private else None, exist_ok=True)
            repo = made.repo_id
            info = self.api.model_info(repo, files_metadata=False)
            if self.private and not info.private:
                raise ExportError(
                    f"{repo} is there already, and public: make it private in its settings first, or name another; the "
                    f"export is in {folder}"
                )
            files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
            before = {each.rfilename for each in info.siblings or ()} - set(files)
            stale = sorted(n for n in before if any(fnmatch.fnmatch(n, pattern) for pattern in _OF_A_MODEL))
            self.api.create_commit(
                repo,
                [
                    *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(folder / name)) for name in files),
                    *(CommitOperationDelete(path_in_repo=name) for name in stale),
                ],
                commit_message="mmrl export",
            )
        return str(made)

    @contextmanager
    def _explained(self, folder: Path) -> Iterator[None]:
        try:
            yield
        except _FAILURES as error:
            raise ExportError(
                f"{self.repo} did not take the export: {_told(error, self.api.token)}; it is in {folder}: send it from "
                f"there with `hf upload {self.repo} {folder}`"
            ) from error


def _told(error: Exception, token: str | None) -> str:
    """In one line, whatever somebody else put into it."""
    text = one_line(error) or type(error).__name__
    if token:
        text = text.replace(token, "…")
    return text if len(text) <= _BRIEF else f"{text[: _BRIEF - 1]}…"
