"""DVC on a copy of the repository: the traps that would restore, retrain or lose the wrong thing."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from helpers.kit import copy_of_repository, run
from transformers import Qwen3Config, Qwen3Model

from f2llm.embedded.backbone import train_tokenizer
from f2llm.model import Embedder

STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
pytestmark = pytest.mark.pipeline
# Two more sizes: small enough to train in seconds, and one whose name has a dot, as the published ones do.
TINY = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 600}
STUDENTS = {
    "pico": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1},
    "femto": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1},
}
HIDDEN_SIZES = {"0.1B": 32, "0.2B": 48}
SMALL = {"base": "nano", "prune": {"students": STUDENTS, "leave_out": ["atto"]}, "evaluate": {"dims": [8]}}


def write_teacher(folder: Path, hidden_size: int) -> None:
    """A tiny random model; without the files of sentence-transformers, whose import takes seconds in every stage."""
    tokenizer = train_tokenizer(["a teacher of its own"], vocab=300)
    shape = {"hidden_size": hidden_size, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = Qwen3Model(Qwen3Config(vocab_size=len(tokenizer), num_key_value_heads=2, head_dim=8, **shape))
    Embedder(model, tokenizer, max_tokens=16).save(folder)
    (folder / "modules.json").unlink()


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The working tree's tracked and new files as a fresh repository, in a folder with a space in its name."""
    folder = tmp_path_factory.mktemp("a folder") / "f2llm kit"
    for size, hidden_size in HIDDEN_SIZES.items():  # each with a teacher of its own, whose stage takes a second
        write_teacher(folder / "teachers" / size, hidden_size)

    def add_sizes(params: dict) -> None:
        for size, hidden_size in HIDDEN_SIZES.items():
            taught = {"teacher": f"folder:teachers/{size}", "stage2": {"distillation_weight": 1.0}}
            params["sizes"][size] = SMALL | taught | {"backbone": TINY | {"hidden_size": hidden_size}}

    copy_of_repository(folder, add_sizes)
    return folder


def resolved(folder: Path) -> dict:
    return yaml.safe_load((folder / "build" / "config.yaml").read_text())


def hidden_size_of_teacher(folder: Path) -> int:
    return json.loads((folder / "models" / "teacher" / "config.json").read_text())["hidden_size"]


def test_changing_the_size_never_restores_another_sizes_output(copy):
    hidden = []
    for size in ("0.1B", "0.2B", "0.1B"):
        run(copy, "dvc", "exp", "run", "-S", f"model.size={size}", "teacher")
        assert resolved(copy)["name"] == size
        hidden.append(hidden_size_of_teacher(copy))
    assert hidden == [32, 48, 32]


def test_returning_to_a_size_takes_its_output_from_the_cache(copy):
    run(copy, "dvc", "exp", "run", "-S", "model.size=0.2B", "teacher")
    assert hidden_size_of_teacher(copy) == 48
    output = run(copy, "dvc", "exp", "run", "-S", "model.size=0.1B", "teacher")
    assert "Stage 'teacher' is cached - skipping run" in output
    assert hidden_size_of_teacher(copy) == 32


@pytest.mark.parametrize("where", [["--temp"], ["--queue"]], ids=["temp", "queue"])
def test_size_and_seed_can_be_set_outside_the_workspace(copy, where):
    name = f"outside{where[0].strip('-')}"
    run(copy, "dvc", "exp", "run", *where, "-n", name, "-S", "model.size=0.2B", "-S", "seed=5", "config")
    if where == ["--queue"]:
        run(copy, "dvc", "exp", "run", "--run-all", "-j", "1")
    refs = run(copy, "git", "for-each-ref", "--format=%(refname)", "refs/exps").split()
    (ref,) = [ref for ref in refs if ref.endswith(f"/{name}")]
    lock = yaml.safe_load(run(copy, "git", "show", f"{ref}:dvc.lock"))["stages"]["config"]
    assert lock["params"]["params.yaml"]["model.size"] == "0.2B"
    assert lock["params"]["params.yaml"]["seed"] == 5
    assert "0.2B" in lock["cmd"]


def stale(folder: Path) -> set[str]:
    """Stages of which a dependency or a parameter differs from dvc.lock; outputs that were never made do not count."""
    status = json.loads(run(folder, "dvc", "status", "--json"))
    changes = ("changed deps", "changed command")
    return {stage for stage, facts in status.items() if any(key in fact for fact in facts for key in changes)}


