"""One training in several processes: what each computes, what they exchange, and how weights are sharded.

Every process sees the embeddings of the whole batch and computes the whole loss, which costs a thousandth of the
forward pass and makes the result independent of the number of processes; only texts are shared out. Processes are
started by `accelerate launch` or torchrun; one process needs neither.
"""

import os
from dataclasses import replace
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

TIMEOUT = timedelta(minutes=15)  # how long a process waits for another before it fails


def start() -> None:
    """Initialise the process group, if a launcher (torchrun, accelerate) started several processes."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        PartialState(cpu=not torch.cuda.is_available(), timeout=TIMEOUT)


def stop() -> None:
    """Destroy the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait until all processes are here."""
    if dist.is_initialized():
        dist.barrier()


def broadcast_from_rank0(value):
    """The value that process 0 has, a small Python object, in every process."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    return box[0]


def gather(own: Tensor, shares: list[list[int]]) -> Tensor:
    """All rows (N, D), float32, in every process. own: this process's rows, in the order of shares[rank]."""
    own = own.detach().float()
    order = torch.tensor([row for share in shares for row in share], device=own.device)
    if world_size() > 1:
        padded = own.new_zeros(max(map(len, shares)), own.shape[1])
        padded[: len(own)] = own
        received = [torch.empty_like(padded) for _ in shares]
        dist.all_gather(received, padded)
        own = torch.cat([rows[: len(share)] for rows, share in zip(received, shares)])
    return own[order.argsort()]


# Gradients and sharded weights ------------------------------------------------------------------


def shard(model: nn.Module, autocast_dtype: torch.dtype | None) -> None:
    """Shard weights, gradients and optimizer state over all processes, layer by layer (FSDP2), in place."""
    policy = MixedPrecisionPolicy(param_dtype=autocast_dtype, reduce_dtype=torch.float32, output_dtype=None)
    mesh = dist.device_mesh.init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (world_size(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def wants_shards(asked: bool) -> bool:
    """Whether machine.shard or accelerate's configuration (distributed_type: FSDP) ask for it, among several."""
    by_accelerate = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return (asked or by_accelerate) and world_size() > 1


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def sum_gradients(model: nn.Module, bucket: int = 2**26) -> None:
    """Add the processes' gradients, unless the weights are sharded, whose gradients FSDP2 has added already.

    Not DDP's own reducer: it counts one backward pass a step, and gradient caching runs one for every pack.
    bucket: numbers per message.
    """
    if world_size() == 1 or is_sharded(model):
        return
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        if parameter.grad is None:  # a process whose share is empty
            parameter.grad = torch.zeros_like(parameter)
    waiting: list[Tensor] = []
    for parameter in trained:
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


# Full state dicts, the same for any number of processes ------------------------------------------

_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
_BROADCAST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def full_state_dict(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> tuple[dict, dict]:
    """({weight: tensor}, {weight.state: tensor}) of model and optimizer, on the CPU of process 0; else empty.

    Frozen weights, which an adapter leaves as they were, are left out.
    """
    weights = get_model_state_dict(model, options=_FULL)
    if optimizer is None:
        return weights, {}
    state = get_optimizer_state_dict(model, optimizer, options=_FULL).get("state", {})
    return weights, {f"{name}.{key}": value for name, values in state.items() for key, value in values.items()}


def load_full_state_dict(
    model: nn.Module, optimizer: torch.optim.Optimizer, weights: dict, optimizer_state: dict
) -> None:
    """Load what `full_state_dict` returned; only process 0 needs to pass it."""
    options = _BROADCAST if dist.is_initialized() else StateDictOptions(full_state_dict=True)
    options = replace(options, strict=all(parameter.requires_grad for parameter in model.parameters()))
    set_model_state_dict(model, weights, options=options)
    state: dict[str, dict] = {}
    for name, value in optimizer_state.items():
        weight, _, key = name.rpartition(".")
        state.setdefault(weight, {})[key] = value
    groups = get_optimizer_state_dict(model, optimizer, options=_FULL).get("param_groups", [])
    set_optimizer_state_dict(model, optimizer, {"state": state, "param_groups": groups}, options=options)
