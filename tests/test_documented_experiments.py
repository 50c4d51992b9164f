"""The commands of README.md and docs/experiments.md, run as they are written, in their order, on a small copy.

A block runs line by line, from the state of the last commit. In a comment, "nothing" is a promise: no stage runs but
`code`, which always does.
"""

import json
import random
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ROOT
from helpers.kit import copy_of_repository, environment, run

pytestmark = pytest.mark.pipeline
DOCUMENTS = ["README.md", "docs/experiments.md"]

# Commands that run only up to a stage here, the first that they change or the last that they are about.
UP_TO = {
    "dvc exp run -S seed=1": "teacher",
    "dvc exp run -S recipe=v1": "stage2",
    "dvc exp run -S '++override.stage1.matryoshka_min_dim=0'": "stage1",
    "dvc exp run -S '++override.data.from=local'": "data",
    "dvc exp run -S machine.processes=0": "stage1",
    "dvc exp run -S machine.processes=0 -S machine.shard=true": "stage1",
    "dvc exp run --temp -n longer -S '++override.stage2.max_steps=1200'": "stage2",
    "dvc exp run -S model.size=0.6B -S machine.token_budget=16384": "stage2",
    "dvc exp run -S model.size=0.6B -S '++override.training.lora.rank=16' "
    "-S '++override.training.learning_rate=1e-4'": "stage1",
    "dvc exp run -S '++override.stage2.lora.rank=16' -S '++override.stage2.lora.targets=[q_proj, v_proj]'": "stage2",
    "dvc exp run -S '++override.training.lora.rank=16' -S '++override.training.lora.dora=true'": "stage1",
    "dvc exp run -S model.size=0.6B -S '++override.teacher=experiment:my-1.7B'": (
        "-S '++override.stage2.distillation_weight=1.0' teacher"  # the small 0.6B has no teacher of its own
    ),
}

# What a command says where there is no network and no mirror: one line that names the remedy.
REFUSED = {
    'f2llm fetch --benchmark "MTEB(kor, v1)" --model codefuse-ai/F2LLM-v2-80M': "put HF_HUB_OFFLINE=0 before",
    'f2llm evaluate codefuse-ai/F2LLM-v2-80M --benchmark "MTEB(kor, v1)"': "f2llm fetch --model codefuse-ai/F2LLM-v2",
    "dvc exp run -S '++override.evaluate.benchmark=\"MTEB(kor, v1)\"'": 'f2llm fetch --benchmark "MTEB(kor, v1)"',
    "f2llm fetch --set data.from=released --set 'data.only=[squad, ocgi]'": "put HF_HUB_OFFLINE=0 before",
    "dvc exp run -S '++override.data.from=released' -S '++override.data.only=[squad, ocgi]'": "ocgi.parquet is missing",
}

# Run by another test, or by .ci/run; or by nothing: here PATH is set, and there are no four machines.
ELSEWHERE = {
    "make repro": ".ci/run",
    "make test": ".ci/run",
    "make lab": "tests/pipeline/test_jupyterlab.py::test_running_editing_around_and_saving",
    "source .venv/bin/activate": "",
    "f2llm evaluate --verify": "tests/evaluation/test_verify.py::test_published_scores_of_eight_tasks",
    "f2llm fetch 0.6B": "tests/data/test_fetch.py::test_fetch_brings_the_backbone_and_the_teacher",
    "f2llm fetch 0.6B --recipe v1": "tests/data/test_fetch.py::test_fetch_brings_the_backbone_and_the_teacher",
    "f2llm ablate": "tests/pipeline/test_ablations.py::test_after_a_kill_and_a_failure_the_same_call",
    "sbatch configs/slurm.sbatch stage1": "tests/pipeline/test_several_machines.py::test_the_slurm_script_trains",
    "python -m torch.distributed.run --nnodes=4 --rdzv-id=f2llm --rdzv-backend=c10d "
    "--rdzv-endpoint=FIRST_MACHINE:29500 --nproc-per-node=8 -m f2llm.pipeline.train_stage stage1": "",
}


