"""Losses against their formulas in slow Python, their known limits, their invariances and a library's own."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.closeness import assert_close as assert_close_to_scale

from f2llm.losses import (
    distillation_loss,
    hard_negative_loss,
    in_batch_loss,
    matryoshka,
    matryoshka_dims,
)

B, K, D, TEMPERATURE = 5, 3, 16, 0.05


def assert_same_loss(loss, expected, eps=1e-6):
    """A contrastive loss is a difference of logits of up to 1 / temperature: their rounding is its own."""
    assert_close_to_scale(loss, expected, eps, scale=1 / TEMPERATURE)


@pytest.fixture
def query():
    return torch.randn(B, D, requires_grad=True)


@pytest.fixture
def passage(query):
    """Close enough to its query that the losses are neither 0 nor huge."""
    return (query + torch.randn(B, D)).detach().requires_grad_()


@pytest.fixture
def negatives(query):
    return (query.unsqueeze(1) + 2 * torch.randn(B, K, D)).detach().requires_grad_()


def slow_info_nce(query, candidates, positive, temperature=TEMPERATURE):
    """Oracle: one query, Python floats, straight from the formula."""
    exp = []
    for candidate in candidates:
        dot = sum(q * c for q, c in zip(query.tolist(), candidate.tolist()))
        exp.append(math.exp(dot / math.hypot(*query.tolist()) / math.hypot(*candidate.tolist()) / temperature))
    return -math.log(exp[positive] / sum(exp))


def mean(values):
    values = list(values)
    assert values and any(value > 1e-3 for value in values), "vacuous: a loss of 0 compares with anything"
    return sum(values) / len(values)


# Formulas ---------------------------------------------------------------------------------------


def test_in_batch_loss_is_the_formula_over_all_passages(query, passage):
    positive = torch.tensor([2, 0, 1, 4, 3])
    expected = mean(slow_info_nce(query[i], passage, positive[i]) for i in range(B))
    assert_same_loss(in_batch_loss(query, passage, positive, TEMPERATURE), expected)


def test_hard_negative_loss_is_the_formula_over_the_querys_own_candidates(query, passage, negatives):
    expected = mean(slow_info_nce(query[i], [passage[i], *negatives[i]], 0) for i in range(B))
    assert_same_loss(hard_negative_loss(query, passage, negatives, TEMPERATURE), expected)


def test_duplicates_leave_the_denominator_but_the_own_passage_stays(query, passage):
    positive = torch.arange(B)
    duplicates = torch.eye(B, dtype=torch.bool)
    duplicates[0, 3] = duplicates[3, 0] = duplicates[1, 2] = True
    others = [[j for j in range(B) if j == i or not duplicates[i, j]] for i in range(B)]
    expected = mean(slow_info_nce(query[i], passage[others[i]], others[i].index(i)) for i in range(B))
    masked = in_batch_loss(query, passage, positive, TEMPERATURE, duplicates)
    assert_same_loss(masked, expected)
    assert masked < in_batch_loss(query, passage, positive, TEMPERATURE), "vacuous: the mask removed nothing"


def test_distillation_loss_is_the_mean_squared_error_to_the_teachers_first_dimensions():
    student, teacher = torch.randn(3, 4), torch.randn(3, 6)
    squares = [(s - t) ** 2 for a, b in zip(student.tolist(), teacher.tolist()) for s, t in zip(a, b[:4])]
    assert len(squares) == 12
    assert distillation_loss(student, teacher).item() == pytest.approx(sum(squares) / 12, rel=1e-5)
    assert distillation_loss(student, teacher).item() == pytest.approx(F.mse_loss(student, teacher[:, :4]).item())


@pytest.mark.parametrize("width", [4, 6], ids=["cut", "as wide"])
def test_normalised_distillation_is_2_minus_2_cosine_shared_out_over_the_dimensions(width):
    """The teacher's length is taken of the dimensions that are left, not of all."""
    student, teacher = torch.randn(2, 3, width), 5 * torch.randn(2, 3, 6)
    expected = []
    for a, b in zip(student.reshape(-1, width).tolist(), teacher[..., :width].reshape(-1, width).tolist()):
        cosine = sum(s * t for s, t in zip(a, b)) / math.hypot(*a) / math.hypot(*b)
        expected.append(2 - 2 * cosine)
    loss = distillation_loss(student, teacher, normalised=True)
    assert width * loss.item() == pytest.approx(mean(expected), rel=1e-5) and len(expected) == 6
    assert loss != distillation_loss(student, teacher), "vacuous: not normalised"


