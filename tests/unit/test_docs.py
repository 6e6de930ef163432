"""README, docs and the other pages for people: what they point at is there, and they stay short."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import yaml

from mmrl_ray.config.reward import RewardSection
from mmrl_ray.config.schema import Config
from mmrl_ray.report.facts import EVENT_WORDS

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "benchmarks").glob("*.md")]
    + [page for page in (ROOT / "docs").rglob("*.md") if "_generated" not in page.parts and "_build" not in page.parts]
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_is_there(page: Path) -> None:
    """Sphinx checks references between the pages of docs; here are links elsewhere, and files of the repository."""
    text = page.read_text(encoding="utf-8")
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [link for link in links if link and not (page.parent / link).exists()] == []
    files = re.findall(
        r"(?<![\w/.])((?:mmrl_ray|tests|examples|benchmarks|deploy|docker|configs|docs)/[\w./-]+\w)", text
    )
    files = [name for name in files if "_build" not in name]
    assert [name for name in files if not (ROOT / name).exists()] == []
    assert [line for line in text.splitlines() if len(line) > 120] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_configs_on_a_page_are_configs(page: Path) -> None:
    for block in re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        written = yaml.safe_load(block)
        if "run" in written:
            Config.model_validate(written)
        elif "reward" in written:
            RewardSection.model_validate(written["reward"])


def test_the_front_page_is_short() -> None:
    assert (ROOT / "README.md").stat().st_size <= 9 * 1024
    assert (ROOT / "docs" / "report.png").stat().st_size <= 150_000


def test_continuous_integration_calls_what_a_laptop_does() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    steps = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    called = {target for step in steps if step.startswith("make ") for target in step.split()[1:]}
    assert called == set(re.findall(r"^ *make ([\w-]+)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE))
    assert called == {"check", "test", "docs", "test-quantized", "test-vllm"}


def _kinds(path: Path) -> set[str]:
    """Kinds of events that a module makes: in dictionaries with a `kind`, and as `_note`'s first argument."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Dict):
            keys = [key.value for key in node.keys if isinstance(key, ast.Constant)]
            values = [v.value for k, v in zip(node.keys, node.values, strict=True)
                      if isinstance(k, ast.Constant) and k.value == "kind" and isinstance(v, ast.Constant)]  # fmt: skip
            found |= set(values) if set(keys) - {"kind"} or len(node.keys) > len(keys) else set()
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "_note":
            found |= {arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)}
    return found


def test_every_event_is_in_the_reference() -> None:
    makers = [
        p for room in ("rollouts", "learner", "training", "tracking") for p in (ROOT / "mmrl_ray" / room).glob("*.py")
    ]
    made = set().union(*(_kinds(path) for path in makers))
    assert {"worker_lost", "learner_restarted", "reward_failed"} <= made
    assert made <= set(EVENT_WORDS)
