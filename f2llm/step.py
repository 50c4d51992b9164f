"""One optimizer step: a packed batch, its losses and gradients; and the same without gradients, for validation.

B queries, K hard negatives, D dimensions.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from . import distributed
from .batches import Batch, HomogeneousBatches
from .config import Machine, Training
from .losses import distillation_loss, hard_negative_loss, in_batch_loss, matryoshka, matryoshka_dims
from .model import Embedder
from .packing import Pack, fill, make_pack, share_out
from .tokens import Tokens


@dataclass(frozen=True)
class PackedBatch:
    """A batch, packed for this process. shares: rows of the texts of every process, in the order it embeds them."""

    batch: Batch
    packs: list[Pack]
    shares: list[list[int]]
    num_kept: int  # of the last packs: their activations wait for the backward pass
    lengths: list[int]  # tokens of every text
    num_cut: int  # texts that fill max_tokens

    def tokens(self) -> dict[str, int]:
        """Useful tokens of the step, and what one padded batch of queries, passages and negatives would compute."""
        padded = self.batch.num_texts * max(self.lengths)
        return {"tokens": sum(self.lengths), "padded_tokens": padded, "cut_texts": self.num_cut}


def prepare(model: Embedder, batch: Batch, machine: Machine, tokens: dict[str, Tokens] | None = None) -> PackedBatch:
    """Tokenise a batch, divide its texts among the processes, and pack those of this process."""
    token_ids = token_ids_of(batch, model, tokens)
    lengths = [len(ids) for ids in token_ids]
    if min(lengths) < 2:
        empty = batch.texts[lengths.index(min(lengths))]
        raise ValueError(
            f"source {batch.source}: the text {empty!r} has no tokens (rows {shown(batch.rows)}); "
            "remedy: remove it from the source"
        )
    groups = [
        list(fill(lengths, machine.token_budget, share)) for share in share_out(lengths, distributed.world_size())
    ]
    own = [make_pack(rows, [token_ids[row] for row in rows]) for rows in groups[distributed.rank()]]
    if distributed.is_sharded(model.model):  # all processes must run equally many passes: fill up with empty packs
        empty = [make_pack([], [[model.tokenizer.eos_token_id]])] * (max(map(len, groups)) - len(own))
        own = empty + own
    return PackedBatch(
        batch=batch,
        packs=own,
        shares=[[row for group in rank_groups for row in group] for rank_groups in groups],
        num_kept=min(num_kept(lengths, rank_groups, machine.activation_tokens) for rank_groups in groups),
        lengths=lengths,
        num_cut=lengths.count(model.max_tokens),
    )


def token_ids_of(batch: Batch, model: Embedder, tokens: dict[str, Tokens] | None) -> list[Sequence[int]]:
    """Token ids of every text: read where they are stored, computed now for all others."""
    stored = tokens[batch.source] if tokens else None
    rows = [row if stored else None for row in batch.stored]
    computed = iter(model.tokenize([text for text, row in zip(batch.texts, rows) if row is None]))
    return [next(computed) if row is None else stored[row] for row in rows]


def num_kept(lengths: list[int], groups: list[list[int]], activation_tokens: int) -> int:
    """How many of the last packs fit into `activation_tokens`; at least one, which is computed last anyway."""
    count = tokens = 0
    for rows in reversed(groups):
        tokens += sum(lengths[row] for row in rows)
        if count and tokens > activation_tokens:
            break
        count += 1
    return count


def ahead(make: Callable, items: Iterable, depth: int = 2) -> Iterator:
    """make(item) of every item in order; a thread computes the next ones while the caller uses the last."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(make, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


# Losses and gradients ---------------------------------------------------------------------------


def grad_cache_backward(
    model: Embedder,
    packed: PackedBatch,
    config: Training,
    target: Tensor | None = None,
    scale: float = 1.0,
) -> dict[str, float]:
    """Weighted losses of a batch by name; their gradients are added to the parameters'.

    target (texts, at least D): the teacher's embeddings. scale: a factor of the gradients, see
    `f2llm.optimizer.LossScale`; `clip_gradients` takes it out again.
    Gradient caching (GradCache): all texts are embedded, the loss gives the gradient of every embedding, and each pack
    is embedded once more to propagate its part of that gradient, unless its activations were kept. So losses and
    gradients do not depend on what fits into memory. Source: Gao et al. 2021, arXiv 2101.06983.
    """
    first_kept = len(packed.packs) - packed.num_kept
    outputs = []
    for number, pack in enumerate(packed.packs):
        with torch.set_grad_enabled(number >= first_kept):
            outputs.append(model.embed_pack(pack)[: len(pack.rows)])
    embeddings = distributed.gather(_cat(outputs, model), packed.shares).requires_grad_()  # (texts, D)
    losses = compute_losses(embeddings, packed.batch, config, target)
    sum(losses.values()).backward()
    gradient = scale * embeddings.grad  # (texts, D)
    if distributed.is_sharded(model.model):
        gradient = gradient * distributed.world_size()  # FSDP2 takes the mean over processes
    for number in reversed(range(len(packed.packs))):  # the kept ones first: their memory is free for the others
        pack, output = packed.packs[number], outputs.pop()
        if number < first_kept:
            output = model.embed_pack(pack)[: len(pack.rows)]
        output.backward(gradient[pack.rows].to(output.dtype))
        del output
    distributed.sum_gradients(model.model)
    return {name: loss.item() for name, loss in losses.items()}


