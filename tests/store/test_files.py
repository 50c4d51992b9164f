"""Files and folders that are whole or not there, errors of the disk, hashes, and one process in a folder at a time."""

import errno
import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from f2llm.store.files import alone_in, clear_errors, require_writable, sha256, whole_file, whole_folder


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_takes_the_place_of_the_old_one_as_a_whole(tmp_path):
    out = tmp_path / "deep" / "out"
    for text in ("old", "new"):
        with whole_folder(out) as folder:
            (folder / "part").mkdir()
            (folder / "part" / f"{text}.txt").write_text(text)
            assert "part/new.txt" not in contents(out), "not there before it is complete"
    assert contents(tmp_path) == {"deep/out/part/new.txt": "new"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, RuntimeError])
def test_a_failing_block_keeps_the_old_folder_and_leaves_nothing_else(tmp_path, error):
    with whole_folder(tmp_path / "out") as folder:
        (folder / "a.txt").write_text("old")
    with pytest.raises(error), whole_folder(tmp_path / "out") as folder:
        (folder / "a.txt").write_text("half")
        raise error
    assert contents(tmp_path) == {"out/a.txt": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_leftovers_of_a_killed_run_do_not_get_in(tmp_path):
    (tmp_path / ".out.writing").mkdir()
    (tmp_path / ".out.writing" / "stale.txt").write_text("stale")
    with whole_folder(tmp_path / "out") as folder:
        (folder / "a.txt").write_text("new")
    assert contents(tmp_path) == {"out/a.txt": "new"}


def test_a_full_disk_is_one_error_that_names_the_folder_and_keeps_the_old_one(tmp_path):
    with whole_folder(tmp_path / "out") as folder:
        (folder / "a.txt").write_text("old")
    message = r"cannot write .*out: No space left.*what was there before is kept. remedy: free disk space"
    with pytest.raises(RuntimeError, match=message), whole_folder(tmp_path / "out"):
        raise OSError(28, "No space left on device")
    assert contents(tmp_path) == {"out/a.txt": "old"}


def test_a_parent_that_is_a_file_is_one_error(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    out = tmp_path / "file" / "out"
    with pytest.raises(RuntimeError, match=r"cannot write .*file/out: .*remedy"), whole_folder(out):
        raise AssertionError("the block must not run")
    assert contents(tmp_path) == {"file": "not a folder"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_parent_without_the_right_to_write_is_one_error(tmp_path):
    tmp_path.chmod(0o555)
    try:
        message = r"Permission denied.*make the folder writable"
        with pytest.raises(RuntimeError, match=message), whole_folder(tmp_path / "out"):
            raise AssertionError("the block must not run")
    finally:
        tmp_path.chmod(0o755)


def test_a_folder_that_cannot_be_written_is_named_before_any_work(tmp_path):
    require_writable([tmp_path / "models"], free_mib=1)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RuntimeError, match=r"cannot write into .*file.*nothing was run.*remedy"):
        require_writable([tmp_path / "file" / "models"], free_mib=1)


def test_a_full_disk_is_named_before_any_work(tmp_path):
    with pytest.raises(RuntimeError, match=r"MiB are free for .*at least .* are needed.*remedy"):
        require_writable([tmp_path], free_mib=2**40)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the name of an open file")
def test_everything_is_on_the_disk_before_it_is_visible(tmp_path, monkeypatch):
    events, fsync, rename = [], os.fsync, Path.rename

    def flushed(descriptor):
        events.append(os.readlink(f"/proc/self/fd/{descriptor}").removeprefix(f"{tmp_path}/"))
        fsync(descriptor)

    def renamed(path, target):
        events.append("rename")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "rename", renamed)
    with whole_folder(tmp_path / "deep" / "out") as folder:
        (folder / "part").mkdir()
        for name in ("a.txt", "part/b.txt"):
            (folder / name).write_text("new")
    visible = events.index("rename")
    inside = "deep/.out.writing"
    assert set(events[:visible]) == {inside, f"{inside}/a.txt", f"{inside}/part", f"{inside}/part/b.txt"}
    assert events[visible:] == ["rename", "deep"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), Exception("No space left on device (os error 28)")])
