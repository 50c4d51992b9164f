"""The loop and its parts: schedule, losses of a batch, learning, reproducibility, and what stops it."""

import copy
import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import SMALL_SOURCES, write_small_data

from f2llm.batches import HomogeneousBatches
from f2llm.config import HardNegatives, Shape
from f2llm.losses import hard_negative_loss, in_batch_loss, matryoshka, matryoshka_dims
from f2llm.model import Embedder
from f2llm.prune import prune_width
from f2llm.run import Run
from f2llm.step import (
    accumulate_gradients,
    ahead,
    compute_losses,
    embed_without_gradient,
    num_kept,
    prepare,
    validate,
)
from f2llm.targets import Cached, live
from f2llm.train import inputs_and_outputs, path_of_teacher, run_stage, train


@pytest.fixture
def batches(small_store, tiny_training):
    """Two epochs of all four sources."""
    return HomogeneousBatches(small_store, tiny_training, seed=0, stage1=False)


def batch_of(batches, source):
    return next(batch for batch in map(batches.__getitem__, range(len(batches))) if batch.source == source)


def losses_of(model, batch, plan, teacher=None):
    """The losses of a batch by the plain way: all texts embedded at once."""
    token_ids = model.tokenize(batch.texts)
    return compute_losses(model.embed(token_ids), batch, plan, teacher and teacher.embed(token_ids).detach())


def run_of(batches):
    return Run("test", len(batches), print_every=1e9)


def same_weights(one, other):
    theirs = other.model.state_dict()
    return all(torch.equal(weight, theirs[name]) for name, weight in one.model.state_dict().items())


# Losses of a batch ------------------------------------------------------------------------------


@pytest.mark.parametrize("source", SMALL_SOURCES)
def test_in_batch_loss_is_for_retrieval_only_and_hard_negatives_for_every_task(
    embedder, batches, tiny_training, source
):
    losses = losses_of(embedder, batch_of(batches, source), tiny_training)
    retrieval = SMALL_SOURCES[source][2]["task"] == "retrieval"
    assert set(losses) == ({"hard_negative", "in_batch"} if retrieval else {"hard_negative"})
    assert all(loss.item() > 0 and loss.requires_grad for loss in losses.values())


def test_the_losses_of_a_batch_are_those_of_texts_encoded_one_by_one(embedder, batches, tiny_training):
    batch = batch_of(batches, "pairs")
    alone = torch.cat([embedder.embed(embedder.tokenize([text])) for text in batch.texts])
    query, passage, negatives = alone[batch.query], alone[batch.passage], alone[batch.hard_negatives]
    dims = matryoshka_dims(32, tiny_training.matryoshka_min_dim)
    assert len(dims) > 1
    group = torch.tensor(batch.group)
    expected = {
        "hard_negative": matryoshka(
            lambda *parts: hard_negative_loss(*parts, tiny_training.temperature), query, passage, negatives, dims=dims
        ),
        "in_batch": matryoshka(
            lambda *parts: in_batch_loss(
                *parts, torch.arange(len(query)), tiny_training.temperature, group[:, None] == group
            ),
            *(query, passage),
            dims=dims,
        ),
    }
    losses = losses_of(embedder, batch, tiny_training)
    assert losses.keys() == expected.keys()
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(expected[name].item(), rel=1e-4)


def test_passages_of_one_group_are_no_negatives_of_each_other(embedder, batches, tiny_training):
    batch = batch_of(batches, "pairs")
    batch = replace(batch, group=batch.group * 0)  # all answer each other: nothing is left in the denominator
    masked = losses_of(embedder, batch, tiny_training)
    plain = losses_of(embedder, batch, replace(tiny_training, mask_duplicates=False))
    assert masked["in_batch"].item() == pytest.approx(0, abs=1e-5)
    assert plain["in_batch"].item() > 0.1
    assert masked["hard_negative"].item() == plain["hard_negative"].item()


def test_a_model_learns_nothing_from_itself_as_its_teacher(embedder, batches, tiny_training):
    plan = replace(tiny_training, distillation_weight=2.0)
    teacher = Embedder(copy.deepcopy(embedder.model), embedder.tokenizer, embedder.max_tokens)
    batch = batch_of(batches, "kinds")
    assert losses_of(embedder, batch, plan, teacher)["distill"].item() == pytest.approx(0, abs=1e-8)
    with torch.no_grad():
        teacher.model.norm.weight *= 2
    once = losses_of(embedder, batch, replace(plan, distillation_weight=1.0), teacher)["distill"].item()
    assert once > 0.1
    assert losses_of(embedder, batch, plan, teacher)["distill"].item() == pytest.approx(2 * once)
    assert "distill" not in losses_of(embedder, batch, plan)


