"""AdamW and its schedule, counted in optimizer steps whatever the number of processes."""

import math

import torch
from torch import nn

from .config import Training


def build_optimizer(model: nn.Module, config: Training) -> torch.optim.AdamW:
    """Fused AdamW; weights of norms and biases decay only if config.decay_norms, as the authors' do."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": config.weight_decay if config.decay_norms else 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=tuple(config.betas), fused=True)


def learning_rate(step: int, num_steps: int, config: Training) -> float:
    """Rate of a step counted from 0: linear warm-up, then a cosine that ends at min_learning_rate exactly.

    Deviation: the authors overwrite rates below min_learning_rate, and take the first step at 0.
    """
    warmup = min(config.warmup_steps, num_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = min(1.0, (step - warmup + 1) / max(1, num_steps - warmup))
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return config.min_learning_rate + (config.learning_rate - config.min_learning_rate) * cosine
