"""Which actor fits where, on nodes that are data."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmrl_ray.config import Config
from mmrl_ray.config.schema import Demand, demands_of
from mmrl_ray.config.sections import ActorResources
from mmrl_ray.config.serving import DeploymentSection
from mmrl_ray.errors import ConfigError
from mmrl_ray.learner.group import scaling_config
from mmrl_ray.planning.preflight import Node, place, unplaced_lines
from mmrl_ray.rollouts.pool_settings import PoolSettings, placed_demands, shared_gpus_of
from mmrl_ray.serving.launch import options_of


def config(**sections: Any) -> Config:
    return Config.model_validate(
        {
            "run": {"name": "demo"},
            "model": {"path": "org/model"},
            "data": {"train": "data"},
            "learner": {"steps": 10, "workers": 2},
            **sections,
        }
    )


def demand(kind: str, count: int, cpus: float, gpus: float, **labels: str) -> Demand:
    return Demand(kind, count, cpus, gpus, f"{kind}.workers", f"resources.{kind}", labels)


def missing(demands: list[Demand], nodes: list[Node]) -> dict[str, int]:
    return {d.kind: short for d, short in place(demands, nodes).missing}


def test_demands_of_a_run() -> None:
    resources = {
        "placement": "split",
        "learner": {"cpus": 4, "gpus": 1},
        "rollout": {"cpus": 2, "gpus": 1, "node_labels": {"pool": "a"}},
        "reward": {"cpus": 0.5},
    }
    live = {"live_policy": True, "policy": {"min_replicas": 2, "max_replicas": 3, "resources": {"cpus": 3}}}
    found = demands_of(config(rollout={"workers": 3}, resources=resources, serving=live))
    assert [(d.kind, d.count, d.cpus, d.gpus, dict(d.labels)) for d in found] == [
        ("learner", 2, 4, 1, {}),
        ("rollout", 3, 2, 1, {"pool": "a"}),
        ("reward", 1, 0.5, 0, {}),
        ("policy", 2, 3, 0, {}),  # the gateway asks for nothing
    ]


def test_demands_of_a_run_that_has_grown() -> None:
    grow = config(rollout={"workers": {"min": 1, "max": 4}}, learner={"steps": 1, "workers": {"min": 2, "max": 3}})
    assert [(d.kind, d.count) for d in demands_of(grow)] == [("learner", 2), ("rollout", 1)]
    assert [(d.kind, d.count) for d in demands_of(grow, at_most=True)] == [("learner", 3), ("rollout", 4)]


def shared(learners: int, workers: int, learner: float, rollout: float, **sections: Any) -> Config:
    resources = {"learner": {"cpus": 2, "gpus": learner}, "rollout": {"cpus": 1, "gpus": rollout}}
    asked = {"steps": 10, "workers": learners}
    return config(learner=asked, rollout={"workers": workers}, resources=resources, **sections)


@pytest.mark.parametrize(
    ("cfg", "workers", "beside", "gpus"),
    [
        (shared(2, 2, 0.51, 0.49), [1, 1], 0, 2),
        (shared(4, 4, 0.51, 0.49), [1, 1, 1, 1], 0, 4),
        (shared(2, 3, 0.6, 0.2), [2, 1], 0, 2),
        (shared(2, 1, 0.6, 0.4), [1, 0], 0, 2),  # whoever is added later finds the other GPU's rest
        (shared(2, 5, 0.6, 0.2), [2, 2], 1, 3),
    ],
)
def test_a_learner_and_the_workers_beside_it_are_placed_as_one(
    cfg: Config, workers: list[int], beside: int, gpus: int
) -> None:
    assert [gpu.workers for gpu in shared_gpus_of(cfg)] == workers
    demands = placed_demands(cfg)
    assert sum(d.gpus * d.count for d in demands) == pytest.approx(sum(d.gpus * d.count for d in demands_of(cfg)))
    assert sum(d.cpus * d.count for d in demands) == sum(d.cpus * d.count for d in demands_of(cfg))
    assert sum(d.count for d in demands if d.kind == "rollout") == beside
    assert place(demands, [Node("a", 64, gpus)]).missing == ()
    assert place(demands, [Node("a", 64, gpus - 1)]).missing != ()


def test_a_range_of_learners_shares_no_gpu_with_workers() -> None:
    """Workers could take the place of learners that are only looked for."""
    asked = {"steps": 10, "workers": {"min": 1, "max": 2}}
    half = {"cpus": 1, "gpus": 0.49}
    cfg = config(learner=asked, resources={"learner": {"cpus": 1, "gpus": 0.51}, "rollout": half})
    with pytest.raises(ConfigError, match=r"^learner.workers={min: 1, max: 2} on shared GPUs: .* as one number, or"):
        placed_demands(cfg)
    whole = {"cpus": 1, "gpus": 1}
    for fine in (
        config(learner=asked, resources={"learner": whole, "rollout": whole, "placement": "split"}),
        config(learner=asked, resources={"learner": whole, "rollout": {"cpus": 1}}),
        config(learner=asked),
    ):
        assert placed_demands(fine) == demands_of(fine)


def test_who_shares_no_gpu_is_placed_alone() -> None:
    split = config(resources={"placement": "split", "learner": {"gpus": 1}, "rollout": {"gpus": 1}})
    for cfg in (config(), split):
        assert shared_gpus_of(cfg) == ()
        assert placed_demands(cfg) == demands_of(cfg)


def test_a_reward_of_words_asks_for_nothing() -> None:
    assert [d.kind for d in demands_of(config())] == ["learner", "rollout"]
    inline = config(reward={"host": "inline"}, resources={"reward": {"cpus": 1}})
    assert [d.kind for d in demands_of(inline)] == ["learner", "rollout"]


def test_what_workers_ask_ray_for_is_what_is_planned() -> None:
    """Shares and labels reach the actors' options."""
    share = {"cpus": 1.5, "gpus": 0.5, "node_labels": {"pool": "a"}}
    cfg = config(resources={"placement": "shared", "learner": {"gpus": 0.5}, "rollout": share})
    settings = PoolSettings.of(cfg)
    assert settings.actor_options == {"num_cpus": 1.5, "num_gpus": 0.5, "label_selector": {"pool": "a"}}
    assert settings.demand == "{CPU: 1.5, GPU: 0.5} on a node labelled pool=a"
    assert PoolSettings.of(config()).actor_options["label_selector"] is None
    learners = scaling_config(config(resources={"placement": "split", "learner": {"cpus": 3, "gpus": 1}}))
    assert (learners.num_workers, learners.resources_per_worker) == (2, {"CPU": 3, "GPU": 1})
    assert learners.use_gpu
    assert learners.label_selector is None
    labelled = scaling_config(config(resources={"learner": {"node_labels": {"pool": "b"}}}))
    assert (labelled.label_selector, labelled.use_gpu) == ({"pool": "b"}, False)
    replica = options_of(DeploymentSection(resources=ActorResources(cpus=1.5, gpus=0.5, node_labels={"pool": "c"})))
    assert replica["ray_actor_options"] == {"num_cpus": 1.5, "num_gpus": 0.5, "label_selector": {"pool": "c"}}


