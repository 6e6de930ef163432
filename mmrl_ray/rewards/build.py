"""From the `reward:` section to the reward of a run."""

from __future__ import annotations

from collections.abc import Mapping

from mmrl_ray.config.reward import (
    CaptionPart,
    CiderPart,
    FluencyPart,
    FormatPart,
    FunctionPart,
    LearnedPart,
    LengthPart,
    RepetitionPart,
    RewardPart,
    RewardSection,
    RougePart,
)
from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import ConfigError, DataError, ModelError, RewardError
from mmrl_ray.metrics.text import MAX_ORDER, CorpusStatistics, LanguageModel
from mmrl_ray.rewards.base import RewardFailure, RewardFn, Score
from mmrl_ray.rewards.captioning import CaptionReward
from mmrl_ray.rewards.function import FunctionReward
from mmrl_ray.rewards.learned import LearnedReward
from mmrl_ray.rewards.multimodal import MultimodalReward
from mmrl_ray.rewards.text import CiderReward, FluencyReward, FormatReward, LengthReward, RepetitionReward, RougeReward

NOTHING = CorpusStatistics(1, ({},) * MAX_ORDER, ends=({},) * MAX_ORDER)
"""Statistics for parts that need none."""


def build_reward(cfg: RewardSection, statistics: CorpusStatistics, *, device: str | None = None) -> RewardFn:
    """The composed reward; always a `MultimodalReward`, so that breakdowns look alike however many parts there are.

    Learned parts score on `device`; by default on the first GPU of the process that scores, or else its CPU.

    Picklable: it is made once by the driver and sent to the workers. All parts make their words with the tokeniser that
    the statistics were counted with. Ends of captions count only where the statistics have ends: a run that began
    before they did goes on as it was.

    Raises:
        ConfigError: a part, which it names, cannot be made; or `risk` has no trained sigma to work with.
    """
    parts = {name: _named(name, part, statistics, cfg, device) for name, part in cfg.parts.items()}
    _refuse_untrained_sigma(cfg, parts)
    modalities = {name: part.modality for name, part in cfg.parts.items()}
    return MultimodalReward(parts, cfg.weights, modalities=modalities, risk=cfg.risk)


def check_reward(cfg: RewardSection) -> None:
    """Makes what needs no statistics of the data, to find out before a run whether it can; raises as `build_reward`."""
    ready = {name: part for name, part in cfg.parts.items() if not part.needs_statistics}
    parts = {name: _named(name, part, NOTHING, cfg) for name, part in ready.items()}
    _refuse_untrained_sigma(cfg, parts)


def try_functions(cfg: RewardSection, sample: Sample, caption: str) -> dict[str, Score]:
    """What each function of the user's has for one caption of a sample, by its part; raises as `build_reward`."""
    found: dict[str, Score] = {}
    for name, part in cfg.functions.items():
        made = _named(name, part, NOTHING, cfg)
        try:
            (found[name],) = made.score_batch([sample], [caption])
        except RewardError as error:
            found[name] = RewardFailure(str(error))
    return found


def _named(
    name: str, part: RewardPart, statistics: CorpusStatistics, cfg: RewardSection, device: str | None = None
) -> RewardFn:
    try:
        return _build_part(part, statistics, cfg, device)
    except (ConfigError, DataError, ModelError) as error:
        raise ConfigError(f"reward.parts.{name}: {error}") from error


def _build_part(part: RewardPart, statistics: CorpusStatistics, cfg: RewardSection, device: str | None) -> RewardFn:
    match part:
        case CaptionPart():
            return CaptionReward(
                alpha=part.alpha,
                beta=part.beta,
                gamma=part.gamma,
                idf=statistics.idf,
                max_words=part.max_words,
                grounded=part.grounded,
                eos=part.eos and statistics.ends is not None,
                tokenizer=statistics.tokenizer,
            )
        case CiderPart():
            return CiderReward(statistics, eos=part.eos)
        case RougePart():
            return RougeReward(statistics.tokenizer)
        case RepetitionPart():
            return RepetitionReward(part.order, statistics.tokenizer)
        case FormatPart():
            return FormatReward(part.pattern, prefix=part.prefix or "", timeout_s=cfg.timeout_s)
        case LengthPart():
            return LengthReward(part.min_words, part.max_words, statistics.tokenizer)
        case FluencyPart():
            if (counts := statistics.language) is None:
                raise ConfigError(
                    "the statistics hold no n-grams of the training references: use those of a run with them"
                )
            return FluencyReward(LanguageModel(counts, part.order, part.smoothing, statistics.tokenizer))
        case LearnedPart():
            return LearnedReward(part.model, device)
        case FunctionPart():
            return FunctionReward(part.path, part.state, part.kwargs, cfg.timeout_s, cfg.code)


def _refuse_untrained_sigma(cfg: RewardSection, parts: Mapping[str, RewardFn]) -> None:
    """`risk` takes standard deviations off the total: at least one part that counts has to know its own."""
    candidates = [name for name, part in cfg.parts.items() if part.may_have_sigma and cfg.weights[name] > 0]
    if cfg.risk > 0 and not any(getattr(parts[name], "has_sigma", False) for name in candidates):
        raise ConfigError(
            f"reward.risk={cfg.risk:g} needs a trained sigma, which no part has: that of "
            f"{', '.join(map(repr, candidates)) or 'none'} was never trained; train it with ratings or preferences "
            "(`mmrl reward train`), or set reward.risk to 0"
        )
