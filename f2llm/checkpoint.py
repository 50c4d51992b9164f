"""Folders that are complete or not there."""

import os
import shutil
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_folder(path: Path):
    """A folder to write into that takes the place of `path` only when the block ends without an error.

    The old folder is removed as a whole, so nothing is ever written through a link into the DVC cache.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.writing")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        for file in aside.rglob("*"):
            if file.is_file():
                _flush(file)
        if path.exists():
            shutil.rmtree(path)
        aside.rename(path)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise RuntimeError(
            f"cannot write {path}: {error.strerror or error}; what was there before is kept. "
            "remedy: free disk space, or make the folder writable"
        ) from error
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _flush(file: Path) -> None:
    """Force one file's bytes to the disk."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
