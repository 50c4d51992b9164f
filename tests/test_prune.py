"""Pruned models against masked, shallow, permuted and unpruned ones."""

import copy
import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SENTENCES
from helpers.closeness import assert_close
from helpers.pruning import as_embedder, hidden_states, norms_of, rms_norm, slow_importance, with_uneven_channels
from transformers import AutoModel, Qwen3Config, Qwen3Model
from transformers.initialization import no_init_weights

from f2llm.config import SHAPE, Shape, resolve
from f2llm.model import Embedder
from f2llm.prune import (
    importance_scores,
    keep_channels,
    keep_layers,
    keep_mlp_channels,
    prune_depth,
    prune_to,
    prune_width,
)

D, MLP, LAYERS = 32, 48, 2
WHOLE = Shape(hidden_size=D, intermediate_size=MLP, num_hidden_layers=LAYERS)
NARROW = Shape(hidden_size=20, intermediate_size=24, num_hidden_layers=LAYERS)
SMALL = Shape(hidden_size=20, intermediate_size=24, num_hidden_layers=1)


@pytest.fixture
def embedder(embedder):
    return with_uneven_channels(embedder)


@pytest.fixture
def plan(config):
    """As the papers have it."""
    as_published = {"activations": "normed", "norm": "l2", "channels": "importance", "order": "original"}
    as_published |= {"rescale": "none", "layers": "first", "weights": "pruned"}
    return replace(config.prune, **as_published)


@pytest.fixture
def scores(embedder):
    return importance_scores(embedder, SENTENCES)


def same_weights(one, other):
    theirs = other.model.state_dict()
    return all(torch.equal(weight, theirs[name]) for name, weight in one.model.state_dict().items())


# Width ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activations", ["normed", "residual"])
@pytest.mark.parametrize("norm", ["l1", "l2", "max"])
@pytest.mark.parametrize("rescale", ["none", "masked", "calibrated"])
def test_pruning_nothing_changes_no_weight(embedder, plan, rescale, norm, activations):
    scores = importance_scores(embedder, SENTENCES, norm, activations)
    pruned = prune_to(embedder, WHOLE, scores, replace(plan, rescale=rescale, layers="change"), seed=0)
    assert same_weights(pruned, embedder)
    assert_close(hidden_states(pruned, SENTENCES), hidden_states(embedder, SENTENCES))
    parts = zip(pruned.model.parameters(), embedder.model.parameters(), strict=True)
    assert all(one.data_ptr() != other.data_ptr() for one, other in parts), "a copy"


@torch.no_grad()
def masked(model, hidden_keep, mlp_keep):
    """Oracle: the wide model that never writes to a dropped channel."""
    model = copy.deepcopy(model)
    dropped = [channel for channel in range(D) if channel not in hidden_keep]
    model.embed_tokens.weight[:, dropped] = 0
    for layer, keep in zip(model.layers, mlp_keep):
        layer.self_attn.o_proj.weight[dropped] = 0
        layer.mlp.down_proj.weight[dropped] = 0
        out = [channel for channel in range(MLP) if channel not in keep]
        layer.mlp.gate_proj.weight[out] = 0
    return model


@pytest.fixture
def kept(scores):
    """(hidden channels, MLP channels of each layer, scores by which they are kept)."""
    hidden_keep = torch.randperm(D)[:20].sort().values
    mlp_keep = [torch.randperm(MLP)[:24].sort().values for _ in range(LAYERS)]
    assert not torch.equal(*mlp_keep), "vacuous: layers keep the same channels"
    hidden, mlp = torch.zeros(D), [torch.zeros(MLP) for _ in range(LAYERS)]
    for score, keep in ((hidden, hidden_keep), *zip(mlp, mlp_keep)):
        score[keep] = torch.rand(len(keep)) + 0.5
    return hidden_keep, mlp_keep, replace(scores, hidden=hidden, mlp=mlp)


