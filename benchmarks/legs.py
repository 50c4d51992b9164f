"""Training steps of others to measure against: the authors' released one and that of sentence-transformers.

Written from their descriptions. B queries, K hard negatives each, L tokens of the longest text, E dimensions of a
head, D of an embedding. Every step returns (loss, gradient norm before clipping) and leaves updated weights.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AutoModel, Qwen3Model
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from f2llm.losses import hard_negative_loss, in_batch_loss, matryoshka

UNPADDED = "unpadded_by_text"  # the name of `attend_without_pads` in transformers
TEMPERATURE = 0.05
MAX_GRAD_NORM = 1.0

Step = Callable[["TokenBatch"], tuple[float, float]]


@dataclass(frozen=True)
class TokenBatch:
    """B tuples as token ids. query, passage (B), hard_negatives (B, K): rows of `token_ids`."""

    token_ids: list[list[int]]
    query: Tensor
    passage: Tensor
    hard_negatives: Tensor

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.token_ids))

    @property
    def padding(self) -> float:
        """Share of pads, where all texts are padded to the longest."""
        return 1 - self.num_tokens / (len(self.token_ids) * max(map(len, self.token_ids)))

    @property
    def padding_by_column(self) -> float:
        """Share of pads, where queries, passages and each place of the hard negatives are padded by themselves."""
        columns = self.columns()
        return 1 - self.num_tokens / sum(len(column) * max(map(len, column)) for column in columns)

    def columns(self) -> list[list[list[int]]]:
        """Token ids of the queries, the passages, the first hard negatives, the second ..., each of B texts."""
        places = [self.query, self.passage, *self.hard_negatives.T]
        return [[self.token_ids[row] for row in rows.tolist()] for rows in places]


def contrastive_loss(embeddings: Tensor, batch: TokenBatch, dims: list[int]) -> Tensor:
    """The authors' two losses over every matryoshka prefix, from embeddings (texts, D) in the order of the batch."""
    query, passage = embeddings[batch.query], embeddings[batch.passage]
    positive = torch.arange(len(query), device=query.device)

    def hard(*prefixes):
        return hard_negative_loss(*prefixes, temperature=TEMPERATURE)

    def in_batch(*prefixes):
        return in_batch_loss(*prefixes, positive=positive, temperature=TEMPERATURE)

    hard_negatives = embeddings[batch.hard_negatives]  # (B, K, D)
    return matryoshka(hard, query, passage, hard_negatives, dims=dims) + matryoshka(in_batch, query, passage, dims=dims)


def update(model: torch.nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> tuple[float, float]:
    """Backward, clip, step: the end of every step here."""
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item(), norm.item()


# The authors' step ------------------------------------------------------------------------------


def pad(token_ids: list[list[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Right-padded ids (texts, L) and the mask of real tokens (texts, L)."""
    ids = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(ids) for ids in token_ids], batch_first=True, padding_value=pad_token_id
    )
    lengths = torch.tensor([len(ids) for ids in token_ids])
    return ids, (torch.arange(ids.shape[1]) < lengths.unsqueeze(1)).long()


def attend_without_pads(module, query, key, value, attention_mask, scaling, **_) -> tuple[Tensor, None]:
    """Causal attention (texts, L, H, E) that computes no pads, text by text; pads come out as zeros.

    What flash attention does with a padded batch on a GPU: linears and norms see pads, attention does not.
    query (texts, H, L, E), key and value (texts, fewer heads, L, E).
    """
    longest = query.shape[2]
    lengths = [longest] * len(query) if attention_mask is None else attention_mask.sum(1).tolist()
    outputs = []
    for length, *text in zip(lengths, *(tensor.unbind() for tensor in (query, key, value))):
        parts = (tensor[:, :length].unsqueeze(0) for tensor in text)
        output = F.scaled_dot_product_attention(*parts, is_causal=True, scale=scaling, enable_gqa=True)
        outputs.append(F.pad(output[0].transpose(0, 1), (0, 0, 0, 0, 0, longest - length)))  # (L, H, E)
    return torch.stack(outputs), None


AttentionInterface.register(UNPADDED, attend_without_pads)
AttentionMaskInterface.register(UNPADDED, flash_attention_mask)  # the mask (texts, L), or None without pads


def authors_step(
    model: Qwen3Model, dims: list[int], attention: str = "sdpa", checkpointing: bool = True, learning_rate: float = 1e-5
) -> Step:
    """One padded batch of B * (2 + K) texts in one forward pass, activation checkpointing, default AdamW.

    Source: the released code of arXiv 2510.02294 and 2603.19223, as one process runs it.
    """
    model.set_attn_implementation(attention)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)

    def step(batch: TokenBatch) -> tuple[float, float]:
        ids, mask = pad(batch.token_ids, model.config.pad_token_id)
        hidden = model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        embeddings = hidden[torch.arange(len(ids)), mask.sum(1) - 1]
        return update(model, optimizer, contrastive_loss(embeddings, batch, dims))

    return step


# sentence-transformers --------------------------------------------------------------------------


def sentence_transformers_step(
    folder: Path, dims: list[int], mini_batch_size: int, learning_rate: float = 1e-5
) -> Step:
    """Its cached multiple-negatives loss under its matryoshka loss, with our weights of the prefixes.

    Each column of the batch is padded by itself, as its collator does, but tokenised in advance. AdamW is fused, as
    its trainer's default is. Its loss is one softmax over all passages and hard negatives of the batch, ours are two.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.losses import CachedMultipleNegativesRankingLoss, MatryoshkaLoss

    model = SentenceTransformer(str(folder), device="cpu")
    cached = CachedMultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE, mini_batch_size=mini_batch_size)
    full_dim = max(dims)
    weights = [1 / (order * (full_dim / dim) ** 0.5) for order, dim in enumerate(sorted(dims, reverse=True), start=1)]
    loss = MatryoshkaLoss(model, cached, sorted(dims, reverse=True), weights)
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )

    def step(batch: TokenBatch) -> tuple[float, float]:
        padded = (pad(column, model.tokenizer.pad_token_id) for column in batch.columns())
        features = [{"input_ids": ids, "attention_mask": mask} for ids, mask in padded]
        return update(model, optimizer, loss(features, labels=torch.tensor([])))

    return step
