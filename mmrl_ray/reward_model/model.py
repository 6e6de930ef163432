"""The learned multimodal reward: picture and caption in, a mean and a σ out; and the folder it is kept in.

    picture ──image encoder──▶ tokens ─┐                 ┌─▶ mean head k      ─┐
                                       ├─fusion─▶ vector ┤                     ├─▶ μ, σ² = mean σ_k² + variance μ_k
    caption ──text encoder───▶ tokens ─┘                 └─▶ log-variance head ─┘

`N` captions, `K` heads, all on one vector or each on that of a member with encoders and a fusion of its own. σ² has two
parts: what raters disagree about (the heads' own σ_k², Kendall and Gal 2017) and what the model does not know (how far
the heads' means are apart, Lakshminarayanan et al. 2017; 0 for K = 1). Heads that share encoders share their errors:
where training said nothing, they agree on something that none of them knows. Members with priors of their own do not.

The encoders make contextual tokens of one width of `B` pictures or captions, padding masked: `L` tokens, `S` pixels a
side, `d` the width. Positions are part of every encoder: without, "red above blue" would equal "blue above red".

The folder holds `reward_model.json` (what it is), `model.safetensors` (weights) and `report.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from mmrl_ray.data import atomic
from mmrl_ray.errors import ModelError, one_line
from mmrl_ray.metrics.text import Tokenizer, words
from mmrl_ray.reward_model.fusion import build_fusion
from mmrl_ray.reward_model.vision_source import Picture, PictureInputs, RewardModelSpec, VisionSource

MODALITIES = ("image", "text")
_ATTENTION_HEADS = 4
_LOG_VARIANCE_RANGE = (-12.0, 8.0)
"""In units of the ratings' spread: beyond it a likelihood overflows before it says anything."""
_CAPTIONS_AT_ONCE = 256
PATCH = 16
"""Pixels a side that one token of the own image encoder stands for."""
PAD, UNKNOWN = 0, 1
"""Ids before those of words."""
_NEIGHBOURS = 5
"""Words that a convolution of the text encoder sees at once."""
_CONVOLUTIONS = 2
SPEC, WEIGHTS, REPORT = "reward_model.json", "model.safetensors", "report.json"
_FORMAT = RewardModelSpec.model_fields["format"].default

Tokens = tuple[torch.Tensor, torch.Tensor]
"""[B, L, d] and its mask, bool [B, L]."""


class Encoded(NamedTuple):
    """Tokens of B pictures and N captions, with their masks."""

    image: torch.Tensor
    """[B, L, d]."""
    image_mask: torch.Tensor
    """bool [B, L]."""
    text: torch.Tensor
    """[N, T, d]."""
    text_mask: torch.Tensor
    """bool [N, T]."""


class HeadOutputs(NamedTuple):
    """Outputs of the K heads, in units inside the model."""

    mean: torch.Tensor
    """[N, K]."""
    log_variance: torch.Tensor
    """[N, K]."""
    weights: torch.Tensor | None
    """[N, 2], how much image and text count, where the fusion says so; in the mean of the members."""


class Scores(NamedTuple):
    """In units of the ratings."""

    mean: torch.Tensor
    """[N]."""
    sigma: torch.Tensor
    """[N]."""
    weights: torch.Tensor | None
    """[N, 2], as `HeadOutputs.weights`."""


class Prior(nn.Module):
    """A random function of a caption that is never trained (Osband et al. 2018, arXiv:1806.03335).

    A member adds its own to its mean and learns to cancel it on the captions that training shows, on no others. Of the
    caption alone: a policy chooses its words, not the picture.
    """

    def __init__(self, vocabulary: int, spec: RewardModelSpec) -> None:
        super().__init__()
        self.scale = spec.prior
        self.text = TextEncoder(vocabulary, spec.max_words, spec.width, 1, _ATTENTION_HEADS)
        self.head = nn.Linear(spec.width, 1, bias=False)
        nn.init.normal_(self.head.weight, std=spec.width**-0.5)
        self.requires_grad_(False)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        """[N, 1] of word ids [N, T]; about `scale` in size however long a caption is."""
        tokens, mask = self.text(words)
        summed = self.head(tokens * mask[:, :, None]).sum(dim=1)
        return self.scale * summed / mask.sum(dim=1, keepdim=True).to(summed.dtype).sqrt()


