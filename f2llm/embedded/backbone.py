"""The language model that training starts from in the embedded default, which has no hub: made here.

A byte-level BPE tokenizer and a Qwen3 with grouped-query attention and tied embeddings, pretrained for a
short while to predict the next token. Its texts are those that training may see, never evaluation's.
"""

import math
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from ..config import SHAPE, Backbone
from ..model import append_eos
from .texts import Texts

EOS, PAD = "<|im_end|>", "<|endoftext|>"  # as in Qwen3
# A word keeps its combining marks, which most scripts of South and South-East Asia write vowels with.
WORDS = r" ?[\p{L}\p{M}]+| ?\p{N}+| ?[^\s\p{L}\p{M}\p{N}]+|\s+"


def corpus(texts: Texts, seed: int, num_messages: int = 60_000) -> list[str]:
    """Training texts in random order: a sample of messages, as many of each locale as there are, and all Python."""
    draw = random.Random(f"corpus:{seed}")
    messages = sorted({message.text for message in texts.messages if not message.domain.startswith("list:")})
    python = [text for f in texts.functions for text in (f.summary, f.body, f.code) if text]
    chosen = draw.sample(messages, min(num_messages, len(messages))) + python
    draw.shuffle(chosen)
    return chosen


def train_tokenizer(texts: list[str], vocab: int, prompts: list[str] = ()) -> PreTrainedTokenizerFast:
    """Byte-level BPE that appends exactly one EOS to every text, by itself.

    prompts: the prompts before queries, repeated so often that each of their words becomes one token.
    """
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
    tokenizer.train_from_iterator([*prompts] * 300 + [text[:400] for text in texts], trainer)
    tokenizer.post_processor = append_eos(EOS, tokenizer.token_to_id(EOS))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, padding_side="right")


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


def pretrain(model: Qwen3ForCausalLM, tokenizer, texts: list[str], backbone: Backbone) -> list[float]:
    """Next-token training on whole texts, each ended by EOS; the loss of every step, in nats per token."""
    plan = backbone.pretrain
    rows = _rows(tokenizer, texts, plan.max_tokens, plan.tokens_per_step)
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.learning_rate, betas=(0.9, 0.98), fused=True)
    losses = []
    model.train()
    for step in range(plan.steps):
        progress = max(0.0, (step - plan.warmup_steps) / max(1, plan.steps - plan.warmup_steps))
        rate = min((step + 1) / plan.warmup_steps, (1 + math.cos(math.pi * progress)) / 2)
        optimizer.param_groups[0]["lr"] = plan.learning_rate * rate
        input_ids = next(rows)
        loss = model(input_ids=input_ids, labels=input_ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not torch.isfinite(loss):
            raise RuntimeError(
                f"pretraining step {step + 1}: loss {loss.item()}; remedy: a lower pretrain.learning_rate"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    model.eval()
    return losses


def _rows(tokenizer, texts: list[str], max_tokens: int, tokens_per_step: int) -> Iterator[torch.Tensor]:
    """Blocks (rows, max_tokens) cut from the stream of all texts, again and again."""
    rows = max(1, tokens_per_step // max_tokens)
    stream = np.concatenate([np.array(ids) for ids in tokenizer([text[:600] for text in texts])["input_ids"]])
    usable = len(stream) // (rows * max_tokens)
    if not usable:
        raise ValueError(
            f"the corpus has {len(stream)} tokens, less than one pretrain.tokens_per_step, {tokens_per_step}"
        )
    blocks = torch.as_tensor(stream[: usable * rows * max_tokens]).view(usable, rows, max_tokens)
    while True:
        yield from blocks


def save_backbone(model: Qwen3ForCausalLM, tokenizer, folder: Path) -> None:
    """The causal language model as transformers writes it, into a folder that is there."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
