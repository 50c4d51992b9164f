"""Checkpoints of a training while it runs: saved, and taken up again on any number of processes.

Weights that every process has are written by process 0, before the next step. Of sharded ones every process copies its
own part, with its optimizer state, and writes it by torch.distributed.checkpoint while training goes on. Both are
safetensors, and both are read the same way: every process reads what it needs.
"""

import copy
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from . import distributed
from .model import Embedder
from .optimizer import LossScale, WeightAverage
from .store import checkpoint
from .store.run_log import Run


class Checkpoints:
    """Saves and resumes all that one training changes, in run.folder; None: nowhere."""

    def __init__(
        self,
        model: Embedder,
        optimizer: torch.optim.Optimizer,
        scale: LossScale,
        average: WeightAverage,
        run: Run,
    ):
        self.model, self.optimizer, self.scale, self.average, self.run = model.model, optimizer, scale, average, run
        self.sharded = distributed.is_sharded(self.model)
        self.writing: Future | None = None
        self.group = self.pool = None
        if self.sharded and run.folder:
            # A group of its own: what it exchanges in the background never waits for what training exchanges.
            self.group = dist.new_group(backend="gloo", timeout=distributed.TIMEOUT)
            self.pool = ThreadPoolExecutor(1)

    def resume(self) -> int:
        """Take up the newest whole checkpoint, if there is one; returns the number of steps done.

        It may come from another number of processes, sharded or not.
        """
        path = self._latest() if self.run.folder else None
        if path is None:
            return 0
        state = checkpoint.read_state(path)
        distributed.state_dicts(self.model, self.optimizer)  # the optimizer's own state is there from here on
        self.average.resume(state)
        weights, optimizer_state = distributed.state_dicts(self.model, self.optimizer)
        checkpoint.read_tensors(path, tensors := weights | optimizer_state)
        distributed.load_state_dicts(
            self.model,
            self.optimizer,
            {name: tensors[name] for name in weights},
            {name: tensors[name] for name in optimizer_state},
        )
        self.scale.resume(state)
        self.run.resume(state["step"], state)
        if not self.run.quiet:
            done = f"after step {state['step']} of {self.run.num_steps}"
            print(f"{self.run.name}: resumes {done}, from {path}", flush=True)
        return state["step"]

    def _latest(self) -> Path | None:
        """The newest whole checkpoint, the same in every process; each reads its share of the files to find faults."""

        def fault(path: Path) -> str:
            own = checkpoint.fault_of(path, distributed.rank(), distributed.world_size())
            return next(filter(None, distributed.gather_objects(own)), "")

        found = distributed.broadcast_from_rank0(checkpoint.steps(self.run.folder))
        return checkpoint.latest(self.run.folder, found, fault, quiet=distributed.rank() > 0)

    def save(self, step: int) -> None:
        """Save this step: at once, or sharded in the background, once the one before is written."""
        self.wait()
        state = self.run.state() | self.scale.state() | self.average.state()
        if not self.sharded:
            if distributed.rank() == 0:
                weights, optimizer_state = distributed.state_dicts(self.model, self.optimizer)
                checkpoint.save(self.run.folder, step, weights, optimizer_state, state)
            distributed.barrier()
            return
        stager = DefaultStager(StagingOptions(False, False, False, False))  # copies this process's part, in memory
        weights, optimizer_state = distributed.state_dicts(self.model, self.optimizer)
        copied = stager.stage(weights | optimizer_state)
        stager.close()
        self.writing = self.pool.submit(self._write_shard, step, copied, copy.deepcopy(state))

    def check(self) -> None:
        """Raise what went wrong in the background, if writing has ended."""
        if self.writing and self.writing.done():
            self.wait()

    def wait(self) -> None:
        """Until the last checkpoint is written; raises a RuntimeError if it was not."""
        if self.writing:
            writing, self.writing = self.writing, None
            writing.result()

    def _write_shard(self, step: int, tensors: dict[str, Tensor], state: dict) -> None:
        """Write this process's part; process 0 makes all parts visible as one checkpoint once they are on the disk."""
        first = distributed.rank() == 0
        with checkpoint.being_written(self.run.folder, step) if first else nullcontext() as new:
            new = Path(distributed.broadcast_from_rank0(str(new), self.group))  # from here on the folder is there
            own = checkpoint.write_shard(new, tensors, self.group)
            files = distributed.gather_objects(own, self.group)
            if first:
                checkpoint.seal(new, step, state, {name: facts for part in files for name, facts in part.items()})
        if first:
            checkpoint.forget(self.run.folder, step)
