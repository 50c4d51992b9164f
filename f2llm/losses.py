"""The losses of the papers as pure functions of embeddings, computed in float32.

B queries, N candidates, K hard negatives, D dimensions. `temperature` divides cosine similarities.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

SHORTEST = 1e-12  # the least norm to divide by, as in F.normalize
CACHED_LOGITS = 2**17  # how many a CPU handles at a time: 512 KB stay in its cache from one operation to the next


def in_batch_loss(
    query: Tensor, passages: Tensor, positive: Tensor, temperature: float, duplicates: Tensor | None = None
) -> Tensor:
    """InfoNCE of each query against every passage of the batch; `positive` is the row of its own.

    query (B, D), passages (N, D), positive (B) integers below N. duplicates (B, N), bool: passages that
    answer the query too; they leave its denominator (Deviation: the authors count them as negatives).
    Source: arXiv 2510.02294, in-batch loss: other queries' passages only, no hard negatives.
    """
    logits = F.normalize(query.float(), dim=-1) @ F.normalize(passages.float(), dim=-1).T / temperature  # (B, N)
    if duplicates is not None:
        own = F.one_hot(positive, num_classes=len(passages)).bool()
        logits = logits.masked_fill(duplicates & ~own, -torch.inf)
    return F.cross_entropy(logits, positive)


def hard_negative_loss(query: Tensor, passage: Tensor, hard_negatives: Tensor, temperature: float) -> Tensor:
    """InfoNCE of each query against its own passage and its own hard negatives only.

    query (B, D), passage (B, D), hard_negatives (B, K, D).
    Source: arXiv 2510.02294, hard-negative loss.
    """
    candidates = torch.cat([passage.unsqueeze(1), hard_negatives], dim=1).float()  # (B, 1 + K, D)
    similarity = F.cosine_similarity(query.float().unsqueeze(1), candidates, dim=-1)  # (B, 1 + K)
    positive = torch.zeros(len(query), dtype=torch.long, device=query.device)
    return F.cross_entropy(similarity / temperature, positive)


def matryoshka_dims(full_dim: int, min_dim: int) -> list[int]:
    """min_dim, twice that, ... and the full dim, longest first; the full dim alone for min_dim 0."""
    dims = {full_dim}
    while min_dim and min_dim < full_dim:
        dims.add(min_dim)
        min_dim *= 2
    return sorted(dims, reverse=True)


def matryoshka(loss_fn: Callable[..., Tensor], *embeddings: Tensor, dims: list[int]) -> Tensor:
    """Weighted sum of `loss_fn` over prefixes of the embeddings, longest first.

    The n-th prefix, of length d, weighs 1 / (n * sqrt(D / d)); the weights are not normalised.
    Source: Kusupati et al. 2022, arXiv 2205.13147; weights of the released F2LLM-v2 code.
    """
    full_dim = embeddings[0].shape[-1]
    total = torch.zeros((), device=embeddings[0].device)
    for order, dim in enumerate(sorted(dims, reverse=True), start=1):
        weight = 1 / (order * math.sqrt(full_dim / dim))
        total = total + weight * loss_fn(*(embedding[..., :dim] for embedding in embeddings))
    return total


def distillation_loss(student: Tensor, teacher: Tensor, normalised: bool = False) -> Tensor:
    """Mean squared error to the teacher's embeddings, cut to the student's width.

    student (..., D), teacher (..., at least D). normalised: both at unit length, so that D times the loss is 2 - 2
    cosine. Source: arXiv 2603.19223; un-normalised in the released code.
    """
    if teacher.shape[-1] < student.shape[-1]:
        raise ValueError(
            f"the teacher's embeddings have {teacher.shape[-1]} dimensions, the student's {student.shape[-1]}; "
            "a teacher must be at least as wide as its student"
        )
    student, teacher = student.float(), teacher[..., : student.shape[-1]].float()
    if normalised:
        student, teacher = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    return F.mse_loss(student, teacher)


# Matryoshka of the in-batch loss, in one pass ---------------------------------------------------


def matryoshka_in_batch_loss(
    query: Tensor,
    passages: Tensor,
    positive: Tensor,
    temperature: float,
    dims: list[int],
    duplicates: Tensor | None = None,
    rows: int = 256,
) -> Tensor:
    """`matryoshka` of `in_batch_loss` in one pass: the same value and gradients in less time and memory.

    query (B, D), passages (N, D), positive (B), duplicates (B, N) as in `in_batch_loss`; dims as in `matryoshka`.
    Arithmetic is float32, gradients have the inputs' dtypes, an input that needs none costs none. `rows` queries go
    at a time: (len(dims) + 1) x rows x N floats of work space beside the gradients, rows x N if none is needed; only
    the gradients are kept for backward, and they are constants: a second derivative is a RuntimeError.
    Source: the formulas of those two; rows at a time as in arXiv 2410.17243, gradients made early as in 2410.10989.
    """
    wanted = [torch.is_grad_enabled() and embeddings.requires_grad for embeddings in (query, passages)]
    return _MatryoshkaInBatch.apply(query, passages, positive, temperature, dims, duplicates, rows, wanted)


class _MatryoshkaInBatch(torch.autograd.Function):
    """Makes the gradients together with the loss; they wait, in float32, until their scale is known."""

    @staticmethod
    def forward(ctx, query, passages, *settings):
        loss, gradients = _loss_and_gradients(query.float(), passages.float(), *settings)
        ctx.dtypes = query.dtype, passages.dtype
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, scale):
        made = zip(ctx.saved_tensors, ctx.dtypes)
        return *(None if gradient is None else (gradient * scale).to(dtype) for gradient, dtype in made), *[None] * 6


def _loss_and_gradients(query, passages, positive, temperature, dims, duplicates, rows, wanted):
    """The loss and its gradients for query (B, D) and passages (N, D), None for one that is not `wanted`.

    Block k is the columns Q_k, P_k that prefix k adds: its dot products are S_k = S_(k-1) + Q_k P_k^T, its logits
    S_k with row i divided by |q_i| temperature and column j by |p_j|, norms of the prefix. On the way back, with
    slopes G_k = dloss / dS_k and A_k = A_(k+1) + G_k, Q_k gets A_k P_k and P_k gets A_k^T Q_k, less the norms' share.
    """
    dims, pair = sorted(dims), (query, passages)
    blocks = [slice(*ends) for ends in zip([0, *dims], dims)]
    orders = range(len(dims), 0, -1)  # the longest prefix comes first
    weights = [1 / (order * math.sqrt(query.shape[1] / dim)) / len(query) for order, dim in zip(orders, dims)]
    norms = [_prefix_norms(embeddings, blocks) for embeddings in pair]  # (K, B), (K, N)
    row_scale, column_scale = (1 / norm.clamp_min(SHORTEST) for norm in norms)
    row_scale = row_scale.unsqueeze(2) / temperature  # (K, B, 1)
    gradients = [torch.zeros_like(embeddings) if want else None for embeddings, want in zip(pair, wanted)]
    sums = [torch.zeros_like(norm) for norm in norms]  # of G_k * S_k over a row, over a column
    dots = query.new_empty(min(rows, len(query)), len(passages))
    slopes = dots.new_empty(len(dims) if any(wanted) else 0, *dots.shape)

    loss = query.new_zeros(())
    for start in range(0, len(query), rows):
        part = slice(start, start + rows)
        own = positive[part, None]
        dots, slopes = dots[: len(own)], slopes[:, : len(own)]  # fewer rows in the last part
        for k, block in enumerate(blocks):
            dots.addmm_(query[part, block], passages[:, block].T, beta=min(k, 1))
            if k == 0 and duplicates is not None:  # the lowest dot product stays the lowest for all prefixes
                kept = dots.gather(1, own)
                dots.masked_fill_(duplicates[part], torch.finfo(dots.dtype).min).scatter_(1, own, kept)
            gradient_of = (slopes[k], sums[0][k, part], sums[1][k]) if any(wanted) else None
            loss += _prefix_loss(dots, own, row_scale[k, part], column_scale[k], weights[k], gradient_of)
        _slopes_to_gradients(slopes, blocks, part, pair, gradients)
    for embeddings, gradient, norm, total in zip(pair, gradients, norms, sums):
        if gradient is not None:
            _subtract_share_of_norms(gradient, embeddings, blocks, norm, total)
    return loss, gradients


def _prefix_norms(embeddings: Tensor, blocks: list[slice]) -> Tensor:
    """(K, B) norms of the prefixes of embeddings (B, D) that end with each of the K blocks."""
    squares = [torch.linalg.vector_norm(embeddings[:, block], dim=1).square() for block in blocks]
    return torch.stack(squares).cumsum(0).sqrt()


def _prefix_loss(dots, own, row_scale, column_scale, weight, gradient_of):
    """Cross-entropy of one prefix, summed over dots (R, N) and weighted; own (R, 1), scales (R, 1) and (N).

    Writes into `gradient_of`, if given, the slopes dloss / ddots (R, N) and the sums of slopes * dots by row (R)
    and, added, by column (N). A tile of rows at a time, so that each step finds the last one's result in the cache.
    """
    losses = -row_scale * column_scale[own] * dots.gather(1, own)  # minus the own logit
    size = len(dots) if dots.is_cuda else max(1, CACHED_LOGITS // dots.shape[1])
    buffer = dots.new_empty(min(size, len(dots)), dots.shape[1])
    for start in range(0, len(dots), size):
        tile = slice(start, start + size)
        work = torch.mul(dots[tile], column_scale, out=buffer[: len(own[tile])])
        largest = work.amax(1, keepdim=True)
        total = work.sub_(largest).mul_(row_scale[tile]).exp_().sum(1, keepdim=True)
        losses[tile] += largest * row_scale[tile] + total.log()
        if gradient_of is not None:
            slopes, row_sums, column_sums = gradient_of
            scale = weight * row_scale[tile]
            work.mul_(scale / total).scatter_add_(1, own[tile], -scale)  # softmax minus one-hot
            torch.mul(work, column_scale, out=slopes[tile])
            torch.mv(work.mul_(dots[tile]), column_scale, out=row_sums[tile])
            column_sums += column_scale * work.sum(0)
    return weight * losses.sum()


def _slopes_to_gradients(slopes, blocks, part, pair, gradients):
    """Add what a part of the queries gives to the gradients of both; slopes (K, R, N) are used up."""
    for k in reversed(range(len(slopes))):
        if k + 1 < len(slopes):
            slopes[-1] += slopes[k]  # now those of all prefixes that hold block k
        query, passages = pair[0][part, blocks[k]], pair[1][:, blocks[k]]
        if gradients[0] is not None:
            gradients[0][part, blocks[k]].addmm_(slopes[-1], passages)
        if gradients[1] is not None:
            gradients[1][:, blocks[k]].addmm_(slopes[-1].T, query)


def _subtract_share_of_norms(gradient, embeddings, blocks, norms, sums):
    """A longer prefix lowers its logits: subtract embeddings * sums / norms^2 of all prefixes that hold a column.

    gradient, embeddings (B, D), norms, sums (K, B). Below SHORTEST the divisor is constant and has no share.
    """
    share = (sums / norms.square()).where(norms > SHORTEST, 0)
    share = share.flip(0).cumsum(0).flip(0).unsqueeze(2)  # (K, B, 1)
    for block, factor in zip(blocks, share):
        gradient[:, block].addcmul_(embeddings[:, block], factor, value=-1)
