"""One training in several processes: what each computes, what they exchange, and how weights are sharded.

Every process sees the embeddings of the whole batch and computes the whole loss, which costs a thousandth of the
forward pass and makes the result independent of the number of processes; only texts are shared out. torchrun starts the
processes; one process needs no launcher.
"""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
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
    """Initialise the process group and choose this process's GPU, if torchrun started several processes."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)


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


def broadcast_from_rank0(value, group: dist.ProcessGroup | None = None):
    """The value that process 0 has, a small Python object, in every process of the group (None: all)."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box, group=group)
    return box[0]


def gather_objects(value, group: dist.ProcessGroup | None = None) -> list:
    """The values of all processes of the group (None: all), small Python objects, by number of process."""
    found = [value]
    if dist.is_initialized():
        found = [None] * dist.get_world_size(group)
        dist.all_gather_object(found, value, group=group)
    return found


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


# State dicts, the same for any number of processes ------------------------------------------------


def state_dicts(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """({weight: tensor}, {weight.state: tensor}) of what is trained: the part that this process holds, not a copy."""
    options = StateDictOptions(ignore_frozen_params=True)
    weights = get_model_state_dict(model, options=options)  # first: FSDP2 then holds its shards alone again
    state = get_optimizer_state_dict(model, optimizer, options=options).get("state", {})
    return weights, {f"{name}.{key}": value for name, values in state.items() for key, value in values.items()}


def load_state_dicts(
    model: nn.Module, optimizer: torch.optim.Optimizer, weights: dict[str, Tensor], optimizer_state: dict[str, Tensor]
) -> None:
    """Load the parts that this process holds, as `state_dicts` returns them."""
    strict = all(parameter.requires_grad for parameter in model.parameters())  # else frozen weights are not among them
    set_model_state_dict(model, weights, options=StateDictOptions(strict=strict))
    state: dict[str, dict] = {}
    for name, value in optimizer_state.items():
        weight, _, key = name.rpartition(".")
        state.setdefault(weight, {})[key] = value
    groups = get_optimizer_state_dict(model, optimizer)["param_groups"]
    set_optimizer_state_dict(model, optimizer, {"state": state, "param_groups": groups})


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    """{weight: tensor} of what is trained, whole and on the CPU of process 0, else empty."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    return get_model_state_dict(model, options=options)