def blocks_of(path: Path) -> list[list[str]]:
    """The fenced blocks of commands, continued lines joined."""
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    return [[re.sub(r" {2,}(?!#)", " ", line) for line in block.splitlines() if line.strip()] for block in blocks]


BLOCKS = [(name, lines) for name in DOCUMENTS for lines in blocks_of(ROOT / name)]


def parts_of(line: str) -> tuple[str, str]:
    """(command, comment)"""
    command, _, comment = re.sub(r"\s+# ", "\0", line).partition("\0")
    return command.strip(), comment


def shrink(params: dict) -> None:
    """The default as a model of a few thousand parameters that trains for eight steps on local data."""
    nano = params["sizes"]["nano"]
    nano["backbone"] |= {"vocab_size": 600, "hidden_size": 32, "intermediate_size": 64, "head_dim": 8}
    nano["data"] |= {"from": "local"}
    nano["training"] |= {"max_steps": 8, "global_batch_size": 16, "validate_every": 4, "warmup_steps": 2}
    nano["v2"]["stage2"] |= {"max_steps": 8, "warmup_steps": 2}
    nano["v2"]["distill"] |= {"max_steps": 4, "warmup_steps": 2}
    nano["v1"]["stage2"] |= {"max_steps": 8}
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    nano["prune"] |= {"calibration_texts": 50, "leave_out": ["femto", "atto"]}
    nano["prune"]["students"] = dict.fromkeys(("pico", "femto", "atto"), small)
    nano["evaluate"] = {"benchmark": ["tickets-held-out"], "dims": [8], "precisions": []}
    params["sizes"]["smollm2"]["data"]["from"] = "embedded"  # whose base is nano, too
    params["sizes"]["0.6B"] = {"base": "nano", "prune": {"students": dict.fromkeys(("330M", "160M", "80M"), small)}}


