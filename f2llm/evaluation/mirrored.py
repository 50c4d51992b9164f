"""Data of public benchmarks, read from a mirror instead of the hub.

mteb pins a revision of each data set. A mirror that `f2llm fetch --benchmark` filled holds its files at that revision;
here a task is pointed to them. Before any score its files are hashed, and its rows are counted against the statistics
that mteb ships.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..config import root
from ..data.mirror import Mirror
from .benchmarks import EMBEDDED, leaves, tasks_of
from .library import mteb, without_progress_bars

BESIDE = {"GermanQuAD-Retrieval": ["mteb/germanquad-retrieval-qrels"]}  # a second repository, which its loader names
LOCAL = "local/"  # begins the repositories of tasks that bring their own rows


def tasks_to_score(
    names: str | Sequence[str], mirror: Path, languages: Sequence[str] = (), splits: Sequence[str] = ()
) -> list:
    """The tasks of `tasks_of`, reading their rows from a mirror. ValueError that lists what the mirror lacks."""
    tasks = tasks_of(names, languages, splits)
    asked = [names] if isinstance(names, str) else names
    require_data(
        tasks, mirror, "f2llm fetch " + " ".join(f'--benchmark "{name}"' for name in asked if name != EMBEDDED)
    )
    read_from_mirror(tasks, mirror)
    return tasks


def repositories(tasks: Sequence) -> dict[tuple[str, str | None], list]:
    """{(repository, revision): tasks} of all data sets that tasks read; revision None: mteb pins none."""
    found = {}
    for task in leaves(tasks):
        data = task.metadata.dataset
        if not data["path"].startswith(LOCAL):
            beside = [(name, None) for name in BESIDE.get(task.metadata.name, [])]
            for key in [(data["path"], data["revision"]), *beside]:
                found.setdefault(key, []).append(task)
    return found


def require_data(tasks: Sequence, mirror: Path, command: str) -> None:
    """ValueError that lists every data set which a mirror lacks, with its size as far as mteb's statistics tell it.

    Also if a file is missing or truncated, or another revision is there; command: what would fetch them.
    """
    held, missing = Mirror(mirror), []
    for (repo_id, revision), readers in repositories(tasks).items():
        try:
            held.require_all(held.folder_of(repo_id, revision), revision, command=command)
        except ValueError as error:
            absent = held.folder_of(repo_id, revision) not in held
            fault = f"{_size(readers)}, not there" if absent else str(error).partition("; remedy")[0]
            missing.append(f"{repo_id} at {revision or 'any revision'}: {fault}")
    if missing:
        lines = "\n  ".join(missing[:40]) + (f"\n  and {len(missing) - 40} more" if len(missing) > 40 else "")
        raise ValueError(
            f"mirror {mirror} lacks {len(missing)} of {len(repositories(tasks))} data sets:\n  {lines}\n"
            f"remedy: {command}, on a machine with network; the mirror folder can be copied"
        )


def _size(readers: Sequence) -> str:
    characters = sum(num_characters(task) for task in readers)
    return f"{characters / 1e6:,.1f} million characters" if characters else "size unknown"


def num_characters(task) -> int:
    """Characters of a task's texts, from mteb's statistics, for the splits and about the share of subsets it runs.

    Of the kit's own tasks, which have no statistics, as counted.
    """
    if hasattr(task, "num_characters"):
        return task.num_characters
    statistics = task.metadata.descriptive_stats or {}
    share = len(task.hf_subsets) / max(1, len(task.metadata.hf_subsets))
    total = sum(_characters_in(statistics.get(split, {})) for split in task.eval_splits)
    return round(share * total) or 1


def _characters_in(statistics: dict) -> int:
    total = statistics.get("number_of_characters")
    if total is not None:
        return total
    parts = (value for value in statistics.values() if isinstance(value, dict))
    return sum(part.get("total_text_length") or 0 for part in parts)


def read_from_mirror(tasks: Sequence, mirror: Path) -> None:
    """Make tasks read their rows from a mirror; their results still name the pinned revision.

    The files are hashed and the rows counted when a task loads. `task.data_digest` is a digest of the files' hashes.
    """
    held = Mirror(mirror)
    for task in leaves(tasks):
        data = task.metadata.dataset
        if data["path"].startswith(LOCAL):
            continue
        folder = held.folder_of(data["path"], data["revision"])
        task.metadata = task.metadata.model_copy(
            update={"dataset": {**data, "path": str(held.path.absolute() / folder)}}
        )
        parts = [folder, *BESIDE.get(task.metadata.name, [])]
        task.data_digest = _digest(held, parts)
        task.load_data = _checked_loader(task, held, parts)


def _digest(held: Mirror, folders: Sequence[str]) -> str:
    """Of the paths and contents that a manifest lists."""
    facts = [
        [str(held.path.absolute()), part, name, held.sha256(part, name)]
        for part in folders
        for name in held.names(part)
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _checked_loader(task, held: Mirror, folders: Sequence[str]):
    """The task's own loader, between a check of the files and a check of the rows."""
    load = task.load_data

    def load_data(*arguments, **keywords) -> None:
        if task.data_loaded:
            return
        for folder in folders:
            held.require_all(folder, None, command="f2llm fetch --benchmark", hashed=True)
        with _own_copies(task.data_digest), without_progress_bars():
            load(*arguments, **keywords)
        check_rows(task)

    return load_data


@contextmanager
def _own_copies(digest: str) -> Iterator[None]:
    """Without the hub, and with a folder of its own for the copies that `datasets` makes of a data set.

    `datasets` finds its copy of a local folder by the folder's name and configs alone, so that files which were changed
    would give the old rows. A folder for each digest of the files rules that out.
    """
    import datasets
    from huggingface_hub import constants

    before = datasets.config.HF_DATASETS_CACHE, datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    datasets.config.HF_DATASETS_CACHE = root() / "scratch" / "datasets" / digest
    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_DATASETS_CACHE, datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


def check_rows(task) -> None:
    """ValueError if the numbers of rows or characters of a loaded task are not those that mteb's statistics have."""
    expected = task.metadata.descriptive_stats
    whole = set(task.hf_subsets) == set(task.metadata.hf_subsets)
    if not expected or not whole:
        return
    for split in task.eval_splits:
        if split not in expected:
            continue
        with without_progress_bars():
            found = task._calculate_descriptive_statistics_from_split(
                split, compute_overall=task.metadata.is_multilingual
            )
        for key in ("num_samples", "number_of_characters", "number_texts_intersect_with_train"):
            if key in expected[split] and key in found and found[key] != expected[split][key]:
                raise ValueError(
                    f"{task.metadata.name}, split {split}: {key} is {found[key]}, but mteb {mteb().__version__} "
                    f"counted {expected[split][key]}; remedy: fetch the data set again, at the revision that mteb pins"
                )
