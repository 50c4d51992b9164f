"""The schedule and what decays."""

import json
import math
from dataclasses import replace

import pytest
import torch
from helpers.closeness import assert_close

from f2llm.optimizer import LossScale, build_optimizer, learning_rate


def test_the_rate_warms_up_to_the_peak_and_ends_at_the_minimum(tiny_training):
    plan = replace(tiny_training, learning_rate=1.0, min_learning_rate=0.1, warmup_steps=2)
    cosine = [0.1 + 0.9 * (1 + math.cos(math.pi * part / 4)) / 2 for part in (1, 2, 3)]
    rates = [learning_rate(step, 6, plan) for step in range(6)]
    assert rates == pytest.approx([0.5, 1.0, *cosine, 0.1])
    assert rates[-1] == 0.1, "the last step is exactly the minimum"
    assert rates[3] == pytest.approx(0.55), "half-way is the mean of both"


@pytest.mark.parametrize(("warmup", "steps"), [(0, 5), (5, 5), (9, 5), (3, 1)])
def test_the_rate_stays_within_its_bounds_whatever_the_lengths(tiny_training, warmup, steps):
    plan = replace(tiny_training, learning_rate=1.0, min_learning_rate=0.1, warmup_steps=warmup)
    rates = [learning_rate(step, steps, plan) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[-1] == (0.1 if warmup < steps else 1.0)


@pytest.mark.parametrize(("decay_norms", "expected"), [(True, 0.5), (False, 0.0)])
def test_norms_decay_only_if_the_recipe_says_so(embedder, tiny_training, decay_norms, expected):
    """With no gradient at all a step of AdamW multiplies what decays by 1 - rate * decay."""
    plan = replace(tiny_training, weight_decay=0.5, learning_rate=0.1, min_learning_rate=0.1, decay_norms=decay_norms)
    optimizer = build_optimizer(embedder.model, plan)
    before = {name: weight.detach().clone() for name, weight in embedder.model.named_parameters()}
    for weight in embedder.model.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    for name, weight in embedder.model.named_parameters():
        factor = 1 - 0.1 * (0.5 if weight.ndim > 1 else expected)
        assert_close(weight, before[name] * factor, name=name)
    assert len(before) == sum(len(group["params"]) for group in optimizer.param_groups)


def test_the_fused_optimizer_is_adamw(tiny_training):
    plan = replace(tiny_training, weight_decay=0.1, learning_rate=0.01, betas=[0.8, 0.95])
    torch.manual_seed(0)
    ours, theirs = torch.nn.Linear(5, 3), torch.nn.Linear(5, 3)
    theirs.load_state_dict(ours.state_dict())
    reference = torch.optim.AdamW(theirs.parameters(), lr=0.01, betas=(0.8, 0.95), weight_decay=0.1, foreach=False)
    optimizer = build_optimizer(ours, plan)
    for _ in range(10):
        inputs = torch.randn(7, 5)
        for model, steps in ((ours, optimizer), (theirs, reference)):
            steps.zero_grad()
            model(inputs).square().sum().backward()
            steps.step()
    for weight, expected in zip(ours.parameters(), theirs.parameters()):
        assert_close(weight, expected)


def test_the_scale_of_float16_halves_at_an_overflow_and_doubles_when_steady():
    scale = LossScale(needed=True)
    assert scale.factor == 65536 and scale.overflowed(float("inf")) and scale.overflowed(float("nan"))
    assert scale.factor == 16384
    assert not any(scale.overflowed(1.0) for _ in range(1999)) and scale.factor == 16384
    again = LossScale(needed=True)
    again.resume(json.loads(json.dumps(scale.state())))
    for one in (scale, again):
        assert not one.overflowed(1.0) and one.factor == 32768
    for _ in range(15):
        assert scale.overflowed(float("inf"))
    assert scale.factor == 1 and not scale.overflowed(float("inf")), "then it is the training that has no number"


def test_other_precisions_have_no_scale():
    scale = LossScale(needed=False)
    assert not scale.overflowed(float("inf")) and scale.factor == 1 and scale.state() == {}
    scale.resume({"loss_scale": 8.0, "loss_scale_steady": 3})
    assert scale.factor == 1