@pytest.mark.parametrize("rescale", ["none", "masked"])
def test_a_width_pruned_model_equals_the_masked_one(embedder, plan, kept, rescale):
    """Without rescaling up to sqrt(D / kept) in the norms, with it as it is; epsilons are made to correspond."""
    hidden_keep, mlp_keep, scores = kept
    narrow = prune_to(embedder, NARROW, scores, replace(plan, rescale=rescale), seed=0)
    wide = as_embedder(masked(embedder.model, hidden_keep, mlp_keep), embedder)
    unadjusted = hidden_states(wide, SENTENCES)[:, hidden_keep]
    share = len(hidden_keep) / D
    for norm in norms_of(narrow.model).values():
        norm.variance_epsilon /= share
    if rescale == "none":
        with torch.no_grad():
            for norm in norms_of(wide.model).values():
                norm.weight *= share**0.5
    expected = hidden_states(wide, SENTENCES)[:, hidden_keep]
    assert_close(hidden_states(narrow, SENTENCES), expected, eps=1e-4)
    assert (expected - hidden_states(embedder, SENTENCES)[:, hidden_keep]).abs().max() > 0.1, "vacuous: no effect"
    if rescale == "none":
        assert (unadjusted - expected).abs().max() > 0.1, "vacuous: the factor does not matter"


def test_pruning_to_a_width_is_cutting_the_channels_with_the_highest_scores(embedder, plan, kept):
    hidden_keep, mlp_keep, scores = kept
    narrow = as_embedder(prune_width(embedder.model, hidden_keep, mlp_keep), embedder)
    assert same_weights(narrow, prune_to(embedder, NARROW, scores, plan, seed=0))


def test_masked_rescaling_equals_the_plainly_masked_model_up_to_its_norms_epsilon(embedder, plan, kept):
    hidden_keep, mlp_keep, scores = kept
    narrow = prune_to(embedder, NARROW, scores, replace(plan, rescale="masked"), seed=0)
    wide = as_embedder(masked(embedder.model, hidden_keep, mlp_keep), embedder)
    expected = hidden_states(wide, SENTENCES)[:, hidden_keep]
    assert_close(hidden_states(narrow, SENTENCES), expected, eps=3e-3)
    plain = prune_to(embedder, NARROW, scores, plan, seed=0)
    assert (hidden_states(plain, SENTENCES) - expected).abs().max() > 0.1, "vacuous: rescaling does not matter"


@torch.no_grad()
def handed_on(model, texts, weights):
    """Mean square of what each norm hands on, over tokens and channels, its weight (by name) divided out."""
    squares, handles = {name: [] for name in norms_of(model.model)}, []
    for name, norm in norms_of(model.model).items():
        keep = squares[name].append
        handles.append(norm.register_forward_hook(lambda _, inputs, output, keep=keep: keep(output[0])))
    hidden_states(model, texts)
    for handle in handles:
        handle.remove()
    return {name: (torch.cat(found) / weights[name]).square().mean().item() for name, found in squares.items()}


def test_calibrated_rescaling_hands_on_the_mean_square_that_the_kept_channels_had(embedder, plan, scores):
    student = prune_to(embedder, NARROW, scores, replace(plan, rescale="calibrated"), seed=0)
    hidden_keep = keep_channels(scores.hidden, 20, plan, torch.Generator())
    weights = {name: norm.weight[hidden_keep] for name, norm in norms_of(embedder.model).items()}
    found = handed_on(student, SENTENCES, weights)
    slow = slow_importance(embedder, SENTENCES)
    expected = {name: energy[hidden_keep].mean().item() for name, energy in slow.energy.items()}
    assert found == pytest.approx(expected, rel=1e-3) and len(expected) == 2 * LAYERS + 1
    different = sorted([1, D / 20, *expected.values()])
    assert min(b - a for a, b in itertools.pairwise(different)) > 1e-3, "vacuous: as without, as masked, or all alike"


