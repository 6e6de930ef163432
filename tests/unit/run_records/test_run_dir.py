"""`RunDir`: atomic files, JSON lines, committed folders; on a local folder and on something that is none."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pyarrow import fs

from mmrl_ray.data import atomic
from mmrl_ray.errors import CheckpointError, RunError
from mmrl_ray.run_records.run_dir import MANIFEST, RunDir


@pytest.fixture(params=["local", "object store"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> RunDir:
    if request.param == "local":
        return RunDir.create(tmp_path / "runs", "r1")
    # A file system that is not `LocalFileSystem`, so that everything goes through pyarrow's streams.
    return RunDir.create("runs", "r1", filesystem=fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()))


def everything_in(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*")}


def test_a_folder_that_was_moved_away_is_not_made_anew_by_whoever_still_writes_there(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "runs", "r1")
    with run.staging_folder() as scratch:
        (tmp_path / "runs" / "r1").rename(tmp_path / "moved")
        writes = (
            lambda: run.write_json("status.json", {}),
            lambda: run.append_line("events.jsonl", {}),
            lambda: run.commit_folder("adapter", scratch),
        )
        for write in writes:
            with pytest.raises(RunError, match=r"r1 is gone: it was moved or deleted .* with --resume"):
                write()
    assert list((tmp_path / "runs").iterdir()) == []


def test_an_existing_folder_is_refused_and_resume_is_named(run: RunDir) -> None:
    root = run.path.rsplit("/", 1)[0]
    filesystem = None if run.is_local else run.filesystem
    with pytest.raises(RunError, match=r"exists already.*--resume"):
        RunDir.create(root, "r1", filesystem=filesystem)
    assert RunDir.open(root, "r1", filesystem=filesystem).path == run.path
    assert RunDir.at(run.path, filesystem=filesystem).name == "r1"
    with pytest.raises(RunError, match=r"no run folder at .*r2"):
        RunDir.open(root, "r2", filesystem=filesystem)
    if run.is_local:
        with pytest.raises(RunError, match=r"no run folder at .*rr1; did you mean .*/r1\?"):
            RunDir.open(root, "rr1")


def test_files_come_back_as_written_and_no_temporary_stays(run: RunDir, tmp_path: Path) -> None:
    run.write_bytes("images/ab.png", b"\x00\xff")
    run.write_text("config.yaml", "name: größe\n")
    run.write_json("summary.json", {"a": 1.5, "b": math.nan, "c": [math.inf, (1, 2)]})
    assert run.read_bytes("images/ab.png") == b"\x00\xff"
    assert run.read_text("config.yaml") == "name: größe\n"
    assert run.read_json("summary.json") == {"a": 1.5, "b": None, "c": [None, [1, 2]]}
    run.write_text("config.yaml", "again")
    assert run.read_text("config.yaml") == "again"
    assert run.list() == ["config.yaml", "images", "summary.json"]
    assert run.list("images") == ["ab.png"]
    assert run.list("no such folder") == []
    assert everything_in(tmp_path / "runs" / "r1") == {"config.yaml", "images", "images/ab.png", "summary.json"}
    assert run.exists("images/ab.png")
    run.delete("images")
    run.delete("images")
    assert not run.exists("images/ab.png")
    with pytest.raises(RunError, match=r"images/ab.png: no such file"):
        run.read_bytes("images/ab.png")


def test_it_pickles(run: RunDir) -> None:
    run.write_text("a", "1")
    again = pickle.loads(pickle.dumps(run))
    assert again.read_text("a") == "1"
    assert again.location == run.location


def test_lines_are_appended_read_and_cut_for_a_resume(run: RunDir) -> None:
    assert run.read_lines("metrics.jsonl") == []
    assert run.truncate_lines("metrics.jsonl", lambda o: True) == 0
    for step in range(4):
        run.append_line("metrics.jsonl", {"step": step, "loss": math.nan})
    assert [o["step"] for o in run.read_lines("metrics.jsonl")] == [0, 1, 2, 3]
    assert run.read_lines("metrics.jsonl")[0] == {"step": 0, "loss": None}
    assert run.truncate_lines("metrics.jsonl", lambda o: o["step"] < 2) == 2
    run.append_line("metrics.jsonl", {"step": 2, "again": True})
    assert run.read_lines("metrics.jsonl") == [
        {"step": 0, "loss": None},
        {"step": 1, "loss": None},
        {"step": 2, "again": True},
    ]


def test_a_torn_last_line_is_left_out_and_a_torn_middle_is_an_error(run: RunDir) -> None:
    run.write_bytes("m.jsonl", b'{"step": 0}\n{"st')
    assert run.read_lines("m.jsonl") == [{"step": 0}]
    run.truncate_lines("m.jsonl", lambda o: True)
    assert run.read_bytes("m.jsonl") == b'{"step": 0}\n'
    run.write_bytes("m.jsonl", b'{"st\n{"step": 1}\n')
    with pytest.raises(RunError, match="not JSON"):
        run.read_lines("m.jsonl")


def test_what_comes_after_a_torn_line_stands_on_its_own(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, "r1")
    run.write_bytes("m.jsonl", b'{"step": 0}\n{"st')
    run.cut_torn_line("m.jsonl")
    run.cut_torn_line("none.jsonl")
    run.append_line("m.jsonl", {"step": 1})
    assert run.read_bytes("m.jsonl") == b'{"step": 0}\n{"step": 1}\n'


def test_scratch_folders_of_killed_processes_go_and_those_in_use_stay(tmp_path: Path) -> None:
    hold = "import sys; from mmrl_ray.data.atomic import scratch_folder as s; from pathlib import Path\n"
    hold += "with s(Path(sys.argv[1])) as f: (f / 'weights').touch(); print(f, flush=True); input()"
    child = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    theirs = Path(child.stdout.readline().strip())
    (tmp_path / ".tmp-other").mkdir()  # not of ours
    with atomic.scratch_folder(tmp_path) as mine:
        with atomic.scratch_folder(tmp_path):
            assert mine.exists()
            assert (theirs / "weights").exists()
        child.kill()
        child.communicate(timeout=60)
        assert theirs.exists()
        with atomic.scratch_folder(tmp_path):
            assert not theirs.exists()
            assert mine.exists()
        mine.rename(tmp_path / "whole")
    assert everything_in(tmp_path) == {"whole", ".tmp-other"}


def commit(run: RunDir, text: str) -> None:
    with run.staging_folder() as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "a.txt").write_text(text)
        (folder / "b.bin").write_bytes(b"12345")
        run.commit_folder("checkpoints/step-000003", folder, facts={"step": 3})


def test_a_committed_folder_is_whole_and_its_hashes_hold(run: RunDir, tmp_path: Path) -> None:
    commit(run, "one")
    commit(run, "two")  # replaces
    name = "checkpoints/step-000003"
    manifest = run.verify_manifest(name)
    assert manifest["step"] == 3
    assert manifest["files"]["inner/a.txt"] == {"bytes": 3, "sha256": hashlib.sha256(b"two").hexdigest()}
    assert set(manifest["files"]) == {"inner/a.txt", "b.bin"}
    with run.local_copy(name) as folder:
        assert everything_in(folder) == {"inner", "inner/a.txt", "b.bin", MANIFEST}
        assert (folder / "inner" / "a.txt").read_text() == "two"
    base = tmp_path / "runs" / "r1"
    assert everything_in(base / name) == {"inner", "inner/a.txt", "b.bin", MANIFEST}
    assert everything_in(base) - everything_in(base / name) >= {"checkpoints", name}
    assert run.list() == ["checkpoints"]
    assert not list(base.rglob(".*")), "a scratch folder stayed"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "b.bin").write_bytes(b"1234"), "4 bytes instead of 5"),
        (lambda f: (f / "b.bin").write_bytes(b"12346"), "does not match its hash"),
        (lambda f: (f / "b.bin").unlink(), "lacks a file"),
        (lambda f: (f / MANIFEST).unlink(), "no valid manifest"),
        (lambda f: (f / MANIFEST).write_text("{}"), "no valid manifest"),
        (lambda f: (f / MANIFEST).write_text('{"fi'), "no valid manifest"),
    ],
)
def test_damage_to_a_committed_folder_is_found(run: RunDir, tmp_path: Path, damage, message: str) -> None:  # type: ignore[no-untyped-def]
    commit(run, "one")
    damage(tmp_path / "runs" / "r1" / "checkpoints" / "step-000003")
    with pytest.raises(CheckpointError, match=message):
        run.verify_manifest("checkpoints/step-000003")


def test_an_object_store_commits_by_its_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir.create("runs", "r1", filesystem=fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()))
    commit(run, "one")
    written: list[str] = []
    original = RunDir.write_bytes

    def dies_at_the_last_file(self: RunDir, name: str, data: bytes) -> None:
        written.append(name)
        if name.endswith("a.txt"):
            raise RunError("gone")
        original(self, name, data)

    monkeypatch.setattr(RunDir, "write_bytes", dies_at_the_last_file)
    with pytest.raises(RunError, match="gone"):
        commit(run, "two")
    assert written == ["checkpoints/step-000003/b.bin", "checkpoints/step-000003/inner/a.txt"]
    with pytest.raises(CheckpointError, match="no valid manifest"):
        run.verify_manifest("checkpoints/step-000003")


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir.create(tmp_path, "r1")
    run.write_text("summary.json", "old")
    run.append_line("metrics.jsonl", {"step": 0})
    real = os.write

    def half(descriptor: int, data: bytes) -> int:
        if len(data) < 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, bytes(data)[: len(data) // 2])

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(RunError, match=r"summary.json: the disk is full; .*--resume"):
        run.write_text("summary.json", "new " * 20)
    with pytest.raises(RunError, match=r"metrics.jsonl: the disk is full"):
        run.append_line("metrics.jsonl", {"step": 1})
    monkeypatch.undo()
    assert run.read_text("summary.json") == "old"
    assert run.read_bytes("metrics.jsonl") == b'{"step": 0}\n'
    assert everything_in(tmp_path / "r1") == {"summary.json", "metrics.jsonl"}


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="mounting a small tmpfs needs root")
def test_a_really_full_disk(tmp_path: Path) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"no tmpfs here: {mounted.stderr.decode().strip()}")
    try:
        run = RunDir.create(tmp_path, "r1")
        run.write_text("a", "kept")
        with pytest.raises(RunError, match="the disk is full"):
            run.write_bytes("a", b"x" * 200_000)
        with pytest.raises(RunError, match="the disk is full"), run.staging_folder() as folder:
            (folder / "big").write_bytes(b"x" * 200_000)
        assert run.read_text("a") == "kept"
        assert everything_in(tmp_path / "r1") == {"a"}
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("not a folder")
    with pytest.raises(RunError, match="a file lies where a folder is needed"):
        RunDir.create(tmp_path / "runs", "r1")


def test_what_a_killed_writer_left_is_swept_for_a_resume(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, "r1")
    run.write_text("checkpoints/step-000001/a", "1")
    (tmp_path / "r1" / ".tmp-1").mkdir()
    (tmp_path / "r1" / ".tmp-1" / "part").write_text("")
    (tmp_path / "r1" / "checkpoints" / ".old-2").mkdir()
    (tmp_path / "r1" / ".tmp-3").write_text("")
    assert run.list() == ["checkpoints"]
    run.remove_scratch()
    assert everything_in(tmp_path / "r1") == {"checkpoints", "checkpoints/step-000001", "checkpoints/step-000001/a"}


def test_a_uri_keeps_its_options_behind_the_name(tmp_path: Path) -> None:
    run = RunDir.create(f"file://{tmp_path}", "r1")
    assert run.is_local
    assert run.local_path("tb") == tmp_path / "r1" / "tb"
    with pytest.raises(RunError, match=r"no location pyarrow.fs knows"):
        RunDir.create("nosuch://x", "r1")
    remote = RunDir(fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()), "r1", "s3://b/r1")
    with pytest.raises(RunError, match=r"needs a local run.root"):
        remote.local_path("tb")


def test_json_lines_are_plain_json(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, "r1")
    run.append_line("events.jsonl", {"kind": "x", "values": (1, -math.inf)})
    assert json.loads((tmp_path / "r1" / "events.jsonl").read_text()) == {"kind": "x", "values": [1, None]}