def test_normalised_distillation_sees_directions_only(embedder, batches, tiny_training):
    """D times the loss of queries, of passages and of negatives is the mean of 2 - 2 cosine; summed and weighted."""
    plan = replace(tiny_training, distillation_weight=2.0, distillation_normalised=True)
    teacher = Embedder(copy.deepcopy(embedder.model), embedder.tokenizer, embedder.max_tokens)
    with torch.no_grad():
        teacher.model.norm.weight *= 3
    batch = batch_of(batches, "pairs")
    assert losses_of(embedder, batch, plan, teacher)["distill"].item() == pytest.approx(0, abs=1e-8)
    with torch.no_grad():
        teacher.model.norm.weight.uniform_(0.1, 3)
    student, target = (model.embed(model.tokenize(batch.texts)).detach() for model in (embedder, teacher))
    cosine = torch.nn.functional.cosine_similarity(student, target, dim=-1)
    parts = (batch.query, batch.passage, batch.hard_negatives.reshape(-1))
    expected = 2.0 * sum((2 - 2 * cosine[part]).mean().item() for part in parts) / 32
    assert expected > 1e-3, "vacuous: the same directions"
    assert losses_of(embedder, batch, plan, teacher)["distill"].item() == pytest.approx(expected, rel=1e-4)
    raw = losses_of(embedder, batch, replace(plan, distillation_normalised=False), teacher)["distill"].item()
    assert raw > 2 * expected


def test_no_gradient_reaches_the_teacher(embedder, batches, tiny_training, machine):
    teacher = Embedder(copy.deepcopy(embedder.model), embedder.tokenizer, embedder.max_tokens)
    plan = replace(tiny_training, distillation_weight=1.0)
    work = prepare(embedder, batches[0], machine)
    accumulate_gradients(embedder, work, plan, embed_without_gradient(teacher, work))
    assert any(parameter.grad is not None for parameter in embedder.model.parameters()), "vacuous: no gradient at all"
    assert all(parameter.grad is None for parameter in teacher.model.parameters())


# Training ---------------------------------------------------------------------------------------


def test_the_loss_falls_and_every_parameter_moves(embedder, small_store, tiny_training, machine):
    before = copy.deepcopy(embedder.model.state_dict())
    plan = replace(tiny_training, epochs=5, learning_rate=3e-3, min_learning_rate=3e-4)
    batches = HomogeneousBatches(small_store, plan, seed=0, stage1=False)
    run = run_of(batches)
    train(embedder, batches, plan, run, machine)
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
    train(embedder, batches, plan, run, machine, live(teacher))
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
    assert logs["first"] == pytest.approx(logs["live"], rel=1e-4)
    assert same_weights(students["first"], students["second"]) and logs["first"] == logs["second"]
    assert logs["none"] != pytest.approx(logs["live"], rel=1e-2), "vacuous: the teacher does not matter"
    for name, weight in students["live"].model.state_dict().items():
        torch.testing.assert_close(students["first"].model.state_dict()[name], weight, rtol=1e-3, atol=1e-4)


def test_new_rows_of_the_cache_are_on_the_disk_before_every_checkpoint(
    embedder, small_store, tiny_training, machine, tmp_path, monkeypatch
):
    plan = replace(tiny_training, distillation_weight=1.0, max_steps=7)
    batches = HomogeneousBatches(small_store, plan, seed=0, stage1=False)
    texts = [set(batches[step].texts) for step in range(len(batches))]
    found = []

    def look(step, *_):
        again = Cached(embedder, tmp_path / "cache", machine)
        found.append((step, len(again.where), len(set().union(*texts[:step]))))

    monkeypatch.setattr("f2llm.train.save", look)
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


# Stages -----------------------------------------------------------------------------------------


