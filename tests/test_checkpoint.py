"""Folders that are complete or not there, checkpoints among them, and where trainings keep theirs."""

import errno
import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from f2llm.checkpoint import (
    FILES,
    alone_in,
    clear_errors,
    clear_finished,
    keyed_folder,
    latest,
    mark_finished,
    require_writable,
    restore,
    save,
    sha256,
    steps,
    whole_folder,
)


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


# Checkpoints ------------------------------------------------------------------------------------

TENSORS = {
    "float32": torch.tensor([[0.1, -0.0], [float("inf"), 1e-45]]),
    "float64": torch.tensor([0.1, 5e-324], dtype=torch.float64),
    "bfloat16": torch.tensor([0.1, 3.0], dtype=torch.bfloat16),
    "float16": torch.tensor([0.1, 6e-8], dtype=torch.float16),
    "int64": torch.tensor([2**62 + 1, -1]),
    "uint8": torch.tensor([0, 255], dtype=torch.uint8),
    "bool": torch.tensor([True, False]),
    "nan": torch.tensor([0x7FC12345], dtype=torch.int32).view(torch.float32),
    "step": torch.tensor(3),
    "float step": torch.tensor(3.0),
    "no rows": torch.zeros(0, 4),
    "transposed": torch.arange(6.0).reshape(2, 3).T,
}


def bits(tensor):
    return tensor.dtype, tensor.shape, tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def write(folder, step):
    """A small checkpoint whose content names its step."""
    save(folder, step, {"weight": torch.full((3,), step + 0.5)}, {"weight.step": torch.tensor(step)}, {"rows": [step]})


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path):
    state = {"rows": [{"loss": 0.1 + 0.2, "source": "ä 敏", "lr": 5e-324}], "seconds": 1 / 3}
    save(tmp_path, 7, TENSORS, {f"{name}.exp_avg": tensor for name, tensor in TENSORS.items()}, state)
    weights, moments, found = restore(latest(tmp_path))
    assert {tensor.dtype for tensor in weights.values()} == {tensor.dtype for tensor in TENSORS.values()}
    assert {name: bits(tensor) for name, tensor in weights.items()} == {
        name: bits(tensor) for name, tensor in TENSORS.items()
    }
    assert {name: bits(tensor) for name, tensor in moments.items()} == {
        f"{name}.exp_avg": bits(tensor) for name, tensor in TENSORS.items()
    }
    assert found == {"step": 7, **state}


def test_a_checkpoint_holds_safetensors_and_json_with_their_hashes(tmp_path):
    write(tmp_path, 2)
    assert {path.name for path in (tmp_path / "step-00000002").iterdir()} == {*FILES, "manifest.json"}
    manifest = json.loads((tmp_path / "step-00000002" / "manifest.json").read_text())
    assert manifest["training"] == tmp_path.name
    for name in FILES:
        content = (tmp_path / "step-00000002" / name).read_bytes()
        assert manifest["files"][name] == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_the_hash_is_that_of_the_whole_file(tmp_path):
    content = bytes(range(256)) * 10_000  # longer than any piece that is read at once
    (tmp_path / "file").write_bytes(content)
    assert sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()
    (tmp_path / "file").write_bytes(content[:-1] + b"x")
    assert sha256(tmp_path / "file") != hashlib.sha256(content).hexdigest()


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


FAULTS = {
    "truncated weights": (
        lambda path: os.truncate(path / "model.safetensors", 90),
        r"model.safetensors has 90 bytes, not the \d+ of its manifest",
    ),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), "model.safetensors is missing"),
    "a flipped bit": (
        lambda path: flip(path / "optimizer.safetensors"),
        "the content of optimizer.safetensors is not what was written",
    ),
    "a changed state": (lambda path: flip(path / "state.json"), "the content of state.json is not what was written"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing"),
    "an empty manifest": (lambda path: (path / "manifest.json").write_text(""), "JSONDecodeError: "),
    "half a manifest": (lambda path: os.truncate(path / "manifest.json", 40), "JSONDecodeError: "),
    "another JSON": (lambda path: (path / "manifest.json").write_text("[]"), "TypeError: "),
    "bytes for a manifest": (lambda path: (path / "manifest.json").write_bytes(b"\xff\xfe"), "UnicodeDecodeError: "),
    "an empty folder": (lambda path: [file.unlink() for file in path.iterdir()], "manifest.json is missing"),
}


