"""A teacher: another model, on resources of its own, that scores what the policy samples.

    rollout worker ── samples, sampled tokens ──▶ TeacherActor ──▶ Teacher: its own prompt of each sample, log-probs
                   ◀── log-probs, or a reason ──

The teacher reads the student's tokens as they are, so that both must have the same vocabulary (`refuse_other_tokens`,
found out before anything is started). Prompts it makes itself, by its own processor and chat template: its pictures may
have another size and another number of tokens. It stays as it is; nothing of it depends on the policy's version, and
which of several actors scores changes no number.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from mmrl_ray.config import Config
from mmrl_ray.config.schema import torch_threads
from mmrl_ray.config.sections import TeacherSection
from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import MMRLError, ModelError, PlacementError, RolloutError, said
from mmrl_ray.rollouts.pool_settings import demand_of

if TYPE_CHECKING:
    import torch

    from mmrl_ray.policy.model import Policy

logger = logging.getLogger(__name__)
_RESTARTS = 3
_CACHE_BYTES = 256 << 20
"""Of the teacher's vision features."""
_SHOWN = 3

Scored = list["torch.Tensor"] | str
"""float32 [T] of each completion of a sample, or why the teacher cannot read the sample."""


def refuse_other_tokens(student: Policy, teacher: Policy) -> None:
    """Refuses a teacher to which the student's tokens would say something else.

    Raises:
        ModelError: names the first tokens that differ, and the numbers of both.
    """
    ours, theirs = student.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()
    what = f"teacher {teacher.path!r} cannot score what {student.path!r} samples: "
    remedy = "; a teacher reads the student's tokens as they are: take one with the same tokenizer"
    if ours != theirs:
        differing = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
        shown = ", ".join(f"{t!r} is {theirs.get(t)} there and {ours.get(t)} here" for t in differing[:_SHOWN])
        raise ModelError(
            f"{what}its vocabulary has {len(theirs)} tokens and the student's {len(ours)}, of which {len(differing)} "
            f"differ ({shown}){remedy}"
        )
    if teacher.end_id != student.end_id:
        end = [policy.tokenizer.convert_ids_to_tokens(policy.end_id) for policy in (teacher, student)]
        raise ModelError(f"{what}its answers end with {end[0]!r} and the student's with {end[1]!r}{remedy}")
    if teacher.vocab_size < student.vocab_size:
        raise ModelError(
            f"{what}it has logits for {teacher.vocab_size} tokens, and the student may say any of {student.vocab_size}"
            f"{remedy}"
        )
    forbidden = sorted(set(teacher.image_token_ids) - set(student.image_token_ids))
    if said_by_student := [token for token in forbidden if token < student.vocab_size]:
        shown = ", ".join(map(repr, teacher.tokenizer.convert_ids_to_tokens(said_by_student[:_SHOWN])))
        raise ModelError(f"{what}it never says {shown}, which the student may{remedy}")


class Teacher:
    """Loads it, and scores with it. One thread at a time."""

    def __init__(self, section: TeacherSection, *, device: str) -> None:
        """Raises MMRLError: model or adapter cannot be used."""
        from mmrl_ray.policy.load import load_policy
        from mmrl_ray.policy.lora.adapter import load_adapter, merge_adapter
        from mmrl_ray.policy.vision import VisionCache

        self.policy = load_policy(section.model, device=device)
        if section.adapter is not None:
            load_adapter(self.policy, os.path.expanduser(section.adapter))
            merge_adapter(self.policy)
        self.policy.model.requires_grad_(False)
        self._cache = VisionCache(_CACHE_BYTES)
        self._path: Any = None

    def logprobs(
        self, samples: Sequence[Sample], completions: Sequence[Sequence[torch.Tensor]], temperature: float
    ) -> list[Scored]:
        """Of each sample's completions int64 [T], at the temperature that they were sampled at.

        Raises:
            ModelError: the teacher's ways of scoring do not agree, or it gives a token no probability at all.
        """
        from mmrl_ray.policy.memory import scored_parts
        from mmrl_ray.policy.prompts import check_context, encode_prompts

        found: list[Scored] = ["" for _ in samples]
        prompts = {}
        for i, (sample, group) in enumerate(zip(samples, completions, strict=True)):
            try:
                (prompts[i],) = encode_prompts(self.policy, [sample])
                check_context(self.policy, prompts[i], max(tokens.numel() for tokens in group))
            except MMRLError as error:
                prompts.pop(i, None)
                found[i] = f"the teacher cannot read it: {type(error).__name__}: {error}"
        places = list(prompts)
        longest = [max(tokens.numel() - 1 for tokens in completions[i]) for i in places]
        sizes = [
            (len(completions[i]), prompts[i].input_ids.numel() + most) for i, most in zip(places, longest, strict=True)
        ]
        for part in scored_parts(sizes, self.policy.key_bytes):
            chosen = places[part]
            rows = self._score([prompts[i] for i in chosen], [completions[i] for i in chosen], temperature)
            for i, group in zip(chosen, rows, strict=True):
                found[i] = group
        return found

    def _score(self, prompts: Any, completions: Sequence[Sequence[torch.Tensor]], temperature: float) -> Any:
        import torch

        from mmrl_ray.policy.parity import choose_path
        from mmrl_ray.policy.scoring.prefix import score_completions
        from mmrl_ray.policy.vision import vision_features

        with torch.no_grad():
            if self._path is None:
                choice = choose_path(self.policy, prompts[:2], temperature=temperature)
                self._path = choice.path
                logger.warning("the teacher's scoring path: %s (%s)", choice.path, choice.reason)
            features = vision_features(self.policy, prompts, self._cache) if self.policy.inject_vision else None
            scores = score_completions(self.policy, prompts, features, completions, temperature, path=self._path)
            logprobs, mask = scores.logprobs.cpu(), scores.mask.cpu()
        if not bool(torch.isfinite(logprobs[mask]).all()):
            raise ModelError(f"teacher {self.policy.path!r} gave NaN or infinity for the log-prob of a sampled token")
        rows = iter(zip(logprobs, mask, strict=True))
        return [[row[valid].clone() for row, valid in itertools.islice(rows, len(group))] for group in completions]


