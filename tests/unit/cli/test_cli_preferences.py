"""`mmrl preferences …`: from a file to figures and back, and how it ends where something is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmrl_ray.preferences.files import read_preferences
from mmrl_ray.preferences.schema import Preference
from mmrl_ray.preferences.store import PreferenceStore
from tests.unit.cli.program import Patch, mmrl
from tests.unit.preferences.examples import pair, picture, preference


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of votes; without `--store` the store is a file in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MMRL_PREFERENCES", raising=False)
    (tmp_path / "p.png").write_bytes(picture())
    return tmp_path


def votes(*rows: dict[str, object], name: str = "votes.jsonl") -> str:
    base = {"image": "p.png", "caption_a": "x", "caption_b": "y", "choice": "a", "rater": "ann", "shown_first": "a"}
    Path(name).write_text("\n".join(json.dumps({**base, **row}) for row in rows))
    return name


def test_in_and_out_and_what_is_in_there(here: Path) -> None:
    file = votes({}, {"rater": "bob", "choice": "b"}, {"caption_b": "z", "choice": "tie"})
    done = mmrl("preferences", "import", file)
    assert done.stdout == "sqlite:///preferences.db: 3 new preferences, 2 new pairs\n", done.stderr
    assert mmrl("preferences", "import", file).stdout == "sqlite:///preferences.db: 3 that were there, 0 new pairs\n"
    shown = mmrl("preferences", "stats").stdout.splitlines()
    assert shown[:3] == ["pairs        2, 2 of them labelled", "preferences  3: a 1, b 1, tie 1", "raters       2"]
    assert shown[3] == "  ann: 2, first caption chosen 100.0% of 1 [20.7%, 100.0%]"
    assert shown[5].startswith("agreement    0.0% of the couples of raters of 1 pairs; Krippendorff's alpha 0.000")
    told = json.loads(mmrl("preferences", "stats", "--json").stdout)
    assert (told["pairs"], told["raters"]["ann"][0], told["first"]["count"]) == (2, 2, 2)
    assert told["agreement"]["alpha"] == pytest.approx(0.0, abs=5e-4)
    assert shown[6] == "position     first caption chosen 50.0% of 2 [9.5%, 90.5%]: no bias seen"
    assert mmrl("preferences", "export", "all.parquet").stdout == "all.parquet: 3 preferences\n"
    assert mmrl("preferences", "export", "some.parquet", "--decided").stdout == "some.parquet: 2 preferences\n"
    assert [p.choice for p in read_preferences("some.parquet") if isinstance(p, Preference)] == ["a", "b"]


def test_what_is_wrong_ends_with_one_line_and_nothing_stored(here: Path) -> None:
    bad = votes({}, {"caption_b": "x"}, {"rater": "ann", "choice": "b"})
    done = mmrl("preferences", "import", bad)
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith("error: votes.jsonl, line 2: both captions are 'x'")
    assert mmrl("preferences", "stats").stdout.startswith("pairs        0, 0 of them labelled")
    lenient = mmrl("preferences", "import", bad, "--skip-bad")
    assert lenient.stdout == "sqlite:///preferences.db: 1 new preferences, 1 new pairs, 2 bad rows left out\n"
    assert lenient.stderr.count("left out: votes.jsonl, line ") == 2
    assert mmrl("preferences", "import", votes({"choice": "b"}), "--replace").stdout.endswith(
        "1 replaced, 0 new pairs\n"
    )
    rated = mmrl("preferences", "import", votes({"rating_a": 3, "rater": "cy"}))
    assert "rating_a=3 is off the scale of sqlite:///preferences.db, 0 to 1" in rated.stderr
    scaled = ("--store", "sqlite:///stars.db", "--rating-scale", 1, 5)
    assert mmrl("preferences", "import", votes({"rating_a": 3}), *scaled).exit_code == 0


def test_a_store_that_is_not_there_is_not_made_by_looking(here: Path) -> None:
    for arguments in (("stats",), ("export", "x.parquet")):
        done = mmrl("preferences", *arguments, "--store", "sqlite:///typo.db")
        assert done.exit_code == 1
        assert "typo.db: there is no such file; `mmrl preferences import`" in done.stderr
    assert not (here / "typo.db").exists()


def test_pairs_to_label_go_out_blinded_and_come_back_with_their_order(here: Path) -> None:
    with PreferenceStore("sqlite:///preferences.db") as store:
        store.add(pair(shade=shade) for shade in range(30))
        store.add([preference(shade=77)])
    assert mmrl("preferences", "export", "todo.jsonl", "--unlabelled").stdout == "todo.jsonl: 30 pairs to label\n"
    rows = [json.loads(line) for line in Path("todo.jsonl").read_text().splitlines()]
    assert {row["caption_a"] for row in rows} == {"a red square", "a square"}
    # A rater who takes whatever comes first.
    Path("done.jsonl").write_text("\n".join(json.dumps({**row, "choice": "a", "rater": "lazy"}) for row in rows))
    assert "30 new preferences, 0 new pairs" in mmrl("preferences", "import", "done.jsonl").stdout
    assert "lazy: 30, first caption chosen 100.0% of 30" in mmrl("preferences", "stats").stdout
    with PreferenceStore("sqlite:///preferences.db") as store:
        assert {p.choice for p in store.preferences() if p.rater == "lazy"} == {"a", "b"}


def test_sample_hands_over_what_was_asked(here: Path, patched: Patch) -> None:
    (here / "runs" / "again").mkdir(parents=True)
    sample = patched("mmrl_ray.preferences.dataset.sample_pairs", return_value=[preference()])
    asked = ("--pairs", 7, "--seed", 3, "--strategy", "closest", "--label-by-reward")
    done = mmrl("preferences", "sample", "runs/again", *asked)
    assert done.exit_code == 0, done.stderr
    assert sample.call_args.args[1:] == (7,)
    assert sample.call_args.kwargs == {"seed": 3, "strategy": "closest", "by_reward": True}
    assert "1 pairs of runs/again (of 7 asked for: the run's log has no more groups of two captions)" in done.stdout
    wrong = mmrl("preferences", "sample", "runs/again", "--strategy", "best")
    assert (wrong.exit_code, "choose one of random, closest, disagreement" in wrong.stderr) == (2, True)
