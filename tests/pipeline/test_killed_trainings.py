"""A training that is killed anywhere, run again: the same bits. And what else may come between: disks, doubles, nan."""

import csv
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, write_small_data
from helpers.closeness import assert_close
from helpers.trainings import NO_MOUNT
from safetensors.torch import load_file

from f2llm.batches import HomogeneousBatches
from f2llm.config import Shape
from f2llm.model import Embedder
from f2llm.pipeline.train_stage import scratch_folder
from f2llm.store import checkpoint, code
from f2llm.store.tuples import TupleStore

STEPS = 7  # checkpoints after 2, 4, 6 and 7; validation after 3, 6 and 7
OUT = {"stage2": ["stage2"], "distill": ["distilled/one", "distilled/two"]}


@pytest.fixture(scope="module")
def kit(config, tiny_training):
    """A whole configuration of small trainings."""
    plan = replace(tiny_training, max_steps=STEPS, validate_every=3, validation_rows=2, matryoshka_min_dim=16)
    shapes = {"one": Shape(32, 48, 2), "two": Shape(32, 48, 2)}
    distill = dict.fromkeys(shapes, replace(plan, distillation_weight=1.0))
    small = replace(config, stage1=plan, stage2=plan, distill=distill)
    small = replace(small, prune=replace(config.prune, students=shapes))
    return replace(small, machine=replace(config.machine, threads=1, save_every=2))


@pytest.fixture(scope="module")
def template(kit, _session_model, tokenizer, tmp_path_factory):
    """A working folder with data, models to start from, and the configuration."""
    folder = tmp_path_factory.mktemp("template")
    write_small_data(folder / "data")
    for model in ("stage1", "pruned/one", "pruned/two"):
        Embedder(_session_model, tokenizer, max_tokens=24).save(folder / "models" / model)
    configure(folder, kit)
    return folder


def configure(folder: Path, config) -> None:
    (folder / "config.pickle").write_bytes(pickle.dumps(config))