def test_calibrated_rescaling_of_the_first_norm_keeps_the_length_of_the_embeddings_channels(embedder, plan, scores):
    """Its input is the same in both models; slow, token by token, from the embedding table."""
    student = prune_to(embedder, NARROW, scores, replace(plan, rescale="calibrated"), seed=0)
    keep, table = keep_channels(scores.hidden, 20, plan, torch.Generator()), embedder.model.embed_tokens.weight.double()
    tokens = [token for ids in embedder.tokenize(SENTENCES) for token in ids]
    shares = [(table[token][keep].square().mean() / table[token].square().mean()).item() for token in tokens]
    ratio = student.model.layers[0].input_layernorm.weight / embedder.model.layers[0].input_layernorm.weight[keep]
    assert ratio.square().tolist() == pytest.approx([sum(shares) / len(shares)] * 20, rel=1e-4)
    assert max(shares) > 1.1 * min(shares), "vacuous: all tokens are alike"


def test_calibration_follows_a_layer_to_its_new_place(embedder, plan, scores):
    change = replace(scores, change=torch.tensor([0.1, 0.9]))
    pruned = [
        prune_to(embedder, SMALL, change, replace(plan, layers="change", rescale=rescale), seed=0).model
        for rescale in ("none", "calibrated")
    ]
    keep = keep_channels(scores.hidden, 20, plan, torch.Generator())
    for name, norm in norms_of(pruned[1]).items():
        origin = name.replace("layers.0", "layers.1")
        assert origin != name or name == "norm"
        ratio = (norm.weight / norms_of(pruned[0])[name].weight).square()
        assert ratio.tolist() == pytest.approx([scores.energy[origin][keep].mean().item()] * 20, rel=1e-4)


def test_attention_keeps_its_heads(embedder, plan, scores):
    pruned = prune_to(embedder, SMALL, scores, plan, seed=0)
    attention, original = pruned.model.layers[0].self_attn, embedder.model.layers[0].self_attn
    assert attention.q_proj.weight.shape == (4 * 8, 20)
    assert attention.k_proj.weight.shape == attention.v_proj.weight.shape == (2 * 8, 20)
    assert attention.o_proj.weight.shape == (20, 4 * 8)
    assert torch.equal(attention.q_norm.weight, original.q_norm.weight)
    assert torch.equal(attention.k_norm.weight, original.k_norm.weight)


@pytest.mark.parametrize("rescale", ["none", "calibrated"])
@pytest.mark.parametrize("weights", ["pruned", "random"])
def test_pruning_leaves_the_teacher_as_it_was(embedder, plan, rescale, weights):
    before, config = copy.deepcopy(embedder.model.state_dict()), embedder.model.config.to_dict()
    scores = importance_scores(embedder, SENTENCES)
    prune_to(embedder, SMALL, scores, replace(plan, rescale=rescale, weights=weights), seed=0)
    assert all(torch.equal(before[name], weight) for name, weight in embedder.model.state_dict().items())
    assert embedder.model.config.to_dict() == config


def test_exact_weights_stay_exact_where_products_are_half_precision(embedder, plan):
    """As a model that was loaded for training is on a GPU."""
    embedder.autocast_dtype = torch.bfloat16
    scores = importance_scores(embedder, SENTENCES)
    assert not torch.equal(scores.hidden, importance_scores(as_embedder(embedder.model, embedder), SENTENCES).hidden)
    student = prune_to(embedder, NARROW, scores, plan, seed=0)
    assert student.autocast_dtype == torch.bfloat16 and student.model.dtype == torch.float32
    keep = keep_channels(scores.hidden, 20, plan, torch.Generator())
    cut = embedder.model.layers[0].self_attn.q_proj.weight[:, keep]
    assert torch.equal(student.model.layers[0].self_attn.q_proj.weight, cut)
    assert not torch.equal(cut, cut.bfloat16().float()), "vacuous: bfloat16 holds them"


def test_a_student_keeps_the_channels_with_the_highest_scores(embedder, plan, scores):
    scores.hidden = torch.arange(32.0)
    scores.mlp = [torch.arange(48.0), -torch.arange(48.0)]
    student = prune_to(embedder, NARROW, scores, plan, seed=0).model.state_dict()
    teacher = embedder.model.state_dict()
    assert torch.equal(student["embed_tokens.weight"], teacher["embed_tokens.weight"][:, 12:])
    for layer, channels in ((0, slice(24, 48)), (1, slice(0, 24))):
        name = f"layers.{layer}.mlp.down_proj.weight"
        assert torch.equal(student[name], teacher[name][12:, channels])