def write_tickets(path: Path) -> None:
    """300 pairs of made-up words, of which a query and its passage share one."""
    draw, syllables = random.Random(0), ("bado", "kilu", "menu", "pora", "site", "nal", "mer", "tol", "vis", "gan")
    words = [first + last for first in syllables for last in syllables]
    pairs = [draw.sample(words, 6) for _ in range(300)]
    rows = [
        {"query": f"{' '.join(pair[:3])} {number}", "passage": " ".join(pair[2:])} for number, pair in enumerate(pairs)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


ENTRY = """  - {name: tickets, recipes: [local], task: retrieval, files: [tickets.jsonl], licence: unknown,
     instruction: "Find the answer.", symmetric: false}
"""


@pytest.fixture(scope="module")
def kit(tmp_path_factory) -> Path:
    """The small copy after a whole run, which is committed; `origin` is a bare repository."""
    folder = tmp_path_factory.mktemp("documented") / "kit"
    copy_of_repository(folder, shrink)
    with (folder / "data" / "sources.yaml").open("a") as registry:
        registry.write(ENTRY)
    write_tickets(folder / "data" / "local" / "tickets.jsonl")
    run(folder, "dvc", "repro")
    run(folder, "git", "init", "-q", "--bare", "-b", "main", str(folder.parent / "origin.git"))
    run(folder, "git", "remote", "add", "origin", str(folder.parent / "origin.git"))
    run(folder, "git", "add", "-A")
    run(folder, "git", "commit", "-qm", "whole run")
    return folder


@pytest.mark.parametrize(("document", "lines"), BLOCKS, ids=[f"{name}: {lines[0][:40]}" for name, lines in BLOCKS])
def test_documented_commands_do_what_they_say(kit, document, lines):
    run(kit, "git", "checkout", "-q", "HEAD", "--", ".")
    run(kit, "dvc", "checkout", "-q")
    here = before = kit.parent if lines[0].startswith("git clone") else kit  # on another machine
    for command, comment in map(parts_of, lines):
        if command not in ELSEWHERE:
            output, now = perform(command, here, before, kit.parent)
            here, before = now, here if now != here else before
            if comment.startswith("nothing"):
                assert set(re.findall(r"Running stage '(\w+)'", output)) <= {"code"}, output
                assert "didn't change, skipping" in output
            check_after(command, here, output, kit)


def perform(command: str, here: Path, before: Path, around: Path) -> tuple[str, Path]:
    """Run one line in bash, as a person's shell would; its output, and the folder after it.

    before: the last folder before this one. around: what holds the kit, its remote and its other clones.
    """
    where = around / "where"
    line = f"{command} {UP_TO.get(command, '')}"
    for written, used in {
        "/srv/f2llm": around / "store",
        "ADDRESS": around / "origin.git",
        "my-1.7B": "longer",
        "my-adapter": "models/stage1/adapter",
        "--nproc-per-node=8": "--nproc-per-node=2",
        "max_steps=1200": "max_steps=10",
    }.items():
        line = line.replace(written, str(used))
    done = subprocess.run(
        ["bash", "-c", f"trap 'pwd > \"$WHERE\"' EXIT\n{line}"],
        cwd=here,
        env=environment() | {"OLDPWD": str(before), "WHERE": str(where)},
        capture_output=True,
        text=True,
    )
    output = done.stdout + done.stderr
    refused = REFUSED.get(command)
    assert (done.returncode != 0) == (refused is not None), f"{line} in {here}:\n{output}"
    if refused:
        assert len(re.findall("^error: ", output, re.MULTILINE)) == 1 and "Traceback" not in output, output
        assert refused in output, output
    return output, Path(where.read_text().strip())


def check_after(command: str, here: Path, output: str, kit: Path) -> None:
    """What a newcomer would look at next; and copies of local files, which the document asks for."""
    if command.startswith(("git clone", "cd ../second-tree")):
        shutil.copy(kit / "data" / "local" / "tickets.jsonl", here / "data" / "local")
    if command == "dvc exp run -n v1 -S recipe=v1":
        shown = run(here, "dvc", "exp", "show", "--csv", "--drop", ".*", "--keep", "Experiment|params.yaml:recipe")
        assert {",v2", "v1,v1"} <= set(shown.splitlines()), "the last commit and the experiment"
    if command.startswith("dvc queue start"):
        wait_for_queue(here)
    if command == "dvc queue logs cold":
        assert "Running stage 'stage2'" in output and "Running stage 'stage1'" not in output
    if command.startswith("git checkout HEAD ."):
        assert run(here, "git", "status", "--short") == ""
        assert "models/stage2" not in run(here, "dvc", "status", "stage2"), "its model is not there"
    if command.startswith("dvc exp diff"):
        assert "stage2.temperature" in output and "stage2.mean" in output
    if command.startswith("dvc plots diff"):
        assert "stage 2 loss" in (here / "dvc_plots" / "index.html").read_text()
    if command.startswith("dvc exp apply"):
        assert f"'{command.split()[-1]}' have been applied" in output
        assert "models/stage2" not in run(here, "dvc", "status", "stage2"), "its model is not there"


def wait_for_queue(here: Path) -> None:
    end = time.monotonic() + 600
    while (status := run(here, "dvc", "queue", "status")) and "Success" not in status:
        assert "Failed" not in status and time.monotonic() < end, status
        time.sleep(1)


def test_a_command_that_is_not_run_here_has_its_place():
    """Every exception is a command that a document has, and names a test that is there."""
    commands = {parts_of(line)[0] for _, lines in BLOCKS for line in lines}
    assert {*UP_TO, *REFUSED, *ELSEWHERE} <= commands
    for command, place in ELSEWHERE.items():
        path, _, test = place.partition("::")
        text = (ROOT / path).read_text() if path else ""
        found = f"def {test}" in text if test else not path or command.partition(" ")[2] in text
        assert found, f"{command}: {place}"