def reword(folder: Path) -> None:
    """Other prose, outputs and counts in every notebook; other comments and docstrings in a module of every wing."""
    for path in (folder / "notebooks").glob("*.ipynb"):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        notebook["cells"][0]["source"] = ["# Reworded"]
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                cell |= {"execution_count": 3, "outputs": [{"output_type": "stream", "name": "stdout", "text": "x"}]}
        path.write_text(json.dumps(notebook))
    for path in (folder / "f2llm").rglob("*.py"):
        lines = path.read_text(encoding="utf-8").splitlines()
        lines[0] = lines[0].replace('"""', '"""Reworded. ', 1)
        path.write_text("\n".join([*lines, "", "# A comment.", ""]), encoding="utf-8")


def test_running_or_rewording_a_notebook_or_a_docstring_reruns_the_code_stage_alone(copy):
    run(copy, "dvc", "repro", "code")
    before = {path.name: path.read_bytes() for path in (copy / "build" / "code").glob("*.py")}
    assert len(before) == 11
    reword(copy)
    assert "code" in stale(copy)
    output = run(copy, "dvc", "repro", "teacher")
    assert "Running stage 'code'" in output and "Stage 'teacher' didn't change, skipping" in output
    assert {path.name: path.read_bytes() for path in (copy / "build" / "code").glob("*.py")} == before
    run(copy, "git", "checkout", "--", "notebooks", "f2llm")


USERS = {  # a module whose code changes: the stages that run again
    "f2llm/prune.py": {"06_prune"},
    "f2llm/losses.py": {"04_stage1", "05_stage2", "07_distill"},
    "f2llm/mining/search.py": {"03_mine", "08_evaluate"},
    "f2llm/data/mirror.py": {"02_backbone", "01_data", "08_evaluate", "teacher"},
    "f2llm/reporting/figures.py": {"09_report", "10_ablations"},
    "f2llm/config.py": set(),
    "f2llm/pipeline/cli.py": set(),
}


@pytest.mark.parametrize("module", USERS)
def test_changed_code_changes_exactly_the_stages_that_use_it(copy, module):
    run(copy, "dvc", "repro", "code")
    folder, path = copy / "build" / "code", copy / module
    before, source = {code.name: code.read_bytes() for code in folder.glob("*.py")}, path.read_text(encoding="utf-8")
    path.write_text(source + "\n\nANOTHER = 1\n", encoding="utf-8")
    run(copy, sys.executable, "-m", "f2llm", "code", "build/code")
    path.write_text(source, encoding="utf-8")
    changed = {code.stem for code in folder.glob("*.py") if code.read_bytes() != before[code.name]}
    run(copy, "dvc", "repro", "--force", "--single-item", "code")
    assert changed == USERS[module]


def test_git_ignores_every_output_by_hand():
    """A failed `dvc repro` takes back the lines that it would write itself; `git add -A` must still be safe."""
    outs = [
        path
        for stage in STAGES.values()
        for out in stage.get("outs", [])
        for path in ([out] if isinstance(out, str) else out)
    ]
    assert len(outs) > 20, "vacuous: no outputs found"
    for out in outs:
        run(ROOT, "git", "check-ignore", "-q", out)
        assert not run(ROOT, "git", "ls-files", out), f"{out} is an output and must not be in git"


