"""Decoders of transformers beside Qwen3: packed equals padded in values and gradients; export; pruning."""

import copy
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import SENTENCES
from helpers.closeness import assert_all_close, assert_close
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import (
    AutoModel,
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from f2llm import attention, lora
from f2llm.batches import HomogeneousBatches
from f2llm.config import SHAPE as SHAPE_OF_BACKBONE
from f2llm.config import Lora, Prune, Shape
from f2llm.model import Embedder
from f2llm.pipeline.planning.costs import num_parameters
from f2llm.prune import importance_scores, prune_to
from f2llm.step import compute_losses, grad_cache_backward, prepare
from f2llm.store.model_folder import ARCHITECTURES, LINEAR, OF_LLAMA

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "attn_implementation": "eager",
}
HEADS = {"head_dim": 16}
LOCAL = {"layer_types": ["sliding_attention", "full_attention"] * 2}
CONFIGS = {
    "qwen3": (Qwen3Config, HEADS),
    "qwen3 with windows": (Qwen3Config, HEADS | {"use_sliding_window": True, "sliding_window": 4} | LOCAL),
    "qwen2": (Qwen2Config, {}),
    "qwen2 with windows": (Qwen2Config, {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2}),
    "llama": (LlamaConfig, HEADS),
    "llama with biases": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "mistral": (MistralConfig, HEADS | {"sliding_window": None}),
    "mistral with windows": (MistralConfig, HEADS | {"sliding_window": 4}),
    "gemma": (GemmaConfig, HEADS),
    "gemma2": (Gemma2Config, HEADS | LOCAL | {"sliding_window": 4, "attn_logit_softcapping": 1.5}),
    "gemma3_text": (Gemma3TextConfig, HEADS | LOCAL | {"sliding_window": 4}),
    "smollm3": (SmolLM3Config, {"no_rope_layers": [1, 1, 0, 1]}),
    "olmo": (OlmoConfig, {}),
    "olmo2": (Olmo2Config, {}),
    "olmo3": (Olmo3Config, LOCAL | {"sliding_window": 4}),
}
TEXTS = [*SENTENCES, "fox", " ".join(SENTENCES[:2])]


@pytest.fixture(params=CONFIGS)
def name(request):
    return request.param


@pytest.fixture
def model(name, tokenizer):
    """A tiny random model of transformers, all of whose weights matter."""
    kind, own = CONFIGS[name]
    special = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    config = kind(**SHAPE | own | special, vocab_size=len(tokenizer) + 3)
    model = AutoModel.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases, which start as constants
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def one_by_one(model, token_ids: list[list[int]]) -> torch.Tensor:
    """Oracle: transformers' own forward pass, text by text; the last hidden state of each."""
    return torch.cat([model(torch.tensor([ids])).last_hidden_state[:, -1] for ids in token_ids])


def padded(model, token_ids: list[list[int]]) -> torch.Tensor:
    """Oracle: transformers' own forward pass of a padded batch with its attention mask."""
    longest = max(map(len, token_ids))
    ids = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in token_ids])
    lengths = torch.tensor([len(ids) for ids in token_ids])
    mask = (torch.arange(longest) < lengths[:, None]).long()
    hidden = model(ids, attention_mask=mask).last_hidden_state
    return hidden[torch.arange(len(lengths)), lengths - 1]


def gradients(model, embeddings: torch.Tensor) -> dict[str, torch.Tensor]:
    weights = torch.linspace(-1, 1, embeddings.numel()).view_as(embeddings)
    model.zero_grad()
    (torch.nn.functional.normalize(embeddings, dim=-1) * weights).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_every_architecture_is_tried():
    assert {name.split()[0] for name in CONFIGS} == set(ARCHITECTURES)


