"""Checkpoints that are whole or not there, and where trainings keep theirs."""

import errno
import hashlib
import json
import os
import re
import shutil

import pytest
import torch

from f2llm.store.checkpoint import (
    FILES,
    clear_finished,
    keyed_folder,
    latest,
    mark_finished,
    read_state,
    read_tensors,
    save,
    steps,
)
from f2llm.store.files import alone_in

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
    averages = {f"{name}.exp_avg": tensor for name, tensor in TENSORS.items()}
    save(tmp_path, 7, TENSORS, averages, state)
    found = {name: torch.ones_like(tensor) for name, tensor in (TENSORS | averages).items()}
    read_tensors(latest(tmp_path), found)
    assert {name: bits(tensor) for name, tensor in found.items()} == {
        name: bits(tensor) for name, tensor in (TENSORS | averages).items()
    }
    assert read_state(latest(tmp_path)) == {"step": 7, **state}


@pytest.mark.parametrize("wanted", [{"other": torch.zeros(3)}, {"weight": torch.zeros(4)}], ids=["name", "shape"])
def test_tensors_of_another_training_are_one_error(tmp_path, wanted):
    write(tmp_path, 2)
    with pytest.raises(ValueError, match=r"step-00000002 is of another training: .*; remedy: delete "):
        read_tensors(latest(tmp_path), wanted)


def test_a_checkpoint_holds_safetensors_and_json_with_their_hashes(tmp_path):
    write(tmp_path, 2)
    assert {path.name for path in (tmp_path / "step-00000002").iterdir()} == {*FILES, "manifest.json"}
    manifest = json.loads((tmp_path / "step-00000002" / "manifest.json").read_text())
    assert manifest["training"] == tmp_path.name
    for name in FILES:
        content = (tmp_path / "step-00000002" / name).read_bytes()
        assert manifest["files"][name] == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


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
    assert read_state(latest(tmp_path))["rows"] == steps(tmp_path)[-1:]
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
    assert output.startswith(f"stage2 starts from step 0: an interrupted training in {old} had other {names}. ")
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
