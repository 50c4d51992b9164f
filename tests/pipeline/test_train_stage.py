"""What a training stage reads, and what it leaves: a model, its log, its provenance."""

import csv
import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, write_small_data
from safetensors.torch import load_file

from f2llm.config import Lora, Shape
from f2llm.contract import read_contract
from f2llm.model import Embedder
from f2llm.pipeline import cli
from f2llm.pipeline.doctor import examine
from f2llm.pipeline.train_stage import models_to_train, run_stage
from f2llm.prune import prune_width


def same_weights(one, other):
    theirs = other.model.state_dict()
    return all(torch.equal(weight, theirs[name]) for name, weight in one.model.state_dict().items())


def test_stages_read_and_write_fixed_places(config):
    found = {stage: models_to_train(stage, config) for stage in ("stage1", "stage2", "distill")}
    named = {stage: [(str(one.start), str(one.out)) for one in models] for stage, models in found.items()}
    assert named["stage1"] == [("models/backbone", "models/stage1")]
    assert named["stage2"] == [("models/stage1", "models/stage2")]
    assert named["distill"] == [(f"models/pruned/{name}", f"models/distilled/{name}") for name in config.prune.students]


@pytest.fixture
def stages(embedder, config, tiny_training, tmp_path, monkeypatch):
    """A working folder with data and models, and a configuration of three steps a stage."""
    monkeypatch.chdir(tmp_path)
    write_small_data(tmp_path / "data")
    for folder in ("models/backbone", "models/pruned/small", "models/pruned/other", "models/teacher"):
        embedder.save(tmp_path / folder)
    plan = replace(tiny_training, max_steps=3)
    small = replace(config, machine=replace(config.machine, threads=1, save_every=2), stage1=plan, stage2=plan)
    own = {
        "small": replace(plan, distillation_weight=1.0),
        "other": replace(plan, distillation_weight=1.0, max_steps=2),
    }
    shapes = dict.fromkeys(own, Shape(32, 48, 2))
    return replace(small, distill=own, prune=replace(config.prune, students=shapes))