@pytest.mark.parametrize(
    ("demands", "nodes", "expected"),
    [
        # a sum that fits is no node that fits
        ([demand("learner", 1, 8, 0)], [Node("a", 4, 0), Node("b", 4, 0)], {"learner": 1}),
        ([demand("learner", 2, 4, 1)], [Node("a", 8, 1)], {"learner": 1}),
        ([demand("learner", 1, 0, 2)], [Node("a", 8, 1), Node("b", 8, 1)], {"learner": 1}),
        # fractions come from one GPU each: three of 0.6 need three GPUs
        ([demand("rollout", 3, 0, 0.6)], [Node("a", 8, 2)], {"rollout": 1}),
        ([demand("rollout", 4, 0, 0.5)], [Node("a", 8, 2)], {}),
        # `shared`: a learner and a worker on each GPU
        ([demand("learner", 2, 1, 0.6), demand("rollout", 2, 1, 0.4)], [Node("a", 4, 2)], {}),
        # a fraction must not take a whole GPU that the learner needs, whatever is asked for first
        ([demand("rollout", 2, 0, 0.5), demand("learner", 1, 0, 1)], [Node("a", 8, 2)], {}),
        ([demand("rollout", 2, 0, 0.5, pool="x"), demand("learner", 1, 0, 1)], [Node("a", 8, 2, {"pool": "x"})], {}),
        ([demand("rollout", 1, 1, 0), demand("learner", 1, 8, 0)], [Node("a", 8, 0), Node("b", 1, 0)], {}),
        # a node that is partly taken
        ([demand("rollout", 1, 0, 0.5)], [Node("a", 8, 0.4)], {"rollout": 1}),
        ([demand("rollout", 1, 0, 0.5)], [Node("a", 8, 0.5)], {}),
        # labels
        ([demand("learner", 1, 1, 0, pool="x")], [Node("a", 8, 0), Node("b", 8, 0, {"pool": "y"})], {"learner": 1}),
        (
            [demand("rollout", 1, 8, 0), demand("learner", 1, 4, 0, pool="x")],
            [Node("a", 8, 0, {"pool": "x"}), Node("b", 8, 0)],
            {},
        ),
        ([demand("learner", 2, 1, 0)], [], {"learner": 2}),
    ],
)
def test_first_fit(demands: list[Demand], nodes: list[Node], expected: dict[str, int]) -> None:
    assert missing(demands, nodes) == expected


