"""Training steps of others to measure against, and the model and texts that all legs share.

The steps are written from their descriptions: the authors' released one, and that of sentence-transformers' trainer.
B queries, K hard negatives each, L tokens of the longest text, E dimensions of a head, D of an embedding. A step takes
a batch, returns (loss, gradient norm before clipping) and leaves updated weights.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import AttentionInterface, PreTrainedTokenizerFast, Qwen3Config, Qwen3Model
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from f2llm.batches import Batch
from f2llm.losses import hard_negative_loss, in_batch_loss, matryoshka

SHAPE = {
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 768,
    "vocab_size": 16384,
}
SMALL_SHAPE = {
    **SHAPE,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "vocab_size": 512,
}
QUERY, PASSAGE = (20, 60), (80, 400)  # tokens: 10th and 90th percentile of a lognormal law
MAX_TOKENS = 1024
HARD_NEGATIVES = 7
TEMPERATURE = 0.05
MIN_DIM = 8  # of matryoshka
MAX_GRAD_NORM = 1.0
LEARNING_RATE = 1e-5
ADAMW = {"lr": LEARNING_RATE, "betas": (0.9, 0.98), "weight_decay": 0.01}
PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unknown>"  # ids 0, 1, 2
UNPADDED = "unpadded_text_by_text"  # the name of `attend_without_pads` in transformers


# The model and its texts ------------------------------------------------------------------------


def new_model(shape: dict[str, int], seed: int = 0) -> Qwen3Model:
    """A Qwen3 with random weights."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=shape["vocab_size"],
        hidden_size=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"],
        num_hidden_layers=shape["num_hidden_layers"],
        num_attention_heads=shape["num_attention_heads"],
        num_key_value_heads=shape["num_key_value_heads"],
        head_dim=shape["head_dim"],
        max_position_embeddings=MAX_TOKENS,
        pad_token_id=0,
        eos_token_id=1,
        use_cache=False,
    )
    return Qwen3Model(config)


def word_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """One token per word: w3, w4 ...; appends EOS."""
    words = [PAD, EOS, UNKNOWN, *(f"w{number}" for number in range(3, vocab))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, unk_token=UNKNOWN, padding_side="right"
    )


def draw_texts(law: tuple[int, int], number: int, vocab: int, random: np.random.Generator) -> list[str]:
    """Random words; the lengths, EOS included, are lognormal with the law's 10th and 90th percentile, and capped."""
    low, high = np.log(law)
    lengths = np.exp(random.normal((low + high) / 2, (high - low) / 2 / 1.2816, number))
    lengths = lengths.round().clip(2, MAX_TOKENS).astype(int)
    return [" ".join(f"w{word}" for word in random.integers(3, vocab, length - 1)) for length in lengths]


@dataclass(frozen=True)
class TokenBatch:
    """A batch for our step, and the token ids of its texts for the others'."""

    batch: Batch
    token_ids: list[list[int]]

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.token_ids))

    def padding(self) -> float:
        """Share of pads where all texts are padded to the longest."""
        return _padding([self.token_ids])

    def padding_by_column(self) -> float:
        """Share of pads where each column is padded by itself."""
        return _padding(self.columns())

    def columns(self) -> list[list[list[int]]]:
        """Token ids of the queries, the passages, the first hard negatives, the second ..., each of B texts."""
        places = [self.batch.query, self.batch.passage, *self.batch.hard_negatives.T]
        return [[self.token_ids[row] for row in rows] for rows in places]


def _padding(columns: list[list[list[int]]]) -> float:
    real = sum(len(ids) for column in columns for ids in column)
    return 1 - real / sum(len(column) * max(map(len, column)) for column in columns)


def draw_batch(size: int, tokenizer: PreTrainedTokenizerFast, random: np.random.Generator) -> TokenBatch:
    """`size` tuples of a query, a passage and its hard negatives, all texts different."""
    query = draw_texts(QUERY, size, len(tokenizer), random)
    documents = draw_texts(PASSAGE, size * (1 + HARD_NEGATIVES), len(tokenizer), random)
    texts = [*query, *documents]
    rows = np.arange(size, len(texts)).reshape(size, 1 + HARD_NEGATIVES)
    every = np.arange(size)
    raw = [None] * len(texts)
    batch = Batch("random", "retrieval", every, texts, every, rows[:, 0], rows[:, 1:], rows[:, 0], every, stored=raw)
    return TokenBatch(batch, tokenizer(texts)["input_ids"])


def useful_flops(shape: dict[str, int], token_ids: list[list[int]]) -> float:
    """Of forward and backward pass without pads and without computing anything twice."""
    width, keys = (shape[heads] * shape["head_dim"] for heads in ("num_attention_heads", "num_key_value_heads"))
    layer = shape["hidden_size"] * (2 * width + 2 * keys + 3 * shape["intermediate_size"])  # weights of its matrices
    tokens, squares = sum(map(len, token_ids)), sum(len(ids) ** 2 for ids in token_ids)
    return 6.0 * shape["num_hidden_layers"] * (layer * tokens + width * squares)  # causal attention: half the square


