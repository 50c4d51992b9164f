"""The loop: learning, reproducibility, teachers, and what stops it."""

import copy
import math
import shutil
from dataclasses import replace

import pytest
import torch
from helpers.closeness import assert_close

from f2llm.batches import HomogeneousBatches
from f2llm.config import Average, HardNegatives, load_config
from f2llm.model import Embedder
from f2llm.optimizer import LossScale, WeightAverage, build_optimizer
from f2llm.step import clip_gradients, grad_cache_backward, prepare
from f2llm.store.run_log import Run
from f2llm.teacher import Cached, live
from f2llm.train import train


@pytest.fixture
def batches(small_store, tiny_training):
    """Two epochs of all four sources."""
    return HomogeneousBatches(small_store, tiny_training, seed=0, stage1=False)


def run_of(batches):
    return Run("test", len(batches), print_every=1e9)


def same_weights(one, other):
    theirs = other.model.state_dict()
    return all(torch.equal(weight, theirs[name]) for name, weight in one.model.state_dict().items())


def test_the_loss_falls_and_every_parameter_moves(embedder, small_store, tiny_training, machine):
    before = copy.deepcopy(embedder.model.state_dict())
    plan = replace(tiny_training, epochs=5, learning_rate=3e-3, min_learning_rate=3e-4)
    batches = HomogeneousBatches(small_store, plan, seed=0, stage1=False)
    run = run_of(batches)
    train(embedder, batches, plan, run, replace(machine, token_budget=2000))
    losses = [row["loss"] for row in run.rows if row["source"] == "pairs"]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    unchanged = [name for name, weight in embedder.model.state_dict().items() if torch.equal(weight, before[name])]
    assert unchanged == []
    assert not embedder.model.training


def test_the_same_seed_trains_the_same_weights_bit_for_bit(embedder, small_store, tiny_training, machine):
    plan = replace(tiny_training, max_steps=6)
    models = [Embedder(copy.deepcopy(embedder.model), embedder.tokenizer, embedder.max_tokens) for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1)):
        batches = HomogeneousBatches(small_store, plan, seed=seed, stage1=False)
        train(model, batches, plan, run_of(batches), machine)
    assert same_weights(models[0], models[1])
    assert not same_weights(models[0], models[2]), "vacuous: training changes nothing"


def test_a_student_comes_closer_to_its_teacher(embedder, small_store, tiny_training, machine):
    teacher = Embedder(copy.deepcopy(embedder.model), embedder.tokenizer, embedder.max_tokens)
    with torch.no_grad():
        teacher.model.norm.weight.uniform_(0.5, 2)
    alone = {"in_batch_tasks": [], "hard_negatives": HardNegatives(retrieval=0, clustering=0, classification=0)}
    plan = replace(tiny_training, distillation_weight=1.0, learning_rate=3e-3, epochs=4, **alone)
    batches = HomogeneousBatches(small_store, plan, seed=0, stage1=False)
    run = run_of(batches)
    train(embedder, batches, plan, run, replace(machine, token_budget=2000), live(teacher))
    losses = [row["distill"] for row in run.rows]
    assert losses == [row["loss"] for row in run.rows]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_a_cached_teacher_trains_the_same_student_as_a_live_one(
    embedder, small_store, tiny_training, machine, tmp_path
):
    """Rows may differ in their last digits, as the same text in other company does."""
    teacher = Embedder(copy.deepcopy(embedder.model), embedder.tokenizer, embedder.max_tokens)
    with torch.no_grad():
        teacher.model.norm.weight.uniform_(0.5, 2)
    plan = replace(tiny_training, distillation_weight=1.0, max_steps=12)
    batches = HomogeneousBatches(small_store, plan, seed=0, stage1=False)
    cached = Cached(teacher, tmp_path / "cache", machine)
    students, logs = {}, {}
    for name, target in (("live", live(teacher)), ("first", cached), ("second", cached), ("none", None)):
        students[name] = Embedder(copy.deepcopy(embedder.model), embedder.tokenizer, embedder.max_tokens)
        run = Run(name, len(batches), tmp_path / name, print_every=1e9)
        (tmp_path / name).mkdir()
        train(students[name], batches, plan, run, replace(machine, save_every=5), target)
        logs[name] = [row["loss"] for row in run.rows]
    assert_close(logs["first"], logs["live"], eps=1e-4)
    assert same_weights(students["first"], students["second"]) and logs["first"] == logs["second"]
    assert logs["none"] != pytest.approx(logs["live"], rel=1e-2), "vacuous: the teacher does not matter"
    start, first, live_one = (
        torch.cat([weight.flatten() for weight in model.model.state_dict().values()])
        for model in (embedder, students["first"], students["live"])
    )
    # As a whole: where a gradient is almost 0, rounding decides the direction of AdamW's step.
    assert (first - live_one).norm() < 0.02 * (live_one - start).norm()


