"""Causal attention over texts that lie in one row without padding: no text sees another, and no pad is computed.

T tokens of all texts of a pack, N texts, Q queries, H query heads, K key-value heads, E dimensions of a head, P tokens
of a shared prefix. Registered with transformers as "packed"; where each text begins it reads from the keyword arguments
of the model's forward pass (cu_seqlens, the cumulative lengths). Three implementations give the same numbers: an
operator on CPU, torch's varlen attention on Ampere and newer in half precision, torch's SDPA text by text elsewhere.
Sliding windows and capped scores (Mistral, Gemma) go text by text everywhere.
"""

import inspect
from collections.abc import Iterator
from itertools import pairwise
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

NAME = "packed"
_flash_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


# One opaque operator with its own backward, so that torch.compile neither traces the loop over texts nor
# recompiles when the lengths change.
@torch.library.custom_op("f2llm::packed_attention", mutates_args=())
def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int, scale: float
) -> tuple[Tensor, Tensor]:
    """(output (Q, H, E), logsumexp of the scores (Q, H)) of causal attention within each text.

    query (Q, H, E), key and value (T, K, E); cu_seqlens (N + 1), int32: first token of each text and T. There is a
    query for every token (Q = T) or for the last one of every text (Q = N). Neighbours of equal length go
    through one call, so short sorted texts cost as little as a padded batch.
    """
    outputs, sums = [], []
    causal = len(query) == len(key)
    for asking, tokens, count in _runs(cu_seqlens, len(query)):
        parts = (_by_text(tensor, count) for tensor in (query[asking], key[tokens], value[tokens]))
        output, logsumexp = _flash_cpu(*parts, 0.0, causal, scale=scale)
        outputs.append(_by_token(output))
        sums.append(_by_token(logsumexp))
    return torch.cat(outputs), torch.cat(sums)


@torch.library.custom_op("f2llm::packed_attention_backward", mutates_args=())
def packed_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, logsumexp: Tensor,
    cu_seqlens: Tensor, longest: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key and value, in their shapes."""
    grads = []
    causal = len(query) == len(key)
    for asking, tokens, count in _runs(cu_seqlens, len(query)):
        parts = (grad[asking], query[asking], key[tokens], value[tokens], output[asking], logsumexp[asking])
        parts = (_by_text(part, count) for part in parts)
        grads.append([_by_token(part) for part in _flash_cpu_backward(*parts, 0.0, causal, scale=scale)])
    return tuple(torch.cat(parts) for parts in zip(*grads))


def _runs(cu_seqlens: Tensor, num_queries: int) -> Iterator[tuple[slice, slice, int]]:
    """(queries, tokens, number of texts) of each run of neighbours of equal length."""
    ends = cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(ends)]
    every_token = num_queries == ends[-1]
    first = 0
    for text in range(1, len(lengths) + 1):
        if text == len(lengths) or lengths[text] != lengths[first]:
            tokens = slice(ends[first], ends[text])
            yield tokens if every_token else slice(first, text), tokens, text - first
            first = text


def _by_text(tensor: Tensor, count: int) -> Tensor:
    """(tokens, heads, ...) of `count` texts of equal length -> (texts, heads, length, ...), a view."""
    return tensor.unflatten(0, (count, -1)).transpose(1, 2)


def _by_token(tensor: Tensor) -> Tensor:
    """(texts, heads, length, ...) -> (tokens, heads, ...)."""
    return tensor.transpose(1, 2).flatten(0, 1)


@packed_attention.register_fake
def _(query, key, value, cu_seqlens, longest, scale):
    return torch.empty(query.shape, dtype=query.dtype, device=query.device), query.new_empty(
        query.shape[:2], dtype=torch.float32
    )


@packed_attention_backward.register_fake
def _(grad, query, key, value, output, logsumexp, cu_seqlens, longest, scale):
    return tuple(torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in (query, key, value))


def _keep_for_backward(ctx, inputs, output) -> None:
    *tensors, cu_seqlens, longest, scale = inputs
    ctx.save_for_backward(*tensors, *output, cu_seqlens)
    ctx.longest, ctx.scale = longest, scale


def _backward(ctx, grad, _):
    tensors = ctx.saved_tensors
    grads = packed_attention_backward(grad.contiguous(), *tensors, ctx.longest, ctx.scale)
    return *grads, None, None, None


packed_attention.register_autograd(_backward, setup_context=_keep_for_backward)


def attention_by_text(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    """The output of `packed_attention` by torch's SDPA, which every device has."""
    outputs, causal = [], len(query) == len(key)
    runs = list(_runs(cu_seqlens, len(query)))
    queries, tokens = ([part.stop - part.start for part in parts] for parts in list(zip(*runs))[:2])
    for (_, _, count), *parts in zip(runs, query.split(queries), key.split(tokens), value.split(tokens)):
        parts = (_by_text(part, count) for part in parts)
        output = F.scaled_dot_product_attention(*parts, is_causal=causal, scale=scale, enable_gqa=True)
        outputs.append(_by_token(output))
    return torch.cat(outputs)


