"""What a training shows: the line, the time left, the files."""

import csv

import pytest

from f2llm.store import run_log as run_module
from f2llm.store.run_log import Run


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = [1000.0]
    monkeypatch.setattr(run_module.time, "monotonic", lambda: now[0])
    return now


def log(run, step, seconds=0.0, **losses):
    run.log(step, "pairs", 1e-3, 0.5, losses or {"hard_negative": 1.0, "in_batch": 2.0}, TOKENS)


TOKENS = {"tokens": 300, "padded_tokens": 1000, "cut_texts": 0}


def test_the_line_has_loss_by_part_rate_speed_padding_memory_and_time_left(clock, capsys):
    run = Run("stage9", num_steps=40, print_every=10)
    for step in range(1, 11):
        clock[0] += 2
        log(run, step)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2, "one line every ten seconds"
    assert lines[-1].startswith("stage9: step 10/40, loss 3.000 = hard_negative 1.000 + in_batch 2.000, lr 1.0e-03, ")
    assert "150 tokens/s, no padding (70% if padded), " in lines[-1]
    assert lines[-1].endswith("MiB, 60 s left")


def test_the_parts_of_the_line_add_up_when_not_every_step_has_all(clock):
    run = Run("stage9", num_steps=40, print_every=1e9)
    clock[0] += 1
    log(run, 1, hard_negative=1.0, in_batch=2.0)
    log(run, 2, hard_negative=1.0)
    assert "loss 2.000 = hard_negative 1.000 + in_batch 1.000" in run.line()


def test_time_left_counts_this_process_only(clock):
    run = Run("stage9", num_steps=100, print_every=1e9)
    run.resume(50, {"rows": [{"step": 50, "loss": 1.0}] * 50, "validation": [], "seconds": 5000.0})
    for step in range(51, 61):
        clock[0] += 3
        log(run, step)
    assert run.seconds_left() == pytest.approx(3 * 40)
    assert run.elapsed() == pytest.approx(5030)


def test_the_files_grow_with_every_step_and_are_cut_when_training_goes_on(tmp_path, capsys):
    run = Run("stage9", num_steps=9, folder=tmp_path)
    for step in (1, 2, 3):
        log(run, step)
    run.validate(2, [{"source": "pairs", "dim": 8, "loss": 1.5, "accuracy": 0.25}])
    state = {**run.state(), "rows": run.rows[:2]}
    with (tmp_path / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2", "3"] and rows[0]["tokens"] == "300"
    again = Run("stage9", num_steps=9, folder=tmp_path)
    again.resume(2, state)
    log(again, 3)
    with (tmp_path / "log.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "2", "3"]
    assert (tmp_path / "validation.csv").read_text().splitlines()[1] == "2,pairs,8,1.5,0.25"
    assert (
        "step 2, validation loss 1.500, accuracy 0.250 (mean of 1 sources at 8 dimensions)" in capsys.readouterr().out
    )


def test_all_processes_but_the_first_are_quiet(tmp_path, capsys):
    run = Run("stage9", num_steps=1, folder=tmp_path, quiet=True)
    log(run, 1)
    run.validate(1, [{"source": "pairs", "dim": 8, "loss": 1.5, "accuracy": 0.25}])
    assert capsys.readouterr().out == "" and list(tmp_path.iterdir()) == []


def test_tensorboard_that_is_not_installed_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"machine.tensorboard is true.*remedy: pip install"):
        Run("stage9", num_steps=1, folder=tmp_path, tensorboard=True)


def test_tensorboard_gets_losses_and_validation(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = Run("stage9", num_steps=2, folder=tmp_path, tensorboard=True, print_every=1e9)
    log(run, 1)
    run.validate(1, [{"source": "pairs", "dim": 8, "loss": 1.5, "accuracy": 0.25}])
    run.board.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("train/in_batch")] == [2.0]
    assert [event.value for event in events.Scalars("validation/pairs/8")] == [1.5]
