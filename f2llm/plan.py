"""Training on several GPUs and machines: the lines to type, or the Slurm script to submit.

Checked here: the lines on CPU processes of one machine. Not run: a GPU, a second machine, a Slurm cluster.
"""

from .config import TRAINING_STAGES

SLURM = """#!/bin/bash
#SBATCH --job-name=f2llm-{stage}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={gpus}
#SBATCH --time={hours}:00:00
#SBATCH --requeue
# Submit from the repository's folder, on a file system that all nodes share: checkpoints are in scratch/, and a job
# that is requeued goes on from the last one.
set -euo pipefail
export HF_HUB_OFFLINE=1
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=1 .venv/bin/python -m torch.distributed.run \\
  --nnodes="$SLURM_NNODES" --nproc-per-node={gpus} \\
  --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="$head:29500" \\
  -m f2llm.train {stage}
# The notebook of the stage finds the finished training, checks it, draws its figures, and DVC records the result.
.venv/bin/python -m dvc repro --single-item {stage}
"""


def require_valid(stage: str, nodes: int, gpus: int) -> None:
    """A ValueError for what no cluster can run."""
    if stage not in TRAINING_STAGES:
        raise ValueError(f"stage is {stage!r}, but only these train: {', '.join(TRAINING_STAGES)}")
    if nodes < 1 or gpus < 1:
        raise ValueError(f"nodes is {nodes} and gpus is {gpus}, but both must be 1 or more")


def torchrun_line(stage: str, nodes: int, gpus: int) -> str:
    """What to type on every machine: the same line on all of them."""
    machines = "--standalone"
    if nodes > 1:
        machines = f"--nnodes={nodes} --rdzv-id=f2llm --rdzv-backend=c10d --rdzv-endpoint=FIRST_MACHINE:29500"
    return f"python -m torch.distributed.run {machines} --nproc-per-node={gpus} -m f2llm.train {stage}"


def slurm_script(stage: str, nodes: int, gpus: int, hours: int) -> str:
    """For `sbatch`; killed or out of time, the same script goes on from the last checkpoint."""
    return SLURM.format(stage=stage, nodes=nodes, gpus=gpus, hours=hours)