@pytest.mark.parametrize("rescale", ["none", "masked", "calibrated"])
def test_the_order_of_importance_permutes_the_embedding_and_changes_nothing_else(embedder, plan, scores, rescale):
    shape = replace(SMALL, num_hidden_layers=2)
    ordered, original = (
        prune_to(embedder, shape, scores, replace(plan, order=order, rescale=rescale), seed=0)
        for order in ("importance", "original")
    )
    keep = keep_channels(scores.hidden, 20, replace(plan, order="importance"), torch.Generator())
    assert scores.hidden[keep].diff().max() <= 0 and keep.diff().min() < 0, "vacuous: it is the original order"
    states = hidden_states(ordered, SENTENCES)
    expected = hidden_states(original, SENTENCES)
    assert_close(states[:, keep.argsort()], expected, eps=1e-4)
    assert (states - expected).abs().max() > 0.1, "vacuous: nothing was permuted"


# Depth ------------------------------------------------------------------------------------------


@torch.no_grad()
def through_layers(model, texts, layers):
    """Oracle: final hidden states of these layers alone, one text at a time."""
    found = []
    for ids in model.tokenize(texts):
        x = model.model.embed_tokens(torch.tensor([ids]))
        rotary = model.model.rotary_emb(x, torch.arange(len(ids))[None])
        for number in layers:
            layer = model.model.layers[number]
            x = x + layer.self_attn(rms_norm(layer.input_layernorm, x), rotary, attention_mask=None)[0]
            x = x + layer.mlp(rms_norm(layer.post_attention_layernorm, x))
        found.append(rms_norm(model.model.norm, x)[0])
    return torch.cat(found)


@pytest.mark.parametrize("layers", [[0], [1], [0, 1]])
def test_a_depth_pruned_model_runs_these_layers(embedder, layers):
    shallow = as_embedder(prune_depth(embedder.model, layers), embedder)
    found = hidden_states(shallow, SENTENCES)
    assert_close(found, through_layers(embedder, SENTENCES, layers), eps=1e-4)
    for others in ([0], [1], [0, 1]):
        if others != layers:
            assert (found - through_layers(embedder, SENTENCES, others)).abs().max() > 0.1, "vacuous: layers are alike"
    assert len(shallow.model.layers) == len(shallow.model.config.layer_types) == len(layers)


@pytest.mark.parametrize(("rule", "layer"), [("first", 0), ("change", 1)])
def test_a_student_has_the_first_layers_or_those_that_change_most(embedder, plan, scores, rule, layer):
    scores.change = torch.tensor([0.1, 0.5])
    shape = replace(WHOLE, num_hidden_layers=1)
    student = prune_to(embedder, shape, scores, replace(plan, layers=rule), seed=0)
    assert same_weights(student, as_embedder(prune_depth(embedder.model, [layer]), embedder))
    assert not same_weights(student, as_embedder(prune_depth(embedder.model, [1 - layer]), embedder))


def test_the_mlp_channels_of_a_layer_are_kept_by_its_own_scores(embedder, plan, scores):
    scores.change = torch.tensor([0.1, 0.5])
    scores.mlp = [torch.arange(48.0), -torch.arange(48.0)]
    student = prune_to(embedder, replace(SMALL, hidden_size=D), scores, replace(plan, layers="change"), seed=0)
    kept_rows = student.model.layers[0].mlp.gate_proj.weight
    assert torch.equal(kept_rows, embedder.model.layers[1].mlp.gate_proj.weight[:24])


def test_layers_stay_in_their_order_and_of_equal_ones_the_first_stay(plan):
    change = torch.tensor([0.4, 0.1, 0.4, 0.9, 0.2, 0.4])
    assert keep_layers(change, 3, replace(plan, layers="change")) == [0, 2, 3]
    assert keep_layers(change, 2, replace(plan, layers="change")) == [0, 3]
    assert keep_layers(change, 3, replace(plan, layers="first")) == [0, 1, 2]