@pytest.mark.parametrize(("damage", "reason"), FAULTS.values(), ids=FAULTS)
def test_a_checkpoint_that_is_not_whole_is_named_and_the_one_before_it_serves(tmp_path, capsys, damage, reason):
    write(tmp_path, 2)
    write(tmp_path, 4)
    assert latest(tmp_path).name == "step-00000004" and not capsys.readouterr().out
    damage(tmp_path / "step-00000004")
    assert latest(tmp_path).name == "step-00000002"
    (line,) = capsys.readouterr().out.splitlines()
    start, end = line.split(" is not a whole checkpoint and is left out: ")
    assert start == str(tmp_path / "step-00000004")
    assert re.match(reason, end)
    damage(tmp_path / "step-00000002")
    assert latest(tmp_path) is None


def test_a_checkpoint_of_another_step_or_training_is_named_and_left_out(tmp_path, capsys):
    own, other = tmp_path / "stage2-0123", tmp_path / "stage2-4567"
    for folder in (own, other):
        write(folder, 2)
    shutil.copytree(own / "step-00000002", own / "step-00000006")
    shutil.copytree(other / "step-00000002", own / "step-00000008")
    assert latest(own) == own / "step-00000002"
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{own}/step-00000008 ") and first.endswith("it belongs to stage2-4567")
    assert second.startswith(f"{own}/step-00000006 ") and second.endswith("it says that it is of step 2")