class Member(nn.Module):
    """Encoders of both modalities, a fusion, and heads on it."""

    def __init__(self, spec: RewardModelSpec, vocabulary: int, heads: int) -> None:
        """Random weights from torch's generator; `vocabulary` is the number of word ids."""
        super().__init__()
        dim = spec.width
        self.image: PixelEncoder | FeatureEncoder = (
            PixelEncoder(spec.image_size, dim, spec.layers, _ATTENTION_HEADS)
            if spec.feature_dim is None
            else FeatureEncoder(spec.feature_dim, dim)
        )
        self.text = TextEncoder(vocabulary, spec.max_words, dim, spec.layers, _ATTENTION_HEADS)
        self.fusion = build_fusion(spec.fusion, dict.fromkeys(MODALITIES, dim), dim)
        self.means = nn.ModuleList(_head(dim) for _ in range(heads))
        self.log_variances = nn.ModuleList(_head(dim) for _ in range(heads if spec.sigma_trained else 0))
        self.prior = Prior(vocabulary, spec) if spec.prior else None

    def encode(self, pictures: PictureInputs, words: torch.Tensor) -> Encoded:
        """Tokens of pictures (see `VisionSource`) and of captions, int64 [N, T] (see `Vocabulary.encode`)."""
        return Encoded(*self.image(*pictures), *self.text(words))

    def judge(self, encoded: Encoded, of: torch.Tensor, words: torch.Tensor) -> HeadOutputs:
        """What its heads say of the N captions encoded; `of` int64 [N] is the picture that each describes.

        Raises:
            ValueError: the shapes do not fit.
        """
        image, image_mask, text, text_mask = encoded
        fused = self.fusion({"image": image[of], "text": text}, {"image": image_mask[of], "text": text_mask})
        mean = torch.cat([head(fused.vector) for head in self.means], dim=-1)
        if self.prior is not None:
            mean = mean + self.prior(words)
        if not self.log_variances:
            return HeadOutputs(mean, torch.zeros_like(mean), fused.weights)
        log_variance = torch.cat([head(fused.vector) for head in self.log_variances], dim=-1)
        return HeadOutputs(mean, log_variance.clamp(*_LOG_VARIANCE_RANGE), fused.weights)

    def forward(self, pictures: PictureInputs, of: torch.Tensor, words: torch.Tensor) -> HeadOutputs:
        """`judge` of what `encode` makes."""
        return self.judge(self.encode(pictures, words), of, words)


class RewardModel(nn.Module):
    """Encoders, fusions and heads of a learned reward, made from its `RewardModelSpec`: scores captions of pictures."""

    def __init__(self, spec: RewardModelSpec) -> None:
        """Random weights from torch's generator."""
        super().__init__()
        self.spec = spec
        self.vocabulary = Vocabulary(spec.vocabulary, spec.tokenizer)
        heads = [spec.heads] if spec.ensemble == "heads" else [1] * spec.heads
        members = nn.ModuleList(Member(spec, len(self.vocabulary), count) for count in heads)
        self.members = cast("Sequence[Member]", members)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def forward(self, pictures: PictureInputs, of: torch.Tensor, words: torch.Tensor) -> HeadOutputs:
        """What the heads of all members say of N captions, int64 [N, T]; see `Member`."""
        means, log_variances, weights = zip(*(member(pictures, of, words) for member in self.members), strict=True)
        shared = None if weights[0] is None else torch.stack(weights).mean(dim=0)
        return HeadOutputs(torch.cat(means, dim=1), torch.cat(log_variances, dim=1), shared)

    def scores(self, outputs: HeadOutputs) -> Scores:
        """The heads' answers as one mean and one σ a caption: σ² = mean of σ_k² + variance of μ_k."""
        spread = self.spec.spread
        variance = outputs.log_variance.exp().mean(dim=1) + outputs.mean.var(dim=1, unbiased=False)
        return Scores(self.spec.center + spread * outputs.mean.mean(dim=1), spread * variance.sqrt(), outputs.weights)

    @torch.no_grad()
    def score(self, source: VisionSource, pictures: Sequence[Picture], captions: Sequence[str]) -> Scores:
        """Scores of captions, each with the picture that it describes; equal pictures are encoded once. On the CPU.

        Raises:
            ImageError: a picture cannot be decoded.
            DataError: a picture that the image encoder does not take.
        """
        parts = []
        for start in range(0, len(captions), _CAPTIONS_AT_ONCE):
            some = slice(start, start + _CAPTIONS_AT_ONCE)
            distinct = list(dict.fromkeys(pictures[some]))
            places = {picture: i for i, picture in enumerate(distinct)}
            of = torch.tensor([places[picture] for picture in pictures[some]], device=self.device)
            words = self.vocabulary.encode(captions[some], self.spec.max_words).to(self.device)
            parts.append(self.scores(self(source.inputs(distinct, self.device), of, words)))
        if not parts:
            return Scores(torch.zeros(0), torch.zeros(0), None)
        weights = [part.weights.cpu() for part in parts if part.weights is not None]
        return Scores(
            torch.cat([part.mean for part in parts]).cpu(),
            torch.cat([part.sigma for part in parts]).cpu(),
            torch.cat(weights) if weights else None,
        )


