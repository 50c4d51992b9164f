"""A mirror: files of hub repositories at pinned revisions, in a folder that `f2llm fetch` fills.

All code that uses published data reads a mirror, never the hub; a mirror can be copied to another place. It holds
    manifest.json        {repository: {"revision": sha, "files": {name: {"bytes": n, "sha256": hex}}}}, and, where it
                         was fetched, "listing": the names of all files at that commit, fetched or not
    <repository>/<name>  the files

While a fetch runs, <repository>/.cache/huggingface holds its unfinished files. That folder is removed when the fetch
ends, or by the next fetch if this one is killed. Only files that the manifest lists are read and verified.
"""

import json
import re
from fnmatch import fnmatchcase
from pathlib import Path, PureWindowsPath

from ..store.files import sha256, whole_file
from ..store.progress import Progress


def write_manifest(mirror: Path, manifest: dict) -> None:
    """Write manifest.json atomically: completely or not at all."""
    with whole_file(mirror / "manifest.json") as new, new.open("w", encoding="utf-8") as opened:
        json.dump(manifest, opened, ensure_ascii=False, indent=1, sort_keys=True)


def read_manifest(mirror: Path) -> dict[str, dict]:
    """The manifest of a mirror, checked; {} if there is none."""
    path = Path(mirror) / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        for repo_id, entry in manifest.items():
            inside(path.parent, repo_id)
            if not isinstance(entry["revision"], str):
                raise ValueError(f"the revision of {repo_id} is no text")
            for name in (*entry["files"], *entry.get("listing", [])):
                inside(path.parent / repo_id, name)
            for name, fact in entry["files"].items():
                if not (isinstance(fact["bytes"], int) and re.fullmatch("[0-9a-f]{64}", fact["sha256"])):
                    raise ValueError(f"{name} of {repo_id} has no bytes and sha256")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} is not the manifest of a mirror ({type(error).__name__}: {error}); remedy: remove it and fetch "
            "again, files that are there whole are kept"
        ) from error
    return manifest


class Mirror:
    """Read access to a mirror; nothing is downloaded or written."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self._manifest = read_manifest(self.path)

    def __contains__(self, repo_id: str) -> bool:
        return repo_id in self._manifest

    def folder_of(self, repo_id: str, revision: str | None) -> str:
        """The name under which a repository is kept at a revision; its own, unless a second revision is kept beside."""
        beside = f"{repo_id}@{revision}"
        return beside if beside in self._manifest else repo_id

    def require(
        self, repo_id: str, patterns: list[str], *, command: str, revision: str | None = None, hashed: bool = False
    ) -> list[Path]:
        """Sorted paths of all files of a repository that match the names or globs.

        ValueError if any of them is missing, truncated or of another revision; it names `command`, which fetches them.
        hashed: also if its content differs from what was fetched; reads every byte.
        """
        entry = self._manifest.get(repo_id, {"revision": revision, "files": {}})
        if revision not in (None, entry["revision"]):
            raise ValueError(
                f"mirror {self.path} holds {repo_id} at revision {entry['revision']}, but {revision} is asked for; "
                f"remedy: another mirror folder, or ask for the other revision, or remove {self.path / repo_id} "
                f"and run: {command}"
            )
        paths, names, faults = set(), {}, {}
        for pattern in patterns:
            found = matching(sorted({*entry["files"], *entry.get("listing", [])}), pattern) or [pattern]
            paths |= {self.path / repo_id / name for name in found}
            names |= dict.fromkeys(found)
        progress = Progress("hash", "bytes", sum(num_bytes(path) for path in paths))
        for name in names:
            if hashed:
                fault = self._difference(entry["files"], repo_id, name, progress)
            else:
                fault = self._fault(entry["files"], repo_id, name)
            faults |= {name: fault} if fault else {}
        if faults:
            more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
            some = ", ".join(list(faults.values())[:3])
            raise ValueError(f"mirror {self.path}, {repo_id}: {some}{more}; remedy: fetch with: {command}")
        return sorted(paths)

    def verify(self) -> list[str]:
        """One line for every file that is missing or has changed since it was fetched; reads every byte."""
        problems, entries = [], self._manifest.items()
        total = sum(num_bytes(self.path / repo_id / name) for repo_id, entry in entries for name in entry["files"])
        progress = Progress("hash", "bytes", total)
        for repo_id, entry in entries:
            for name in entry["files"]:
                fault = self._difference(entry["files"], repo_id, name, progress)
                problems += [f"{repo_id}: {fault}"] if fault else []
        return problems

    def revision(self, repo_id: str) -> str:
        """The commit of a repository that the mirror holds."""
        return self._of(repo_id)["revision"]

    def sha256(self, repo_id: str, name: str) -> str:
        """SHA-256 of one file, from the manifest."""
        if name not in (facts := self._of(repo_id)["files"]):
            raise ValueError(f"mirror {self.path}, {repo_id}: {name} is missing; remedy: f2llm fetch")
        return facts[name]["sha256"]

    def _of(self, repo_id: str) -> dict:
        if repo_id not in self._manifest:
            held = ", ".join(sorted(self._manifest)) or "nothing"
            raise ValueError(f"mirror {self.path} has no {repo_id}, it holds {held}; remedy: f2llm fetch")
        return self._manifest[repo_id]

    def names(self, repo_id: str) -> list[str]:
        """The files that were fetched; what lies in the folder besides is not read."""
        return sorted(self._manifest.get(repo_id, {"files": {}})["files"])

    def require_all(self, repo_id: str, revision: str | None, *, command: str, hashed: bool = False) -> None:
        """As `require`, of every data file that the hub listed at the commit, or that was adopted."""
        entry = self._manifest.get(repo_id, {"files": {}})
        names = data_files(sorted({*entry["files"], *entry.get("listing", [])})) or ["README.md"]
        self.require(repo_id, names, command=command, revision=revision, hashed=hashed)

    def lists(self, repo_id: str, name: str) -> bool:
        """Whether a file was fetched."""
        return name in self.names(repo_id)

    def _difference(self, files: dict, repo_id: str, name: str, progress: Progress) -> str:
        """What is wrong with a file, its content included."""
        path = self.path / repo_id / name
        if fault := self._fault(files, repo_id, name):
            return fault
        with progress.work(num_bytes(path)):
            same = sha256(path) == files[name]["sha256"]
        return "" if same else f"{name} was changed: remove {path} and fetch again"

    def _fault(self, files: dict, repo_id: str, name: str) -> str:
        path = self.path / repo_id / name
        if name not in files and path.is_file():
            return f"{name} is there, but manifest.json does not list it"
        if name not in files or not path.is_file():
            return f"{name} is missing"
        if num_bytes(path) != (expected := files[name]["bytes"]):
            return f"{name} has {num_bytes(path)} bytes, not {expected}: truncated or changed, fetch again"
        return ""


def num_bytes(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def inside(folder: Path, name: str) -> Path:
    """folder/name; ValueError if that could be outside the folder on any operating system."""
    path = PureWindowsPath(name)  # takes both kinds of slashes, and knows drives
    if not name or path.anchor or ".." in path.parts:
        raise ValueError(
            f"the name {name!r} could leave {folder}, nothing was written; remedy: leave it out of the patterns"
        )
    return folder / name


def data_files(names) -> list[str]:
    """Of all files of a data set, those that are data or describe it: no code, nothing hidden."""
    return [name for name in names if not name.endswith(".py") and not name.startswith(".")]


def matching(names, pattern: str) -> list[str]:
    return [name for name in names if name == pattern or fnmatchcase(name, pattern)]
