"""One step: the losses of a batch and where their gradients go, texts made ready ahead, and validation."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import SMALL_SOURCES
from helpers.closeness import assert_close

from f2llm.batches import HomogeneousBatches
from f2llm.losses import hard_negative_loss, in_batch_loss, matryoshka, matryoshka_dims
from f2llm.model import Embedder
from f2llm.step import ahead, compute_losses, embed_without_gradient, grad_cache_backward, num_kept, prepare, validate


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


# Losses of a batch --------------------------------------------------------------------------------


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
    assert losses.keys() == expected.keys() and min(expected.values()) > 0.1
    for name, loss in losses.items():
        assert_close(loss, expected[name], scale=1 / tiny_training.temperature, name=name)


def test_passages_of_one_group_are_no_negatives_of_each_other(embedder, batches, tiny_training):
    batch = batch_of(batches, "pairs")
    batch = replace(batch, group=batch.group * 0)  # all answer each other: nothing is left in the denominator
    masked = losses_of(embedder, batch, tiny_training)
    plain = losses_of(embedder, batch, replace(tiny_training, mask_duplicates=False))
    similarity = 1 / tiny_training.temperature  # that losses are differences of
    assert_close(masked["in_batch"], 0, scale=similarity)
    assert plain["in_batch"].item() > 0.1
    assert_close(masked["hard_negative"], plain["hard_negative"], scale=similarity)


def test_a_model_learns_nothing_from_itself_as_its_teacher(embedder, batches, tiny_training):
    plan = replace(tiny_training, distillation_weight=2.0)
    teacher = Embedder(copy.deepcopy(embedder.model), embedder.tokenizer, embedder.max_tokens)
    batch = batch_of(batches, "kinds")
    itself = losses_of(embedder, batch, plan, teacher)["distill"].item()
    with torch.no_grad():
        teacher.model.norm.weight *= 2
    once = losses_of(embedder, batch, replace(plan, distillation_weight=1.0), teacher)["distill"].item()
    assert once > 0.1 and itself < 1e-8 * once
    assert losses_of(embedder, batch, plan, teacher)["distill"].item() == pytest.approx(2 * once, rel=1e-5)
    assert "distill" not in losses_of(embedder, batch, plan)


def test_normalised_distillation_sees_directions_only(embedder, batches, tiny_training):
    """D times the loss of queries, of passages and of negatives is the mean of 2 - 2 cosine; summed and weighted."""
    plan = replace(tiny_training, distillation_weight=2.0, distillation_normalised=True)
    teacher = Embedder(copy.deepcopy(embedder.model), embedder.tokenizer, embedder.max_tokens)
    with torch.no_grad():
        teacher.model.norm.weight *= 3
    batch = batch_of(batches, "pairs")
    longer = losses_of(embedder, batch, plan, teacher)["distill"].item()
    with torch.no_grad():
        teacher.model.norm.weight.uniform_(0.1, 3)
    student, target = (model.embed(model.tokenize(batch.texts)).detach() for model in (embedder, teacher))
    cosine = torch.nn.functional.cosine_similarity(student, target, dim=-1)
    parts = (batch.query, batch.passage, batch.hard_negatives.reshape(-1))
    expected = 2.0 * sum((2 - 2 * cosine[part]).mean().item() for part in parts) / 32
    assert expected > 1e-3 and longer < 1e-6 * expected, "three times as long is the same direction"
    assert losses_of(embedder, batch, plan, teacher)["distill"].item() == pytest.approx(expected, rel=1e-4)
    raw = losses_of(embedder, batch, replace(plan, distillation_normalised=False), teacher)["distill"].item()
    assert raw > 2 * expected


def test_no_gradient_reaches_the_teacher(embedder, batches, tiny_training, machine):
    teacher = Embedder(copy.deepcopy(embedder.model), embedder.tokenizer, embedder.max_tokens)
    plan = replace(tiny_training, distillation_weight=1.0)
    packed = prepare(embedder, batches[0], machine)
    grad_cache_backward(embedder, packed, plan, embed_without_gradient(teacher, packed))
    assert any(parameter.grad is not None for parameter in embedder.model.parameters()), "vacuous: no gradient at all"
    assert all(parameter.grad is None for parameter in teacher.model.parameters())


# Batches made ready -------------------------------------------------------------------------------


def test_work_ahead_comes_in_order_and_an_error_reaches_the_caller():
    assert list(ahead(lambda number: number**2, range(10))) == [number**2 for number in range(10)]
    begun = []
    stream = ahead(lambda number: begun.append(number) or 1 / (3 - number), range(9))
    assert next(stream) == 1 / 3
    with pytest.raises(ZeroDivisionError):
        list(stream)
    assert max(begun) <= 6, "no more than a few items ahead"


def test_activations_are_kept_for_the_last_packs_that_fit():
    lengths, groups = [4, 4, 6, 6, 9], [[0, 1], [2, 3], [4]]  # packs of 8, 12 and 9 tokens
    assert [num_kept(lengths, groups, tokens) for tokens in (1, 9, 20, 21, 28, 29)] == [1, 1, 1, 2, 2, 3]
    assert num_kept(lengths, [], 100) == 0


def test_tokens_are_counted_as_packed_and_as_padded(embedder, batches, machine):
    batch = batch_of(batches, "pairs")
    packed = prepare(embedder, batch, machine)
    lengths = [len(ids) for ids in embedder.tokenize(batch.texts)]
    longest = max(lengths)
    assert packed.tokens()["tokens"] == sum(lengths) == sum(part.num_tokens for part in packed.packs)
    assert packed.tokens()["padded_tokens"] == len(batch.rows) * (2 + batch.hard_negatives.shape[1]) * longest
    embedder.max_tokens = longest
    assert prepare(embedder, batch, machine).tokens()["cut_texts"] == lengths.count(longest) > 0


def test_a_text_without_tokens_is_an_error_with_source_and_rows(embedder, batches, machine):
    batch = batch_of(batches, "code")
    batch = replace(batch, texts=[*batch.texts[:-1], ""])
    with pytest.raises(ValueError, match=r"source code: the text '' has no tokens \(rows \d+, .*remedy: remove it"):
        prepare(embedder, batch, machine)


# Validation ---------------------------------------------------------------------------------------


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
                margin = cosine(query, own, dim=0) - max(scores)
                assert abs(margin) > 1e-4, "so near to each other that rounding decides"
                right.append(margin.item() > 0)
                for negatives in (others, in_batch) if batch.task == "retrieval" else (others,):
                    logits = torch.stack([cosine(query, text, dim=0) for text in [own, *negatives]]) / plan.temperature
                    losses.append(-logits.log_softmax(0)[0])
            assert row["accuracy"] == pytest.approx(sum(right) / len(right), abs=1e-4)  # it is rounded
            assert_close(row["loss"], sum(losses) / len(right), scale=1 / plan.temperature)
    assert len({row["accuracy"] for row in rows}) > 2, "vacuous: all accuracies are alike"
