"""Filters against a NumPy oracle, draws against their distribution, seeds against each other."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mmrl_ray.errors import ConfigError
from mmrl_ray.experience.carriers import SamplingParams
from mmrl_ray.policy.generation.sampling import RowSampler, behaviour_logprobs, check_sampling, draw, uniforms

CPU = torch.device("cpu")
NOTHING = torch.tensor([], dtype=torch.int64)


def oracle(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """Probabilities of one row in float64: token by token, as the definitions say."""
    weights = np.exp((logits - logits.max()) / temperature)
    ranked = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    kept = ranked[:top_k] if top_k else ranked
    total = sum(weights[i] for i in kept)
    nucleus, mass = [], 0.0
    for i in kept:
        if mass >= top_p and top_p < 1:
            break
        nucleus.append(i)
        mass += weights[i] / total
    out = np.zeros(len(logits))
    out[nucleus] = weights[nucleus] / sum(weights[i] for i in nucleus)
    return out


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.tuples(
            st.lists(st.integers(-40, 40), min_size=7, max_size=7),
            st.floats(0.2, 3.0),
            st.integers(0, 9),
            st.floats(0.05, 1.0),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_filters_equal_the_oracle(rows: list[tuple[list[int], float, int, float]]) -> None:
    # Distinct logits a fraction apart, so that no cumulated sum lies within rounding of top_p by construction.
    logits = torch.tensor([[v / 10 + j * 0.013 for j, v in enumerate(values)] for values, *_ in rows])
    temperature, top_k, top_p = (torch.tensor([row[i] for row in rows]) for i in (1, 2, 3))
    got = behaviour_logprobs(logits, temperature, top_k=top_k, top_p=top_p).exp().numpy()
    for i in range(len(rows)):
        expected = [
            oracle(logits[i].double().numpy(), float(temperature[i]), int(top_k[i]), float(top_p[i]) + nudge)
            for nudge in (-1e-6, 1e-6)
        ]
        # Where a sum is within rounding of top_p either answer is right.
        assert any(np.allclose(got[i], e, rtol=1e-4, atol=1e-6) for e in expected)


def test_filters_on_literal_values() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.15, 0.1]])).repeat(4, 1)
    got = behaviour_logprobs(
        logits,
        torch.ones(4),
        top_k=torch.tensor([0, 2, 0, 3]),
        top_p=torch.tensor([1.0, 1.0, 0.7, 0.5]),
    ).exp()
    expected = [
        [0.5, 0.25, 0.15, 0.1],
        [2 / 3, 1 / 3, 0, 0],
        [2 / 3, 1 / 3, 0, 0],
        [1, 0, 0, 0],  # 0.5 of 0.9 is above 0.5 already
    ]
    torch.testing.assert_close(got, torch.tensor(expected))


def test_top_k_keeps_exactly_k_of_equal_logits() -> None:
    got = behaviour_logprobs(torch.zeros(1, 6), torch.ones(1), top_k=torch.tensor([2]))
    torch.testing.assert_close(got.exp(), torch.tensor([[0.5, 0.5, 0, 0, 0, 0]]))


def test_temperature_divides_the_logits() -> None:
    got = behaviour_logprobs(torch.tensor([[1.0, 3.0]]), torch.tensor([2.0]))
    assert got[0, 1].item() == pytest.approx(-math.log1p(math.exp(-1)), abs=1e-6)


def test_log_probs_are_float32_of_a_bfloat16_model() -> None:
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    got = behaviour_logprobs(logits, torch.ones(2))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.exp().sum(-1), torch.ones(2))


def test_draws_follow_the_distribution() -> None:
    probabilities = np.array([0.4, 0.3, 0.0, 0.2, 0.07, 0.03])
    count = 40_000
    logprobs = torch.log(torch.tensor(probabilities)).float().expand(count, -1)
    uniform = torch.from_numpy(uniforms(seed=1234, row=0, count=count))
    seen = np.bincount(draw(logprobs, uniform).numpy(), minlength=6)
    assert seen[2] == 0
    support = probabilities > 0
    p_value = stats.chisquare(seen[support], probabilities[support] * count).pvalue
    assert p_value > 0.001


def test_rows_of_one_group_and_tokens_of_one_row_are_independent() -> None:
    table = np.stack([uniforms(seed=5, row=row, count=4000) for row in range(8)])
    correlation = np.corrcoef(table)
    assert np.abs(correlation[~np.eye(8, dtype=bool)]).max() < 0.06
    assert abs(np.corrcoef(table[:, :-1].ravel(), table[:, 1:].ravel())[0, 1]) < 0.03
    assert stats.kstest(table.ravel(), "uniform").pvalue > 0.001


def test_uniforms_depend_on_seed_and_row_alone() -> None:
    assert (uniforms(7, 3, 5) == uniforms(7, 3, 50)[:5]).all()
    assert (uniforms(7, 3, 5) != uniforms(8, 3, 5)).all()
    assert (uniforms(7, 3, 5) != uniforms(7, 4, 5)).all()
    # Seeds are 63-bit: the upper half counts.
    assert (uniforms(7, 0, 5) != uniforms(7 + 2**40, 0, 5)).all()


@pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
def test_the_ends_of_the_unit_interval_draw_a_possible_token(u: float) -> None:
    probabilities = torch.tensor([[0.0, 0.3, 0.7, 0.0], [0.0, 0.1, 0.2, 0.0]])
    logprobs = torch.log(probabilities / probabilities.sum(-1, keepdim=True))
    assert draw(logprobs, torch.full((2,), u, dtype=torch.float64)).tolist() == ([1, 1] if u == 0 else [2, 2])


def sampler(*params: SamplingParams, greedy: bool = False) -> RowSampler:
    return RowSampler.of([(p, i, greedy) for i, p in enumerate(params)], CPU)


def test_forbidden_tokens_are_never_drawn_and_the_rest_is_normalised() -> None:
    rows = sampler(*[SamplingParams(seed=3)] * 400)
    logits = torch.zeros(400, 4)
    logits[:, 1] = 1e4
    tokens, logprobs = rows.sample(logits, torch.tensor([1]), torch.tensor([0]))
    assert set(tokens.tolist()) == {0, 2, 3}
    torch.testing.assert_close(logprobs, torch.full((400,), -math.log(3)))


def test_the_end_is_forbidden_before_min_new_tokens() -> None:
    rows = sampler(SamplingParams(min_new_tokens=2), SamplingParams(min_new_tokens=0), greedy=True)
    logits = torch.tensor([[0.0, 9.0, 1.0]]).repeat(2, 1)
    seen = [rows.sample(logits, NOTHING, torch.tensor([1]))[0].tolist() for _ in range(3)]
    assert seen == [[2, 1], [2, 1], [1, 1]]


def test_greedy_takes_the_likeliest_whatever_the_temperature_but_reports_its_log_prob() -> None:
    rows = sampler(SamplingParams(temperature=4.0), greedy=True)
    tokens, logprobs = rows.sample(torch.tensor([[0.0, 4.0]]), NOTHING, NOTHING)
    assert tokens.tolist() == [1]
    assert logprobs.item() == pytest.approx(-math.log1p(math.exp(-1)), abs=1e-6)


def test_rows_draw_the_same_in_any_order_and_company() -> None:
    params = [SamplingParams(seed=s, max_new_tokens=4, top_k=k) for s, k in ((1, 0), (1, 3), (2, 0), (9, 2))]
    generator = torch.Generator().manual_seed(0)
    steps = [torch.randn(4, 30, generator=generator) for _ in range(4)]
    whole = sampler(*params)
    expected = [whole.sample(logits, NOTHING, NOTHING) for logits in steps]
    order = torch.tensor([2, 0, 3])
    some = sampler(*params).select(order.tolist())
    first = RowSampler.of([(params[1], 1, False)], CPU)
    joined = some.join(first)
    for logits, (tokens, logprobs) in zip(steps, expected, strict=True):
        got = joined.sample(logits[[2, 0, 3, 1]], NOTHING, NOTHING)
        assert got[0].tolist() == tokens[[2, 0, 3, 1]].tolist()
        torch.testing.assert_close(got[1], logprobs[[2, 0, 3, 1]], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0.0),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("max_new_tokens", 0),
        ("min_new_tokens", 33),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("stop", ("",)),
        ("seed", -1),
    ],
)
def test_parameters_out_of_range_are_named(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name):
        check_sampling(SamplingParams(**{name: value}))  # type: ignore[arg-type]


def test_the_defaults_are_in_range() -> None:
    check_sampling(SamplingParams())
