"""The one place that downloads: `f2llm fetch` brings files of hub repositories at pinned revisions into a mirror."""

import hashlib
import json
import os
import shutil
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers

from .checkpoint import alone_in, clear_errors, sha256
from .config import Config
from .mirror import inside, matching, num_bytes, read_manifest, write_manifest


@dataclass(frozen=True)
class HubFile:
    """One file as the hub lists it; checksum: SHA-256 of an LFS file, git blob id of another, None if not listed."""

    name: str
    bytes: int
    checksum: str | None


@dataclass(frozen=True)
class Plan:
    """What `fetch` brings: files of one repository at one commit."""

    repo_id: str
    repo_type: str
    revision: str
    endpoint: str
    files: list[HubFile]
    listing: list[str]  # the names of all files at that commit

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)


def plan_fetch(
    repo_id: str, patterns: list[str], revision: str | None, repo_type: str = "dataset", endpoint: str | None = None
) -> Plan:
    """The files that match any of the names or globs ('*' also matches '/'), at the commit that `revision` means.

    A ValueError says what of the question is wrong, a RuntimeError why the hub gave no answer.
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


def models_needed(config: Config) -> list[tuple[str, list[str], str, str]]:
    """(repository, globs, commit, "model") of backbone and teacher where they come from the hub; no pickles or code."""
    backbone, (kind, _, what) = config.backbone, config.teacher.partition(":")
    names = [(backbone.name, backbone.revision)] if backbone.source == "hub" else []
    names += [tuple(what.rsplit("@", 1))] if kind == "hub" else []
    return [(repo_id, ["*.json", "*.safetensors"], revision, "model") for repo_id, revision in names]


def plan_all(needed: list[tuple], endpoint: str | None = None) -> list[Plan]:
    """A plan for each (repository, patterns, revision) of data, with "model" as a fourth of a model.

    One ValueError lists all repositories that have none.
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
    """An error of the hub, or of the way to it, becomes one line with a remedy."""
    login, again = "`hf auth login`, or set HF_TOKEN", "repeat the command later, it goes on where it stopped"
    page = f"{endpoint}/{'' if repo_type == 'model' else f'{repo_type}s/'}{repo_id}"
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise RuntimeError(
            "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids the network; remedy: put HF_HUB_OFFLINE=0 before the "
            "command, or fetch on another machine and copy the mirror folder"
        ) from error
    except GatedRepoError as error:
        raise ValueError(f"{repo_id} is gated; remedy: accept its terms at {page}, then {login}") from error
    except RevisionNotFoundError as error:
        raise ValueError(f"{repo_id} has no revision {revision!r}; remedy: take one that {page} lists") from error
    except RepositoryNotFoundError as error:
        remedy = f"correct the id, or, if it is private, {login}"
        raise ValueError(f"{endpoint} has no {repo_type} {repo_id!r}, or it is private; remedy: {remedy}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        remedy = f"correct the id, or, if it is private or gated, {login}" if status in (401, 403, 404) else again
        raise RuntimeError(f"{endpoint} answers {status} for {repo_id}; remedy: {remedy}") from error
    except json.JSONDecodeError as error:
        raise RuntimeError(f"{endpoint} does not answer as a hub; remedy: check HF_ENDPOINT and proxy") from error
    except HTTPError as error:
        raise RuntimeError(
            f"no answer from {endpoint} for {repo_id} ({type(error).__name__}: {error}); remedy: check network and "
            f"proxy, {again}; if the hub is slow, raise HF_HUB_ETAG_TIMEOUT and HF_HUB_DOWNLOAD_TIMEOUT (seconds)"
        ) from error


def fetch(plan: Plan, mirror: Path) -> None:
    """Bring the files of a plan that are not in the mirror yet, verified; may be interrupted and repeated."""
    mirror = Path(mirror)
    with alone_in(mirror, "fetch"), clear_errors(mirror):
        manifest = read_manifest(mirror)
        entry = _entry(manifest, mirror, plan.repo_id, plan.revision)
        files = [file for file in plan.files if not _present(file, entry, mirror / plan.repo_id)]
        needed = sum(file.bytes - num_bytes(_partial(mirror, plan, file)) for file in files)
        if needed > (free := shutil.disk_usage(mirror).free):
            raise RuntimeError(
                f"{needed / 2**30:.1f} GiB are to be fetched, but only {free / 2**30:.1f} GiB are free for {mirror}; "
                "nothing was fetched. remedy: free disk space, or fetch fewer files"
            )
        entry["listing"] = plan.listing
        write_manifest(mirror, manifest)
        for number, file in enumerate(files, start=1):
            print(f"{number}/{len(files)} {plan.repo_id}/{file.name}: {file.bytes / 2**20:.1f} MiB", flush=True)
            digest = _download(plan, file, mirror)
            entry["files"][file.name] = {"bytes": file.bytes, "sha256": digest}
            write_manifest(mirror, manifest)
        with suppress(OSError):
            (mirror / ".partial").rmdir()


def adopt(mirror: Path, repo_id: str, folder: Path, revision: str) -> None:
    """Register the files of a folder, but hidden ones, as those of a repository: by hard links, or copies."""
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
    """The repository's entry in the manifest, a new one if there is none; revisions are never mixed."""
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
    """Is the file there? One of which the manifest knows nothing, or something else, is hashed."""
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
    """SHA-256 of a file, '' if it is not what the hub lists."""
    digest = found = sha256(path)
    if len(file.checksum or "") == 40:  # small, as git holds it
        found = hashlib.sha1(b"blob %d\0" % file.bytes + path.read_bytes()).hexdigest()
    return digest if file.checksum in (None, found) else ""


def _download(plan: Plan, file: HubFile, mirror: Path) -> str:
    """Put one file in place, going on with what there is of it; returns its SHA-256.

    Not hf_hub_download, which starts a file anew in every process: its parts go to the same URL by ranges.
    """
    partial, path = _partial(mirror, plan, file), inside(mirror / plan.repo_id, file.name)
    url = hf_hub_url(plan.repo_id, file.name, repo_type=plan.repo_type, revision=plan.revision, endpoint=plan.endpoint)
    headers = build_hf_headers() | {"Accept-Encoding": "identity"}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.parent.mkdir(exist_ok=True)
    with _hub_errors(plan.endpoint, plan.repo_id, plan.repo_type, plan.revision), partial.open("ab") as opened:
        if opened.tell() < file.bytes:
            http_get(url, opened, resume_size=opened.tell(), headers=headers, displayed_filename=file.name)
        opened.flush()
        os.fsync(opened.fileno())
    size = num_bytes(partial)
    if size != file.bytes or not (digest := _verified(partial, file)):
        partial.unlink()
        raise RuntimeError(
            f"{plan.repo_id}/{file.name}: what came ({size} bytes) is not what the hub lists ({file.bytes} bytes, "
            f"{file.checksum}); it was removed. remedy: repeat the command; if it stays so, check proxy and HF_ENDPOINT"
        )
    partial.replace(path)
    return digest


def _partial(mirror: Path, plan: Plan, file: HubFile) -> Path:
    key = f"{plan.repo_type} {plan.repo_id} {plan.revision} {file.name}"
    return mirror / ".partial" / hashlib.sha256(key.encode()).hexdigest()[:20]
