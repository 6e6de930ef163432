"""The notebook of `examples/`, then the Python of docs/howto/notebook.md, in one kernel, which is stopped once."""

from __future__ import annotations

import json
import re
from pathlib import Path

import nbformat
import pytest
import yaml
from nbclient import NotebookClient
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell

from mmrl_ray.data.samples import read_split

from .conftest import Workplace

ROOT = Path(__file__).parents[3]
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"
CELL_S = 150
"""For a cell."""
STOP = """
import json, logging, os, signal, sys, threading, time
from pathlib import Path
from mmrl_ray.errors import Interrupted

def state():
    handlers = list(logging.getLogger().handlers)
    return [dict(os.environ), *map(signal.getsignal, (2, 15, 1)), handlers, sys.unraisablehook]

def press_stop():  # what the button does
    lines, deadline = Path("runs/stopped/metrics.jsonl"), time.monotonic() + 100
    while time.monotonic() < deadline and not (lines.exists() and lines.read_text().count("\\n") >= 2):
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGINT)

before = state()
threading.Thread(target=press_stop, daemon=True).start()
try:
    train("my.yaml", overrides={"run.name": "stopped", "learner.steps": 400})
except Interrupted as error:
    told = str(error)
stopped = load_run("stopped")
print(json.dumps([told, stopped.status, stopped.step, stopped.checkpoints, state() == before]))
"""


@pytest.fixture
def place(workplace: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the page takes for granted, and a home of Jupyter's own."""
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "jupyter"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "photos").symlink_to(workplace.folder / "eval")
    (sample,) = read_split(workplace.folder / "train", prompt="", limit=1)
    (tmp_path / "photo.jpg").write_bytes(sample.images[0])
    learner = {**workplace.settings["learner"], "steps": 2, "groups_per_step": 2}
    settings = {**workplace.settings, "run": {"name": "mine"}, "learner": learner}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


def outputs(cell: NotebookNode, kind: str) -> list[str]:
    return [output["data"][kind] for output in cell.outputs if kind in output.get("data", {})]


@pytest.mark.timeout(420)
def test_it_runs_and_so_does_the_page_and_the_stop_button_checkpoints(workplace: Workplace, place: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}
    assert not [cell for cell in code.values() if cell.outputs or cell.execution_count is not None], "as it is shipped"
    page = (ROOT / "docs" / "howto" / "notebook.md").read_text()
    blocks = [new_code_cell(block) for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL)]
    assert len(blocks) == 5
    stop = new_code_cell(STOP)
    notebook.cells += [*blocks, stop]
    client = NotebookClient(
        notebook, timeout=CELL_S, kernel_name="python3", resources={"metadata": {"path": str(place)}}
    )
    client.execute(env={**workplace.environment, "IPYTHONDIR": str(place / "ipython"), "OMP_NUM_THREADS": "1"})

    (progress,) = outputs(code["train"], "text/plain")[:-1]
    assert "learning 6/6" in progress
    assert progress.splitlines()[-1].split("] ")[1].startswith("wall "), "nothing moves any more"
    assert len(outputs(code["figure"], "image/png")) == 1
    (shown,) = outputs(code["captions"], "text/html")
    assert shown.count('src="data:image/png;base64,') == 4
    assert "cider_d" in outputs(code["evaluate"], "text/html")[-1]
    assert len(eval(outputs(code["caption"], "text/plain")[-1])) == 2  # noqa: S307
    (report,) = outputs(code["report"], "text/html")
    assert "srcdoc=" in report
    assert outputs(code["later"], "text/plain") == ["'finished'"]
    assert json.loads((place / "runs" / "again" / "summary.json").read_text())["status"] == "finished"

    told, status, step, checkpoints, is_as_before = json.loads(stop.outputs[-1]["text"])
    assert told.startswith(f"stopped after {step} steps; go on with: ")
    assert (status, checkpoints[-1], is_as_before) == ("interrupted", step, True)