sizes = st.tuples(st.sampled_from([0, 0.5, 1, 2, 4]), st.sampled_from([0, 0.25, 0.5, 1, 2]))


@given(
    st.lists(st.tuples(st.integers(1, 4), sizes), min_size=1, max_size=3),
    st.lists(st.tuples(st.integers(0, 8), st.integers(0, 4)), max_size=4),
)
def test_no_node_gives_more_than_it_has(asked: list[Any], given_nodes: list[Any]) -> None:
    demands = [demand(f"kind{i}", count, *size) for i, (count, size) in enumerate(asked)]
    nodes = [Node(str(i), *amounts) for i, amounts in enumerate(given_nodes)]
    placement = place(demands, nodes)
    by_kind = {d.kind: d for d in demands}
    placed = 0
    for node, (name, actors) in zip(nodes, placement.nodes, strict=True):
        assert node.name == name
        shares = [by_kind[actor.split()[0]] for actor in actors]
        assert sum(d.cpus for d in shares) <= node.cpus
        assert sum(d.gpus for d in shares) <= node.gpus
        placed += len(actors)
    assert placed + sum(short for _, short in placement.missing) == sum(d.count for d in demands)


def test_the_line_names_what_does_not_fit_and_what_would() -> None:
    nodes = [Node("a", 8, 1), Node("b", 4, 1)]
    demands = [demand("learner", 3, 2, 1), demand("rollout", 1, 1, 0, pool="x")]
    lines = unplaced_lines(place(demands, nodes), nodes)
    assert sorted(lines) == [
        "1 of 1 rollout actors have no node, each asks for 1 CPU, 0 GPU on nodes labelled pool=x; no node is labelled "
        "pool=x: add room for 1 more, or lower resources.rollout",
        "1 of 3 learner actors have no node, each asks for 2 CPU, 1 GPU; the 2 nodes have up to 8 CPU and 1 GPU each, "
        "some of it for the run's other actors: add room for 1 more, or set learner.workers=2, or lower "
        "resources.learner",
    ]
    (line,) = unplaced_lines(place(demands[:1], []), [])
    assert "the cluster has no node" in line
