"""Files and folders written whole or not at all, locks, hashes, and a check that folders can be written."""

import errno
import hashlib
import os
import re
import shutil
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM)


def require_writable(folders: list[Path], free_mib: int) -> None:
    """Raise a RuntimeError unless every folder can be written and has `free_mib` free, before any work is done."""
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
        with clear_errors(path):
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(parents=True)
        with clear_errors(path, under=new):
            yield new
        with clear_errors(path):
            for file in (*new.rglob("*"), new):
                _flush(file)
            shutil.rmtree(old, ignore_errors=True)
            if path.exists():
                path.rename(old)
            new.rename(path)
            _flush(path.parent)
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)


@contextmanager
def whole_file(path: Path):
    """A path to write to whose file takes the place of `path` only when the block ends without an error.

    It is `.name` beside `path`; its bytes are on the disk before it gets its name. What a killed process left there is
    overwritten by the next one.
    """
    path = Path(path)
    new = path.with_name(f".{path.name}")
    try:
        with clear_errors(path, under=path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield new
            _flush(new)
            new.replace(path)
            _flush(path.parent)
    finally:
        with suppress(OSError):  # the error above says what is wrong
            new.unlink(missing_ok=True)


@contextmanager
def clear_errors(path: Path, under: Path | None = None):
    """Turn an error of the disk into a RuntimeError that names `path` and the remedy; other errors pass.

    under: where the block writes; an error about a file elsewhere passes, unless the disk is full.
    """
    try:
        yield
    except Exception as error:
        number, file = _system_error(error), getattr(error, "filename", None)
        elsewhere = under and file and not Path(str(file)).is_relative_to(under)
        if number is None or (elsewhere and number != errno.ENOSPC):
            raise
        raise RuntimeError(
            f"cannot write {path}: {os.strerror(number)}; what was there before is kept. "
            "remedy: free disk space, or make the folder writable"
        ) from error


def _system_error(error: Exception) -> int | None:
    """errno of an error, None where it has none; safetensors and tokenizers have it in their message only."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found and int(found[1]) in DISK_ERRORS else None


def _flush(file: Path) -> None:
    """Force one file's bytes, or a folder's names, to the disk."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(file: Path) -> str:
    """Hash of a file, read in pieces."""
    with Path(file).open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@contextmanager
def alone_in(folder: Path, work: str = "training"):
    """A lock: no other process does this work in the folder while the block runs; it ends with the process."""
    lock = FileLock(folder / ".lock")
    try:
        with clear_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(blocking=False)
    except Timeout:
        raise RuntimeError(
            f"another {work} works in {folder}; remedy: wait for it or stop it, two would overwrite each other"
        ) from None
    try:
        yield
    finally:
        lock.release()