# Known limits -----------------------------------------------------------------------------------


def test_equal_candidates_cost_log_of_their_number(query, passage):
    same = passage[:1].expand(B, D)
    in_batch = in_batch_loss(query, same, torch.arange(B), TEMPERATURE)
    assert_same_loss(in_batch, math.log(B))
    hard = hard_negative_loss(query, passage, passage.unsqueeze(1).expand(B, 7, D), TEMPERATURE)
    assert_same_loss(hard, math.log(8))


def test_orthogonal_negatives_cost_almost_nothing_and_swapped_positives_a_lot():
    axes = torch.eye(B, D)
    positive = torch.arange(B)
    assert_same_loss(in_batch_loss(axes, axes, positive, TEMPERATURE), 0)
    assert_same_loss(in_batch_loss(axes, axes, positive.roll(1), TEMPERATURE), 1 / TEMPERATURE)


def test_a_model_is_its_own_perfect_teacher():
    embeddings = torch.randn(2, 3, 8)
    assert distillation_loss(embeddings, embeddings) == 0
    assert distillation_loss(embeddings, embeddings + 1).item() == pytest.approx(1, rel=1e-5), "vacuous: always 0"


def test_distillation_is_not_normalised():
    student = torch.randn(3, 8)
    assert distillation_loss(student, 2 * student).item() == pytest.approx(student.square().mean().item(), rel=1e-5)


