"""The backbone that training starts from in the embedded default, which has no hub: made from the training tuples.

A byte-level BPE tokenizer and a Qwen3 with grouped-query attention and tied embeddings. Its weights are random, but for
the input embeddings, which come from statistics of the tuples.
"""

import math
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from scipy import sparse
from scipy.sparse.linalg import eigsh
from threadpoolctl import threadpool_limits
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from ..config import SHAPE, Backbone
from ..model import append_eos
from ..store.tuples import TupleStore

EOS, PAD = "<|im_end|>", "<|endoftext|>"  # as in Qwen3
# A word keeps its combining marks, which most scripts of South and South-East Asia write vowels with.
WORDS = r" ?[\p{L}\p{M}]+| ?\p{N}+| ?[^\s\p{L}\p{M}\p{N}]+|\s+"

WITHIN = 0.1  # how much two tokens of the same text count, beside two of a query and its passage


def corpus(store: TupleStore, seed: int, num_texts: int = 60_000) -> list[str]:
    """Documents and half as many queries of all parts alike, each text once, in random order."""
    chosen = sorted({*store.sample(num_texts, seed), *store.sample(num_texts // 2, seed, queries=True)})
    random.Random(f"corpus:{seed}").shuffle(chosen)
    return chosen


def train_tokenizer(texts: list[str], vocab: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most `vocab` tokens that appends exactly one EOS to every text, by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[PAD, "<|im_start|>", EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text[:400] for text in texts), trainer)
    tokenizer.post_processor = append_eos(EOS, tokenizer.token_to_id(EOS))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, padding_side="right")


def add_prompts(tokenizer: PreTrainedTokenizerFast, prompts: list[str]) -> dict[str, list[int]]:
    """Make each prompt one more token; returns the ids of the pieces that each was cut into before.

    Deviation: a small vocabulary cuts "Instruct: Find the code. Query: " into ten pieces, before texts of five. As one
    token it costs little, and the text behind it is cut as it is cut alone.
    """
    pieces = {prompt: tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts}
    tokenizer.add_tokens([AddedToken(prompt, normalized=False) for prompt in prompts])
    return pieces


def new_model(backbone: Backbone, tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    """A Qwen3 with random weights in the shape that params.yaml names."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        **{name: getattr(backbone, name) for name in SHAPE} | {"vocab_size": len(tokenizer)},
        initializer_range=backbone.initializer_range,
        max_position_embeddings=1024,
        rope_theta=10_000.0,
        tie_word_embeddings=True,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


def token_table(pairs: Iterable[tuple[list[list[int]], list[list[int]]]], shape: tuple[int, int]) -> np.ndarray:
    """Input embeddings (vocabulary, D) in which tokens lie near those that they meet in training pairs; float32.

    pairs: token ids of the queries and of the passages of one source after the other, without the end token. Two tokens
    meet where one is in a query and the other in its passage, and, for a tenth as much, in the same text; every text
    counts the same, whatever its length. The columns are the eigenvectors of their positive pointwise mutual
    information with the largest eigenvalues, largest first; rows have a root mean square length of 1, and tokens that
    meet none have zeros. Source: Levy, Goldberg and Dagan (2015), Improving distributional similarity, with context
    distributions to the power 0.75 and eigenvalues to the power 0, which they found best among their choices.
    """
    vocab, dim = shape
    met = sparse.csr_matrix((vocab, vocab), dtype=np.float32)
    for queries, passages in pairs:
        left, right = _presence(queries, vocab), _presence(passages, vocab)
        across = left.T @ right
        met = met + across + across.T + WITHIN * (left.T @ left + right.T @ right)
    met.setdiag(0)
    met.eliminate_zeros()
    often = np.asarray(met.sum(1)).ravel()
    context = often**0.75 / (often**0.75).sum()
    row, column = met.nonzero()
    information = np.log(met.data / (often[row] * context[column])).clip(0)
    ppmi = sparse.csr_matrix((information, (row, column)), shape=met.shape)
    with threadpool_limits(1, user_api="blas"):  # so that the table does not depend on the number of cores
        values, vectors = eigsh((ppmi + ppmi.T) / 2, dim, which="LA", v0=np.ones(vocab, dtype=np.float32), tol=1e-3)
    table = vectors[:, np.argsort(-values)] * math.sqrt(vocab / dim)
    table[often == 0] = 0
    return table.astype(np.float32)


def _presence(token_ids: list[list[int]], vocab: int) -> sparse.csr_matrix:
    """(texts, vocabulary): 1 / sqrt(distinct tokens) where a text has a token."""
    distinct = [sorted(set(ids)) for ids in token_ids]
    counts = np.array([len(ids) for ids in distinct])
    values = np.repeat(1 / np.sqrt(counts.clip(1)), counts).astype(np.float32)
    columns = np.fromiter((token for ids in distinct for token in ids), dtype=np.int32, count=counts.sum())
    return sparse.csr_matrix((values, columns, np.concatenate([[0], counts.cumsum()])), shape=(len(distinct), vocab))


def training_pairs(store: TupleStore, tokenizer, max_rows: int = 100_000, max_tokens: int = 64) -> Iterator[tuple]:
    """Token ids of (queries, passages) of each part of stage 1, without the end token, as `token_table` takes them."""
    for name in (name for name, entry in store.sources.items() if entry["stage1"]):
        rows, documents = store.tables[name].slice(0, max_rows), store.documents[name]
        texts = rows["query"].to_pylist(), [documents[row] for row in rows["passage"].to_pylist()]
        yield tuple(
            [ids[:max_tokens] for ids in tokenizer(side, add_special_tokens=False)["input_ids"]] for side in texts
        )


def set_token_table(model: Qwen3ForCausalLM, tokenizer, table: np.ndarray, pieces: dict[str, list[int]]) -> None:
    """Put a table's rows that are not zero into a model, as long as its random rows are on average.

    pieces: of `add_prompts`; the row of a prompt becomes the mean of the rows of its pieces.
    """
    weight = model.get_input_embeddings().weight
    rows = torch.from_numpy(table) * model.config.initializer_range * table.shape[1] ** 0.5
    known = rows.any(1)
    with torch.no_grad():
        weight[known] = rows[known]
        for prompt, ids in pieces.items():
            weight[tokenizer.convert_tokens_to_ids(prompt)] = weight[ids].mean(0)


def save_backbone(model: Qwen3ForCausalLM, tokenizer, folder: Path) -> None:
    """The causal language model as transformers writes it, into a folder that is there."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