# What is kept -----------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [keep_channels, keep_mlp_channels])
def test_the_highest_scores_keep_their_original_order_and_of_equals_the_first(plan, keep):
    def kept(scores, count):
        return keep(torch.tensor(scores), count, plan, torch.Generator()).tolist()

    assert kept([5.0, 1, 7, 3, 6], 3) == [0, 2, 4]
    assert kept([1.0, 2, 2, 2, 1], 2) == [1, 2]
    assert kept([1.0] * 100, 40) == list(range(40))


def test_channels_in_the_order_of_importance_of_equals_the_first_come_first(plan):
    ordered = replace(plan, order="importance")
    assert keep_channels(torch.tensor([5.0, 1, 7, 3, 7, 5]), 4, ordered, torch.Generator()).tolist() == [2, 4, 0, 5]
    mlp = keep_mlp_channels(torch.tensor([5.0, 1, 7, 3, 7, 5]), 4, ordered, torch.Generator())
    assert mlp.tolist() == [0, 2, 4, 5], "an MLP's order means nothing"


def test_the_first_channels_are_a_prefix_and_the_mlp_is_cut_by_importance_all_the_same(embedder, plan, scores):
    scores.hidden = torch.arange(32.0)
    first = replace(plan, channels="first")
    student, by_importance = (prune_to(embedder, NARROW, scores, choice, seed=0) for choice in (first, plan))
    embedding, teacher = student.model.embed_tokens.weight, embedder.model.embed_tokens.weight
    assert torch.equal(embedding, teacher[:, :20])
    assert not torch.equal(embedding, by_importance.model.embed_tokens.weight)
    rows = keep_mlp_channels(scores.mlp[0], 24, plan, torch.Generator())
    assert torch.equal(
        student.model.layers[0].mlp.up_proj.weight, embedder.model.layers[0].mlp.up_proj.weight[rows][:, :20]
    )
    assert rows.tolist() != list(range(24)), "vacuous: the prefix is what matters most"


def test_random_channels_are_sorted_and_drawn_by_the_seed_alone(embedder, plan, scores):
    random = replace(plan, channels="random")
    students = {}
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        torch.manual_seed(len(name) + 7)  # what was drawn before must not matter
        students[name] = prune_to(embedder, NARROW, scores, random, seed)
    assert same_weights(students["one"], students["again"])
    assert not same_weights(students["one"], students["other"])
    for keep, total in ((keep_channels, D), (keep_mlp_channels, MLP)):
        chosen = keep(torch.rand(total), 20, random, torch.Generator().manual_seed(0)).tolist()
        assert chosen == sorted(set(chosen)) and len(chosen) == 20 and chosen[-1] < total
        others = keep(torch.rand(total), 20, random, torch.Generator().manual_seed(0)).tolist()
        assert chosen == others, "scores do not matter"
    first, second = (layer.mlp.gate_proj.weight for layer in students["one"].model.layers)
    kept_rows = []
    for layer, cut in zip(embedder.model.layers, (first, second)):
        columns = keep_channels(scores.hidden, 20, random, torch.Generator().manual_seed(0))
        whole = layer.mlp.gate_proj.weight[:, columns]
        kept_rows.append([next(row for row in range(MLP) if torch.equal(whole[row], own)) for own in cut])
    assert all(rows == sorted(rows) for rows in kept_rows) and kept_rows[0] != kept_rows[1], "each layer its own draw"


