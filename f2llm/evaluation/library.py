"""mteb, imported on first use: its import takes seconds and makes a cache folder, here scratch/mteb."""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import TextIOBase
from pathlib import Path
from typing import TextIO

from ..config import root


def mteb():
    """The library; ValueError if it is not installed."""
    with _own_cache():
        try:
            import mteb
        except ModuleNotFoundError as error:
            raise ValueError(f"{error}; remedy: pip install -e '.[eval]'") from None
    return mteb


@contextmanager
def _own_cache() -> Iterator[None]:
    """Sets mteb's cache to a folder of this repository while mteb is imported, unless MTEB_CACHE is set.

    Outside a clone it is a folder of the system for temporary files.
    """
    if "MTEB_CACHE" in os.environ:
        yield
        return
    try:
        scratch = root() / "scratch"
    except ValueError:
        scratch = Path(tempfile.gettempdir())
    os.environ["MTEB_CACHE"] = str(scratch / "mteb")  # mteb makes this folder at import
    try:
        yield
    finally:
        del os.environ["MTEB_CACHE"]


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Drops the bars of mteb and datasets, which come by the hundred, also with show_progress_bar=False."""
    with redirect_stderr(_WithoutProgressBars(sys.stderr)):
        yield


class _WithoutProgressBars(TextIOBase):
    """A stream that drops tqdm's bars.

    tqdm writes a bar as one text that begins with a carriage return, and a line break when the bar is finished.
    """

    def __init__(self, stream: TextIO):
        self.stream, self.in_bar = stream, False

    def write(self, text: str) -> int:
        self.in_bar = text.startswith("\r") or (self.in_bar and not text.strip())
        return len(text) if self.in_bar else self.stream.write(text)

    def flush(self) -> None:
        self.stream.flush()
