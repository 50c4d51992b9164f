"""Importance scores against a slow computation, and what must not change them."""

import pytest
import torch
from conftest import SENTENCES
from helpers.closeness import assert_close
from helpers.pruning import norms_of, slow_importance, with_uneven_channels

from f2llm.prune import importance_scores

LAYERS = 2


@pytest.fixture
def embedder(embedder):
    return with_uneven_channels(embedder)


@pytest.fixture
def scores(embedder):
    return importance_scores(embedder, SENTENCES)


TEXTS = [*SENTENCES, "a", "fox", "dog", ""]  # of several lengths, some of the same


@pytest.mark.parametrize("activations", ["normed", "residual"])
@pytest.mark.parametrize("norm", ["l1", "l2", "max"])
def test_importance_is_the_norm_of_activations_over_all_tokens(embedder, norm, activations):
    embedder.token_budget = 40
    scores = importance_scores(embedder, TEXTS, norm, activations)
    slow = slow_importance(embedder, TEXTS, norm, activations)
    pairs = [(scores.hidden, slow.hidden), *zip(scores.mlp, slow.mlp, strict=True)]
    for score, expected in pairs:
        assert expected.max() > 1.5 * expected.min(), "vacuous: all channels are alike"
        assert_close(score, expected)
    for other in {"l1", "l2", "max"} - {norm}:
        assert not torch.allclose(importance_scores(embedder, TEXTS, other, activations).hidden, scores.hidden)


def test_normed_and_residual_activations_are_not_the_same_channels(embedder):
    normed, residual = (
        importance_scores(embedder, TEXTS, activations=activations) for activations in ("normed", "residual")
    )
    assert normed.hidden.argmax() != residual.hidden.argmax()
    for pair in zip(normed.mlp, residual.mlp, strict=True):
        assert_close(*pair, name="MLP channels are measured alike")


def test_the_change_of_a_layer_is_the_mean_relative_change_of_the_streams_length(embedder):
    """Against the hidden states that transformers returns, but for the last, which it norms."""
    embedder.token_budget = 40
    scores = importance_scores(embedder, TEXTS)
    slow = slow_importance(embedder, TEXTS).change
    assert_close(scores.change, slow, scale=1, name="differences of relative lengths from 1")
    states = [
        embedder.model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
        for ids in embedder.tokenize(TEXTS)
    ]
    before, after = (torch.cat([state[number][0] for state in states]).norm(dim=-1) for number in (0, 1))
    assert_close(scores.change[0], (after / before - 1).abs().mean(), scale=1)
    assert slow.min() > 0.01 and (slow[0] / slow[1]).log().abs() > 0.05, "vacuous: layers are alike"


def test_the_energy_of_every_norm_has_mean_1_and_is_that_of_the_slow_computation(embedder, scores):
    slow = slow_importance(embedder, SENTENCES)
    assert list(scores.energy) == list(norms_of(embedder.model)) == list(slow.energy)
    for name, energy in scores.energy.items():
        assert_close(energy, slow.energy[name], name=name)
        assert energy.mean().item() == pytest.approx(1, rel=1e-5) and energy.max() > 1.2


def test_importance_does_not_depend_on_the_order_of_texts_or_the_budget(embedder, scores):
    for budget, texts in ((1, SENTENCES[::-1]), (30, [*SENTENCES[3:], *SENTENCES[:3]]), (10_000, SENTENCES)):
        embedder.token_budget = budget
        other = importance_scores(embedder, texts)
        for one, same in zip([scores.hidden, *scores.mlp], [other.hidden, *other.mlp], strict=True):
            assert_close(same, one)
        assert_close(other.change, scores.change, scale=1, name="differences of relative lengths from 1")
        for name, energy in scores.energy.items():
            assert_close(other.energy[name], energy, name=name)
    assert not torch.allclose(importance_scores(embedder, SENTENCES[:2]).hidden, scores.hidden)


def test_a_token_whose_embedding_is_0_leaves_all_scores_finite(embedder):
    """As that of a padding token, which no gradient ever reaches, in a text that spells it out."""
    with torch.no_grad():
        embedder.model.embed_tokens.weight[embedder.tokenize(["fox"])[0][0]] = 0
    scores = importance_scores(embedder, ["fox", *SENTENCES])
    without = importance_scores(embedder, SENTENCES)
    for found in (scores.hidden, scores.change, *scores.mlp, *scores.energy.values()):
        assert found.isfinite().all()
    assert_close(scores.change, without.change, eps=0.5)


def hooks_of(model):
    return [hook for part in model.modules() for hook in (*part._forward_hooks, *part._forward_pre_hooks)]


def test_no_hook_is_left_behind_also_when_a_pass_ends_in_an_error(embedder):
    before = hooks_of(embedder.model)
    importance_scores(embedder, SENTENCES)
    assert hooks_of(embedder.model) == before
    seen = []

    def fail(*_):
        seen.append(len(hooks_of(embedder.model)))
        raise RuntimeError("no more memory")

    handle = embedder.model.layers[1].mlp.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="no more memory"):
        importance_scores(embedder, SENTENCES)
    assert seen == [len(before) + 1 + (2 * LAYERS + 1) + LAYERS], "vacuous: no hook was there"
    handle.remove()
    assert hooks_of(embedder.model) == before