def test_no_stage_persists_or_tracks_a_key_that_dvc_ignores():
    """persist: true trains on from another run's output; keys named size or nfiles are left out of the run cache."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    text = (ROOT / "dvc.yaml").read_text()
    assert "persist: true" not in text and "frozen" not in text
    tracked = STAGES["config"]["params"]
    assert "model.size" in tracked and "model" not in tracked
    assert "${model.size}" in STAGES["config"]["cmd"]

    def keys(value):
        return {key for item in value.values() for key in keys(item)} | set(value) if isinstance(value, dict) else set()

    for name in set(tracked) - {"model.size"}:
        assert not keys(params[name]) & {"size", "nfiles"}


def test_uncached_outputs_are_metrics_and_plots_only():
    """`cache: false` on any other output turns the run cache off for its stage: wanted for `code`, which must run."""
    for name, stage in STAGES.items():
        uncached = [out for out in stage.get("outs", []) if not isinstance(out, str)]
        assert uncached == ([{"build/inputs.json": {"cache": False}}] if name == "code" else [])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.size=nanno", "model.size is 'nanno', but params.yaml offers only: nano, smollm2, 0.6B"),
        ("+override.stage1.temprature=1", "stage1: unknown key 'temprature'; did you mean 'temperature'?"),
        ("model.size=1.7B", "this machine cannot train size 1.7B, nothing was run"),
    ],
)
def test_a_mistake_is_one_line_of_the_first_stage_that_says_how_to_get_params_yaml_back(copy, setting, message):
    output = run(copy, "dvc", "exp", "run", "-S", setting, "backbone", check=False)
    (line,) = (line for line in output.splitlines() if line.startswith("error: "))
    assert message in line and line.endswith("git checkout params.yaml takes its values back")
    assert "Traceback" not in output
    started = [line for line in output.splitlines() if line.startswith("Running stage")]
    assert started == ["Running stage 'config':"]
    run(copy, "git", "checkout", "--", "params.yaml")


EXPERIMENTS = {  # settings, and what they must do to (temperature, weight_decay) of all trainings after the edit
    "a preset": (["recipes.v2.training.weight_decay=0.03"], (0.07, 0.03)),
    "recipe and override": (["recipe=v2", "++override.training.weight_decay=0.03"], (0.07, 0.03)),
    "override twice": (["++override.stage1.epochs=1", "++override.training.weight_decay=0.02"], (0.07, 0.02)),
}


@pytest.mark.parametrize("case", EXPERIMENTS)
def test_a_shared_value_edited_after_an_experiment_still_reaches_all_trainings(copy, case):
    """An experiment rewrites params.yaml, and DVC writes out as copies what YAML states by anchors and merge keys."""
    path = copy / "params.yaml"
    kept = path.read_bytes()
    path.write_bytes((ROOT / "params.yaml").read_bytes())
    settings, expected = EXPERIMENTS[case]
    for _ in range(2):  # the same command works twice
        run(copy, "dvc", "exp", "run", *(word for setting in settings for word in ("-S", setting)), "config")
    text = path.read_text(encoding="utf-8")
    assert text != (ROOT / "params.yaml").read_text(encoding="utf-8") and text.count("temperature: 0.05") == 1
    path.write_text(text.replace("temperature: 0.05", "temperature: 0.07"), encoding="utf-8")
    run(copy, "dvc", "repro", "config")
    config = resolved(copy)
    trainings = [config["stage1"], config["stage2"], *config["distill"].values()]
    assert [(each["temperature"], each["weight_decay"]) for each in trainings] == [expected] * 5
    path.write_bytes(kept)


# Scores and the inputs that they belong to ------------------------------------------------------

SCORES = ["results/metrics.json", "results/scores.csv", "results/dims.csv", "results/languages.csv"]


@pytest.fixture(scope="module")
def evaluated(copy) -> Path:
    """The copy with committed scores that belong to its inputs, as after a whole run."""
    run(copy, "git", "checkout", "-q", "HEAD", "--", ".")
    run(copy, "dvc", "exp", "run", "-S", "model.size=0.1B", "teacher")
    run(copy, "git", "checkout", "-q", "HEAD", "--", "results")
    run(copy, "git", "add", "-A")
    run(copy, "git", "commit", "-qm", "as after a whole run")
    return copy


def scores_shown(folder: Path) -> dict[str, str]:
    """{experiment: its mean score of stage 2} as `dvc exp show` has it; '!' or '' where there is none."""
    shown = run(folder, "dvc", "exp", "show", "--csv", "--drop", ".*", "--keep", r"Experiment|.*stage2\.mean")
    rows = [line.split(",") for line in shown.splitlines()]
    assert rows[0] == ["Experiment", "stage2.mean"]
    return {name: score for name, score, *_ in rows[1:]}


def score_at(folder: Path, reference: str) -> bool:
    """Whether the commit of an experiment holds any scores."""
    refs = run(folder, "git", "for-each-ref", "--format=%(refname)", "refs/exps").split()
    (ref,) = [ref for ref in refs if ref.endswith(f"/{reference}")]
    return bool(set(SCORES) & set(run(folder, "git", "ls-tree", "-r", "--name-only", ref).splitlines()))


def test_a_partial_experiment_shows_no_score_of_another_run(evaluated):
    stated = json.loads((evaluated / "results" / "metrics.json").read_text())["stage2"]["mean"]
    run(evaluated, "dvc", "exp", "run", "-n", "unchanged", "teacher")
    for number, name in enumerate(("first", "again")):  # the second is restored from the run cache, but for stage code
        run(evaluated, "dvc", "exp", "run", "-n", name, "-S", "seed=21", "teacher")
        assert not [path for path in SCORES if (evaluated / path).exists()], number
        run(evaluated, "git", "checkout", "-q", "HEAD", "--", ".")
    run(evaluated, "dvc", "exp", "run", "--temp", "-n", "outside", "-S", "seed=22", "teacher")
    run(evaluated, "dvc", "exp", "run", "--queue", "-n", "queued", "-S", "seed=23", "teacher")
    run(evaluated, "dvc", "exp", "run", "--run-all", "-j", "1")
    assert all((evaluated / path).exists() for path in SCORES), "an experiment elsewhere leaves the work tree alone"
    shown = scores_shown(evaluated)
    assert float(shown["unchanged"]) == pytest.approx(stated, abs=1e-4), "vacuous: no score is shown at all"
    assert {shown[name] for name in ("first", "again", "outside", "queued")} <= {"", "!", "-"}
    assert [score_at(evaluated, name) for name in ("unchanged", "again", "outside", "queued")] == [True] + [False] * 3


def test_changed_code_or_registry_takes_scores_away_and_prose_or_speed_does_not(evaluated):
    changes = {  # file: (from, to, whether scores are of other inputs afterwards)
        "f2llm/losses.py": ('"""', '"""Another docstring. ', False),
        "f2llm/step.py": ("import torch\n", "import torch\n\nANOTHER = 1\n", True),
        "f2llm/reporting/figures.py": ('"""', '"""Another docstring. ', False),
        "notebooks/09_report.ipynb": ("config = boot(size)", "config = boot(size)  # and so on", False),
        "params.yaml": ("threads: 1 ", "threads: 2 ", False),
        "data/sources.yaml": ("title: UNPC", "title: The UN", False),
    }
    for name, (old, new, others) in changes.items():
        path = evaluated / name
        text = path.read_text(encoding="utf-8")
        changed = text.replace(old, new, 1) if name != "params.yaml" else text.replace("threads: 1", "threads: 2", 1)
        assert changed != text, f"vacuous: {name} was not changed"
        path.write_text(changed, encoding="utf-8")
        run(evaluated, "dvc", "repro", "code")
        assert [(evaluated / path).exists() for path in SCORES] == [not others] * len(SCORES), name
        run(evaluated, "git", "checkout", "-q", "HEAD", "--", ".")
        run(evaluated, "dvc", "repro", "-q", "code")
        run(evaluated, "git", "checkout", "-q", "HEAD", "--", "results")


ENTRY = """  - {name: mine, recipes: [local], task: retrieval, files: [mine.jsonl], licence: unknown,
     instruction: "Find it.", symmetric: false}
