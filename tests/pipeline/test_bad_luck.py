"""What may come between a person and a run: each is one line that says what to do, and nothing is lost."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT

from f2llm.pipeline.notebook import require_unchanged, write_stage_code
from f2llm.store import code

LIMIT = 120  # seconds that a test waits before it gives up


@pytest.fixture
def folder(tmp_path):
    """A repository with a notebook 98_trial, whose only cell `trial` writes."""
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "notebooks").mkdir()
    return tmp_path


def trial(folder: Path, source: str) -> None:
    cells = [nbformat.v4.new_code_cell("import os, time\n\nopen('kernel', 'w').write(str(os.getpid()))\n" + source)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "notebooks" / "98_trial.ipynb")


def start(folder: Path, *words: str, before=lambda: None, **variables: str) -> subprocess.Popen:
    """python -m f2llm ... in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "f2llm", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=before,
    )


def end(process: subprocess.Popen) -> tuple[int, str]:
    """(exit code, the last line of what it says)."""
    _, error = process.communicate(timeout=LIMIT)
    assert "Traceback" not in error and "╭" not in error, error
    return process.returncode, error.splitlines()[-1]


def until(holds) -> None:
    stop = time.monotonic() + LIMIT
    while not holds():
        assert time.monotonic() < stop
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2:3] if Path("/proc").exists() else True


# A stage that is stopped ------------------------------------------------------------------------


def test_a_kernel_that_is_killed_is_one_line_with_the_likely_reason(folder):
    trial(folder, "os.kill(os.getpid(), 9)")
    status, error = end(start(folder, "run", "98_trial"))
    assert status == 1 and error.startswith("error: notebooks/98_trial.ipynb: its process was killed, mostly for lack")
    assert "remedy: the same command, which resumes" in error


@pytest.mark.parametrize("times", [1, 2])
def test_an_interrupt_ends_the_command_with_one_line_and_its_kernel(folder, times):
    trial(folder, "time.sleep(600)")
    process = start(folder, "run", "98_trial", before=partial(signal.signal, signal.SIGINT, signal.default_int_handler))
    until(lambda: (folder / "kernel").exists() and (folder / "kernel").read_text())
    for _ in range(times):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.3)
    status, said = end(process)
    assert said == "stopped; the same command resumes"
    assert status in (130, -signal.SIGINT), "a shell shows 130 for both; the second may come while Python ends"
    kernel = int((folder / "kernel").read_text())
    until(lambda: not is_alive(kernel))


# Code that is edited midway ---------------------------------------------------------------------


@pytest.fixture
def own_code(folder, monkeypatch):
    """The repository with code of its own, after stage `code`."""
    for name in ("f2llm", "notebooks"):
        shutil.copytree(ROOT / name, folder / name, dirs_exist_ok=True)
    monkeypatch.setattr(code, "PACKAGE", folder / "f2llm")
    monkeypatch.chdir(folder)
    write_stage_code(folder / "build" / "code")
    return folder


def append(path: Path, text: str) -> None:
    path.write_text(path.read_text(encoding="utf-8") + text, encoding="utf-8")


def test_prose_and_code_that_a_stage_does_not_use_may_be_edited_while_it_runs(own_code):
    append(own_code / "f2llm" / "losses.py", "\n# A comment.\n")
    append(own_code / "f2llm" / "reporting" / "figures.py", "\nANOTHER = 1\n")
    require_unchanged("04_stage1", "while it ran")


def test_code_of_a_stage_that_is_edited_before_or_while_it_runs_gives_no_result(own_code):
    append(own_code / "f2llm" / "losses.py", "\nANOTHER = 1\n")
    for notebook in (True, False):
        with pytest.raises(
            RuntimeError, match=r"the code of 04_stage1 was changed while it ran, so no .*remedy: the s"
        ):
            require_unchanged("04_stage1", "while it ran", notebook)
    require_unchanged("06_prune", "while it ran")


def test_a_notebook_counts_when_its_run_begins_and_not_after(own_code):
    path = own_code / "notebooks" / "04_stage1.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell("print(1)"))
    nbformat.write(notebook, path)
    with pytest.raises(RuntimeError, match="changed since"):
        require_unchanged("04_stage1", "since DVC looked at it")
    require_unchanged("04_stage1", "while it ran", notebook=False)


def test_a_stage_whose_code_dvc_did_not_see_is_not_run(folder):
    trial(folder, "")
    (folder / "build" / "code").mkdir(parents=True)
    (folder / "build" / "code" / "98_trial.py").write_text("# %%\nprint('another')\n")
    status, error = end(start(folder, "run", "98_trial", DVC_STAGE="trial"))
    assert status == 1 and error.startswith("error: the code of 98_trial was changed since DVC looked at it")
    assert not (folder / "kernel").exists()


# Places -----------------------------------------------------------------------------------------


def test_a_disk_that_takes_nothing_is_one_line_of_any_command(folder):
    def nothing_more() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))

    (folder / "build").mkdir()
    (folder / "data").mkdir()
    shutil.copy(ROOT / "data" / "sources.yaml", folder / "data")
    status, error = end(start(folder, "config", "nano", "build/config.yaml", before=nothing_more))
    assert status == 1 and error.startswith("error: cannot write ") and "remedy: free disk space" in error


def make(folder: Path, target: str, path: str | None = None) -> subprocess.CompletedProcess:
    shutil.copy(ROOT / "Makefile", folder)
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    (folder / ".venv").mkdir()
    (folder / ".venv" / "installed").touch()
    return subprocess.run(
        [shutil.which("make"), "--no-print-directory", target],
        cwd=folder,
        env={**os.environ, "PATH": path or os.environ["PATH"]},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def path_without_git(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bin")
    for name in ("sh", "bash", "test", "cat", "echo"):
        if found := shutil.which(name):
            (folder / name).symlink_to(found)
    return str(folder)


def test_without_git_make_says_so(folder, path_without_git):
    done = make(folder, "repro", path_without_git)
    assert done.returncode and "error: git is not installed, and DVC needs it; remedy: install git" in done.stdout


def test_without_git_or_outside_a_clone_experiments_are_one_line(folder, path_without_git):
    for variables, reason in (({"PATH": path_without_git}, "git is not installed"), ({}, f"{folder} is no git clone")):
        status, error = end(start(folder, "ablate", GIT_CEILING_DIRECTORIES=str(folder.parent), **variables))
        assert status == 1 and error.startswith(f"error: {reason}, but experiments are commits of a clone; nothing")


def test_a_renamed_folder_is_told_what_of_its_environment_has_the_old_name(folder):
    done = make(folder, "moved")
    assert done.returncode == 0 and done.stdout == "", "an environment that does not say where it was made"
    (folder / ".venv" / "installed").write_text("/old/f2llm kit\n")
    shutil.rmtree(moved := folder.parent / "another kit", ignore_errors=True)
    shutil.copytree(folder, moved)
    done = subprocess.run(["make", "--no-print-directory", "moved"], cwd=moved, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("note: .venv was made in /old/f2llm kit: make works here")
    (moved / ".venv" / "installed").write_text(f"{moved}\n")
    assert (
        subprocess.run(["make", "--no-print-directory", "moved"], cwd=moved, capture_output=True, text=True).stdout
        == ""
    )
