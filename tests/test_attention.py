"""Packed attention against torch's own, one text at a time; its gradients; a shared prefix; and packed = padded."""

import copy
import hashlib
import inspect
import textwrap

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import SENTENCES
from helpers.closeness import assert_all_close, assert_close
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3DecoderLayer

from f2llm import attention
from f2llm.attention import attend_to_prefix, attention_by_text, packed_attention
from f2llm.packing import pack
from f2llm.store.code import plain_code

LENGTHS = {"mixed": [3, 3, 3, 7, 7, 1, 40, 3], "equal": [12] * 9, "one": [33], "single tokens": [1, 1, 1]}


def random_heads(num_tokens, num_attention_heads=4, key_heads=2, dim=8):
    return [
        torch.randn(num_tokens, heads, dim, requires_grad=True) for heads in (num_attention_heads, key_heads, key_heads)
    ]


def boundaries_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def assert_gradients_close(found, expected):
    """Of query, key and value, on one scale: a single token has no gradient but that of its value."""
    assert_all_close(*(dict(zip(("query", "key", "value"), grads)) for grads in (found, expected)))


def one_by_one(query, key, value, lengths, scale):
    """Oracle: eager softmax attention of every text alone, with an explicit mask."""
    outputs, start = [], 0
    repeats = query.shape[1] // key.shape[1]
    for length in lengths:
        q, k, v = (tensor[start : start + length].transpose(0, 1) for tensor in (query, key, value))
        scores = q @ k.repeat_interleave(repeats, 0).mT * scale
        hidden = torch.ones(length, length).triu(1).bool()
        outputs.append((scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v.repeat_interleave(repeats, 0)).mT.mT)
        start += length
    return torch.cat([output.transpose(0, 1) for output in outputs])


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_values_and_gradients_equal_softmax_attention_of_each_text_alone(lengths, key_heads):
    heads = random_heads(sum(lengths), key_heads=key_heads)
    cu_seqlens, weights = boundaries_of(lengths), torch.randn(sum(lengths), 4, 8)
    expected = one_by_one(*heads, lengths, scale=0.3)
    expected_grads = torch.autograd.grad((expected * weights).sum(), heads)
    ways = {
        "operator": packed_attention(*heads, cu_seqlens, max(lengths), 0.3)[0],
        "text by text": attention_by_text(*heads, cu_seqlens, 0.3),
    }
    for name, output in ways.items():
        assert_close(output, expected, name=name)
        assert_gradients_close(torch.autograd.grad((output * weights).sum(), heads), expected_grads)
    at_all = [grad.abs().max() > 0.01 for grad in expected_grads]
    assert at_all == [max(lengths) > 1, max(lengths) > 1, True], "vacuous: no gradient"


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_one_query_a_text_gets_what_its_last_token_gets(lengths):
    query, key, value = random_heads(sum(lengths))
    cu_seqlens, weights = boundaries_of(lengths), torch.randn(len(lengths), 4, 8)
    last = cu_seqlens[1:].long() - 1
    expected = one_by_one(query, key, value, lengths, scale=0.3)[last]
    expected_grads = torch.autograd.grad((expected * weights).sum(), (query, key, value))
    for output in (
        packed_attention(query[last], key, value, cu_seqlens, max(lengths), 0.3)[0],
        attention_by_text(query[last], key, value, cu_seqlens, 0.3),
    ):
        assert_close(output, expected)
        assert_gradients_close(torch.autograd.grad((output * weights).sum(), (query, key, value)), expected_grads)


def test_no_text_sees_another():
    query, key, value = (tensor.detach() for tensor in random_heads(10))
    cu_seqlens = boundaries_of([4, 6])
    before, _ = packed_attention(query, key, value, cu_seqlens, 6, 0.3)
    key[:4] += 1
    value[:4] += 1
    after, _ = packed_attention(query, key, value, cu_seqlens, 6, 0.3)
    assert (after[:4] - before[:4]).abs().min() > 0, "vacuous: nothing changed"
    assert torch.equal(after[4:], before[4:])


def test_the_operator_keeps_torchs_rules():
    heads = [tensor.detach().requires_grad_() for tensor in random_heads(9)]
    arguments = (*heads, boundaries_of([2, 2, 5]), 5, 0.3)
    torch.library.opcheck(packed_attention, arguments, test_utils=["test_schema", "test_faketensor"])


def test_a_shared_prefix_counts_as_if_it_stood_before_every_text():
    prefix, lengths = 5, [1, 4, 4, 9]
    texts = [random_heads(prefix + length) for length in lengths]
    shared = [tensor.detach()[:prefix] for tensor in texts[0]]
    tails = [[tensor.detach()[prefix:] for tensor in heads] for heads in texts]
    whole = [[torch.cat(pair) for pair in zip(shared, tail)] for tail in tails]
    expected = torch.cat([one_by_one(*heads, [len(heads[0])], 0.3)[prefix:] for heads in whole])
    query, key, value = (torch.cat(parts) for parts in zip(*tails))
    output, logsumexp = packed_attention(query, key, value, boundaries_of(lengths), 9, 0.3)
    assert (output - expected).abs().max() > 0.1, "vacuous: the prefix does not matter"
    joined = attend_to_prefix(query, output, logsumexp, *shared[1:], 0.3)
    assert_close(joined, expected)