"""


@pytest.mark.parametrize("where", [["--temp"], ["--queue"], []], ids=["temp", "queue", "workspace"])
def test_local_files_travel_into_an_experiment(evaluated, where):
    registry, local = evaluated / "data" / "sources.yaml", evaluated / "data" / "local" / "mine.jsonl"
    kept = registry.read_bytes()
    registry.write_bytes(kept + ENTRY.encode())
    local.write_text('{"query": "where?", "passage": "here"}\n')
    name = f"local-{(where or ['workspace'])[0].strip('-')}"
    output = run(evaluated, "dvc", "exp", "run", *where, "-n", name, "-S", "++override.data.from=local", "code")
    if where == ["--queue"]:
        run(evaluated, "dvc", "exp", "run", "--run-all", "-j", "1")
    refs = run(evaluated, "git", "for-each-ref", "--format=%(refname)", "refs/exps").split()
    found = [ref for ref in refs if ref.endswith(f"/{name}")]
    assert found, output
    lock = yaml.safe_load(run(evaluated, "git", "show", f"{found[0]}:dvc.lock"))["stages"]["code"]
    (dependency,) = (entry for entry in lock["deps"] if entry["path"] == "data/local")
    assert dependency["nfiles"] == 2, "the file and .gitignore"
    assert "data/local/mine.jsonl" not in run(evaluated, "git", "ls-tree", "-r", "--name-only", found[0])
    local.unlink()
    output = run(evaluated, "dvc", "exp", "run", "-S", "++override.data.from=local", "code", check=False)
    assert "source 'mine': data/local/mine.jsonl missing; remedy: put the file into data/local" in output
    run(evaluated, "git", "checkout", "-q", "HEAD", "--", ".")
    registry.write_bytes(kept)


# Places -----------------------------------------------------------------------------------------


def test_a_git_worktree_runs_stages_and_experiments(evaluated, tmp_path):
    run(evaluated, "git", "worktree", "add", "-q", "--detach", str(tmp_path / "tree"), "HEAD")
    run(tmp_path / "tree", "dvc", "exp", "run", "-n", "tree", "-S", "seed=31", "teacher")
    assert resolved(tmp_path / "tree")["seed"] == 31
    run(evaluated, "git", "worktree", "remove", "--force", str(tmp_path / "tree"))


def test_a_folder_of_a_larger_repository_runs_stages(evaluated, tmp_path):
    inner = tmp_path / "large" / "kit"
    shutil.copytree(evaluated, inner, ignore=shutil.ignore_patterns(".git", "tmp", "cache", "build", "models"))
    run(tmp_path / "large", "git", "init", "-q")
    run(tmp_path / "large", "git", "add", "-A")
    run(tmp_path / "large", "git", "commit", "-qm", "large")
    run(inner, "dvc", "repro", "teacher")
    assert resolved(inner)["name"] == "0.1B"


def test_without_git_make_repro_says_so_before_it_installs_anything(tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "dvc.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    output = run(tmp_path, "make", "repro", check=False)
    assert "error: DVC needs git and a git clone" in output and "remedy: git clone the repository" in output
    assert not (tmp_path / ".venv").exists()
