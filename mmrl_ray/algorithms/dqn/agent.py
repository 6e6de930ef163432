"""The trained agent without RLlib: greedy captions of any pictures, the files it is kept in, and a run's checkpoints.

    agent/
        agent.safetensors   the Q network, mean and deviation of the features
        agent.json          fusion, sizes, words, template

    checkpoints/step-000800/
        agent.safetensors  agent.json     loads by `Agent.load`
        state.safetensors                 learner (target network, optimiser) and replay buffer; no pickle
        state.json                        counters
        manifest.json                     sha256 of every file above, written last

Checkpoints lie beside those of other runs in the folder, by the same rules (`learner/checkpoints.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors

from mmrl_ray.algorithms.dqn.algorithm import ValueBasedSection
from mmrl_ray.algorithms.dqn.exploration import boltzmann_probabilities, epsilon_greedy
from mmrl_ray.algorithms.dqn.network import FeatureScale, QNetwork, QShape, Vocabulary
from mmrl_ray.errors import CheckpointError, ModelError
from mmrl_ray.run_records.checkpoint_choice import prune_checkpoints
from mmrl_ray.run_records.run_dir import RunDir, checkpoint_name

AGENT_FOLDER = "agent"
"""Of a run that took all its steps."""
WEIGHTS_FILE = "agent.safetensors"
FACTS_FILE = "agent.json"
_FORMAT = 1
_PARTS = ("encoder.", "af.", "vf.")
_BATCH = 256


@dataclass(frozen=True)
class AgentFacts:
    """What an agent is made of, beside its weights."""

    shape: QShape
    fusion: str
    width: int
    dueling: bool
    blind: bool
    vocabulary: Vocabulary
    scale: FeatureScale

    @classmethod
    def of(
        cls, cfg: ValueBasedSection, vocabulary: Vocabulary, scale: FeatureScale, image_shape: tuple[int, ...]
    ) -> Self:
        """The facts of an agent of that config; `image_shape` is [L, d]."""
        shape = QShape(image_shape[0], image_shape[1], len(vocabulary.words), vocabulary.max_words)
        return cls(shape, cfg.fusion, cfg.width, cfg.dueling, cfg.blind, vocabulary, scale)


@dataclass
class Saying:
    """One caption as it is said."""

    actions: list[int]
    logprobs: list[float]
    """Of each action."""
    ended: bool
    """By the agent's end, or because there is no room for another word."""

    def words(self, vocabulary: Vocabulary) -> list[int]:
        """The actions that are words."""
        return [action for action in self.actions if action != vocabulary.end]


