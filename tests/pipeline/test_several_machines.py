"""Files for several GPUs and machines: the Slurm script, the lines in the documents."""

import importlib.util
import re
import subprocess

import pytest
from conftest import ROOT

SCRIPT = ROOT / "configs" / "slurm.sbatch"
DOCUMENTS = ["README.md", "docs/experiments.md", "configs/slurm.sbatch"]
FAKE = """#!/bin/bash
name=$(basename "$0")
echo "$name $*" >> calls
[ "$name" != scontrol ] || seq -f 'node%g' 7 20000
[ "$name" != srun ] || exit "${FAILS:-0}"
"""


@pytest.fixture
def submit(tmp_path):
    """Run the script with stand-ins for Slurm and Python: (its exit code and output, how they were called)."""
    (tmp_path / "bin").mkdir()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for path in ("bin/scontrol", "bin/srun", ".venv/bin/python"):
        (tmp_path / path).write_text(FAKE)
        (tmp_path / path).chmod(0o755)

    def run(*arguments, **variables):
        slurm = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "42"} | variables
        environment = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"} | slurm
        done = subprocess.run(
            ["bash", SCRIPT, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        calls = tmp_path / "calls"
        return done, calls.read_text().splitlines() if calls.exists() else []

    return run


def test_the_slurm_script_is_valid_bash_and_asks_for_what_it_uses():
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    text = SCRIPT.read_text()
    assert text.startswith("#!/bin/bash\n")
    asked = re.findall(r"^#SBATCH --([a-z-]+)", text, flags=re.MULTILINE)
    assert {"nodes", "gpus-per-node", "ntasks-per-node", "time", "requeue"} <= set(asked)
    first_command = text.index("\nset -euo pipefail\n")
    assert text.rindex("\n#SBATCH") < first_command, "sbatch reads no options after the first command"


def test_the_slurm_script_trains_on_all_nodes_and_then_records(submit):
    done, calls = submit("stage2", SLURM_GPUS_ON_NODE="8")
    assert done.returncode == 0, done.stderr
    asked, trained, recorded = calls
    assert asked == "scontrol show hostnames node[7-8]"
    assert "python -m torch.distributed.run --nnodes=2 --nproc-per-node=8 --rdzv-id=42" in trained
    assert trained.endswith("--rdzv-endpoint=node7:29500 -m f2llm.pipeline.train_stage stage2")
    assert recorded == "python -m dvc repro --single-item stage2"


def test_a_training_that_fails_is_not_recorded(submit):
    done, calls = submit("stage1", SLURM_GPUS_ON_NODE="8", FAILS="3")
    assert done.returncode == 3 and [call.split()[0] for call in calls] == ["scontrol", "srun"]


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        ([], {"SLURM_GPUS_ON_NODE": "8"}, "name a training stage, as in: sbatch"),
        (["stage1"], {}, "Slurm gave no GPU; ask for some with --gpus-per-node"),
    ],
)
def test_a_missing_stage_or_gpu_is_an_error_before_anything_runs(submit, arguments, variables, message):
    done, calls = submit(*arguments, **variables)
    assert done.returncode and message in done.stderr and not calls


def test_every_module_that_the_documents_start_exists():
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in DOCUMENTS}
    started = {module for text in texts.values() for module in re.findall(r"-m (f2llm[.\w]*)", text)}
    assert started == {"f2llm.pipeline.train_stage"}
    assert all(importlib.util.find_spec(module) for module in started)


def test_every_verb_that_the_documents_name_exists():
    from f2llm.pipeline.cli import app

    verbs = {command.callback.__name__ for command in app.registered_commands}
    documents = ("README.md", "docs/experiments.md", "docs/ablations.md", "data/README.md")
    text = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in documents)
    named = set(re.findall(r"(?:^|`)f2llm ([a-z]+)", text, flags=re.MULTILINE))
    assert {"sizes", "config", "fetch", "check", "ablate", "readme"} <= named <= verbs