def test_what_only_looks_like_a_checkpoint_is_none(tmp_path, capsys):
    for name in ("step-", "step-abc", "step-4", "step-0000000²", "step-00000004.old", ".step-00000009.writing", "logs"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000099").write_text("a file")
    assert steps(tmp_path) == [] and latest(tmp_path) is None
    write(tmp_path, 12)
    assert steps(tmp_path) == [12] and latest(tmp_path).name == "step-00000012"
    assert not capsys.readouterr().out
    assert steps(tmp_path / "nowhere") == [] and latest(tmp_path / "nowhere") is None


def test_the_two_newest_stay_and_nothing_of_a_killed_one(tmp_path):
    for step in (5, 10, 15, 100_000_000):
        (tmp_path / f".step-{step + 1:08d}.writing").mkdir()
        write(tmp_path, step)
    assert steps(tmp_path) == [15, 100_000_000]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000015", "step-100000000"]


def test_later_checkpoints_that_are_not_whole_never_push_out_one_that_is(tmp_path):
    for step in (2, 4):
        write(tmp_path, step)
    for step in (8, 9):
        (tmp_path / f"step-{step:08d}").mkdir()
    assert latest(tmp_path).name == "step-00000004"
    write(tmp_path, 5)
    assert latest(tmp_path).name == "step-00000005"
    assert steps(tmp_path) == [4, 5, 8, 9]


@pytest.mark.parametrize("call", range(6))
def test_a_disk_that_fails_at_any_flush_keeps_the_last_checkpoint(tmp_path, monkeypatch, call):
    write(tmp_path, 2)
    calls, fsync = iter(range(100)), os.fsync

    def failing(descriptor):
        if next(calls) == call:
            raise OSError(errno.EIO, "Input/output error")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(RuntimeError, match=r"cannot write .*step-00000004: Input/output error"):
        write(tmp_path, 4)
    assert next(calls) > call, "vacuous: not reached"
    assert steps(tmp_path) == ([2] if call < 5 else [2, 4])  # the sixth: it was visible already, and is whole
    assert restore(latest(tmp_path))[2]["rows"] == steps(tmp_path)[-1:]
    assert not list(tmp_path.glob(".step-*"))


# Where a training keeps its checkpoints ---------------------------------------------------------

FACTS = {"parameters": {"seed": 0, "tasks": ["retrieval"], "negatives": {"code": 2}}, "code": {"train.py": "1f"}}


def changed(**parameters):
    return FACTS | {"parameters": FACTS["parameters"] | parameters}


def test_a_folder_is_keyed_by_its_facts_alone(tmp_path):
    folder = keyed_folder(tmp_path, "stage2", FACTS)
    assert folder.parent == tmp_path and folder.name.startswith("stage2-")
    assert json.loads((folder / "facts.json").read_text()) == FACTS
    turned = {key: FACTS[key] for key in reversed(FACTS)}
    assert keyed_folder(tmp_path, "stage2", turned) == folder
    assert keyed_folder(tmp_path, "stage2", changed(tasks=("retrieval",))) == folder
    others = [keyed_folder(tmp_path, "stage2", changed(seed=1)), keyed_folder(tmp_path, "stage1", FACTS)]
    assert len({folder, *others}) == 3
    assert not list(tmp_path.rglob(".*")), "nothing half is left"


@pytest.mark.parametrize(
    ("facts", "names"),
    [
        (changed(seed=1), "parameters.seed"),
        (changed(tasks=("retrieval",), seed=1), "parameters.seed"),
        (changed(negatives={"code": 3}, more=1), "parameters.more, parameters.negatives.code"),
        (FACTS | {"code": {"train.py": "2e", "new.py": "3d"}}, "code.new.py, code.train.py"),
    ],
)
def test_what_is_different_from_an_interrupted_training_is_named_once(tmp_path, capsys, facts, names):
    old = keyed_folder(tmp_path, "stage2", FACTS)
    write(old, 2)
    keyed_folder(tmp_path, "stage2", FACTS)
    keyed_folder(tmp_path, "stage2-small", facts)
    assert not capsys.readouterr().out
    keyed_folder(tmp_path, "stage2", facts)
    output = capsys.readouterr().out
    assert output.startswith(f"stage2 starts anew: an interrupted training in {old} had other {names}. It goes on if")
    keyed_folder(tmp_path, "stage2", facts)
    assert not capsys.readouterr().out


def test_a_training_that_saved_nothing_or_finished_is_not_called_interrupted(tmp_path, capsys):
    keyed_folder(tmp_path, "stage2", changed(seed=1))
    done = keyed_folder(tmp_path, "stage2", changed(seed=2))
    write(done, 2)
    mark_finished(done)
    keyed_folder(tmp_path, "stage2", FACTS)
    assert not capsys.readouterr().out


@pytest.mark.parametrize("content", ["", "[]", None])
def test_facts_that_cannot_be_read_stop_nothing(tmp_path, capsys, content):
    old = keyed_folder(tmp_path, "stage2", changed(seed=1))
    write(old, 2)
    (old / "facts.json").unlink()
    if content is not None:
        (old / "facts.json").write_text(content)
    keyed_folder(tmp_path, "stage2", FACTS)
    assert "had other facts.json, which cannot be read. " in capsys.readouterr().out


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


def test_a_scratch_folder_that_cannot_be_made_is_one_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    message = r"cannot write .*/file/train.*: Not a directory; .*remedy"
    with pytest.raises(RuntimeError, match=message):
        keyed_folder(tmp_path / "file" / "train", "stage2", FACTS)
    with pytest.raises(RuntimeError, match=message), alone_in(tmp_path / "file" / "train"):
        raise AssertionError("the block must not run")


def test_finished_trainings_are_cleared_and_no_other(tmp_path):
    done, interrupted = (keyed_folder(tmp_path, "stage2", changed(seed=seed)) for seed in (1, 2))
    for folder in (done, interrupted):
        write(folder, 2)
    mark_finished(done)
    clear_finished(tmp_path)
    assert not done.exists() and latest(interrupted) is not None
    clear_finished(tmp_path / "nowhere")


def test_clearing_that_is_killed_leaves_no_folder_that_looks_interrupted(tmp_path, monkeypatch):
    done = keyed_folder(tmp_path, "stage2", FACTS)
    write(done, 2)
    mark_finished(done)
    removed, remove = [], shutil.rmtree

    def killed_at_the_second(path, **options):
        if removed:
            raise KeyboardInterrupt
        removed.append(path)
        remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        clear_finished(tmp_path)
    assert steps(done) == [] and (done / "finished").exists()
    monkeypatch.undo()
    clear_finished(tmp_path)
    assert not done.exists()