def _head(dim: int) -> nn.Module:
    """An MLP to one number a row; under a linear head an additive fusion would cancel what a pair shares."""
    return nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, 1))


class PixelEncoder(nn.Module):
    """A small image encoder of its own: convolutions down to a token for each 16 × 16 pixels, then attention.

    The convolutions overlap, so that a shape looks alike wherever it lies; without norms between them, few steps of
    training reach the first.
    """

    def __init__(self, image_size: int, dim: int, layers: int, heads: int) -> None:
        super().__init__()
        half = max(dim // 2, 8)
        self.stem = nn.Sequential(
            nn.Conv2d(3, half, 5, stride=2, padding=2),
            nn.GroupNorm(1, half),
            nn.GELU(),
            nn.Conv2d(half, dim, 3, stride=2, padding=1),
            nn.GroupNorm(1, dim),
            nn.GELU(),
            nn.Conv2d(dim, dim, 3, stride=2, padding=1),
            nn.GroupNorm(1, dim),
            nn.GELU(),
            nn.Conv2d(dim, dim, 3, stride=2, padding=1),
        )
        self.contextual = Contextual((image_size // PATCH) ** 2, dim, layers, heads)

    def forward(self, pixels: torch.Tensor, mask: torch.Tensor) -> Tokens:
        """`pixels` uint8 [B, 3, S, S]; `mask` is not looked at, every token of a picture is valid."""
        scaled = pixels.to(self.contextual.positions.dtype) / 127.5 - 1
        tokens = self.stem(scaled).flatten(2).transpose(1, 2)
        valid = tokens.new_ones(tokens.shape[:2], dtype=torch.bool)
        return self.contextual(tokens, valid), valid


class FeatureEncoder(nn.Module):
    """Frozen vision features of a policy, brought to the width of the reward. They bring positions of their own."""

    def __init__(self, feature_dim: int, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(feature_dim)
        self.project = nn.Sequential(nn.Linear(feature_dim, dim), nn.GELU(), nn.Linear(dim, dim))

    def forward(self, features: torch.Tensor, mask: torch.Tensor) -> Tokens:
        """`features` [B, L, feature_dim], padded with 0 where `mask` is False."""
        return self.project(self.norm(features.to(self.norm.weight.dtype))), mask


class TextEncoder(nn.Module):
    """Word ids to contextual tokens: convolutions over neighbours, then attention.

    Which noun an adjective belongs to, and on which side of a relation a noun stands, is said by the words beside it;
    attention over absolute positions alone learns that late.
    """

    def __init__(self, vocabulary: int, max_words: int, dim: int, layers: int, heads: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, dim, padding_idx=PAD)
        self.beside = nn.ModuleList(
            nn.Conv1d(dim, dim, _NEIGHBOURS, padding=_NEIGHBOURS // 2) for _ in range(_CONVOLUTIONS)
        )
        self.contextual = Contextual(max_words, dim, layers, heads)

    def forward(self, ids: torch.Tensor) -> Tokens:
        """`ids` int64 [B, L], at least one word a row, PAD behind."""
        mask = ids != PAD
        tokens = self.words(ids)
        for convolution in self.beside:
            seen = nn.functional.gelu(convolution(tokens.transpose(1, 2))).transpose(1, 2)
            # Padding stays 0: a caption must not depend on how long the others of its batch are.
            tokens = (tokens + seen) * mask[:, :, None]
        return self.contextual(tokens, mask), mask


class Contextual(nn.Module):
    """Learned positions, then a transformer (norm first, no dropout: a reward must not depend on the draw)."""

    def __init__(self, length: int, dim: int, layers: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.positions = nn.Parameter(torch.randn(length, dim) * 0.5)
        layer = nn.TransformerEncoderLayer(dim, heads, 2 * dim, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, nn.LayerNorm(dim), enable_nested_tensor=False)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[B, L, d] of [B, L, d]."""
        return self.layers(self.norm(tokens) + self.positions[: tokens.shape[1]], src_key_padding_mask=~mask)


class Vocabulary:
    """Words to ids, words being those that rewards of words see; any other word is unknown."""

    def __init__(self, known: Sequence[str], tokenizer: Tokenizer = Tokenizer.UNICODE) -> None:
        self.words = tuple(known)
        self._tokenizer = tokenizer
        self._ids = {word: i + 2 for i, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words) + 2

    def encode(self, texts: Sequence[str], max_words: int) -> torch.Tensor:
        """int64 [B, L], cut to `max_words`; a text without a word is one unknown word, so that no row is empty."""
        split = (words(text, self._tokenizer)[:max_words] for text in texts)
        rows = [[self._ids.get(word, UNKNOWN) for word in each] or [UNKNOWN] for each in split]
        ids = torch.full((len(rows), max((len(row) for row in rows), default=1)), PAD)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
        return ids


def save_reward_model(model: RewardModel, folder: str | Path, report: Mapping[str, Any]) -> None:
    """Writes a reward's folder, whole or not at all.

    Raises:
        ModelError: something is there already, or it cannot be written.
    """
    target = Path(folder).expanduser().absolute()
    refuse_occupied(target)
    try:
        with atomic.scratch_folder(target.parent) as scratch:
            weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
            save_file(weights, scratch / WEIGHTS)
            _write_json(scratch / SPEC, model.spec.model_dump(mode="json"))
            _write_json(scratch / REPORT, report)
            atomic.commit_folder(scratch, target)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"the reward model cannot be written to {target}: {one_line(error)[:300]}") from error


def load_reward_model(folder: str | Path) -> RewardModel:
    """A reward from its folder, in eval mode and on the CPU.

    Raises:
        ModelError: no such folder, a file that is missing or broken, another format, or weights that do not fit.
    """
    spec = read_spec(folder)
    file = Path(folder).expanduser() / WEIGHTS
    try:
        stored = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{file} cannot be read as safetensors: {one_line(error)[:300]}; train or copy it again"
        ) from error
    with torch.random.fork_rng(devices=[]):
        model = RewardModel(spec)
    wanted = model.state_dict()
    if stored.keys() != wanted.keys():
        missing, unknown = sorted(wanted.keys() - stored.keys()), sorted(stored.keys() - wanted.keys())
        problem = f"lacks {missing[0]!r}" if missing else f"has the unknown weight {unknown[0]!r}"
        raise ModelError(f"{file} {problem}: it does not belong to the {SPEC} beside it")
    for name, tensor in stored.items():
        if tensor.shape != wanted[name].shape or tensor.dtype != wanted[name].dtype:
            raise ModelError(
                f"{file}: {name} is {list(tensor.shape)} {tensor.dtype}, but {SPEC} asks for "
                f"{list(wanted[name].shape)} {wanted[name].dtype}"
            )
        if not bool(tensor.isfinite().all()):
            raise ModelError(f"{file}: {name} holds NaN or infinity; train it again")
    model.load_state_dict(stored)
    return model.eval().requires_grad_(False)


def read_spec(folder: str | Path) -> RewardModelSpec:
    """What a reward's folder says of itself, without its weights; raises as `load_reward_model`."""
    folder = Path(folder).expanduser()
    file = folder / SPEC
    if not folder.is_dir():
        raise ModelError(f"no reward model at {folder}: train one with `mmrl reward train`, or mend the path")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{folder} is no reward model: it has no {SPEC}") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read as JSON: {one_line(error)[:300]}") from error
    version = found.get("format") if isinstance(found, dict) else None
    if version != _FORMAT:
        raise ModelError(
            f"{file} is of format {version!r}, this program knows format {_FORMAT}: train the reward again with it"
        )
    try:
        return RewardModelSpec.model_validate(found)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ModelError(f"{file}: {key or 'it'}: {' '.join(first['msg'].split())}") from error


def refuse_occupied(target: str | Path) -> None:
    """Raises ModelError if anything is where a reward's folder is to be."""
    if Path(target).expanduser().exists():
        raise ModelError(f"{target} exists already: remove it, or name another `out`")


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