def test_normalised_distillation_does_not_depend_on_lengths_and_has_its_gradient_across_them():
    student, teacher = torch.randn(5, 8, requires_grad=True), torch.randn(5, 8)
    loss = distillation_loss(student, teacher, normalised=True)
    assert distillation_loss(3 * student, 0.1 * teacher, normalised=True).item() == pytest.approx(loss.item(), rel=1e-5)
    assert distillation_loss(student, 7 * student, normalised=True) < 1e-10, "unit vectors are 1e-5 apart at most"
    assert distillation_loss(student, -student, normalised=True).item() == pytest.approx(4 / 8, rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.norm(dim=-1).min() > 1e-4, "vacuous: no gradient"
    along = (gradient * student).sum(-1) / gradient.norm(dim=-1) / student.norm(dim=-1)
    assert along.abs().max() < 1e-4


def test_an_embedding_of_length_0_has_a_finite_normalised_loss_and_gradient():
    student = torch.zeros(1, 8, requires_grad=True)
    loss = distillation_loss(student, torch.randn(1, 8), normalised=True)
    loss.backward()
    assert loss.item() == pytest.approx(1 / 8, rel=1e-5) and student.grad.isfinite().all()


def test_a_student_wider_than_its_teacher_is_an_error_that_names_both_widths():
    with pytest.raises(ValueError, match=r"4 dimensions, the student's 8.*at least as wide"):
        distillation_loss(torch.randn(2, 8), torch.randn(2, 4))


# Matryoshka -------------------------------------------------------------------------------------

PUBLISHED = {
    320: {320: 1, 256: 0.447, 128: 0.211, 64: 0.112, 32: 0.063, 16: 0.037, 8: 0.023},
    1024: {1024: 1, 512: 0.354, 256: 0.167, 128: 0.088, 64: 0.050, 32: 0.029, 16: 0.018, 8: 0.011},
}


@pytest.mark.parametrize("full_dim", PUBLISHED)
def test_matryoshka_weights_are_the_published_ones(full_dim):
    dims = matryoshka_dims(full_dim, 8)
    assert dims == list(PUBLISHED[full_dim])
    for dim, weight in PUBLISHED[full_dim].items():
        only = matryoshka(
            lambda prefix, dim=dim: torch.tensor(float(prefix.shape[-1] == dim)), torch.ones(1, full_dim), dims=dims
        )
        assert only.item() == pytest.approx(weight, abs=6e-4)


def test_matryoshka_is_the_weighted_sum_over_prefixes(query, passage, negatives):
    def loss(*parts):
        return hard_negative_loss(*parts, temperature=TEMPERATURE)

    expected = (
        loss(query, passage, negatives)
        + loss(query[:, :8], passage[:, :8], negatives[..., :8]) / (2 * math.sqrt(16 / 8))
        + loss(query[:, :4], passage[:, :4], negatives[..., :4]) / (3 * math.sqrt(16 / 4))
    )
    total = matryoshka(loss, query, passage, negatives, dims=[4, 16, 8])
    assert_same_loss(total, expected)
    assert total > loss(query, passage, negatives), "vacuous: the prefixes add nothing"


def test_matryoshka_of_the_full_dim_alone_is_the_plain_loss(query, passage):
    def loss(*parts):
        return in_batch_loss(*parts, positive=torch.arange(B), temperature=TEMPERATURE)

    dims = matryoshka_dims(D, 0)
    assert dims == [D]
    assert_same_loss(matryoshka(loss, query, passage, dims=dims), loss(query, passage))


# Invariances ------------------------------------------------------------------------------------


def test_the_length_of_an_embedding_does_not_matter(query, passage, negatives):
    plain = (
        hard_negative_loss(query, passage, negatives, TEMPERATURE),
        in_batch_loss(query, passage, torch.arange(B), TEMPERATURE),
    )
    longer, shorter = query * torch.rand(B, 1).add(1), passage * torch.rand(B, 1).add(0.1)
    scaled = (
        hard_negative_loss(longer, shorter, 7 * negatives, TEMPERATURE),
        in_batch_loss(longer, shorter, torch.arange(B), TEMPERATURE),
    )
    assert min(plain) > 1e-3, "vacuous: a loss of 0"
    assert_same_loss(torch.stack(scaled), torch.stack(plain))
    assert hard_negative_loss(-query, passage, negatives, TEMPERATURE) != plain[0], "vacuous: direction has no effect"


def test_bfloat16_embeddings_are_compared_in_float32(query, passage, negatives):
    rounded = [embedding.detach().bfloat16() for embedding in (query, passage, negatives)]
    exact = [embedding.float() for embedding in rounded]
    assert not torch.equal(exact[0], query), "vacuous: nothing was rounded"
    positive = torch.arange(B)
    losses = hard_negative_loss(*rounded, TEMPERATURE), in_batch_loss(*rounded[:2], positive, TEMPERATURE)
    expected = hard_negative_loss(*exact, TEMPERATURE), in_batch_loss(*exact[:2], positive, TEMPERATURE)
    assert [loss.dtype for loss in losses] == [torch.float32] * 2
    assert_same_loss(torch.stack(losses), torch.stack(expected))
    for normalised in (False, True):
        loss, reference = (distillation_loss(*pair[:2], normalised) for pair in (rounded, exact))
        assert loss.dtype == torch.float32 and loss.item() == pytest.approx(reference.item()) and loss > 1e-3


def test_hard_negatives_of_other_queries_do_not_matter(query, passage, negatives):
    hard_negative_loss(query[:1], passage[:1], negatives[:1], TEMPERATURE).backward()
    assert negatives.grad[0].abs().sum() > 0, "vacuous: the query's own negatives got no gradient"
    assert negatives.grad[1:].abs().sum() == 0


def test_gradients_reach_queries_passages_and_negatives(query, passage, negatives):
    in_batch_loss(query, passage, torch.arange(B), TEMPERATURE).backward()
    assert all(row.abs().sum() > 0 for row in (*query.grad, *passage.grad))
    query.grad = passage.grad = None
    hard_negative_loss(query, passage, negatives, TEMPERATURE).backward()
    assert all(row.abs().sum() > 0 for row in (*query.grad, *passage.grad, *negatives.grad))


def test_a_vector_of_zeros_has_a_finite_loss_and_gradient():
    query, passages = torch.randn(4, 16), torch.randn(4, 16)
    query[0], passages[1] = 0, 0
    query.requires_grad_(), passages.requires_grad_()
    loss = matryoshka(lambda q, p: in_batch_loss(q, p, torch.arange(4), TEMPERATURE), query, passages, dims=[8, 16])
    loss.backward()
    assert loss.isfinite() and query.grad.isfinite().all() and passages.grad.isfinite().all()
    assert query.grad[1:].abs().sum() > 0, "vacuous: no gradient reached the other queries"


# Library parity ---------------------------------------------------------------------------------


def test_in_batch_loss_equals_sentence_transformers_in_value_and_gradient(query, passage, negatives):
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    theirs = MultipleNegativesRankingLoss(model=None, scale=1 / TEMPERATURE)
    for candidates in ([passage], [passage, negatives[:, 0], negatives[:, 1]]):
        ours = in_batch_loss(query, torch.cat(candidates), torch.arange(B), TEMPERATURE)
        other = theirs.compute_loss_from_embeddings([query, *candidates], labels=None)
        assert_same_loss(ours, other)
        leaves = [query, passage]
        for mine, reference in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(other, leaves)):
            assert reference.abs().max() > 1e-4, "vacuous: no gradient to compare"
            assert_close_to_scale(mine, reference, eps=1e-4)
