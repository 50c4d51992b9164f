"""One training in several processes: who computes what, what they exchange, and how weights are split.

Every process sees the embeddings of the whole batch and computes the whole loss, which costs a thousandth of the
forward pass and makes the result independent of the number of processes; only texts are shared out. Processes are
started by `accelerate launch` or torchrun; one process needs neither.
"""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

TIMEOUT = timedelta(minutes=15)  # a process that waits longer for another has lost it


def start() -> None:
    """Join the other processes, if a launcher says that there are any."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        PartialState(cpu=not torch.cuda.is_available(), timeout=TIMEOUT)


def stop() -> None:
    """Leave them."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()


def from_first(value):
    """The first process's value, a small Python object, in every process."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    return box[0]


def gather(own: Tensor, shares: list[list[int]]) -> Tensor:
    """All rows (N, D), float32, in every process. own: this process's rows, in the order of shares[rank]."""
    own = own.detach().float()
    order = torch.tensor([row for share in shares for row in share], device=own.device)
    if num_ranks() > 1:
        padded = own.new_zeros(max(map(len, shares)), own.shape[1])
        padded[: len(own)] = own
        received = [torch.empty_like(padded) for _ in shares]
        dist.all_gather(received, padded)
        own = torch.cat([rows[: len(share)] for rows, share in zip(received, shares)])
    return own[order.argsort()]


# Gradients and sharded weights ------------------------------------------------------------------


def shard(model: nn.Module, half: torch.dtype | None) -> None:
    """Split weights, gradients and optimizer state over all processes, layer by layer (FSDP2), in place."""
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, output_dtype=None)
    mesh = dist.device_mesh.init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (num_ranks(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def wants_shards(asked: bool) -> bool:
    """Whether machine.shard or accelerate's configuration (distributed_type: FSDP) ask for it, among several."""
    by_accelerate = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return (asked or by_accelerate) and num_ranks() > 1


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def sum_gradients(model: nn.Module, bucket: int = 2**26) -> None:
    """Add the processes' gradients, unless the weights are sharded, whose gradients FSDP2 has added already.

    Not DDP's own reducer: it counts one backward pass a step, and gradient caching runs one for every pack.
    bucket: numbers per message.
    """
    if num_ranks() == 1 or is_sharded(model):
        return
    for parameter in model.parameters():
        if parameter.grad is None:  # a process whose share is empty
            parameter.grad = torch.zeros_like(parameter)
    waiting: list[Tensor] = []
    for parameter in model.parameters():
        waiting.append(parameter.grad)
        if sum(grad.numel() for grad in waiting) >= bucket:
            _sum(waiting)
            waiting = []
    _sum(waiting)


def _sum(grads: list[Tensor]) -> None:
    if grads:
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        dist.all_reduce(flat)
        for grad, part in zip(grads, flat.split([grad.numel() for grad in grads])):
            grad.copy_(part.view_as(grad))


# State of weights and optimizer, whole whatever the number of processes -------------------------

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
_SPREAD = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def whole_state(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> tuple[dict, dict]:
    """({weight: tensor}, {weight.name of state: tensor}) on the CPU of the first process; empty in the others."""
    weights = get_model_state_dict(model, options=_WHOLE)
    if optimizer is None:
        return weights, {}
    state = get_optimizer_state_dict(model, optimizer, options=_WHOLE).get("state", {})
    return weights, {f"{name}.{key}": value for name, values in state.items() for key, value in values.items()}


def set_whole_state(model: nn.Module, optimizer: torch.optim.Optimizer, weights: dict, moments: dict) -> None:
    """What `whole_state` gave, back into place; only the first process needs to bring it."""
    options = _SPREAD if dist.is_initialized() else StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, weights, options=options)
    state: dict[str, dict] = {}
    for name, value in moments.items():
        weight, _, key = name.rpartition(".")
        state.setdefault(weight, {})[key] = value
    groups = get_optimizer_state_dict(model, optimizer, options=_WHOLE).get("param_groups", [])
    set_optimizer_state_dict(model, optimizer, {"state": state, "param_groups": groups}, options=options)
