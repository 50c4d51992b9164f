"""Folders that are complete or not there."""

import os

import pytest

from f2llm.checkpoint import require_writable, whole_folder


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
