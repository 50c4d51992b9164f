"""What is done of a long step and how long the rest takes: a plain line about every ten seconds, the same everywhere.

A terminal, a log file and a notebook all show lines; a bar, which is drawn over and over, is only for a terminal.
"""

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

SECONDS = 10.0  # between two lines, and before the first: a shorter step prints nothing
LOOK = 1.0  # seconds between two looks of `watch`
ROUNDING = 1e-9  # of sums of shares

_innermost = threading.local()  # .progress: whose work this thread is in


class Progress:
    """Work that is done, of all that there is, and the time left at the mean speed so far.

    what: the step, as in "tokenise". unit: what is counted, as in "documents"; bytes are shown as MiB or GiB.
    total: how much there is in all, or None if that is not known. quiet: print nothing, as for all processes but one.
    shared: other processes add to it, too; they print nothing.

    Time counts inside `work` and `watch` only. Within the work of another Progress this one prints nothing, and what it
    adds counts there: as it is, if the unit is the same, and otherwise its share of that work.
    """

    def __init__(self, what: str, unit: str, total: float | None = None, quiet: bool = False, shared: bool = False):
        self.what, self.unit, self.all, self.quiet = what, unit, total, quiet
        # Done, and left out.
        self.counts = multiprocessing.get_context("spawn").Array("d", 2) if shared else [0.0, 0.0]
        self.seconds, self.since = 0.0, None  # of work that has ended; when the work in hand began
        self.in_hand, self.of_it_done = 0.0, 0.0  # the work in hand, and what of it was added already
        self.outer, self.printed, self.watched, self.process = None, 0.0, False, os.getpid()

    @property
    def done(self) -> float:
        """Units that are done."""
        return self.counts[0]

    @property
    def total(self) -> float | None:
        """Units in all, without those left out; None if that is not known, or turns out to be wrong."""
        total = None if self.all is None else self.all - self.counts[1]
        return total if total and self.done <= total * (1 + ROUNDING) else None

    @contextmanager
    def work(self, amount: float) -> Iterator[None]:
        """The block does `amount` units, which count as done at its end, or as they are added within it."""
        with self._clock():
            self.in_hand, self.of_it_done = amount, 0.0
            yield
            rest = self.in_hand - self.of_it_done
            self.in_hand = 0.0
            self.add(rest)

    def add(self, amount: float) -> None:
        """Count `amount` units as done, and print the line if it is time."""
        if self.in_hand:
            amount = min(amount, self.in_hand - self.of_it_done)
            self.of_it_done += amount
        total = self.total
        self._count(0, amount)
        if self.outer is None:
            if not self.watched:
                self._print_if_due(ended=self._is_whole())
        elif self.outer.unit == self.unit:
            self.outer.add(amount)
        elif total:
            self.outer.add(self.outer.in_hand * amount / total)

    def skip(self, amount: float) -> None:
        """Leave out `amount` units that turn out to be done already: they say nothing about the speed."""
        self._count(1, amount)
        outer = getattr(_innermost, "progress", None)
        if outer not in (None, self) and outer.unit == self.unit:
            outer.in_hand -= amount
            outer.skip(amount)

    @contextmanager
    def watch(self, measure: Callable[[], float] | None = None) -> Iterator[None]:
        """Print the line while the block runs, whoever does the work.

        measure: how many units of it are done, asked once a second, for work that adds nothing by itself.
        """
        before, stop = self.done, threading.Event()

        def look() -> None:
            if measure:
                self.counts[0] = before + measure()

        def look_again_and_again() -> None:
            while not stop.wait(LOOK):
                look()
                self._print_if_due()

        thread, self.watched = threading.Thread(target=look_again_and_again, daemon=True), True
        with self._clock():
            thread.start()
            try:
                yield
            finally:
                stop.set()
                thread.join()
                self.watched = False
            look()
            self._print_if_due(ended=self.all is None or self._is_whole())

    def elapsed(self) -> float:
        """Seconds of work so far."""
        return self.seconds + (time.monotonic() - self.since if self.since is not None else 0)

    def line(self, ended: bool = False) -> str:
        """What the log gets; ended: of all that was done."""
        seconds, done, total = self.elapsed(), self.done, self.total
        if ended:
            return f"{self.what}: {amount_of(done, self.unit)} in {duration(seconds)}"
        speed = f"{amount_of(done / seconds, self.unit)}/s"
        if total is None:
            return f"{self.what}: {amount_of(done, self.unit)}, {speed}, time left unknown"
        left = f"{duration(seconds / done * max(0, total - done))} left" if done else "time left unknown"
        return f"{self.what}: {done / total:.0%} of {amount_of(total, self.unit)}, {speed}, {left}"

    def _is_whole(self) -> bool:
        return self.total is not None and self.done >= self.total * (1 - ROUNDING)

    def _count(self, place: int, amount: float) -> None:
        with nullcontext() if isinstance(self.counts, list) else self.counts.get_lock():
            self.counts[place] += amount

    @contextmanager
    def _clock(self) -> Iterator[None]:
        """Inside the block time counts, and what other Progress adds counts for this one."""
        before, running = getattr(_innermost, "progress", None), self.since is not None  # work within `watch`
        if not running:
            self.outer, self.since = before, time.monotonic()
        _innermost.progress = self
        try:
            yield
        finally:
            _innermost.progress, self.in_hand = before, 0.0
            if not running:
                self.seconds, self.since = self.elapsed(), None

    def _print_if_due(self, ended: bool = False) -> None:
        elapsed = self.elapsed()
        due = self.printed if ended else elapsed - self.printed >= SECONDS
        if due and not (self.quiet or self.outer) and os.getpid() == self.process:
            self.printed = elapsed
            print(self.line(ended), flush=True)


def amount_of(number: float, unit: str) -> str:
    """'12,288 documents', '31.4 million tokens', '1.2 GiB', '93.0 MiB'."""
    if unit == "bytes":
        return f"{number / 2**30:,.1f} GiB" if number >= 2**30 else f"{number / 2**20:,.1f} MiB"
    return f"{number / 1e6:,.1f} million {unit}" if number >= 1e7 else f"{number:,.0f} {unit}"


def duration(seconds: float) -> str:
    """'45 s', '12 min', '3 h 20 min'."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