# The loss and the end of a step -----------------------------------------------------------------

Step = Callable[[TokenBatch], tuple[float, float]]


def contrastive_loss(embeddings: Tensor, batch: Batch, dims: list[int]) -> Tensor:
    """The authors' two losses over every matryoshka prefix; embeddings (texts, D) in the order of batch.texts."""
    query, passage = embeddings[batch.query], embeddings[batch.passage]  # (B, D)
    hard_negatives = embeddings[batch.hard_negatives]  # (B, K, D)
    positive = torch.arange(len(query), device=query.device)

    def hard(*prefixes):
        return hard_negative_loss(*prefixes, temperature=TEMPERATURE)

    def in_batch(*prefixes):
        return in_batch_loss(*prefixes, positive=positive, temperature=TEMPERATURE)

    return matryoshka(hard, query, passage, hard_negatives, dims=dims) + matryoshka(in_batch, query, passage, dims=dims)


def update(model: torch.nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> tuple[float, float]:
    """Backward, clip, step."""
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item(), norm.item()


# The authors' step ------------------------------------------------------------------------------


def authors_step(model: Qwen3Model, dims: list[int], attention: str = "sdpa", checkpointing: bool = True) -> Step:
    """B * (2 + K) texts padded to one length in one forward pass, full activation checkpointing, default AdamW.

    attention: sdpa, or `UNPADDED`. Source: the released code of arXiv 2510.02294, as one process runs it.
    """
    model.set_attn_implementation(attention)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)

    def step(batch: TokenBatch) -> tuple[float, float]:
        ids, mask = (tensor.to(model.device) for tensor in pad(batch.token_ids, model.config.pad_token_id))
        hidden = model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        embeddings = hidden[torch.arange(len(ids), device=ids.device), mask.sum(1) - 1]
        return update(model, optimizer, contrastive_loss(embeddings, batch.batch, dims))

    return step


def pad(token_ids: list[list[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Right-padded ids (texts, L) and the mask (texts, L), 1 for real tokens."""
    rows = [torch.tensor(ids) for ids in token_ids]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_token_id)
    lengths = torch.tensor([len(row) for row in rows])
    return ids, (torch.arange(ids.shape[1]) < lengths.unsqueeze(1)).long()


def attend_without_pads(module, query, key, value, attention_mask, scaling, **_) -> tuple[Tensor, None]:
    """Causal attention (texts, L, H, E) that computes no pads; theirs are zeros.

    What flash attention does with a padded batch on a GPU: linears and norms see pads, attention does not.
    query (texts, H, L, E), key and value (texts, fewer heads, L, E); attention_mask (texts, L), None without pads.
    """
    longest = query.shape[2]
    lengths = [longest] * len(query) if attention_mask is None else attention_mask.sum(1).tolist()
    outputs = []
    for length, *text in zip(lengths, query.unbind(), key.unbind(), value.unbind()):
        parts = (tensor[:, :length].unsqueeze(0) for tensor in text)
        output = F.scaled_dot_product_attention(*parts, is_causal=True, scale=scaling, enable_gqa=True)
        outputs.append(F.pad(output[0].transpose(0, 1), (0, 0, 0, 0, 0, longest - length)))  # (L, H, E)
    return torch.stack(outputs), None


AttentionInterface.register(UNPADDED, attend_without_pads)
AttentionMaskInterface.register(UNPADDED, flash_attention_mask)


# sentence-transformers --------------------------------------------------------------------------


def sentence_transformers_step(folder: Path, dims: list[int], mini_batch_size: int) -> Step:
    """Cached multiple-negatives loss under the matryoshka loss, with our weights of the prefixes; fused AdamW.

    Each column of a batch is padded by itself, as by its collator, but tokenised in advance. Its loss is one
    softmax over all passages and hard negatives of the batch, where the authors' are two: values are not comparable.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.losses import CachedMultipleNegativesRankingLoss, MatryoshkaLoss

    model = SentenceTransformer(str(folder), device="cpu").train()
    cached = CachedMultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE, mini_batch_size=mini_batch_size)
    weights = [1 / (order * (max(dims) / dim) ** 0.5) for order, dim in enumerate(sorted(dims, reverse=True), start=1)]
    loss = MatryoshkaLoss(model, cached, sorted(dims, reverse=True), weights)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW, fused=True)

    def step(batch: TokenBatch) -> tuple[float, float]:
        padded = (pad(column, model.tokenizer.pad_token_id) for column in batch.columns())
        features = [{"input_ids": ids, "attention_mask": mask} for ids, mask in padded]
        return update(model, optimizer, loss(features, labels=torch.empty(0)))

    return step