def test_new_rows_of_the_cache_are_on_the_disk_before_every_checkpoint(
    embedder, small_store, tiny_training, machine, tmp_path, monkeypatch
):
    plan = replace(tiny_training, distillation_weight=1.0, max_steps=7)
    batches = HomogeneousBatches(small_store, plan, seed=0, stage1=False)
    texts = [set(batches[step].texts) for step in range(len(batches))]
    found = []

    def look(_, step):
        again = Cached(embedder, tmp_path / "cache", machine)
        found.append((step, len(again.where), len(set().union(*texts[:step]))))

    monkeypatch.setattr("f2llm.train.Checkpoints.save", look)
    run = Run("test", len(batches), tmp_path, print_every=1e9)
    train(embedder, batches, plan, run, replace(machine, save_every=3), Cached(embedder, tmp_path / "cache", machine))
    assert [step for step, *_ in found] == [3, 6, 7]
    assert all(stored == met for _, stored, met in found) and found[0][1] < found[-1][1]


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(embedder, batches, tiny_training, machine):
    teacher = Embedder(copy.deepcopy(embedder.model), embedder.tokenizer, embedder.max_tokens)
    with torch.no_grad():
        teacher.model.norm.weight[0] = torch.nan
    before = Embedder(copy.deepcopy(embedder.model), embedder.tokenizer, embedder.max_tokens)
    plan = replace(tiny_training, distillation_weight=1.0)
    rows = ", ".join(map(str, batches[0].rows))
    expected = (
        f"step 1, source {batches[0].source}: .*nan.*no step was taken.*rows: {rows}.*remedy: a lower learning_rate"
    )
    with pytest.raises(RuntimeError, match=expected):
        train(embedder, batches, plan, run_of(batches), machine, live(teacher))
    assert same_weights(embedder, before)


def test_validating_changes_nothing_that_is_trained(embedder, small_store, tiny_training, machine):
    plan = replace(tiny_training, max_steps=4, validate_every=1, validation_rows=4)
    models = []
    for every in (1, 4):
        model = Embedder(copy.deepcopy(embedder.model), embedder.tokenizer, embedder.max_tokens)
        batches = HomogeneousBatches(small_store, replace(plan, validate_every=every), seed=0, stage1=False)
        run = run_of(batches)
        train(model, batches, replace(plan, validate_every=every), run, machine)
        models.append(model)
        assert len({row["step"] for row in run.validation}) == 4 / every
    assert same_weights(*models)


# Precision --------------------------------------------------------------------------------------


@pytest.fixture
def trained_in(embedder, small_store, tiny_training, machine, tmp_path):
    """trained_in(dtype, folder) -> (model, run) after nine steps from the same weights; a checkpoint every third."""

    def train_in(dtype, folder=None):
        model = Embedder(copy.deepcopy(embedder.model), embedder.tokenizer, embedder.max_tokens)
        model.autocast_dtype = dtype
        batches = HomogeneousBatches(small_store, replace(tiny_training, max_steps=9), seed=0, stage1=False)
        folder = tmp_path / (folder or str(dtype))
        folder.mkdir(exist_ok=True)
        run = Run("test", len(batches), folder, print_every=1e9)
        train(model, batches, tiny_training, run, replace(machine, save_every=3))
        return model, run

    return train_in


def learned(embedder, model):
    after = model.model.state_dict()
    return torch.cat([(after[name] - weight).flatten() for name, weight in embedder.model.state_dict().items()])


@pytest.mark.parametrize(("dtype", "within"), [(torch.bfloat16, 0.3), (torch.float16, 0.1)])
def test_half_precision_learns_what_float32_does(embedder, trained_in, monkeypatch, dtype, within):
    """bfloat16 has 8 bits, float16 11: the sum of nine steps is as near, and every weight stays float32."""
    monkeypatch.setattr(LossScale, "FIRST", 2.0**6)  # so that no step is left out
    exact, _ = trained_in(None)
    model, run = trained_in(dtype)
    assert {weight.dtype for weight in model.model.parameters()} == {torch.float32}
    difference = learned(embedder, model) - learned(embedder, exact)
    assert 0 < difference.norm() < within * learned(embedder, exact).norm()
    assert all(row["grad_norm"] < 1e3 for row in run.rows), "the norm is logged without the scale"


