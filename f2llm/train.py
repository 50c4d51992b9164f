"""Contrastive training and distillation: the loop reads as the method."""

from collections.abc import Callable

import torch
from torch import Tensor

from .batches import HomogeneousBatches
from .config import Machine, Training
from .model import Embedder
from .optimizer import LossScale, WeightAverage, build_optimizer, learning_rate
from .resume import Checkpoints
from .step import (
    PackedBatch,
    ahead,
    clip_gradients,
    grad_cache_backward,
    prepare,
    require_finite,
    validate,
)
from .store.run_log import Run
from .teacher import Cached
from .tokens import Tokens


def train(
    model: Embedder,
    batches: HomogeneousBatches,
    config: Training,
    run: Run,
    machine: Machine,
    teacher: Callable[[PackedBatch], Tensor] | None = None,
    tokens: dict[str, Tokens] | None = None,
) -> None:
    """Train `model` in place: one optimizer step per batch, one source per batch.

    Goes on from the newest checkpoint in run.folder, if there is one. teacher: gives the embeddings that distillation
    is to reach, see `f2llm.teacher`. tokens: of the documents, where they are stored.
    """
    optimizer = build_optimizer(model.model, config)
    scale = LossScale(needed=model.autocast_dtype == torch.float16)
    average = WeightAverage(optimizer, len(batches), config)
    checkpoints = Checkpoints(model, optimizer, scale, average, run)
    first = checkpoints.resume()
    model.model.train()
    for packed in ahead(lambda step: prepare(model, batches[step], machine, tokens), range(first, len(batches))):
        step = len(run.rows) + 1
        target = teacher(packed) if teacher and config.distillation_weight else None
        losses = grad_cache_backward(model, packed, config, target, scale.factor)
        grad_norm = clip_gradients(model, config.max_grad_norm, scale.factor)
        rate = learning_rate(step - 1, len(batches), config)
        for group in optimizer.param_groups:
            group["lr"] = rate
        if not scale.overflowed(grad_norm):
            require_finite(step, packed, losses, grad_norm)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.take(step)
        run.log(step, packed.batch.source, rate, grad_norm, losses, packed.tokens())
        if config.validate_every and (step % config.validate_every == 0 or step == len(batches)):
            run.validate(step, validate(model, batches, config, machine))
        if run.folder and (step % machine.save_every == 0 or step == len(batches)):
            if isinstance(teacher, Cached):
                teacher.flush()
            checkpoints.save(step)
        checkpoints.check()
    checkpoints.wait()
    average.put()
    model.model.eval()