def test_random_weights_have_the_students_shape_and_nothing_of_the_teacher(embedder, plan, scores):
    random = replace(plan, weights="random", rescale="calibrated")
    pruned = prune_to(embedder, SMALL, scores, plan, seed=0)
    students = {}
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        torch.manual_seed(len(name) + 7)
        students[name] = prune_to(embedder, SMALL, scores, random, seed)
    student = students["one"]
    shapes = [
        {name: (weight.shape, weight.dtype) for name, weight in model.model.state_dict().items()}
        for model in (student, pruned)
    ]
    assert shapes[0] == shapes[1] and student.num_parameters() == pruned.num_parameters()
    assert student.model.config.to_dict() == pruned.model.config.to_dict()
    assert (student.max_tokens, student.token_budget) == (embedder.max_tokens, embedder.token_budget)
    assert same_weights(student, students["again"]) and not same_weights(student, students["other"])
    matrices = [name for name, weight in student.model.state_dict().items() if weight.dim() == 2]
    assert len(matrices) == 8
    for name in matrices:
        weight, theirs = student.model.state_dict()[name], pruned.model.state_dict()[name]
        assert not torch.isclose(weight, theirs).float().mean() > 0.1, name
        assert weight.std().item() == pytest.approx(embedder.model.config.initializer_range, rel=0.2)
    assert all(bool((norm.weight == 1).all()) for norm in norms_of(student.model).values())


# Students elsewhere -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{}, {"layers": "change", "rescale": "calibrated", "order": "importance"}, {"weights": "random"}],
    ids=["published", "calibrated", "random"],
)
def test_a_student_loads_in_transformers_and_sentence_transformers(embedder, plan, scores, tmp_path, changes):
    from sentence_transformers import SentenceTransformer

    student = prune_to(embedder, SMALL, scores, replace(plan, **changes), seed=0)
    student.save(tmp_path / "student")
    written = json.loads((tmp_path / "student" / "config.json").read_text())
    assert written["layer_types"] == ["full_attention"] and written["max_window_layers"] == 1
    loaded = AutoModel.from_pretrained(tmp_path / "student").eval()
    config = loaded.config
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (20, 24, 1)
    assert config.layer_types == ["full_attention"] and config.max_window_layers == 1
    assert_close(hidden_states(as_embedder(loaded, embedder), SENTENCES), hidden_states(student, SENTENCES))
    theirs = SentenceTransformer(str(tmp_path / "student"), device="cpu").encode(SENTENCES)
    ours = student.encode(SENTENCES)
    assert_close(theirs, ours)
    assert ours.shape == (len(SENTENCES), 20)
    assert np.abs(ours - ours[::-1]).max() > 0.01, "vacuous: all embeddings are alike"


# The published shape ----------------------------------------------------------------------------


def test_0_6b_prunes_to_the_published_counts_of_parameters(params, tokenizer, plan):
    """Exact numbers, which table 1 of the paper rounds to 330M, 160M and 80M; by hand from the shape beside them."""
    config = resolve(params, "0.6B")
    backbone = config.backbone
    shape = {name: getattr(backbone, name) for name in SHAPE}
    with no_init_weights():  # normal numbers for all of them take ten seconds
        model = Qwen3Model(Qwen3Config(**shape, pad_token_id=0)).eval().bfloat16()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1) if "norm" in name else weight.uniform_(-0.03, 0.03)
    model = Embedder(model, tokenizer, max_tokens=8)  # few tokens: half precision is slow on a CPU
    assert model.num_parameters()[0] == 596_049_920
    scores = importance_scores(model, SENTENCES[:1], plan.norm, plan.activations)
    assert scores.hidden.shape == (1024,) and len(scores.mlp) == len(scores.change) == 28
    counts = {}
    for name, student in config.prune.students.items():
        pruned = prune_to(model, student, scores, config.prune, config.seed)
        counts[name] = pruned.num_parameters()[0]
        hidden, mlp, head = student.hidden_size, student.intermediate_size, backbone.head_dim
        heads = 2 * backbone.num_attention_heads + 2 * backbone.num_key_value_heads
        a_layer = hidden * head * heads + 3 * hidden * mlp + 2 * hidden + 2 * head
        assert counts[name] == backbone.vocab_size * hidden + student.num_hidden_layers * a_layer + hidden
        assert (
            pruned.model.dtype == torch.bfloat16 and len(pruned.model.config.layer_types) == student.num_hidden_layers
        )
        embeddings = pruned.encode(SENTENCES[:1])
        assert embeddings.shape == (1, hidden) and np.isfinite(embeddings).all()
        del pruned
    assert counts == {"330M": 334_349_184, "160M": 159_185_024, "80M": 80_084_288}
