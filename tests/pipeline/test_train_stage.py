"""What a training stage reads, and what it leaves: a model, its log, its provenance."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import write_small_data

from f2llm.config import Shape
from f2llm.model import Embedder
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
