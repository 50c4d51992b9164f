"""The lines for several GPUs and machines, and the Slurm script that bash and DVC accept."""

import subprocess

import pytest
from conftest import ROOT

from f2llm.config import TRAINING_STAGES, read_yaml
from f2llm.plan import require_valid, slurm_script, torchrun_line


@pytest.mark.parametrize("stage", TRAINING_STAGES)
def test_the_line_starts_as_many_processes_as_gpus_on_every_machine(stage):
    alone, many = torchrun_line(stage, nodes=1, gpus=8), torchrun_line(stage, nodes=4, gpus=8)
    assert "--standalone --nproc-per-node=8" in alone and alone.endswith(f"-m f2llm.train {stage}")
    assert "--nnodes=4" in many and "--standalone" not in many
    assert stage in read_yaml(ROOT / "dvc.yaml")["stages"]


def test_the_slurm_script_is_valid_bash_with_the_numbers_asked_for(tmp_path):
    script = tmp_path / "job.sh"
    script.write_text(slurm_script("stage2", nodes=3, gpus=4, hours=12))
    subprocess.run(["bash", "-n", script], check=True)
    lines = script.read_text().splitlines()
    assert lines[0] == "#!/bin/bash"
    assert {"#SBATCH --nodes=3", "#SBATCH --gpus-per-node=4", "#SBATCH --time=12:00:00"} <= set(lines)
    assert "{" not in script.read_text().replace("${", ""), "a field was left open"


FAKE = """#!/bin/bash
echo "$(basename "$0") $*" >> calls
[ "$(basename "$0")" != scontrol ] || echo node7
"""


def test_the_slurm_script_trains_and_then_records(tmp_path):
    """With stand-ins for Slurm and Python that write down how they were called."""
    (tmp_path / "bin").mkdir()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for path in ("bin/scontrol", "bin/srun", ".venv/bin/python"):
        (tmp_path / path).write_text(FAKE)
        (tmp_path / path).chmod(0o755)
    environment = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "SLURM_JOB_NODELIST": "node[7-8]"}
    environment |= {"SLURM_NNODES": "2", "SLURM_JOB_ID": "42"}
    script = slurm_script("stage1", nodes=2, gpus=8, hours=1)
    subprocess.run(["bash", "-c", script], check=True, cwd=tmp_path, env=environment)
    asked, trained, recorded = (tmp_path / "calls").read_text().splitlines()
    assert asked == "scontrol show hostnames node[7-8]"
    assert "--nnodes=2 --nproc-per-node=8" in trained and "--rdzv-endpoint=node7:29500 -m f2llm.train stage1" in trained
    assert recorded == "python -m dvc repro --single-item stage1"


@pytest.mark.parametrize("wrong", [("mine", 1, 1), ("stage1", 0, 1), ("stage1", 1, -2)])
def test_what_cannot_run_is_an_error(wrong):
    with pytest.raises(ValueError, match=r"only these train|must be 1 or more"):
        require_valid(*wrong)


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_its_configurations(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    expected = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "cpu": "MULTI_CPU"}[path.stem]
    assert config.distributed_type == expected and config.num_processes >= 2