def attention_masked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """`packed_attention`'s output where a token sees `window` tokens, itself included, and scores are capped.

    softcap: scores become softcap * tanh(scores / softcap), as in Gemma 2 (arXiv 2408.00118). Memory of a text grows
    with the square of its length.
    """
    outputs = []
    for asking, tokens, count in _runs(cu_seqlens, len(query)):
        parts = (_by_text(tensor, count) for tensor in (query[asking], key[tokens], value[tokens]))
        outputs.append(_by_token(_masked(*parts, scale, window, softcap)))
    return torch.cat(outputs)


def _masked(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, softcap: float | None):
    """Of texts of equal length: query (texts, H, Q, E), key and value (texts, K, T, E) -> (texts, H, Q, E)."""
    place = torch.arange(key.shape[2], device=query.device)
    back = place[-query.shape[2] :, None] - place  # (Q, T): how far a key lies before a query
    seen = (back >= 0) & (back < (window or key.shape[2]))
    if softcap is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scale, enable_gqa=True)
    key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (key, value))
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * scale / softcap)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1, dtype=torch.float32)
    return weights.to(value.dtype) @ value


# The options of varlen_attn changed from release to release: ask for what this one has.
_VARLEN = inspect.signature(varlen_attn).parameters
_CAUSAL = {"window_size": (-1, 0)} if "window_size" in _VARLEN else {"is_causal": True}
_FULL = {"window_size": (-1, -1)} if "window_size" in _VARLEN else {"is_causal": False}
_GROUPED = {"enable_gqa": True} if "enable_gqa" in _VARLEN else {}


def attention_varlen(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int, scale: float):
    """The output of `packed_attention` by torch's flash attention: CUDA from Ampere, half precision."""
    if not _GROUPED and query.shape[1] != key.shape[1]:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    options = _GROUPED | ({"scale": scale} if "scale" in _VARLEN else {})
    if len(query) == len(key):
        return varlen_attn(query, key, value, cu_seqlens, cu_seqlens, longest, longest, **options, **_CAUSAL)
    one_each = torch.arange(len(cu_seqlens), dtype=torch.int32, device=query.device)
    return varlen_attn(query, key, value, one_each, cu_seqlens, 1, longest, **options, **_FULL)


def attend_to_prefix(
    query: Tensor, output: Tensor, logsumexp: Tensor, key: Tensor, value: Tensor, scale: float
) -> Tensor:
    """`packed_attention`'s output as if every text began with the same prefix. CPU only.

    query, output (Q, H, E), logsumexp (Q, H); key, value (P, K, E) of the prefix. Softmax over two sets of keys is
    the average of the softmaxes over each, weighted by the sums of their exponentials.
    """
    parts = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, key, value))
    before, before_logsumexp = _flash_cpu(*parts, 0.0, False, scale=scale)
    weight = torch.sigmoid(_by_token(before_logsumexp) - logsumexp).unsqueeze(-1)  # (Q, H, 1)
    return torch.lerp(output, _by_token(before), weight.to(output.dtype))


def attend(module, query, key, value, attention_mask, scaling, cu_seq_lens_q=None, max_length_q=None,
           sliding_window=None, softcap=None, prefix=None, record=None, **others) -> tuple[Tensor, None]:  # fmt: skip
    """What transformers calls in every layer: query (1, H, Q, E), key and value (1, K, T, E) -> (1, Q, H, E).

    cu_seq_lens_q: cu_seqlens (N + 1); max_length_q: the longest text; sliding_window, softcap: of the layer, see
    `attention_masked`. For `Embedder.encode` alone: record, a dictionary that receives {layer: (key, value)}, and
    prefix, one that was recorded, which stands before every text.
    """
    if cu_seq_lens_q is None:  # a plain padded batch: transformers has built its mask
        if softcap is not None:
            raise ValueError("torch's SDPA cannot cap scores; remedy: attn_implementation eager for a padded batch")
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (T, heads, E)
    if torch.is_autocast_enabled(query.device.type):  # query and key come in float32 from norms with such weights
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    if record is not None:
        record[module.layer_idx] = key, value
    window = sliding_window if sliding_window and sliding_window < max_length_q else None
    if window or softcap:
        output = attention_masked(query, key, value, cu_seq_lens_q, scaling, window, softcap)
    elif query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and has_flash_attention(query.device):
        output = attention_varlen(query, key, value, cu_seq_lens_q, max_length_q, scaling)
    elif query.device.type == "cpu":
        output, logsumexp = packed_attention(query, key, value, cu_seq_lens_q, max_length_q, scaling)
        if prefix is not None:
            output = attend_to_prefix(query, output, logsumexp, *prefix[module.layer_idx], scaling)
    else:
        output = attention_by_text(query, key, value, cu_seq_lens_q, scaling)
    return output.unsqueeze(0), None


