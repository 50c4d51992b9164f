"""Pruned models against masked, shallow and unpruned ones, and the importance scores against a slow computation."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import SENTENCES
from transformers import AutoModel

from f2llm.config import Shape
from f2llm.model import Embedder
from f2llm.prune import importance_scores, keep_highest, prune_depth, prune_to, prune_width


@pytest.fixture
def embedder(embedder):
    """The tiny model with norm weights that differ, as training leaves them."""
    with torch.no_grad():
        for name, parameter in embedder.model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 2)
    return embedder


def hidden_states(model, texts):
    """Final hidden states of every text, one after the other."""
    return torch.cat([model.model(input_ids=torch.tensor([ids])).last_hidden_state[0] for ids in model.tokenize(texts)])


def as_embedder(model, like):
    return Embedder(model.eval(), like.tokenizer, like.max_tokens)


# Cutting ----------------------------------------------------------------------------------------


def test_pruning_nothing_gives_the_same_model(embedder):
    shape = Shape(hidden_dim=32, mlp_dim=48, layers=2)
    pruned = prune_to(embedder, shape, importance_scores(embedder, SENTENCES))
    assert torch.equal(hidden_states(pruned, SENTENCES), hidden_states(embedder, SENTENCES))
    assert pruned.model is not embedder.model


@torch.no_grad()
def masked(model, hidden_keep, mlp_keep):
    """Oracle: the wide model that never writes to a dropped channel.

    Its RMS norms still divide by the root of all D channels, which their weights and epsilon make up for.
    """
    model = copy.deepcopy(model)
    width = model.config.hidden_size
    dropped = [channel for channel in range(width) if channel not in hidden_keep]
    model.embed_tokens.weight[:, dropped] = 0
    norms = [model.norm]
    for layer, keep in zip(model.layers, mlp_keep):
        layer.self_attn.o_proj.weight[dropped] = 0
        layer.mlp.down_proj.weight[dropped] = 0
        out = [channel for channel in range(model.config.intermediate_size) if channel not in keep]
        layer.mlp.gate_proj.weight[out] = 0
        norms += [layer.input_layernorm, layer.post_attention_layernorm]
    for norm in norms:
        norm.weight *= (len(hidden_keep) / width) ** 0.5
        norm.variance_epsilon *= len(hidden_keep) / width
    return model


def test_a_width_pruned_model_equals_the_masked_one(embedder):
    hidden_keep = torch.randperm(32)[:20].sort().values
    mlp_keep = [torch.randperm(48)[:24].sort().values for _ in range(2)]
    assert not torch.equal(*mlp_keep), "vacuous: layers keep the same channels"
    narrow = as_embedder(prune_width(embedder.model, hidden_keep, mlp_keep), embedder)
    wide = as_embedder(masked(embedder.model, hidden_keep.tolist(), [keep.tolist() for keep in mlp_keep]), embedder)
    expected = hidden_states(wide, SENTENCES)[:, hidden_keep]
    torch.testing.assert_close(hidden_states(narrow, SENTENCES), expected, rtol=1e-4, atol=1e-5)
    assert (expected - hidden_states(embedder, SENTENCES)[:, hidden_keep]).abs().max() > 0.1, "vacuous: no effect"


@pytest.mark.parametrize("layers", [1, 2])
def test_a_depth_pruned_model_runs_the_first_layers(embedder, layers):
    shallow = prune_depth(embedder.model, layers).eval()
    for ids in embedder.tokenize(SENTENCES):
        states = embedder.model(input_ids=torch.tensor([ids]), output_hidden_states=True)
        expected = embedder.model.norm(states.hidden_states[1]) if layers == 1 else states.last_hidden_state
        torch.testing.assert_close(shallow(input_ids=torch.tensor([ids])).last_hidden_state, expected)
    assert len(shallow.layers) == len(shallow.config.layer_types) == layers


def test_attention_keeps_its_heads(embedder):
    pruned = prune_to(embedder, Shape(hidden_dim=20, mlp_dim=24, layers=1), importance_scores(embedder, SENTENCES))
    attention, original = pruned.model.layers[0].self_attn, embedder.model.layers[0].self_attn
    assert attention.q_proj.weight.shape == (4 * 8, 20)
    assert attention.k_proj.weight.shape == attention.v_proj.weight.shape == (2 * 8, 20)
    assert attention.o_proj.weight.shape == (20, 4 * 8)
    assert torch.equal(attention.q_norm.weight, original.q_norm.weight)
    assert torch.equal(attention.k_norm.weight, original.k_norm.weight)


def test_a_student_loads_in_transformers_with_one_layer_type_per_layer(embedder, tmp_path):
    student = prune_to(embedder, Shape(hidden_dim=20, mlp_dim=24, layers=1), importance_scores(embedder, SENTENCES))
    student.save(tmp_path / "student")
    loaded = AutoModel.from_pretrained(tmp_path / "student").eval()
    config = loaded.config
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (20, 24, 1)
    assert len(config.layer_types) == 1
    assert torch.equal(hidden_states(as_embedder(loaded, embedder), SENTENCES), hidden_states(student, SENTENCES))


def test_pruning_leaves_the_teacher_as_it_was(embedder):
    before, config = copy.deepcopy(embedder.model.state_dict()), embedder.model.config.to_dict()
    prune_to(embedder, Shape(hidden_dim=20, mlp_dim=24, layers=1), importance_scores(embedder, SENTENCES))
    assert all(torch.equal(before[name], weight) for name, weight in embedder.model.state_dict().items())
    assert embedder.model.config.to_dict() == config
    assert not embedder.model.layers[0].mlp.down_proj._forward_pre_hooks, "a hook was left behind"


def test_a_student_keeps_the_channels_with_the_highest_scores(embedder):
    scores = importance_scores(embedder, SENTENCES)
    scores.hidden = torch.arange(32.0)
    scores.mlp = [torch.arange(48.0), -torch.arange(48.0)]
    student = prune_to(embedder, Shape(hidden_dim=20, mlp_dim=24, layers=2), scores).model.state_dict()
    teacher = embedder.model.state_dict()
    assert torch.equal(student["embed_tokens.weight"], teacher["embed_tokens.weight"][:, 12:])
    for layer, channels in ((0, slice(24, 48)), (1, slice(0, 24))):
        name = f"layers.{layer}.mlp.down_proj.weight"
        assert torch.equal(student[name], teacher[name][12:, channels])


# Scores -----------------------------------------------------------------------------------------


def rms_norm(norm, x):
    """The formula of the norm, by hand."""
    return norm.weight * x / (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()


@torch.no_grad()
def slow_importance(model, texts):
    """Oracle: one text at a time, layer by layer, from the hidden states that transformers returns."""
    hidden, mlp = torch.zeros(32), [torch.zeros(48) for _ in model.model.layers]
    for ids in model.tokenize(texts):
        positions = torch.arange(len(ids))[None]
        states = model.model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
        for number, layer in enumerate(model.model.layers):
            x = states[number]
            before = rms_norm(layer.input_layernorm, x)
            attended = x + layer.self_attn(before, model.model.rotary_emb(x, positions), attention_mask=None)[0]
            after = rms_norm(layer.post_attention_layernorm, attended)
            inner = F.silu(layer.mlp.gate_proj(after)) * layer.mlp.up_proj(after)
            hidden += before[0].square().sum(0) + after[0].square().sum(0)
            mlp[number] += inner[0].square().sum(0)
        hidden += states[-1][0].square().sum(0)
    return hidden.sqrt(), [square.sqrt() for square in mlp]


def test_importance_is_the_norm_of_activations_over_all_tokens(embedder):
    texts = [*SENTENCES, "a", "fox", "dog", ""]  # of several lengths, some of the same
    scores = importance_scores(embedder, texts)
    hidden, mlp = slow_importance(embedder, texts)
    assert hidden.max() > 1.5 * hidden.min() and mlp[0].max() > 1.5 * mlp[0].min(), "vacuous: all channels are alike"
    torch.testing.assert_close(scores.hidden.float(), hidden, rtol=1e-4, atol=1e-5)
    for score, expected in zip(scores.mlp, mlp, strict=True):
        torch.testing.assert_close(score.float(), expected, rtol=1e-4, atol=1e-5)


def test_importance_does_not_depend_on_the_order_of_texts_or_the_budget(embedder):
    scores = importance_scores(embedder, SENTENCES)
    embedder.token_budget = 1
    other = importance_scores(embedder, SENTENCES[::-1])
    torch.testing.assert_close(other.hidden, scores.hidden, rtol=1e-5, atol=0)
    assert not torch.allclose(importance_scores(embedder, SENTENCES[:2]).hidden, scores.hidden)


def test_the_highest_scores_keep_their_original_order_and_of_equals_the_first():
    assert keep_highest(torch.tensor([5.0, 1, 7, 3, 6]), 3).tolist() == [0, 2, 4]
    assert keep_highest(torch.tensor([1.0, 2, 2, 2, 1]), 2).tolist() == [1, 2]
    assert keep_highest(torch.ones(100), 40).tolist() == list(range(40))