@pytest.mark.parametrize("oracle", [one_by_one, padded])
@pytest.mark.parametrize("token_budget", [40, 4096])
def test_packed_equals_transformers_own_forward_pass_in_values_and_gradients(model, tokenizer, oracle, token_budget):
    ids = Embedder(model, tokenizer, 64).tokenize(TEXTS)
    assert max(map(len, ids)) > 8, "vacuous: no text is longer than a window"
    model.set_attn_implementation("eager")
    model.layers[-1].__dict__.pop("forward")
    expected = oracle(model, ids)
    expected_gradients = gradients(model, expected)
    embedder = Embedder(model, tokenizer, 64, token_budget)
    embeddings = embedder.embed(ids)
    assert_close(embeddings, expected, eps=1e-5)
    found = gradients(model, embeddings)
    assert found.keys() == expected_gradients.keys() and len(found) > 20
    assert_all_close(found, expected_gradients, eps=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_on_a_gpu_equals_the_cpu(model, tokenizer, dtype):
    embedder = Embedder(model, tokenizer, 64)
    ids = embedder.tokenize(TEXTS)
    with torch.inference_mode():
        expected = torch.nn.functional.normalize(embedder.embed(ids), dim=-1)
        model.to("cuda", dtype)
        found = torch.nn.functional.normalize(embedder.embed(ids).float(), dim=-1)
    if dtype == torch.float32:
        assert_close(found, expected, eps=1e-4)
    assert (found.cpu() * expected).sum(1).min() > 0.97


def of_adapter(model) -> dict[str, torch.Tensor]:
    """The parameters of an adapter, under the names that peft's own model gives them."""
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def test_the_linear_layers_are_those_that_an_adapter_can_be_on(model):
    found = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert found == set(LINEAR)


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapted_model_packed_recomputed_and_merged_is_that_of_peft(model, tokenizer, dora, tmp_path):
    """In gradients to 1e-4: an adapter of this size makes them larger, layer by layer."""
    base, config = copy.deepcopy(model), LoraConfig(r=3, lora_alpha=6, use_dora=dora, target_modules=sorted(LINEAR))
    embedder = Embedder(copy.deepcopy(model), tokenizer, 64, token_budget=40)
    ids = embedder.tokenize(TEXTS)
    with torch.no_grad():
        before = embedder.embed(ids)
    oracle = get_peft_model(model, config).eval()
    with torch.no_grad():
        for parameter in of_adapter(oracle).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    lora.add_adapter(embedder.model, Lora(rank=3, alpha=6.0, dora=dora, targets="all"), seed=0)
    set_peft_model_state_dict(embedder.model, get_peft_model_state_dict(oracle, save_embedding_layers=False))
    expected, found = padded(oracle, ids), embedder.embed(ids)
    assert (expected - before).abs().max() > 0.1, "vacuous: the adapter changes nothing"
    assert_close(found, expected, eps=1e-5)
    expected_gradients = {
        name.removeprefix(lora.PREFIX): gradient for name, gradient in gradients(oracle, expected).items()
    }
    assert expected_gradients.keys() == of_adapter(embedder.model).keys() and len(expected_gradients) >= 14 * 4
    assert_all_close(gradients(embedder.model, found), expected_gradients, eps=1e-4)
    weights = {name: value.detach() for name, value in of_adapter(embedder.model).items()}
    lora.save_adapter(tmp_path / "adapter", embedder, weights, tmp_path)
    lora.merge_weights(base, tmp_path / "adapter")
    assert_close(Embedder(base, tokenizer, 64).embed(ids), expected, eps=1e-5)
    embedder.recompute(selectively=dora)
    embedder.model.train()
    assert_all_close(gradients(embedder.model, embedder.embed(ids)), expected_gradients, eps=1e-4)


def test_windows_and_caps_change_the_embeddings(model, tokenizer, name):
    """Else the test above would pass without them."""
    if attention.is_plain(model):
        pytest.skip("it has none")
    embedder = Embedder(model, tokenizer, 64)
    with torch.inference_mode():
        before = embedder.embed(embedder.tokenize(TEXTS))
        for layer in model.layers:
            layer.self_attn.sliding_window = layer.self_attn.attn_logit_softcapping = None
        model.config.sliding_window = None
        after = embedder.embed(embedder.tokenize(TEXTS))
    assert np.abs(before - after).max() > 1e-3


def test_encode_shares_what_texts_begin_with_only_where_it_changes_nothing(model, tokenizer):
    embedder = Embedder(model, tokenizer, 64)
    texts = [f"the quick brown fox jumps over {text}" for text in TEXTS]
    model.set_attn_implementation("eager")
    forward = model.layers[-1].__dict__.pop("forward")
    with torch.inference_mode():
        expected = torch.nn.functional.normalize(one_by_one(model, embedder.tokenize(texts)), dim=-1)
    model.set_attn_implementation(attention.NAME)
    model.layers[-1].forward = forward
    assert_close(embedder.encode(texts), expected, eps=1e-5)


def test_recomputed_and_compiled_layers_give_the_same_gradients(model, tokenizer):
    embedder = Embedder(model, tokenizer, 64)
    ids = embedder.tokenize(TEXTS)
    plain = gradients(model, embedder.embed(ids))
    embedder.recompute(selectively=True)
    model.train()
    assert_all_close(gradients(model, embedder.embed(ids)), plain, eps=1e-5)


def test_a_step_with_gradient_caching_has_the_gradient_of_the_loss(
    model, tokenizer, small_store, tiny_training, machine
):
    embedder = Embedder(model, tokenizer, tiny_training.max_tokens)
    batch = HomogeneousBatches(small_store, tiny_training, seed=0, stage1=False)[0]
    losses = compute_losses(embedder.embed(embedder.tokenize(batch.texts)), batch, tiny_training)
    sum(losses.values()).backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.train()
    model.zero_grad()
    found = grad_cache_backward(
        embedder, prepare(embedder, batch, replace(machine, activation_tokens=1)), tiny_training
    )
    assert found.keys() == losses.keys()
    assert_all_close({name: parameter.grad for name, parameter in model.named_parameters()}, expected, eps=1e-4)


def test_the_saved_folder_gives_equal_embeddings_here_and_in_sentence_transformers(model, tokenizer, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    embedder = Embedder(model, tokenizer, 24)
    embedder.save(tmp_path / "model")
    if model.config.model_type == "qwen2":  # transformers reads it as Qwen2Tokenizer, which splits texts as Qwen does
        with pytest.raises(ValueError, match=r"'qwen2' as Qwen2Tokenizer, which makes other tokens .* remedy: "):
            Embedder.load(tmp_path / "model")
        embedder = Embedder(model, AutoTokenizer.from_pretrained(tmp_path / "model"), 24)
        embedder.save(tmp_path / "model")
    expected = embedder.encode(TEXTS)
    assert_close(Embedder.load(tmp_path / "model").encode(TEXTS), expected, eps=1e-5)
    theirs = sentence_transformers.SentenceTransformer(str(tmp_path / "model"), local_files_only=True)
    assert_close(theirs.encode(TEXTS), expected, eps=1e-5)


@pytest.mark.parametrize("rope", ["llama3", "linear", "yarn", "dynamic"])
def test_scaled_rotary_embeddings_equal_transformers_own(tokenizer, rope):
    scaling = {"rope_type": rope, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
    scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if rope == "llama3" else {}
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, rope_parameters=scaling, vocab_size=len(tokenizer))
    model = AutoModel.from_config(config, attn_implementation="eager").eval()
    ids = Embedder(model, tokenizer, 64).tokenize(TEXTS)
    with torch.inference_mode():
        packed = Embedder(model, tokenizer, 64).embed(ids)
        model.set_attn_implementation("eager")
        model.layers[-1].__dict__.pop("forward")
        assert_close(packed, one_by_one(model, ids), eps=1e-5)
        model.rotary_emb = type(model.rotary_emb)(LlamaConfig(**SHAPE))
        plain = one_by_one(model, ids)
    if rope != "dynamic":  # which changes nothing up to max_position_embeddings, the longest text that is taken
        assert (packed - plain).abs().max() > 1e-2, "vacuous: the scaling changes nothing"


def test_a_tokenizer_without_pad_token_can_be_padded_once_saved(model, tokenizer, name, tmp_path):
    """As Llama's, Mistral's and SmolLM's: sentence-transformers pads a batch, and could not encode one."""
    if name != "llama":
        pytest.skip("depends on the tokenizer alone")
    sentence_transformers = pytest.importorskip("sentence_transformers")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    bare = AutoTokenizer.from_pretrained(tmp_path / "tokenizer", pad_token=None)
    assert bare.pad_token is None
    embedder = Embedder(model, bare, 24)
    expected = embedder.encode(TEXTS)
    embedder.save(tmp_path / "model")
    theirs = sentence_transformers.SentenceTransformer(str(tmp_path / "model"), local_files_only=True)
    assert_close(theirs.encode(TEXTS), expected, eps=1e-5)
    assert_close(Embedder.load(tmp_path / "model").encode(TEXTS), expected, eps=1e-5)


def test_pruning_keeps_what_it_is_to_keep_or_refuses(model, tokenizer, name, config):
    embedder = Embedder(model, tokenizer, 64)
    plan, shape = config.prune, Shape(hidden_size=16, intermediate_size=24, num_hidden_layers=2)
    if name.split()[0] not in OF_LLAMA:
        with pytest.raises(ValueError, match=r"pruning .* qwen3, qwen2, llama, mistral.*remedy: "):
            importance_scores(embedder, TEXTS)
        return
    assert isinstance(plan, Prune)
    scores = importance_scores(embedder, TEXTS)
    student = prune_to(embedder, shape, scores, plan, seed=0)
    assert student.dim == 16 and len(student.model.layers) == 2
    assert np.isfinite(student.encode(TEXTS)).all()
    whole = prune_to(embedder, Shape(hidden_size=32, intermediate_size=48, num_hidden_layers=4), scores, plan, seed=0)
    assert_close(whole.encode(TEXTS), embedder.encode(TEXTS), eps=1e-6)


def test_parameters_are_counted_without_the_model(model):
    config = model.config
    shape = {name: getattr(config, name, None) for name in SHAPE_OF_BACKBONE}
    shape["head_dim"] = model.layers[0].self_attn.head_dim
    if getattr(config, "attention_bias", False):
        pytest.skip("no preset has biases beside Qwen2's")
    total = sum(parameter.numel() for parameter in model.parameters())
    counted = num_parameters(**shape, architecture=config.model_type)
    assert counted == (total, total - model.embed_tokens.weight.numel())


def test_runs_of_equal_texts_are_cut_at_their_ends():
    """The slow path of windows, against a loop over texts and tokens."""
    torch.manual_seed(0)
    lengths = [3, 3, 5, 1]
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    query, key, value = (torch.randn(12, heads, 8) for heads in (4, 2, 2))
    for window, softcap in ((2, None), (None, 0.7), (2, 0.7)):
        found = attention.attention_masked(query, key, value, cu_seqlens, 0.3, window, softcap)
        for start, end in pairwise(cu_seqlens.tolist()):
            for place in range(start, end):
                keys = slice(max(start, place + 1 - (window or 99)), place + 1)
                for head in range(4):
                    scores = 0.3 * key[keys, head // 2] @ query[place, head]
                    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
                    assert_close(found[place, head], scores.softmax(0) @ value[keys, head // 2], eps=1e-5)
