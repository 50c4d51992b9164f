"""AdamW, its schedule and the scale of float16 gradients, in optimizer steps whatever the number of processes."""

import math

import torch
from torch import nn

from .config import Training


def build_optimizer(model: nn.Module, config: Training) -> torch.optim.AdamW:
    """Fused AdamW of all parameters that are not frozen; vectors (weights of norms, biases, DoRA's magnitudes) decay
    only if config.decay_norms, as the authors' do."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim > 1]
    vectors = [parameter for parameter in trained if parameter.ndim <= 1]
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


class LossScale:
    """The factor that keeps float16 gradients between vanishing and overflow; 1 where it is not needed.

    It halves when gradients overflow, whose step is left out, and doubles after STEADY steps without. Not torch's
    GradScaler, which looks at each process's gradients alone: sharded processes could then step or not, each by itself.
    """

    FIRST, STEADY = 2.0**16, 2000

    def __init__(self, needed: bool):
        self.needed, self.factor, self.steady = needed, self.FIRST if needed else 1.0, 0

    def overflowed(self, grad_norm: float) -> bool:
        """Whether to leave out a step with this gradient norm; at a factor of 1 the fault is not the scale's."""
        if math.isfinite(grad_norm):
            self.steady += 1
            if self.needed and self.steady % self.STEADY == 0:
                self.factor *= 2
            return False
        self.steady = 0
        if self.factor <= 1:
            return False
        self.factor /= 2
        return True

    def state(self) -> dict:
        """What `resume` needs."""
        return {"loss_scale": self.factor, "loss_scale_steady": self.steady} if self.needed else {}

    def resume(self, state: dict) -> None:
        """Take up the factor of a checkpoint; one of another precision has none."""
        if self.needed and "loss_scale" in state:
            self.factor, self.steady = state["loss_scale"], state["loss_scale_steady"]


class WeightAverage:
    """The mean of the weights after some steps: those that `config.average` names, counted from the last one back.

    It is kept as state of the optimizer, in every process for its part of the weights, so that checkpoints hold it.
    Source: Izmailov et al. 2018, arXiv 1803.05407; the authors' code keeps checkpoints for it.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, num_steps: int, config: Training):
        self.optimizer, self.count = optimizer, 0
        self.steps = {num_steps - back * config.average.every for back in range(config.average.last)}

    @torch.no_grad()
    def take(self, step: int) -> None:
        """Add the weights after a step (counted from 1) to the mean, if it is one of those that count."""
        if step in self.steps:
            self.count += 1
            for weight, mean in self._means():
                mean.lerp_(weight, 1 / self.count)

    @torch.no_grad()
    def put(self) -> None:
        """The mean becomes the weights, at the end of a training."""
        if self.count:
            for weight, mean in self._means():
                weight.copy_(mean)

    def _means(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(weight, its mean) of all that is trained."""
        weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        for weight in weights:
            self.optimizer.state[weight].setdefault("mean", torch.zeros_like(weight))
        return [(weight, self.optimizer.state[weight]["mean"]) for weight in weights]

    def state(self) -> dict:
        """What `resume` needs."""
        return {"averaged": self.count} if self.steps else {}

    def resume(self, state: dict) -> None:
        """Make room for the mean of a checkpoint, before its tensors are read."""
        self.count = state.get("averaged", 0)
        if self.count:
            self._means()