def test_gradients_that_float16_would_lose_are_kept_by_the_scale(embedder, small_store, tiny_training, machine):
    """Factor of 1 against 65536, on gradients made small: those of float32 are the oracle."""
    batches = HomogeneousBatches(small_store, tiny_training, seed=0, stage1=False)
    packed, plan = prepare(embedder, batches[0], machine), replace(tiny_training, temperature=2e3)

    def gradient(dtype, scale):
        embedder.autocast_dtype = dtype
        embedder.model.zero_grad()
        grad_cache_backward(embedder, packed, plan, scale=scale)
        clip_gradients(embedder, 1e9, scale)
        return embedder.model.layers[0].mlp.gate_proj.weight.grad.clone()

    expected = gradient(None, 1.0)
    without, scaled = ((gradient(torch.float16, scale) - expected).norm() / expected.norm() for scale in (1.0, 65536.0))
    assert scaled < 0.02 and without > 5 * scaled


def test_an_overflow_leaves_out_the_step_and_resumes_to_the_same_bits(embedder, trained_in, monkeypatch, tmp_path):
    monkeypatch.setattr(LossScale, "FIRST", 2.0**19)  # too large for float16
    whole, run = trained_in(torch.float16)
    overflowed = [row["grad_norm"] for row in run.rows if not math.isfinite(row["grad_norm"])]
    assert 0 < len(overflowed) < 9, "vacuous: none, or all"
    assert all(torch.isfinite(weight).all() for weight in whole.model.parameters())
    shutil.copytree(tmp_path / "torch.float16", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "step-00000009")
    for manifest in (tmp_path / "killed").glob("step-*/manifest.json"):
        manifest.write_text(manifest.read_text().replace("torch.float16", "killed"))
    resumed, again = trained_in(torch.float16, folder="killed")
    assert again.first_step == 6 and same_weights(whole, resumed)


# Averaged weights -------------------------------------------------------------------------------


@pytest.fixture
def averaged(embedder, small_store, tiny_training, machine, tmp_path):
    """averaged(folder, last) -> model after eight steps, the mean of every second from the last back."""

    def train_in(folder, last):
        model = Embedder(copy.deepcopy(embedder.model), embedder.tokenizer, embedder.max_tokens)
        plan = replace(tiny_training, max_steps=8, average=Average(last=last, every=2))
        batches = HomogeneousBatches(small_store, plan, seed=0, stage1=False)
        (tmp_path / folder).mkdir(exist_ok=True)
        run = Run("test", len(batches), tmp_path / folder, print_every=1e9)
        train(model, batches, plan, run, replace(machine, save_every=5))
        return model

    return train_in


def test_averaged_weights_are_the_mean_of_those_after_the_last_steps(averaged, monkeypatch):
    after, take = {}, WeightAverage.take

    def look(average, step):
        groups = average.optimizer.param_groups
        after[step] = [weight.detach().double() for group in groups for weight in group["params"]]
        take(average, step)

    monkeypatch.setattr(WeightAverage, "take", look)
    plain, mean = averaged("plain", last=0), averaged("mean", last=3)
    expected = [sum(weights) / 3 for weights in zip(*(after[step] for step in (4, 6, 8)))]
    optimizer = build_optimizer(mean.model, load_config("nano").stage2)
    found = [weight for group in optimizer.param_groups for weight in group["params"]]
    for weight, wanted, last in zip(found, expected, after[8], strict=True):
        assert_close(weight.detach().double(), wanted, eps=1e-6)
        assert not torch.equal(weight.double(), last), "vacuous: the weights of the last step"
    assert not same_weights(plain, mean)


@pytest.mark.parametrize("killed_after", [5, 8])
def test_averaged_weights_are_the_same_bits_when_resumed(averaged, tmp_path, killed_after):
    whole = averaged("whole", last=3)
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    for manifest in (tmp_path / "killed").glob("step-*/manifest.json"):
        manifest.write_text(manifest.read_text().replace('"whole"', '"killed"'))
    if killed_after == 5:
        shutil.rmtree(tmp_path / "killed" / "step-00000008")
    assert same_weights(averaged("killed", last=3), whole)