# The whole model --------------------------------------------------------------------------------


def gradients_of(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("recompute", [None, "selective", "full"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_packed_pass_equals_padded_ones_in_values_and_gradients(embedder, implementation, recompute):
    token_ids = embedder.tokenize([*SENTENCES, "fox", "dog"])
    weights = torch.randn(len(token_ids), embedder.dim)
    reference = copy.deepcopy(embedder.model)
    reference.set_attn_implementation(implementation)
    longest = max(map(len, token_ids))
    padded = torch.tensor([ids + [0] * (longest - len(ids)) for ids in token_ids])
    mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in token_ids])
    assert mask.min() == 0, "vacuous: nothing is padded"
    hidden = reference(input_ids=padded, attention_mask=mask).last_hidden_state
    expected = hidden[torch.arange(len(token_ids)), mask.sum(1) - 1]
    (expected * weights).sum().backward()
    if recompute:
        embedder.recompute(selectively=recompute == "selective")
        embedder.model.train()
    (part,) = pack(token_ids, token_budget=1000)
    ours = embedder.embed_pack(part)
    assert part.num_tokens < padded.numel(), "vacuous: packing saves nothing"
    assert_close(ours, expected[part.rows])
    (ours * weights[part.rows]).sum().backward()
    assert_all_close(gradients_of(embedder.model), gradients_of(reference))


def test_a_plain_padded_call_of_the_model_is_right_too(embedder):
    """Others may call embedder.model as transformers documents it, padded on the left even."""
    (ids,) = embedder.tokenize(SENTENCES[:1])
    alone = embedder.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
    padded, mask = torch.tensor([[0, 0, *ids]]), torch.tensor([[0, 0] + [1] * len(ids)])
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    left = embedder.model(input_ids=padded, attention_mask=mask, position_ids=positions).last_hidden_state[0, -1]
    assert_close(left, alone)
    assert_close(embedder.embed([ids])[0], alone)


@pytest.mark.skipif(" " in torch.__file__, reason="torch cannot compile for a CPU from a folder with spaces")
def test_compiled_layers_give_the_same_embeddings_and_gradients(embedder):
    """One layer, so that the compiler's minute stays seconds."""
    embedder.model.layers = embedder.model.layers[:1]
    embedder.model.config.num_hidden_layers = 1
    plain = copy.deepcopy(embedder.model)
    token_ids = embedder.tokenize(SENTENCES)
    weights = torch.randn(len(token_ids), embedder.dim)
    embedder.compile()
    ours = embedder.embed(token_ids)
    (ours * weights).sum().backward()
    embedder.model, compiled = plain, embedder.model
    expected = embedder.embed(token_ids)
    (expected * weights).sum().backward()
    assert_close(ours, expected)
    assert_all_close(gradients_of(compiled), gradients_of(plain))


def test_compiling_from_a_folder_with_spaces_is_an_error(embedder, monkeypatch):
    monkeypatch.setattr(torch, "__file__", "/a folder/torch/__init__.py")
    with pytest.raises(ValueError, match=r"folder with spaces, '/a folder/.*remedy: compile: false"):
        embedder.compile()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_varlen_attention_equals_texts_one_by_one_on_a_gpu():
    lengths = LENGTHS["mixed"]
    heads = [tensor.detach().cuda().bfloat16() for tensor in random_heads(sum(lengths), dim=64)]
    output = attention.attention_varlen(*heads, boundaries_of(lengths).cuda(), max(lengths), 0.125)
    expected = one_by_one(*(tensor.float().cpu() for tensor in heads), lengths, 0.125)
    assert_close(output.float(), expected, eps=1e-2)
    assert F.cosine_similarity(output.float().cpu().flatten(), expected.flatten(), dim=0) > 0.999


def test_half_precision_of_training_reaches_attention_in_one_dtype(embedder):
    """Norms with float32 weights hand on float32 queries and keys under autocast, beside half-precision values."""
    token_ids = embedder.tokenize(SENTENCES)
    exact = embedder.embed(token_ids)
    embedder.autocast_dtype = torch.bfloat16
    rounded = embedder.embed(token_ids)
    assert not torch.equal(exact, rounded.float()), "vacuous: nothing was rounded"
    assert torch.nn.functional.cosine_similarity(exact, rounded.float()).min() > 0.99


@pytest.mark.parametrize(
    ("layer", "digest"), [(Qwen3DecoderLayer, "5beeaca20f36b891"), (Qwen3Attention, "fc9be731e817468d")]
)
def test_the_layer_that_the_last_tokens_follow_is_the_one_of_the_installed_library(layer, digest):
    """`_of_last_tokens` computes what transformers 5.23 does: compare both when this fails, then put the new digest."""
    code = plain_code(textwrap.dedent(inspect.getsource(layer.forward)))
    assert "hidden_states" in code, "vacuous: not the code of a layer"
    assert hashlib.sha256(code.encode()).hexdigest()[:16] == digest, (
        f"transformers {transformers.__version__} has another {layer.__name__}.forward than 5.23"
    )