@torch.no_grad()
def embed_without_gradient(model: Embedder, packed: PackedBatch) -> Tensor:
    """Embeddings (texts, D), float32, of a packed batch, in every process."""
    outputs = [model.embed_pack(pack)[: len(pack.rows)] for pack in packed.packs]
    return distributed.gather(_cat(outputs, model), packed.shares)


def _cat(outputs: list[Tensor], model: Embedder) -> Tensor:
    return torch.cat(outputs) if outputs else torch.zeros(0, model.dim, device=model.device)


def compute_losses(
    embeddings: Tensor, batch: Batch, config: Training, target: Tensor | None = None
) -> dict[str, Tensor]:
    """Weighted losses by name; the task of the batch decides which apply (config.in_batch_tasks).

    embeddings (texts, D) of batch.texts; target (texts, at least D): the teacher's.
    """
    query, passage = embeddings[batch.query], embeddings[batch.passage]  # (B, D)
    dims = matryoshka_dims(embeddings.shape[1], config.matryoshka_min_dim)
    losses = {}
    if batch.hard_negatives.shape[1]:
        hard_negative = partial(hard_negative_loss, temperature=config.temperature)
        hard_negatives = embeddings[batch.hard_negatives]  # (B, K, D)
        losses["hard_negative"] = matryoshka(hard_negative, query, passage, hard_negatives, dims=dims)
    if batch.task in config.in_batch_tasks:
        positive = torch.arange(len(query), device=query.device)
        duplicates = same_group(batch, query.device) if config.mask_duplicates else None
        in_batch = partial(in_batch_loss, positive=positive, temperature=config.temperature, duplicates=duplicates)
        passages = passage.detach() if config.in_batch_gradient == "query_only" else passage
        losses["in_batch"] = matryoshka(in_batch, query, passages, dims=dims)
    if target is not None:
        parts = [batch.query, batch.passage] + ([batch.hard_negatives] if batch.hard_negatives.size else [])
        normalised = config.distillation_normalised
        distilled = sum(distillation_loss(embeddings[part], target[part], normalised) for part in parts)
        losses["distill"] = config.distillation_weight * distilled
    return losses


def same_group(batch: Batch, device: torch.device) -> Tensor:
    """(B, B), bool: passages that answer a query beside its own: of its group, or the very same document."""
    group, document = (torch.as_tensor(key, device=device) for key in (batch.group, batch.document))
    return (group[:, None] == group[None, :]) | (document[:, None] == document[None, :])


def clip_gradients(model: Embedder, max_norm: float, scale: float = 1.0) -> float:
    """Divide all gradients by `scale`, then shrink them so that their norm is at most `max_norm`; the norm before."""
    if scale != 1:
        for parameter in model.model.parameters():
            if parameter.grad is not None:
                parameter.grad.div_(scale)
    norm = torch.nn.utils.clip_grad_norm_(model.model.parameters(), max_norm)
    return float(norm.full_tensor() if distributed.is_sharded(model.model) else norm)


def require_finite(step: int, packed: PackedBatch, losses: dict[str, float], grad_norm: float) -> None:
    """Raise a RuntimeError where a loss or the gradient norm is not finite, before the optimizer steps."""
    if np.isfinite(grad_norm) and np.isfinite(sum(losses.values())):
        return
    raise RuntimeError(
        f"step {step}, source {packed.batch.source}: gradient norm {grad_norm}, losses {losses}; no step was "
        f"taken on them, the last checkpoint is kept. rows: {shown(packed.batch.rows)}. "
        "remedy: a lower learning_rate, a longer warmup_steps, or look at the texts of these rows"
    )


def shown(rows: np.ndarray) -> str:
    """The first numbers of a long list."""
    return ", ".join(map(str, rows[:8])) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")


@torch.no_grad()
def validate(model: Embedder, batches: HomogeneousBatches, config: Training, machine: Machine) -> Iterator[dict]:
    """source, dim, loss, accuracy of every source's withheld rows at every matryoshka dim.

    loss: the losses that apply to the task, unweighted. accuracy: queries whose own passage is the nearest
    of all that the losses compare it with.
    """
    model.model.eval()
    for batch in batches.validation():
        embeddings = embed_without_gradient(model, prepare(model, batch, machine))
        for dim in matryoshka_dims(embeddings.shape[1], config.matryoshka_min_dim):
            unit = torch.nn.functional.normalize(embeddings[:, :dim], dim=-1)
            query = unit[batch.query]
            scores = torch.einsum("bd,bkd->bk", query, unit[batch.hard_negatives])  # (B, K)
            if batch.task in config.in_batch_tasks:
                others = (query @ unit[batch.passage].T).masked_fill(same_group(batch, unit.device), -torch.inf)
                scores = torch.cat([scores, others], dim=1)
            own = (query * unit[batch.passage]).sum(-1)
            right = (own > scores.max(dim=1).values) if scores.shape[1] else torch.ones_like(own, dtype=bool)
            losses = compute_losses(embeddings[:, :dim], batch, replace(config, matryoshka_min_dim=0))
            yield {
                "source": batch.source,
                "dim": dim,
                "loss": round(float(sum(losses.values())), 5),
                "accuracy": round(right.float().mean().item(), 5),
            }
    model.model.train()