class Trainings:
    """Orders to the process of tests/helpers/trainings.py."""

    def __init__(self, template: Path):
        environment = {"PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            [sys.executable, ROOT / "tests" / "helpers" / "trainings.py", template],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
        )

    def ask(self, order: dict):
        print(json.dumps(order), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def start(self, folder: Path, stage: str, fault: dict | None = None, **more) -> int:
        return self.ask({"start": str(folder), "stage": stage, "fault": fault, **more})

    def run(self, folder: Path, stage: str, fault: dict | None = None, **more) -> tuple[int, str]:
        """(exit status, output); below 0 is the signal that ended it."""
        return self.ask({"wait": self.start(folder, stage, fault, **more)})

    def kill(self, folder: Path, stage: str, fault: dict) -> None:
        status, output = self.run(folder, stage, fault)
        assert status == -signal.SIGKILL, f"vacuous: not killed\n{output}"

    def finish(self, folder: Path, stage: str) -> list[int]:
        """After which steps the stage's trainings went on."""
        status, output = self.run(folder, stage)
        assert status == 0, output
        return went_on(output)

    def fail(self, folder: Path, stage: str, fault: dict | None = None, **more) -> str:
        """The one line of an error."""
        status, output = self.run(folder, stage, fault, **more)
        if status == NO_MOUNT:
            pytest.skip("this system lets tests mount nothing")
        assert status == 1 and "Traceback" not in output, output
        (error,) = (line for line in output.splitlines() if line.startswith("error"))
        assert output.endswith(f"{error}\n")
        return error


@pytest.fixture(scope="module")
def trainings(template):
    trainings = Trainings(template)
    yield trainings
    trainings.process.stdin.close()
    assert trainings.process.wait(timeout=20) == 0


@pytest.fixture
def folder(template, tmp_path):
    return Path(shutil.copytree(template, tmp_path / "work"))


@pytest.fixture(scope="module")
def finished(trainings, template, tmp_path_factory):
    """A working folder in which no training was ever interrupted."""
    folder = Path(shutil.copytree(template, tmp_path_factory.mktemp("finished") / "work"))
    assert trainings.finish(folder, "stage2") == []
    shutil.copytree(folder / "models" / "stage2", folder / "models" / "kept")
    assert trainings.finish(folder, "distill") == []
    for out in OUT["stage2"] + OUT["distill"]:
        start = folder / "models" / ("stage1" if out == "stage2" else out.replace("distilled", "pruned"))
        before, after = ((path / "model.safetensors").read_bytes() for path in (start, folder / "models" / out))
        assert before != after, "vacuous: nothing was trained"
        assert [row["step"] for row in rows_of(folder, out, "log")] == [str(step + 1) for step in range(STEPS)]
        assert {row["step"] for row in rows_of(folder, out, "validation")} == {"3", "6", "7"}
    return folder


@pytest.fixture(scope="module")
def _interrupted(trainings, template, tmp_path_factory):
    folder = Path(shutil.copytree(template, tmp_path_factory.mktemp("interrupted") / "work"))
    trainings.kill(folder, "stage2", {"at": "torch.optim:AdamW.step", "do": "die_before", "number": 7})
    assert checkpoint.steps(scratch(folder)) == [4, 6]
    return folder


@pytest.fixture
def interrupted(_interrupted, tmp_path):
    """A working folder whose stage 2 was killed in step 7."""
    return Path(shutil.copytree(_interrupted, tmp_path / "work"))


def rows_of(folder: Path, out: str, name: str) -> list[dict]:
    with (folder / "models" / out / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def went_on(output: str) -> list[int]:
    return [int(step) for step in re.findall(rf"resumes after step (\d+) of {STEPS}, from scratch", output)]


def scratch(folder: Path) -> Path:
    (only,) = (folder / "scratch" / "train").iterdir()
    return only


def result(folder: Path, stage: str) -> dict:
    """Every byte that a stage leaves, and what of train.json is not about time and machine."""
    found = {}
    for out in OUT[stage]:
        model = folder / "models" / out
        found |= {f"{out}/{path.relative_to(model)}": path.read_bytes() for path in model.rglob("*") if path.is_file()}
        facts = json.loads(found.pop(f"{out}/train.json"))
        found[f"{out}/train.json"] = {key: facts[key] for key in ("stage", "inputs", "steps", "tokens", "last_losses")}
    return found


def assert_same_result(folder: Path, finished: Path, stage: str = "stage2") -> None:
    """As if never interrupted, and nothing half is left over."""
    expected = result(finished, stage)
    assert {f"{out}/{name}" for out in OUT[stage] for name in ("model.safetensors", "log.csv")} <= expected.keys()
    assert result(folder, stage) == expected
    hidden = [path for path in folder.rglob(".*") if path.name.endswith((".writing", ".old"))]
    assert not hidden
    for out in OUT[stage] if (folder / "scratch" / "train").is_dir() else []:
        (own,) = (folder / "scratch" / "train").glob(f"{out.replace('distilled/', 'distill-')}-*")
        assert (own / "log.csv").read_bytes() == expected[f"{out}/log.csv"]
        assert (own / "validation.csv").read_bytes() == expected[f"{out}/validation.csv"]
        assert (own / "finished").exists() and checkpoint.steps(own) == [6, 7]


# Killed -----------------------------------------------------------------------------------------

OPTIMIZER = {"at": "torch.optim:AdamW.step", "do": "die_before"}
RENAME = {"at": "pathlib:Path.rename", "text": ".step-00000004.writing"}
KILLS = {  # the call at which it ends, and the step after which it goes on; 0: it starts over
    "before the first checkpoint": (OPTIMIZER | {"number": 2}, 0),
    "in a backward pass": ({"at": "torch:Tensor.backward", "do": "die_after", "number": 5}, 2),  # two a step
    "in an optimizer step": (OPTIMIZER | {"number": 4}, 2),
    "after a step was logged": ({"at": "f2llm.store.run_log:Run.log", "do": "die_after", "number": 5}, 4),
    "within a validation": ({"at": "f2llm.train:validate", "do": "die_after", "number": 2}, 4),
    "while optimizer state is written": (
        {"at": "f2llm.store.checkpoint:save_file", "do": "die_within", "text": ".step-00000004.writing/optimizer"},
        2,
    ),
    "before all files are on the disk": (
        {"at": "f2llm.store.files:_flush", "do": "die_before", "text": ".step-00000004.writing/manifest"},
        2,
    ),
    "before a checkpoint is visible": (RENAME | {"do": "die_before"}, 2),
    "after a checkpoint is visible": (RENAME | {"do": "die_after"}, 4),
    "while an old checkpoint is removed": ({"at": "shutil:rmtree", "do": "die_within", "text": "/step-00000002"}, 6),
    "before the model is written": ({"at": "f2llm.pipeline.train_stage:write_model", "do": "die_before"}, 7),
    "while the model is written": ({"at": "f2llm.model:Embedder.write", "do": "die_after"}, 7),
    "before the model is visible": ({"at": "pathlib:Path.rename", "do": "die_before", "text": ".stage2.writing"}, 7),
    "before it is marked as finished": ({"at": "f2llm.store.checkpoint:mark_finished", "do": "die_before"}, 7),
}


@pytest.mark.parametrize(("fault", "step"), KILLS.values(), ids=KILLS)
def test_a_training_killed_anywhere_goes_on_to_the_same_bits(trainings, folder, finished, fault, step):
    trainings.kill(folder, "stage2", fault)
    model, marked = folder / "models" / "stage2", fault["at"].endswith("mark_finished")
    assert model.exists() == marked, "a model is whole or not there"
    assert trainings.finish(folder, "stage2") == ([step] if step else [])
    assert_same_result(folder, finished)


def test_a_training_killed_again_and_again_comes_to_its_end(trainings, folder, finished):
    after = []
    while True:
        status, output = trainings.run(
            folder, "stage2", {"at": "f2llm.train:grad_cache_backward", "do": "die_before", "number": 3}
        )
        after += went_on(output)
        if status == 0:
            break
        assert status == -signal.SIGKILL and len(after) < STEPS, output
    assert after == [2, 4, 6]
    assert_same_result(folder, finished)


@pytest.mark.parametrize(
    "at", ["store.checkpoint:read_tensors", "distributed:load_state_dicts", "store.run_log:Run.resume"]
)
def test_a_training_killed_while_it_resumes_loses_nothing(trainings, interrupted, finished, at):
    trainings.kill(interrupted, "stage2", {"at": f"f2llm.{at}", "do": "die_after"})
    assert trainings.finish(interrupted, "stage2") == [6]
    assert_same_result(interrupted, finished)


FLUSH = {"at": "f2llm.teacher:Cached.flush"}
SECOND_ROWS, SECOND_KEYS = "000001.rows.npy", "000001.keys.npy"
CACHE_KILLS = {  # with the parts that are there then, and the step after which the first student goes on
    "after the first flush, before its checkpoint": (FLUSH | {"do": "die_after"}, 1, 0),
    "while rows are written": ({"at": "numpy:save", "do": "die_within", "text": SECOND_ROWS}, 1, 2),
    "between rows and keys": ({"at": "pathlib:Path.replace", "do": "die_after", "text": SECOND_ROWS}, 1, 2),
    "while keys are written": ({"at": "numpy:save", "do": "die_within", "text": SECOND_KEYS}, 1, 2),
    "after a later flush, before its checkpoint": (FLUSH | {"do": "die_after", "number": 2}, 2, 2),
    "after a checkpoint": ({"at": "f2llm.resume:Checkpoints.save", "do": "die_after", "number": 2}, 2, 4),
    "while rows are made": ({"at": "f2llm.teacher:embed_without_gradient", "do": "die_after", "number": 5}, 2, 4),
}


def cache(folder: Path) -> dict[str, bytes]:
    """The files of the only cache."""
    (only,) = (folder / "scratch" / "teacher").iterdir()
    return {path.name: path.read_bytes() for path in sorted(only.iterdir())}


@pytest.mark.parametrize(("fault", "parts", "step"), CACHE_KILLS.values(), ids=CACHE_KILLS)
def test_distillation_killed_around_its_cache_goes_on_to_the_same_bits(trainings, folder, finished, fault, parts, step):
    shutil.copytree(finished / "models" / "kept", folder / "models" / "stage2")  # the teacher
    trainings.kill(folder, "distill", fault)
    whole = [name for name in (cache(folder) if (folder / "scratch" / "teacher").exists() else {}) if name[0] != "."]
    assert sum(name.endswith(".keys.npy") for name in whole) == parts
    assert trainings.finish(folder, "distill") == ([step] if step else [])
    assert_same_result(folder, finished, "distill")
    assert cache(folder) == cache(finished)


def test_distillation_killed_again_and_again_reads_and_leaves_the_same_cache(trainings, folder, finished):
    shutil.copytree(finished / "models" / "kept", folder / "models" / "stage2")
    after = []
    while True:
        status, output = trainings.run(
            folder, "distill", {"at": "f2llm.train:grad_cache_backward", "do": "die_before", "number": 4}
        )
        after.append(went_on(output))
        if status == 0:
            break
        assert status == -signal.SIGKILL and len(after) < 2 * STEPS, output
    assert after == [[], [2], [4], [7], [7, 2], [7, 4]]
    assert_same_result(folder, finished, "distill")
    assert cache(folder) == cache(finished)


def test_a_second_student_never_asks_the_teacher(trainings, finished, folder):
    """Nor does the first, trained once more; only the cache is left of the first time."""
    shutil.copytree(finished / "models" / "kept", folder / "models" / "stage2")
    shutil.copytree(finished / "scratch" / "teacher", folder / "scratch" / "teacher")
    status, output = trainings.run(
        folder, "distill", {"at": "f2llm.teacher:embed_without_gradient", "do": "die_before"}
    )
    assert status == 0 and went_on(output) == [], output
    assert_same_result(folder, finished, "distill")
    shutil.rmtree(folder / "scratch")
    trainings.kill(folder, "distill", {"at": "f2llm.teacher:embed_without_gradient", "do": "die_before"})


def test_without_a_cache_a_killed_distillation_goes_on_to_its_own_bits(trainings, folder, finished, kit, tmp_path):
    """machine.teacher_cache_gib 0: nothing is written, and losses are those of the cache but for their last digits."""
    configure(folder, replace(kit, machine=replace(kit.machine, teacher_cache_gib=0)))
    shutil.copytree(finished / "models" / "kept", folder / "models" / "stage2")
    whole = Path(shutil.copytree(folder, tmp_path / "whole"))
    assert trainings.finish(whole, "distill") == []
    trainings.kill(folder, "distill", OPTIMIZER | {"number": 6})
    assert trainings.finish(folder, "distill") == [4]
    assert_same_result(folder, whole, "distill")
    assert not (folder / "scratch" / "teacher").exists() and not (whole / "scratch" / "teacher").exists()
    for out in OUT["distill"]:
        losses = [[float(row["loss"]) for row in rows_of(path, out, "log")] for path in (whole, finished)]
        assert_close(*losses, eps=1e-4)


def test_a_full_disk_for_the_cache_is_one_error_and_the_last_checkpoint_stays(trainings, folder, finished):
    shutil.copytree(finished / "models" / "kept", folder / "models" / "stage2")
    error = trainings.fail(folder, "distill", FLUSH | {"do": "files_stay_small", "number": 2})
    assert re.fullmatch(
        r"error: cannot write scratch/teacher/\w+/000001.rows.npy: File too large; .*remedy: free disk space.*", error
    )
    assert trainings.finish(folder, "distill") == [2]
    assert_same_result(folder, finished, "distill")
    assert cache(folder) == cache(finished)


def test_stage_1_of_no_epochs_hands_its_input_on_also_after_a_kill(trainings, folder, kit):
    configure(folder, replace(kit, stage1=replace(kit.stage1, epochs=0)))
    shutil.copytree(folder / "models" / "stage1", folder / "models" / "backbone")
    shutil.rmtree(folder / "models" / "stage1")
    trainings.kill(folder, "stage1", {"at": "f2llm.model:Embedder.write", "do": "die_after"})
    assert not (folder / "models" / "stage1").exists()
    assert trainings.finish(folder, "stage1") == []
    start, out = (load_file(folder / "models" / name / "model.safetensors") for name in ("backbone", "stage1"))
    assert start.keys() == out.keys() and len(out) > 10
    assert all(torch.equal(weight, out[name]) for name, weight in start.items())


def test_distillation_of_a_second_student_goes_on_and_the_first_is_not_trained_again(trainings, finished, folder):
    shutil.copytree(finished / "models" / "kept", folder / "models" / "stage2")  # the teacher
    trainings.kill(folder, "distill", OPTIMIZER | {"number": STEPS + 4})
    assert not (folder / "models" / "distilled" / "two").exists()
    assert trainings.finish(folder, "distill") == [STEPS, 2]
    assert_same_result(folder, finished, "distill")


@pytest.mark.parametrize("removed", [True, False], ids=["as DVC removes it", "as it is"])
def test_a_finished_training_ends_at_once_with_the_same_model(trainings, finished, tmp_path, removed):
    """Its notebook's later cell failed, and DVC runs the stage once more."""
    folder = Path(shutil.copytree(finished, tmp_path / "work"))
    if removed:
        shutil.rmtree(folder / "models" / "stage2")
    status, output = trainings.run(folder, "stage2", {"at": "f2llm.train:grad_cache_backward", "do": "die_before"})
    assert status == 0, f"it must not train:\n{output}"
    assert went_on(output) == [STEPS]
    assert_same_result(folder, finished)


# Another training than before -------------------------------------------------------------------


def test_a_changed_parameter_starts_anew_says_so_and_putting_it_back_goes_on(trainings, interrupted, finished, kit):
    old = scratch(interrupted).relative_to(interrupted)
    configure(interrupted, replace(kit, stage2=replace(kit.stage2, learning_rate=2 * kit.stage2.learning_rate)))
    status, output = trainings.run(interrupted, "stage2")
    assert status == 0 and went_on(output) == []
    notice = f"stage2 starts from step 0: an interrupted training in {old} had other parameters.learning_rate. "
    assert output.count(notice) == output.count("starts from step 0") == 1
    changed, expected = (result(path, "stage2")["stage2/model.safetensors"] for path in (interrupted, finished))
    assert changed != expected
    checkpoint.clear_finished(interrupted / "scratch" / "train")
    configure(interrupted, kit)
    assert trainings.finish(interrupted, "stage2") == [6]
    assert_same_result(interrupted, finished)


def append(folder: Path, name: str, config):
    with (folder / name.partition(".")[2]).open("ab") as file:
        file.write(b"\n")
    return config


def append_code(folder: Path, name: str, config):
    path = folder / name.partition(".")[2].replace(".", "/")
    with path.with_suffix(".py").open("a") as file:
        file.write("MORE = 1\n")
    return config


def other_seed(folder: Path, name: str, config):
    return replace(config, seed=1)


def fewer_negatives(folder: Path, name: str, config):
    negatives = replace(config.stage2.hard_negatives, retrieval=1)
    return replace(config, stage2=replace(config.stage2, hard_negatives=negatives))


CHANGES = {
    "parameters.seed": other_seed,
    "parameters.hard_negatives.retrieval": fewer_negatives,
    "inputs.models/stage1/model.safetensors": append,
    "inputs.models/stage1/tokenizer.json": append,
    "inputs.data/assembled/manifest.json": append,
    "inputs.data/mined/code.arrow": append,
    "code.f2llm.losses": append_code,
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changed_is_named_whether_parameter_input_or_code(interrupted, kit, name, monkeypatch, capsys):
    monkeypatch.chdir(interrupted)
    shutil.copytree(ROOT / "f2llm", interrupted / "f2llm")
    monkeypatch.setattr(code, "PACKAGE", interrupted / "f2llm")

    def place(config):
        return scratch_folder("stage2", config.stage2, config, [Path("models/stage1")])

    old = scratch(interrupted).relative_to(interrupted)
    faster = replace(kit, machine=replace(kit.machine, token_budget=7, save_every=1, processes=3))
    assert place(kit) == place(faster) == old, "vacuous: the folder is another one anyway"
    changed = CHANGES[name](interrupted, name, kit)
    assert "from step 0" not in capsys.readouterr().out
    assert place(changed) != old
    assert f"in {old} had other {name}. " in capsys.readouterr().out
    assert place(changed) != old and "from step 0" not in capsys.readouterr().out, "said once"


def test_two_trainings_cannot_share_a_folder(trainings, folder, finished):
    first = trainings.start(
        folder, "stage2", {"at": "f2llm.train:grad_cache_backward", "do": "wait_for_go", "number": 5}
    )
    end = time.monotonic() + 30
    while not (folder / "waits").exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    error = trainings.fail(folder, "stage2")
    assert re.fullmatch(r"error: another training works in scratch/train/stage2-\w+; remedy: wait for it or .*", error)
    (folder / "go").touch()
    status, output = trainings.ask({"wait": first})
    assert (status, went_on(output)) == (0, []), output
    assert_same_result(folder, finished)


# Checkpoints that are not whole -----------------------------------------------------------------


@pytest.mark.parametrize(("broken", "step"), [([6], [4]), ([6, 4], [])])
def test_a_truncated_checkpoint_is_named_and_the_one_before_it_serves(trainings, interrupted, finished, broken, step):
    for number in broken:
        file = scratch(interrupted) / f"step-{number:08d}" / "model.safetensors"
        os.truncate(file, file.stat().st_size - 1)
    status, output = trainings.run(interrupted, "stage2")
    assert status == 0 and went_on(output) == step, output
    for number in broken:
        assert re.search(rf"scratch/\S+/step-{number:08d} is not a whole checkpoint .*: model.safetensors has", output)
    assert_same_result(interrupted, finished)


# Disks ------------------------------------------------------------------------------------------

STEP_4 = {"at": "f2llm.store.checkpoint:save_file", "text": "step-00000004.writing/model"}
FULL = {  # where, what cannot be written, and the step after which it goes on when there is space again
    "weights": (STEP_4, r"scratch/train/stage2-\w+/step-00000004", 2),
    "state": ({"at": "f2llm.store.run_log:Run.state", "number": 2}, r"scratch/train/stage2-\w+/step-00000004", 2),
    "log": ({"at": "f2llm.store.run_log:Run.log", "number": 5}, r"scratch/train/stage2-\w+/log.csv", 4),
    "validation": (
        {"at": "f2llm.store.run_log:Run.validate", "number": 2},
        r"scratch/train/stage2-\w+/validation.csv",
        4,
    ),
    "model": ({"at": "f2llm.model:Embedder.write"}, "models/stage2", 7),
    "tokenizer": ({"at": "transformers:PreTrainedTokenizerBase.save_pretrained"}, "models/stage2", 7),
}


@pytest.mark.parametrize(("place", "path", "step"), FULL.values(), ids=FULL)
def test_a_full_disk_is_one_error_and_the_last_checkpoint_stays(trainings, folder, finished, place, path, step):
    error = trainings.fail(folder, "stage2", place | {"do": "files_stay_small"})
    assert re.fullmatch(rf"error: cannot write {path}: File too large; .* is kept. remedy: free disk space.*", error)
    assert checkpoint.latest(scratch(folder)).name == f"step-{step:08d}"
    assert trainings.finish(folder, "stage2") == [step]
    assert_same_result(folder, finished)


@pytest.mark.parametrize("place", [STEP_4, STEP_4 | {"text": "step-00000004.writing/optimizer"}])
def test_a_disk_that_is_really_full_is_the_same_error(trainings, folder, finished, place):
    status, output = trainings.run(folder, "stage2", place | {"do": "disk_fills"}, mount="size=3m", again=True)
    if status == NO_MOUNT:
        pytest.skip("this system lets tests mount nothing")
    assert status == 0 and "Traceback" not in output, output
    found = re.findall(r"^error: (.*)$", output, re.M)
    assert len(found) == 1 and re.match(r"cannot write scratch/\S+/step-00000004: No space left on device;", found[0])
    assert re.search(r"exit code 1, whole: scratch/\S+/step-00000002", output)
    assert went_on(output) == [2]
    assert_same_result(folder, finished)


def test_a_read_only_folder_is_one_error(trainings, folder):
    error = trainings.fail(folder, "stage2", mount="ro")
    assert re.fullmatch(
        r"error: cannot write scratch/train/stage2-\w+: Read-only file system; .*folder writable", error
    )


@pytest.mark.parametrize(("stage", "place"), [("stage2", "scratch"), ("distill", "models/distilled")])
def test_a_file_in_the_way_is_one_error(trainings, folder, finished, stage, place):
    shutil.copytree(finished / "models" / "kept", folder / "models" / "stage2")
    (folder / place).write_text("in the way")
    error = trainings.fail(folder, stage)
    assert re.match(rf"error: cannot write {place}\S*: (Not a directory|File exists); .*remedy: ", error)
    assert (folder / place).read_text() == "in the way"


# Numbers that are none --------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["grad_cache_backward", "clip_gradients"])
def test_a_loss_or_gradient_that_is_not_finite_names_step_source_and_rows(trainings, folder, finished, kit, of):
    fault = {"at": f"f2llm.train:{of}", "do": "no_number", "number": 6}
    error = trainings.fail(folder, "stage2", fault)
    store = TupleStore(folder / "data" / "assembled", folder / "data" / "mined")
    batch = HomogeneousBatches(store, kit.stage2, kit.seed, stage1=False)[5]
    rows = ", ".join(map(str, batch.rows))
    assert error.startswith(f"error: step 6, source {batch.source}: ") and f"rows: {rows}. remedy" in error
    assert "nan" in error if of == "grad_cache_backward" else "norm inf" in error
    assert checkpoint.steps(scratch(folder)) == [2, 4]
    assert trainings.finish(folder, "stage2") == [4]
    assert_same_result(folder, finished)
