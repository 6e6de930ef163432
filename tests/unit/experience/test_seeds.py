from mmrl_ray.experience.carriers import derive_seed, group_seed


def test_seeds_are_fixed_for_ever() -> None:
    # A change here would make every resumed run draw other completions than the run it continues.
    assert group_seed(0, 0, 0) == 7779104276895522418
    assert derive_seed(1, "sft") == 9171797887728917538


def test_every_group_has_its_own_seed() -> None:
    seeds = {group_seed(seed, step, index) for seed in range(3) for step in range(40) for index in range(40)}
    assert len(seeds) == 3 * 40 * 40
    assert all(0 <= s < 2**63 for s in seeds)


def test_a_name_is_not_mistaken_for_a_number() -> None:
    assert derive_seed(1, "2") != derive_seed("1", 2) != derive_seed("1", "2")
    assert derive_seed("a", "b") != derive_seed("ab")
