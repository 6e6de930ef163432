"""From votes to what a run trains on: one label a pair, and no picture on both sides."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmrl_ray.data.samples import SampleStream, read_split
from mmrl_ray.errors import PreferenceError
from mmrl_ray.preferences.dataset import SplitSizes, labelled, pair_of, write_split
from mmrl_ray.preferences.schema import Preference
from mmrl_ray.preferences.store import PreferenceStore
from tests.unit.preferences.examples import pair, picture, preference


def test_several_raters_become_one_probability(store: PreferenceStore) -> None:
    store.add([preference("a", "ann"), preference("tie", "bob"), preference("b", "cy"), preference("a", "di")])
    store.add([preference("b", "ann", shade=1)])
    found = {p.image_hash: label.preferred for p, label in labelled(store.preferences(pictures=True))}
    assert found == {pair().image_hash: (0.625, 0.375), pair(shade=1).image_hash: (0.0, 1.0)}


def test_held_out_pictures_are_never_trained_on_and_stay_held_out(tmp_path: Path) -> None:
    said = [Preference(pair(a, "b", shade=i), "a", "ann") for i in range(60) for a in ("x", "y")]
    sizes = write_split(said, str(tmp_path / "train"), str(tmp_path / "out"), share=0.3)
    assert sizes.train + sizes.held_out == 120
    assert 18 < sizes.held_out < 54
    train, held_out = (read_split(tmp_path / name, prompt="") for name in ("train", "out"))
    pictures = {sample.images[0] for sample in held_out}
    assert not pictures & {sample.images[0] for sample in train}
    # More pairs do not move those that were there.
    more = [*said, *(Preference(pair("x", "b", shade=i), "a", "ann") for i in range(60, 90))]
    write_split(more, str(tmp_path / "train2"), str(tmp_path / "out2"), share=0.3)
    assert pictures <= {sample.images[0] for sample in read_split(tmp_path / "out2", prompt="")}


def test_a_stream_of_pairs_is_that_of_any_data_set(tmp_path: Path) -> None:
    said = [preference("a" if i % 2 else "b", shade=i) for i in range(9)]
    assert write_split(said, str(tmp_path / "t"), str(tmp_path / "h"), share=0.0) == SplitSizes(9, 0)
    assert not (tmp_path / "h").exists()

    def stream() -> SampleStream:
        return SampleStream(tmp_path / "t", prompt="P", seed=4, max_quarantined=0)

    first = stream()
    first.take(4)
    state, expected = first.state(), first.take(14)  # the rest of this epoch, and all of the next
    second = stream()
    second.restore(state)
    assert second.take(14) == expected
    labels = {sample.id: pair_of(sample) for sample in expected}
    for each in said:
        label = labels[each.pair.id]
        assert label is not None
        assert label.captions == ("a red square", "a square")
        assert label.preferred == ((1.0, 0.0) if each.choice == "a" else (0.0, 1.0))
    assert {sample.images[0] for sample in expected} == {picture(i) for i in range(9)}


def test_nothing_to_train_on_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    for said in ([], [preference()]):
        with pytest.raises(PreferenceError, match=r"no pair to train on \(\d are held out\): label some"):
            write_split(said, str(tmp_path / "t"), str(tmp_path / "h"), share=1 - 1e-12)
        assert list(tmp_path.iterdir()) == []