def test_an_error_of_the_disk_is_the_same_line_whichever_library_meets_it(tmp_path, error):
    message = r"cannot write .*/out: No space left on device; .*remedy"
    with pytest.raises(RuntimeError, match=message), clear_errors(tmp_path / "out"):
        raise error


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "not there", "/elsewhere/input.txt"),
        OSError("the server does not answer"),
        Exception("No such file or directory (os error 2)"),
        ValueError("row 3"),
    ],
)
def test_an_error_of_something_else_stays_what_it_is(tmp_path, error):
    with pytest.raises(type(error)) as found, clear_errors(tmp_path / "out", under=tmp_path):
        raise error
    assert found.value is error


# Single files -----------------------------------------------------------------------------------


def test_a_file_takes_the_place_of_the_old_one_when_the_block_ends(tmp_path):
    path = tmp_path / "deep" / "a.json"
    for text in ("old", "new"):
        before = contents(path.parent)
        with whole_file(path) as new:
            assert new.suffix == ".json", "numpy and others append a suffix that is not there"
            new.write_text(text)
            assert contents(path.parent) == before | {new.name: text}, "not there before it is complete"
    assert contents(tmp_path) == {"deep/a.json": "new"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError("row 3"), OSError(errno.ENOSPC, "full")])
def test_a_failing_block_keeps_the_old_file_and_leaves_nothing_else(tmp_path, error):
    (tmp_path / "a.txt").write_text("old")
    full = isinstance(error, OSError)
    message = r"cannot write .*/a.txt: No space left on device; what was there before is kept" if full else None
    kind = RuntimeError if full else (KeyboardInterrupt, ValueError)
    with pytest.raises(kind, match=message), whole_file(tmp_path / "a.txt") as new:
        new.write_text("half")
        raise error
    assert contents(tmp_path) == {"a.txt": "old"}


def test_a_file_whose_folder_cannot_be_made_is_one_error(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    message = r"cannot write .*file/a.txt: .*remedy"
    with pytest.raises(RuntimeError, match=message), whole_file(tmp_path / "file" / "a.txt"):
        raise AssertionError("the block must not run")
    assert contents(tmp_path) == {"file": "not a folder"}


KILLED = """
import os, signal, sys
from pathlib import Path
from f2llm.store.files import whole_file

def die(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)

path, at = Path(sys.argv[1]), sys.argv[2]
if at == "flush":
    os.fsync = die
if at == "replace":
    Path.replace = die
with whole_file(path) as new:
    new.write_text("ne")
    if at == "block":
        die()
    new.write_text("new")
if at == "end":
    die()
"""


@pytest.mark.parametrize(("at", "left"), [("block", "old"), ("flush", "old"), ("replace", "old"), ("end", "new")])
def test_a_process_that_is_killed_leaves_the_old_file_or_the_new_one(tmp_path, at, left):
    path = tmp_path / "a.txt"
    path.write_text("old")
    done = subprocess.run([sys.executable, "-c", KILLED, path, at], env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == left
    with whole_file(path) as new:
        new.write_text("newer")
    assert contents(tmp_path) == {"a.txt": "newer"}, "nothing is left"


# Hashes and locks ---------------------------------------------------------------------------------


def test_the_hash_is_that_of_the_whole_file(tmp_path):
    content = bytes(range(256)) * 10_000  # longer than any piece that is read at once
    (tmp_path / "file").write_bytes(content)
    assert sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()
    (tmp_path / "file").write_bytes(content[:-1] + b"x")
    assert sha256(tmp_path / "file") != hashlib.sha256(content).hexdigest()


def test_only_one_training_works_in_a_folder_at_a_time(tmp_path):
    folder = tmp_path / "stage2-0123"
    message = r"another training works in .*stage2-0123; remedy: wait"
    with alone_in(folder), alone_in(tmp_path / "stage2-4567"):
        with pytest.raises(RuntimeError, match=message), alone_in(folder):
            raise AssertionError("the block must not run")
        assert folder.is_dir()
    with pytest.raises(KeyError), alone_in(folder):
        raise KeyError
    with alone_in(folder):
        assert folder.is_dir()