def test_stages_read_and_write_fixed_places(config):
    places = {stage: inputs_and_outputs(stage, config) for stage in ("stage1", "stage2", "distill")}
    named = {stage: [tuple(map(str, pair)) for pair in pairs] for stage, pairs in places.items()}
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
    assert path_of_teacher("stage1", stages, stages.stage1) is path_of_teacher("stage2", stages, stages.stage2) is None
    taught = replace(stages.stage2, distillation_weight=0.5)
    assert path_of_teacher("stage2", stages, taught) == Path("models/teacher")
    assert path_of_teacher("distill", stages, stages.distill["small"]) == Path("models/stage2")
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


# Ready-made work --------------------------------------------------------------------------------


def test_work_ahead_comes_in_order_and_an_error_reaches_the_caller():
    assert list(ahead(lambda number: number**2, range(10))) == [number**2 for number in range(10)]
    begun = []
    stream = ahead(lambda number: begun.append(number) or 1 / (3 - number), range(9))
    assert next(stream) == pytest.approx(1 / 3)
    with pytest.raises(ZeroDivisionError):
        list(stream)
    assert max(begun) <= 6, "no more than a few items ahead"


def test_activations_are_kept_for_the_last_packs_that_fit():
    lengths, groups = [4, 4, 6, 6, 9], [[0, 1], [2, 3], [4]]  # packs of 8, 12 and 9 tokens
    assert [num_kept(lengths, groups, tokens) for tokens in (1, 9, 20, 21, 28, 29)] == [1, 1, 1, 2, 2, 3]
    assert num_kept(lengths, [], 100) == 0


def test_tokens_are_counted_as_packed_and_as_padded(embedder, batches, machine):
    batch = batch_of(batches, "pairs")
    work = prepare(embedder, batch, machine)
    lengths = [len(ids) for ids in embedder.tokenize(batch.texts)]
    longest = max(lengths)
    assert work.tokens()["tokens"] == sum(lengths) == sum(part.num_tokens for part in work.packs)
    assert work.tokens()["padded_tokens"] == len(batch.rows) * (2 + batch.hard_negatives.shape[1]) * longest
    embedder.max_tokens = longest
    assert prepare(embedder, batch, machine).tokens()["cut_texts"] == lengths.count(longest) > 0


def test_a_text_without_tokens_is_an_error_with_source_and_rows(embedder, batches, machine):
    batch = batch_of(batches, "code")
    batch = replace(batch, texts=[*batch.texts[:-1], ""])
    with pytest.raises(ValueError, match=r"source code: the text '' has no tokens \(rows \d+, .*remedy: remove it"):
        prepare(embedder, batch, machine)


# Validation -------------------------------------------------------------------------------------


def test_validation_measures_every_source_at_every_dim(embedder, small_store, tiny_training, machine):
    embedder.max_tokens = 60  # shorter, texts would be cut to equal ones
    plan = replace(tiny_training, validate_every=1, validation_rows=4)
    batches = HomogeneousBatches(small_store, plan, seed=0, stage1=False)
    rows = list(validate(embedder, batches, plan, machine))
    dims = matryoshka_dims(32, plan.matryoshka_min_dim)
    assert {(row["source"], row["dim"]) for row in rows} == {(name, dim) for name in SMALL_SOURCES for dim in dims}
    for batch in batches.validation():
        embeddings = embedder.embed(embedder.tokenize(batch.texts)).detach()
        for dim in dims:
            row = next(row for row in rows if (row["source"], row["dim"]) == (batch.source, dim))
            cosine = torch.nn.functional.cosine_similarity
            right, losses = [], []
            for number, query in enumerate(embeddings[batch.query, :dim]):
                own = embeddings[batch.passage[number], :dim]
                others = [embeddings[text, :dim] for text in batch.hard_negatives[number]]
                in_batch = [
                    embeddings[text, :dim]
                    for text, group in zip(batch.passage, batch.group)
                    if batch.task == "retrieval" and group != batch.group[number]
                ]
                scores = [cosine(query, other, dim=0) for other in [*others, *in_batch]]
                right.append(all(cosine(query, own, dim=0) > score for score in scores))
                for negatives in (others, in_batch) if batch.task == "retrieval" else (others,):
                    logits = torch.stack([cosine(query, text, dim=0) for text in [own, *negatives]]) / plan.temperature
                    losses.append(-logits.log_softmax(0)[0])
            assert row["accuracy"] == pytest.approx(sum(right) / len(right), abs=1e-4)
            assert row["loss"] == pytest.approx(sum(losses).item() / len(right), rel=1e-3)
    assert len({row["accuracy"] for row in rows}) > 2, "vacuous: all accuracies are alike"


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