def is_plain(model: PreTrainedModel) -> bool:
    """Whether every layer sees whole texts and caps no scores, so that a prefix can be computed apart."""
    config = model.config
    windows = getattr(config, "sliding_window", None) and (
        "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    )
    return not windows and not getattr(config, "attn_logit_softcapping", None)


# Decoder layers that `_of_last_tokens` computes: all of Llama's pattern.
_OF_LLAMA = ("Qwen3DecoderLayer", "Qwen2DecoderLayer", "LlamaDecoderLayer")


def only_last_tokens(model: PreTrainedModel) -> None:
    """Let the model's last layer compute nothing but what the last token of every text needs, where asked to.

    Keys and values are those of all tokens; queries, output projection and MLP of the last tokens only, since
    nothing reads the others. The result is the same. A forward pass asks for it by `only_last=True` and then gives
    (1, N, D). Layers of other patterns than Llama's compute all tokens, of which the last are taken.
    Deviation: the authors compute the whole layer. `_of_last_tokens` follows Qwen3DecoderLayer and Qwen3Attention of
    transformers 5.23 (tests/test_attention.py fails where the installed library computes something else).
    """
    layer = model.layers[-1]
    layer.forward = MethodType(_forward, layer)


def _forward(layer, hidden_states, *others, only_last=False, **kwargs):
    if only_last and type(layer).__name__ in _OF_LLAMA:
        return _of_last_tokens(layer, hidden_states, **kwargs)
    output = type(layer).forward(layer, hidden_states, *others, **kwargs)
    return output[:, kwargs["cu_seq_lens_q"][1:].long() - 1] if only_last else output


def _of_last_tokens(
    layer, hidden_states, position_embeddings, cu_seq_lens_q, max_length_q, attention_mask=None, **kwargs
):
    """A decoder layer's output (1, N, D) for the last token of every text; hidden_states (1, T, D)."""
    attention, last = layer.self_attn, cu_seq_lens_q[1:].long() - 1
    normed = layer.input_layernorm(hidden_states)
    heads = (-1, attention.head_dim)
    key = attention.k_proj(normed).unflatten(-1, heads)
    value = attention.v_proj(normed).unflatten(-1, heads).transpose(1, 2)
    query = attention.q_proj(normed[:, last]).unflatten(-1, heads)
    if hasattr(attention, "q_norm"):  # Qwen3
        query, key = attention.q_norm(query), attention.k_norm(key)
    query, key = query.transpose(1, 2), key.transpose(1, 2)
    cos, sin = position_embeddings  # (1, T, E)
    key, _ = apply_rotary_pos_emb(key, key, cos, sin)
    query, _ = apply_rotary_pos_emb(query, query, cos[:, last], sin[:, last])
    options = {"cu_seq_lens_q": cu_seq_lens_q, "max_length_q": max_length_q}
    options["sliding_window"] = getattr(attention, "sliding_window", None)
    output, _ = attend(attention, query, key, value, None, attention.scaling, **options, **kwargs)
    hidden_states = hidden_states[:, last] + attention.o_proj(output.flatten(2))
    return hidden_states + layer.mlp(layer.post_attention_layernorm(hidden_states))


def has_flash_attention(device: torch.device) -> bool:
    """Ampere (compute capability 8) or newer."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
NO_MASK = torch.empty(1, 1, 0, 0)  # as attention_mask: cu_seqlens say it all; of four dimensions, so none is built
# What selective recomputation keeps.
COSTLY = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.f2llm.packed_attention.default]
if hasattr(torch.ops.torch_attn, "_varlen_attn"):
    COSTLY.append(torch.ops.torch_attn._varlen_attn.default)
