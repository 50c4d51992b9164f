"""Folders that are complete or not there, and a look ahead: can they be written at all?"""

import errno
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path


def require_writable(folders: list[Path], free_mib: int) -> None:
    """Raise a RuntimeError now, rather than after an hour, when a folder cannot take the results."""
    for folder in map(Path, folders):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"x")
            free = shutil.disk_usage(folder).free // 2**20
        except OSError as error:
            raise RuntimeError(
                f"cannot write into {folder}: {error.strerror or error}; nothing was run. "
                "remedy: make the folder writable, or free disk space"
            ) from error
        if free < free_mib:
            raise RuntimeError(
                f"only {free} MiB are free for {folder}, but at least {free_mib} are needed; nothing was run. "
                "remedy: free disk space"
            )


@contextmanager
def whole_folder(path: Path):
    """A folder to write into that takes the place of `path` only when the block ends without an error.

    The old folder is moved aside and removed as a whole, so nothing is ever written through a link into the
    DVC cache, and an error leaves it as it was.
    """
    path = Path(path)
    new, old = (path.with_name(f".{path.name}.{state}") for state in ("writing", "old"))
    try:
        with _clear_errors(path):
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(parents=True)
        with _clear_errors(path, under=new):
            yield new
        with _clear_errors(path):
            for file in new.rglob("*"):
                if file.is_file():
                    _flush(file)
            shutil.rmtree(old, ignore_errors=True)
            if path.exists():
                path.rename(old)
            new.rename(path)
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)


@contextmanager
def _clear_errors(path: Path, under: Path | None = None):
    """An OSError about `path` says what was to be written and what to do; one about another file passes."""
    try:
        yield
    except OSError as error:
        elsewhere = under and error.filename and not Path(str(error.filename)).is_relative_to(under)
        if elsewhere and error.errno != errno.ENOSPC:
            raise
        raise RuntimeError(
            f"cannot write {path}: {error.strerror or error}; what was there before is kept. "
            "remedy: free disk space, or make the folder writable"
        ) from error


def _flush(file: Path) -> None:
    """Force one file's bytes to the disk."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
