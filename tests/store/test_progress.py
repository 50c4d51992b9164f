"""The line of a long step: what it says by a clock that the test moves, and that every step counts all of its work."""

import multiprocessing
import threading

import pytest

from f2llm.store import progress as progress_module
from f2llm.store.progress import Progress, amount_of, duration


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = [1000.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def lines(capsys):
    return lambda: capsys.readouterr().out.splitlines()


def do(progress, clock, amount, seconds):
    with progress.work(amount):
        clock[0] += seconds


def test_a_line_has_share_speed_and_time_left_at_the_mean_speed_so_far(clock, lines):
    progress = Progress("tokenise", "documents", 80_000)
    do(progress, clock, 12_000, 10)
    assert lines() == ["tokenise: 15% of 80,000 documents, 1,200 documents/s, 57 s left"]  # 68,000 / 1,200
    do(progress, clock, 8_000, 40)
    assert lines() == ["tokenise: 25% of 80,000 documents, 400 documents/s, 2 min left"]  # 60,000 / 400 = 150


def test_a_step_shorter_than_ten_seconds_prints_nothing_and_a_longer_one_a_line_every_ten(clock, lines):
    short = Progress("short", "documents", 9)
    for _ in range(9):
        do(short, clock, 1, 1)
    assert lines() == []
    long = Progress("long", "documents", 35)
    for _ in range(35):
        do(long, clock, 1, 1)
    shown = lines()
    assert [line.split(",")[0] for line in shown[:-1]] == [
        f"long: {share}% of 35 documents" for share in ("29", "57", "86")
    ]
    assert shown[-1] == "long: 35 documents in 35 s", "and a last one"


def test_a_line_is_plain_text_that_is_flushed(clock, monkeypatch):
    written = []

    class Stream:
        def write(self, text):
            written.append(text)

        def flush(self):
            written.append("FLUSHED")

    monkeypatch.setattr("sys.stdout", Stream())
    do(Progress("hash", "bytes", 4 * 2**30), clock, 2**30, 10)
    assert "".join(written) == "hash: 25% of 4.0 GiB, 102.4 MiB/s, 30 s left\nFLUSHED"


def test_what_is_not_known_is_said_to_be_unknown(clock, lines):
    do(Progress("hold out", "rows"), clock, 500, 10)
    assert lines() == ["hold out: 500 rows, 50 rows/s, time left unknown"]
    progress = Progress("assemble", "rows", 400)  # the registry counts fewer rows than the files have
    do(progress, clock, 500, 10)
    assert lines() == ["assemble: 500 rows, 50 rows/s, time left unknown"]
    assert progress.total is None
    nothing = Progress("fetch", "bytes", 2**20)
    with nothing.watch():
        clock[0] += 10
        assert nothing.line() == "fetch: 0% of 1.0 MiB, 0.0 MiB/s, time left unknown"


def test_only_work_takes_time(clock):
    """Two kinds of work that alternate, as of mining: each knows its own speed."""
    embedding, search = Progress("embedding", "texts", 100), Progress("search", "scores", 1000)
    for _ in range(2):
        do(embedding, clock, 20, 1)
        do(search, clock, 100, 4)
        clock[0] += 1000
    assert embedding.line().endswith("20 texts/s, 3 s left") and search.line().endswith("25 scores/s, 32 s left")


def test_what_an_earlier_call_did_does_not_count_as_speed(clock):
    progress = Progress("mine", "texts", 100)
    progress.skip(60)
    do(progress, clock, 10, 5)
    assert progress.line() == "mine: 25% of 40 texts, 2 texts/s, 15 s left"


def test_work_within_work_moves_the_outer_line_by_its_share_or_in_the_same_unit_as_it_is(clock, lines):
    outer = Progress("evaluate", "characters", 1000)
    with outer.work(400):
        tokens = Progress("embed", "tokens", 200)
        do(tokens, clock, 50, 10)
        assert outer.done == 100, "a quarter of 400"
        do(Progress("embed", "characters"), clock, 120, 10)
        assert outer.done == 220
        do(Progress("count", "texts"), clock, 7, 0)
        assert outer.done == 220, "a share of nothing known is none"
        do(Progress("embed", "characters"), clock, 10_000, 0)
        assert outer.done == 400, "no more than the work in hand"
    assert outer.done == 400
    assert lines() == [
        "evaluate: 10% of 1,000 characters, 10 characters/s, 90 s left".replace("90 s", "2 min"),
        "evaluate: 22% of 1,000 characters, 11 characters/s, 71 s left",
    ], "one line, of the outer"
    with outer.work(600):
        within = Progress("one model", "characters", 600)
        within.skip(100)
        do(within, clock, 500, 20)
    assert (outer.done, outer.total) == (900, 900), "what is left out within is left out of the whole"
    assert lines()[-1] == "evaluate: 900 characters in 40 s"


def test_work_that_fails_is_not_done_and_leaves_no_trace(clock, lines):
    broken = Progress("broken", "texts", 10)
    with pytest.raises(KeyboardInterrupt), broken.work(5):
        raise KeyboardInterrupt
    assert broken.done == 0
    do(Progress("next", "texts", 10), clock, 5, 10)
    assert lines() == ["next: 50% of 10 texts, 0 texts/s, 10 s left"], "it is no work within the broken one"


def test_all_processes_but_the_first_are_quiet(clock, lines):
    do(Progress("tokenise", "documents", 80, quiet=True), clock, 10, 10)
    assert lines() == []


def _add(progress, number):
    for _ in range(number):
        with progress.work(1):
            pass


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_several_processes_add_to_one_line(method, capfd, monkeypatch):
    monkeypatch.setattr(progress_module, "SECONDS", -1.0)  # a line each time, if the wrong process printed any
    progress = Progress("assemble", "rows", 600, shared=True)
    context = multiprocessing.get_context(method)
    processes = [context.Process(target=_add, args=(progress, 200)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert progress.done == 400 and capfd.readouterr().out == ""
    with progress.work(100):
        pass
    assert capfd.readouterr().out.startswith("assemble: 83% of 600 rows, "), "vacuous: nothing is ever printed"


def test_watched_work_is_measured_while_it_runs(clock, lines, monkeypatch):
    monkeypatch.setattr(progress_module, "LOOK", 0.001)
    sizes, seen = iter([2**30, 3 * 2**30]), threading.Event()

    def measure():
        size = next(sizes, 4 * 2**30)
        clock[0] += 10
        if size == 4 * 2**30:
            seen.set()
        return size

    progress = Progress("fetch", "bytes", 4 * 2**30)
    with progress.watch(measure):
        assert seen.wait(30), "nobody looked"
    shown = lines()
    assert shown[:2] == [
        "fetch: 25% of 4.0 GiB, 102.4 MiB/s, 30 s left",
        "fetch: 75% of 4.0 GiB, 153.6 MiB/s, 7 s left",
    ]
    assert shown[-1].startswith("fetch: 4.0 GiB in ") and progress.done == 4 * 2**30


def test_a_watch_ends_with_its_block_also_if_that_fails(clock, monkeypatch):
    monkeypatch.setattr(progress_module, "LOOK", 0.001)
    before = threading.active_count()
    with pytest.raises(ValueError, match="of the block"), Progress("fetch", "bytes", 1).watch(lambda: 0):
        raise ValueError("of the block")
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("number", "unit", "text"),
    [
        (12_288, "texts", "12,288 texts"),
        (31_400_000, "tokens", "31.4 million tokens"),
        (1.5 * 2**30, "bytes", "1.5 GiB"),
        (93 * 2**20, "bytes", "93.0 MiB"),
    ],
)
def test_amounts_read_well(number, unit, text):
    assert amount_of(number, unit) == text


@pytest.mark.parametrize(("seconds", "text"), [(5, "5 s"), (89, "89 s"), (720, "12 min"), (12_000, "3 h 20 min")])
def test_durations_read_well(seconds, text):
    assert duration(seconds) == text
