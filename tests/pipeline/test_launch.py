"""Training in a process of its own: its lines as they come, its error as ours, and no orphan."""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from f2llm.pipeline.launch import launch


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module where `python -m` finds it."""
    monkeypatch.chdir(tmp_path)

    def write(code: str) -> str:
        (tmp_path / "child.py").write_text(code)
        return "child"

    return write


def test_arguments_arrive_and_lines_come_back(module, capfd):
    launch(module("import sys; print('out', sys.argv[1:]); print('err', file=sys.stderr)"), "stage1", 7)
    assert set(capfd.readouterr().out.splitlines()) == {"out ['stage1', '7']", "err"}


def test_a_failure_is_an_error_that_ends_with_the_real_one(module):
    with pytest.raises(RuntimeError, match=r"child stage1 ended with exit code 1: .*ValueError: the texts are gone"):
        launch(module("print('step 1')\nraise ValueError('the texts are gone')"), "stage1")
    with pytest.raises(RuntimeError, match=r"ended with exit code 3: no output"):
        launch(module("raise SystemExit(3)"))


WAITS_FOR_AN_ANSWER = """
import os, time
print("first")
end = time.time() + 20
while not os.path.exists("answer"):
    assert time.time() < end, "nobody listened"
    time.sleep(0.01)
"""


def test_lines_are_shown_while_the_process_still_runs(module, tmp_path, monkeypatch):
    class Reader(io.StringIO):
        """Answers the first line; the child ends well only when it sees the answer."""

        def write(self, text):
            if "first" in text:
                (tmp_path / "answer").touch()
            return super().write(text)

    monkeypatch.setattr(sys, "stdout", Reader())
    launch(module(WAITS_FOR_AN_ANSWER))
    assert sys.stdout.getvalue() == "first\n"


def runs(process_id: int) -> bool:
    """Whether a process is there and not merely waiting to be collected."""
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # gone before the file is opened, or between opening and reading
        return False


def wait_until(condition, seconds=20.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


WRITES_ITS_ID_AND_SLEEPS = """
import os, time
with open("pid.part", "w") as file:
    file.write(str(os.getpid()))
os.rename("pid.part", "pid")
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent is gone")
def test_the_process_ends_when_its_parent_is_killed(module, tmp_path):
    name = module(WRITES_ITS_ID_AND_SLEEPS)
    root = str(Path(__file__).parents[2])
    code = f"import sys; sys.path.insert(0, {root!r}); from f2llm.pipeline.launch import launch; launch({name!r})"
    parent = subprocess.Popen([sys.executable, "-c", code])
    try:
        assert wait_until((tmp_path / "pid").exists)
        child = int((tmp_path / "pid").read_text())
        assert runs(child), "vacuous: it ended before its parent"
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    assert wait_until(lambda: not runs(child))


def test_freed_memory_is_kept_in_the_child_only(module, capfd):
    launch(module("import os; print(os.environ['MALLOC_TRIM_THRESHOLD_'])"))
    assert int(capfd.readouterr().out) > 2**30
    assert "MALLOC_TRIM_THRESHOLD_" not in os.environ


# Several processes ------------------------------------------------------------------------------

FAILS_ON_ONE = """
import os, time, torch
from f2llm import distributed
from f2llm.pipeline import train_stage

def run_stage(stage, config):
    distributed.start()
    with open(f"pid{distributed.rank()}", "w") as file:
        file.write(str(os.getpid()))
    distributed.barrier()
    if distributed.rank() == 1:
        raise ValueError("the texts of process one are gone")
    distributed.barrier()  # for ever: the other one will not come

train_stage.run_stage, train_stage.load_config = run_stage, lambda size: None
train_stage.main()
"""


def test_an_error_in_one_process_ends_all_within_a_minute_and_is_the_one_shown(module, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=r"exit code 1: error of process 1: the texts of process one are gone$"):
        launch(module(FAILS_ON_ONE), "stage1", nproc=2)
    assert time.monotonic() - started < 60
    processes = [int((tmp_path / f"pid{rank}").read_text()) for rank in (0, 1)]
    assert wait_until(lambda: not any(runs(process) for process in processes))


SEVERAL_THAT_SLEEP = """
import os, time
from f2llm.pipeline.launch import die_with_parent
die_with_parent()
with open("part" + os.environ["RANK"], "w") as file:
    file.write(str(os.getpid()))
os.rename("part" + os.environ["RANK"], "pid" + os.environ["RANK"])
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent is gone")
def test_several_processes_end_when_the_notebooks_kernel_is_killed(module, tmp_path):
    name, root = module(SEVERAL_THAT_SLEEP), str(Path(__file__).parents[2])
    code = (
        f"import sys; sys.path.insert(0, {root!r}); from f2llm.pipeline.launch import launch; launch({name!r}, nproc=2)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": root})
    try:
        assert wait_until(lambda: all((tmp_path / f"pid{rank}").exists() for rank in (0, 1)), seconds=60)
        processes = [int((tmp_path / f"pid{rank}").read_text()) for rank in (0, 1)]
        assert all(map(runs, processes)), "vacuous: they ended before their parent"
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    assert wait_until(lambda: not any(map(runs, processes)), seconds=60)