def rows_of(folder):
    with (folder / "log.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_stage_leaves_a_model_its_log_and_its_provenance(stages, tmp_path):
    for stage, out in (("stage1", "stage1"), ("stage2", "stage2"), ("distill", "distilled/small")):
        run_stage(stage, stages)
        folder = tmp_path / "models" / out
        rows = rows_of(folder)
        assert [row["step"] for row in rows] == ["1", "2", "3"]
        assert float(rows[0]["loss"]) > 0 and bool(rows[0]["distill"]) == (stage == "distill")
        facts = json.loads((folder / "train.json").read_text())
        assert (facts["steps"], facts["seed"], facts["size_name"]) == (3, stages.seed, "nano")
        assert {"torch", "transformers"} <= facts["versions"].keys()
        assert Embedder.load(folder).max_tokens == stages.stage2.max_tokens
    assert not same_weights(Embedder.load("models/stage1"), Embedder.load("models/stage2"))
    assert [row["step"] for row in rows_of(tmp_path / "models/distilled/other")] == ["1", "2"], "its own section"
    assert len(list(Path("scratch/teacher").iterdir())) == 1, "students share their teacher's embeddings"


def test_a_stage_of_no_epochs_hands_its_input_on_unchanged(stages, tmp_path):
    run_stage("stage1", replace(stages, stage1=replace(stages.stage1, epochs=0)))
    start, out = tmp_path / "models" / "backbone", tmp_path / "models" / "stage1"
    assert same_weights(Embedder.load(start), Embedder.load(out))
    assert Embedder.load(out).max_tokens == stages.stage1.max_tokens
    facts = json.loads((out / "train.json").read_text())
    assert (facts["steps"], facts["tokens"], facts["last_losses"]) == (0, 0, None)
    assert not (out / "log.csv").exists() and not (out / "validation.csv").exists()
    run_stage("stage2", stages)
    assert len(rows_of(tmp_path / "models" / "stage2")) == 3
    assert not same_weights(Embedder.load("models/stage1"), Embedder.load("models/stage2"))


def test_stage_2_learns_from_a_teacher_if_it_has_a_weight_and_stages_1_and_2_need_none(stages, tmp_path):
    taught = replace(stages.stage2, distillation_weight=0.5)
    teachers = [
        [one.teacher for one in models_to_train(stage, config)]
        for stage, config in (
            ("stage1", stages),
            ("stage2", stages),
            ("stage2", replace(stages, stage2=taught)),
            ("distill", stages),
        )
    ]
    of_students = [Path("models/stage2")] * len(stages.distill)
    assert teachers == [[None], [None], [Path("models/teacher")], of_students] and of_students
    run_stage("stage1", stages)
    run_stage("stage2", replace(stages, stage2=taught))
    assert all(float(row["distill"]) > 0 for row in rows_of(tmp_path / "models" / "stage2")[1:])
    facts = json.loads((tmp_path / "models" / "stage2" / "train.json").read_text())
    assert facts["inputs"] == ["models/stage1", "models/teacher"]


def test_a_teacher_that_does_not_fit_stops_the_stage_before_any_step(stages, embedder, tmp_path):
    run_stage("stage1", stages)
    narrow = prune_width(embedder.model, torch.arange(16), [torch.arange(48)] * 2)
    Embedder(narrow.eval(), embedder.tokenizer, embedder.max_tokens).save(tmp_path / "models" / "teacher")
    with pytest.raises(ValueError, match="embeddings have 16 dimensions, fewer than the student's 32; remedy"):
        run_stage("stage2", replace(stages, stage2=replace(stages.stage2, distillation_weight=1.0)))
    assert not (tmp_path / "models" / "stage2").exists() and not list(tmp_path.glob("scratch/train/stage2-*/log.csv"))


# Adapters ---------------------------------------------------------------------------------------


@pytest.fixture(params=[False, True], ids=["lora", "dora"])
def adapted(stages, request):
    """The stages with an adapter in each training."""
    own = Lora(rank=2, alpha=4.0, dora=request.param, targets="all")
    distill = {name: replace(training, lora=own) for name, training in stages.distill.items()}
    plans = {"stage1": replace(stages.stage1, lora=own), "stage2": replace(stages.stage2, lora=own)}
    return replace(stages, distill=distill, **plans)


def content_of(folder: Path) -> dict[str, bytes]:
    """The files that say what a model computes, also those of its adapter."""
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


def test_a_stage_with_an_adapter_leaves_the_merged_model_and_the_adapter(adapted, tmp_path, capsys):
    run_stage("stage1", adapted)
    run_stage("stage2", adapted)
    run_stage("distill", adapted)
    for start, out in (("backbone", "stage1"), ("stage1", "stage2"), ("pruned/small", "distilled/small")):
        before, folder = tmp_path / "models" / start, tmp_path / "models" / out
        assert [finding for finding in examine(folder) if finding.state == "WRONG"] == []
        assert not same_weights(Embedder.load(before), Embedder.load(folder))
        frozen = Embedder.load(before).model.state_dict()
        moved = {key for key, value in Embedder.load(folder).model.state_dict().items() if not value.equal(frozen[key])}
        assert moved == {key for key in frozen if "proj" in key}, "what has no adapter stays"
        assert {path.name for path in (folder / "adapter").iterdir()} == {
            "adapter_config.json",
            "adapter_model.safetensors",
            "base.json",
        }
        assert json.loads((folder / "adapter" / "base.json").read_text())["path"] == f"models/{start}"
    adapter = load_file(tmp_path / "models" / "stage1" / "adapter" / "adapter_model.safetensors")
    trained = sum(weight.numel() for weight in adapter.values())
    total = Embedder.load(tmp_path / "models" / "stage1").num_parameters()[0] + trained
    assert f"stage1: trains {trained:,} of {total:,} parameters\n" in capsys.readouterr().out
    small = [path.stat().st_size for path in tmp_path.glob("scratch/train/*/step-*/model.safetensors")]
    assert max(small) < (tmp_path / "models" / "stage1" / "model.safetensors").stat().st_size / 3


def test_a_stage_with_an_adapter_that_was_interrupted_ends_with_the_same_bits(adapted, tmp_path):
    run_stage("stage1", adapted)
    expected = content_of(tmp_path / "models" / "stage1")
    (scratch,) = tmp_path.glob("scratch/train/stage1-*")
    for path in (scratch / "step-00000003", tmp_path / "models" / "stage1"):
        shutil.rmtree(path)
    run_stage("stage1", adapted)
    assert len(expected) == 2 and content_of(tmp_path / "models" / "stage1") == expected
    shutil.rmtree(scratch)
    run_stage("stage1", adapted)
    assert content_of(tmp_path / "models" / "stage1") == expected


def test_an_adapter_of_a_stage_merges_into_the_models_bits_by_hand(adapted, tmp_path, monkeypatch, capsys):
    run_stage("stage1", adapted)
    out = tmp_path / "merged"
    arguments = ["f2llm", "merge", "models/stage1/adapter", "models/backbone", str(out)]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0, capsys.readouterr().err
    for name in ("model.safetensors", "embedding_contract.json", "config_sentence_transformers.json", "config.json"):
        assert (out / name).read_bytes() == (tmp_path / "models" / "stage1" / name).read_bytes()
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 1 and "exists; remedy" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("adapted", "shard"), [(False, False), (True, True)], ids=["lora", "dora, sharded"], indirect=["adapted"]
)
def test_two_processes_train_the_adapter_of_one_and_resume_to_the_same_bits(adapted, shard, tmp_path):
    run_stage("stage1", adapted)
    start, one = weights_of(tmp_path / "models" / "backbone"), weights_of(tmp_path / "models" / "stage1")
    machine = replace(adapted.machine, shard=shard)
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(replace(adapted, machine=machine)))
    found = []
    for left in ("stage1-*", "stage1-*/step-00000003"):  # from the start, then as if killed after step 2
        for path in (tmp_path / "models" / "stage1", *tmp_path.glob(f"scratch/train/{left}")):
            shutil.rmtree(path)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        path = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command += [str(ROOT / "tests" / "helpers" / "stage_ranks.py"), "stage1"]
        done = subprocess.run(command, env={**os.environ, **path}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        assert ("resumes after step 2" in done.stdout) == (left != "stage1-*")
        found.append(content_of(tmp_path / "models" / "stage1"))
    assert len(found[0]) == 2 and found[0] == found[1]
    two = weights_of(tmp_path / "models" / "stage1")
    assert (one - start).abs().max() > 1e-4, "vacuous: nothing was learned"
    # As a whole: where a gradient is almost 0, rounding decides the direction of AdamW's step.
    assert (two - one).norm() < 0.02 * (one - start).norm()
    assert all(probe.embedding for probe in read_contract(tmp_path / "models" / "stage1").probes)


def weights_of(folder: Path) -> torch.Tensor:
    """All weights of a model in one row."""
    return torch.cat([weight.flatten() for _, weight in sorted(load_file(folder / "model.safetensors").items())])


def test_an_adapter_of_no_epochs_hands_the_model_on_unchanged(adapted, tmp_path):
    run_stage("stage1", replace(adapted, stage1=replace(adapted.stage1, epochs=0)))
    assert same_weights(*(Embedder.load(tmp_path / "models" / name) for name in ("backbone", "stage1")))
    assert not (tmp_path / "models" / "stage1" / "adapter").exists()