class TeacherActor:
    """A `Teacher` in a process of its own: loaded at the first call, also of one that took a lost one's place."""

    def __init__(self, cfg: Config) -> None:
        self._cfg = cfg
        self._teacher: Teacher | None = None

    def load(self) -> None:
        """Returns when it is ready; raises as `Teacher`."""
        import torch

        share, section = self._cfg.resources.teacher, self._cfg.teacher
        assert section is not None
        if self._teacher is None:
            torch.set_num_threads(torch_threads(self._cfg, share, os.cpu_count() or 1))
            self._teacher = Teacher(section, device="cuda" if share.gpus else "cpu")

    def logprobs(self, *args: Any) -> list[Scored]:
        """As `Teacher.logprobs`."""
        self.load()
        assert self._teacher is not None
        return self._teacher.logprobs(*args)


@dataclass
class TeacherClient:
    """What rollout workers hold; picklable."""

    handles: Sequence[Any]
    timeout_s: float
    asked: int = 0
    """How often, by this worker."""

    def logprobs(
        self, samples: Sequence[Sample], completions: Sequence[Sequence[torch.Tensor]], temperature: float
    ) -> list[Scored]:
        """As `Teacher.logprobs`, by the next actor in turn.

        Raises:
            RolloutError: it is gone, or did not answer in time.
        """
        handle = self.handles[self.asked % len(self.handles)]
        self.asked += 1
        bare = [[tokens.cpu() for tokens in group] for group in completions]
        return _answer(handle.logprobs.remote(samples, bare, temperature), self.timeout_s)


def _answer(reference: Any, timeout_s: float) -> Any:
    try:
        return ray.get(reference, timeout=timeout_s)
    except GetTimeoutError:
        raise RolloutError(
            f"the teacher did not answer within {timeout_s:g} s: raise teacher.workers, resources.teacher or "
            "rollout.assignment_timeout_s, or lower rollout.groups_per_assignment"
        ) from None
    except RayTaskError as error:
        if isinstance(error.cause, MMRLError):
            raise error.cause from None
        raise RolloutError(f"the teacher failed: {said(error.cause)}") from error
    except RayError as error:
        raise RolloutError(f"the teacher's process is gone: {said(error)}") from error


@contextmanager
def teachers(cfg: Config) -> Iterator[TeacherClient | None]:
    """The run's teachers, loaded, while the block lasts; None where it has none.

    Raises:
        PlacementError: Ray had no room for them within `resources.placement_timeout_s`.
        MMRLError: as `Teacher`.
    """
    section, share, limit = cfg.teacher, cfg.resources.teacher, cfg.resources.placement_timeout_s
    if section is None:
        yield None
        return
    options: dict[str, Any] = {"num_cpus": share.cpus, "num_gpus": share.gpus}
    if share.node_labels:
        options["label_selector"] = dict(share.node_labels)
    actor = ray.remote(TeacherActor).options(max_restarts=_RESTARTS, max_task_retries=_RESTARTS, **options)
    handles: list[Any] = [actor.remote(cfg) for _ in range(section.workers)]
    try:
        try:
            for reference in [handle.load.remote() for handle in handles]:
                ray.get(reference, timeout=limit)
        except GetTimeoutError:
            raise PlacementError(
                f"{section.workers} teachers were not placed and loaded within {limit:g} s: one asks for "
                f"{demand_of(share.cpus, share.gpus, share.node_labels)}; lower resources.teacher or teacher.workers, "
                "raise resources.placement_timeout_s, or add nodes"
            ) from None
        except RayError as error:
            if isinstance(error, RayTaskError) and isinstance(error.cause, MMRLError):
                raise error.cause from None
            raise RolloutError(f"the teacher cannot be loaded: {said(error)}") from error
        yield TeacherClient(handles, cfg.rollout.assignment_timeout_s)
    finally:
        for handle in handles:
            ray.kill(handle, no_restart=True)