class Agent:
    """A Q network that captions greedily, or by chance."""

    def __init__(self, facts: AgentFacts, weights: Mapping[str, torch.Tensor]) -> None:
        """`weights` may be the state of a whole RLlib module: what is not the network's is left aside.

        Raises:
            ModelError: they are of another network.
        """
        self.facts = facts
        self.network = QNetwork(facts.shape, facts.fusion, facts.width, dueling=facts.dueling)
        kept = {name: tensor for name, tensor in weights.items() if name.startswith(_PARTS)}
        try:
            self.network.load_state_dict(kept)
        except RuntimeError as error:
            raise ModelError(f"the agent's weights do not fit its network: {str(error).splitlines()[0]}") from error
        self.network.eval().requires_grad_(False)

    def captions(self, images: np.ndarray, *, epsilon: float = 0.0, seed: int = 0) -> list[str]:
        """One caption a picture, greedy unless ε is above 0; 1 is the policy that draws any word.

        Args:
            images: float32 [N, L, d], as `features.image_features` makes them.
            epsilon: probability of a random word.
            seed: of those.
        """
        draws = torch.Generator().manual_seed(seed)
        scaled = self.facts.scale(images, blind=self.facts.blind)
        batches = (scaled[start : start + _BATCH] for start in range(0, len(scaled), _BATCH))
        return [text for batch in batches for text in self._captions(batch, epsilon, draws)]

    def say(
        self, image: np.ndarray, rows: int, *, temperature: float, greedy: bool, seed: int, most: int
    ) -> list[Saying]:
        """`rows` captions of one picture, drawn by the Boltzmann distribution of their Q-values, or greedily.

        Args:
            image: float32 [L, d], as `features.prompt_features` makes it.
            rows: how many.
            temperature: τ of the distribution, whose log-probs are told in either case.
            greedy: the best word each time.
            seed: of the draws.
            most: words at most.
        """
        vocabulary, draws = self.facts.vocabulary, torch.Generator().manual_seed(seed % 2**63)
        seen = self.facts.scale(image[None], blind=self.facts.blind)
        said = [Saying([], [], ended=False) for _ in range(rows)]
        going = list(range(rows))
        while going:
            words = [said[i].words(vocabulary) for i in going]
            q, valid = self._q(np.repeat(seen, len(going), axis=0), words)
            chances = boltzmann_probabilities(q, temperature, valid)
            chosen = (
                epsilon_greedy(q, 0.0, valid=valid) if greedy else torch.multinomial(chances, 1, generator=draws)[:, 0]
            )
            told = chances.gather(1, chosen[:, None])[:, 0].log()
            for i, action, logprob in zip(going, chosen.tolist(), told.tolist(), strict=True):
                said[i].actions.append(action)
                said[i].logprobs.append(logprob)
                said[i].ended = vocabulary.has_ended(said[i].words(vocabulary), action)
            going = [i for i in going if not said[i].ended and len(said[i].actions) < most]
        return said

    def _q(self, images: np.ndarray, said: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Q [B, A] behind so many words, and which actions are allowed."""
        vocabulary = self.facts.vocabulary
        words = torch.from_numpy(np.stack([vocabulary.observed(each) for each in said]))
        valid = torch.from_numpy(np.stack([vocabulary.valid(len(each)) for each in said])).bool()
        return self.network({"image": torch.from_numpy(images), "words": words}), valid

    def _captions(self, images: np.ndarray, epsilon: float, draws: torch.Generator) -> list[str]:
        vocabulary = self.facts.vocabulary
        said: list[list[int]] = [[] for _ in images]
        going = list(range(len(images)))
        while going:
            q, valid = self._q(images[going], [said[i] for i in going])
            actions = epsilon_greedy(q, epsilon, draws, valid).tolist()
            for i, action in zip(going, actions, strict=True):
                if action != vocabulary.end:
                    said[i].append(action)
            going = [i for i, action in zip(going, actions, strict=True) if not vocabulary.has_ended(said[i], action)]
        return [vocabulary.caption(caption) for caption in said]

    def save(self, folder: Path) -> None:
        """Writes both files into a folder that is there."""
        facts = self.facts
        scale = {"scale/mean": facts.scale.mean, "scale/std": facts.scale.std}
        tensors = {
            **{name: tensor.detach().cpu().contiguous() for name, tensor in self.network.state_dict().items()},
            **{name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in scale.items()},
        }
        (folder / WEIGHTS_FILE).write_bytes(dump_tensors(tensors))
        document = {
            "format": _FORMAT,
            "shape": facts.shape._asdict(),
            "fusion": facts.fusion,
            "width": facts.width,
            "dueling": facts.dueling,
            "blind": facts.blind,
            "vocabulary": asdict(facts.vocabulary),
        }
        (folder / FACTS_FILE).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """What `save` wrote.

        Raises:
            ModelError: it is not there, or of another format.
        """
        try:
            document = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
            tensors = load_tensors((folder / WEIGHTS_FILE).read_bytes())
            if document["format"] != _FORMAT:
                raise ModelError(f"{folder} has format {document['format']}, this version reads {_FORMAT}")
            facts = _facts(document, tensors)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{folder} holds no agent that can be read: {error}") from error
        return cls(facts, tensors)


def _facts(document: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> AgentFacts:
    told = document["vocabulary"]
    template: Sequence[Sequence[str]] | None = told["template"]
    return AgentFacts(
        shape=QShape(**document["shape"]),
        fusion=document["fusion"],
        width=document["width"],
        dueling=document["dueling"],
        blind=document["blind"],
        vocabulary=Vocabulary(
            tuple(told["words"]), told["max_words"], None if template is None else tuple(map(tuple, template))
        ),
        scale=FeatureScale(tensors["scale/mean"].numpy(), tensors["scale/std"].numpy()),
    )


@dataclass(frozen=True, slots=True)
class ValueState:
    """What a run goes on from."""

    words: int
    """Said by all workers since the run began."""
    learner: Mapping[str, torch.Tensor]
    """As `TemporalDifferenceLearner.captured` names them."""
    replay: Mapping[str, torch.Tensor]
    """As `replay.episodes_to_tensors` names them."""


def save_value_checkpoint(run: RunDir, step: int, agent: Agent, state: ValueState, keep: int) -> None:
    """Writes the checkpoint of `step` optimiser steps, then removes all but the newest `keep`.

    Raises:
        RunError: it cannot be written; what was there before is as it was.
    """
    tensors = {f"learner/{name}": tensor for name, tensor in state.learner.items()}
    tensors |= {f"replay/{name}": tensor for name, tensor in state.replay.items()}
    with run.staging_folder() as folder:
        agent.save(folder)
        (folder / "state.safetensors").write_bytes(dump_tensors({k: t.contiguous() for k, t in tensors.items()}))
        (folder / "state.json").write_text(json.dumps({"format": _FORMAT, "step": step, "words": state.words}))
        run.commit_folder(checkpoint_name(step), folder, facts={"step": step})
    prune_checkpoints(run, step, keep)


def load_value_checkpoint(run: RunDir, step: int) -> ValueState:
    """What `save_value_checkpoint` wrote.

    Raises:
        CheckpointError: it is missing, damaged, or of a later format.
    """
    name = checkpoint_name(step)
    run.verify_manifest(name)
    facts = run.read_json(f"{name}/state.json")
    if facts["format"] != _FORMAT:
        raise CheckpointError(f"{run.full_path(name)} has format {facts['format']}, this version reads {_FORMAT}")
    tensors = load_tensors(run.read_bytes(f"{name}/state.safetensors"))
    parts: dict[str, dict[str, torch.Tensor]] = {"learner": {}, "replay": {}}
    for key, tensor in tensors.items():
        part, _, rest = key.partition("/")
        parts[part][rest] = tensor
    return ValueState(int(facts["words"]), parts["learner"], parts["replay"])


def save_agent_folder(run: RunDir, agent: Agent, step: int) -> None:
    """Commits the final agent; a RunError where it cannot be written."""
    with run.staging_folder() as folder:
        agent.save(folder)
        run.commit_folder(AGENT_FOLDER, folder, facts={"step": step})
