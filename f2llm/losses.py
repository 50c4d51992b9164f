"""The losses of the papers as pure functions of embeddings, computed in float32.

B queries, N candidates, K hard negatives, D dimensions. `temperature` divides cosine similarities.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


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
