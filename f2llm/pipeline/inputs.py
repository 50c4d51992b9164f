"""Inputs of a run: whether they are there, and digests of them, by which scores of other inputs are taken away.

The stage `code` writes the digests to build/inputs.json, whose hash is then in dvc.lock. DVC shows what is in results/
for every experiment, also for one that ended before evaluation; so the stage removes what was computed from other
inputs. It has an output outside DVC's cache: such a stage is never restored, but runs whenever an input has changed.
"""

import hashlib
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

from ..config import Config, read_yaml
from ..data.fetch import models_needed, packages_needed
from ..data.mirror import Mirror
from ..data.registry import LOCAL, Source, choose_sources, fetch_command, files_needed, load_registry, local_paths
from ..embedded.tasks import names_of_tasks
from ..evaluation.benchmarks import EMBEDDED
from ..evaluation.mirrored import tasks_to_score
from ..store.files import sha256, whole_file
from ..store.model_folder import is_model
from ..store.packages import path_of
from ..store.tuples import OWN

EVALUATION = "08_evaluate"  # no score depends on the notebooks after it


HUB_FILES = ["config.json", "tokenizer.json", "*.safetensors"]  # that every model of the hub has


def require_inputs(config: Config) -> None:
    """ValueError for the first thing that a configuration names and that is not there, before any stage works.

    Outputs of stages count as there, and files that `bring_local_files` will link.
    """
    sources = _sources(config)
    if config.data.source == "local":
        for source in sources:
            local_paths(source, LOCAL, _repository() / LOCAL)
    _require_in_mirror(config, sources)
    _require_folder("teacher", config.teacher)
    _require_folder("start_from", config.start_from)
    if config.data.source != "released":  # its tuples have their negatives
        _require_miner(config.mine.miner, config.data.source)
    for package in packages_needed(config):
        path_of(package)
    benchmark = config.evaluate.benchmark
    names = [benchmark] if isinstance(benchmark, str) else benchmark
    ours = {EMBEDDED, *names_of_tasks()}  # which the stage `data` makes, as it does those of local data
    if public := [name for name in names if name not in ours and not name.endswith(OWN)]:
        tasks_to_score(public, _here_or_in_repository(config.data.mirror))


def _require_in_mirror(config: Config, sources: list[Source]) -> None:
    """The backbone, the teacher and the data that come from the hub are in the mirror, at their commits."""
    mirror = Mirror(_here_or_in_repository(config.data.mirror))
    command = f"f2llm fetch {config.name} --recipe {config.recipe}"
    for repo_id, files, revision in files_needed(sources, config.data):
        mirror.require(repo_id, files, revision=revision, command=fetch_command(config.data))
    for repo_id, _, revision, _ in models_needed(config):
        mirror.require(repo_id, HUB_FILES, revision=revision, command=command)


def _require_folder(setting: str, named: str) -> None:
    """Where a setting names a model's folder, it is one; the teacher's may be made by a stage, before it is read."""
    kind, _, name = named.partition(":")
    if kind != "folder":
        return
    if setting == "start_from" and _made_by_a_stage(name):
        raise ValueError(
            f"start_from is {named!r}, but a stage of dvc.yaml writes that folder; remedy: a copy of it elsewhere, or "
            "experiment:HEAD for the models/stage2 of the last commit"
        )
    if not is_model(_here_or_in_repository(name)) and not _made_by_a_stage(name):
        raise ValueError(f"{setting} is {named!r}, but {name} holds no config.json; remedy: another path")


def _require_miner(miner: str, data_from: str) -> None:
    """A model folder is there; the name of a hub's model is in the hub's cache, where the data surely need mining."""
    kind, _, name = miner.partition(":")
    if kind == "tfidf" or _here_or_in_repository(name).is_dir() or _made_by_a_stage(name):
        return
    if kind == "embedder":
        raise ValueError(
            f"mine.miner is {miner!r}, but there is no folder {name}; remedy: the folder of a trained model "
            "(dvc repro stage1 makes models/stage1), or miner: tfidf"
        )
    from huggingface_hub.constants import HF_HUB_CACHE

    if data_from != "local" and not Path(HF_HUB_CACHE, f"models--{name.replace('/', '--')}", "snapshots").is_dir():
        raise ValueError(
            f"mine.miner is {miner!r}, but that is neither a folder nor a model in the hub's cache; "
            f"remedy: hf download {name}, which needs a network once, or miner: tfidf"
        )


def _sources(config: Config) -> list[Source]:
    return choose_sources(load_registry(), config.data, config.recipe)[0]


def _repository() -> Path:
    """The repository that an experiment's copy (--temp, --queue) is made of; the working folder itself elsewhere."""
    return Path(os.environ.get("DVC_ROOT", "."))


def _here_or_in_repository(name: str) -> Path:
    return Path(name) if Path(name).exists() else _repository() / name


def _made_by_a_stage(name: str) -> bool:
    """Whether a path is, or lies in, an output of a stage of dvc.yaml."""
    path = Path(os.path.normpath(name))
    stages = read_yaml(Path("dvc.yaml"))["stages"].values()
    outs = [Path(out) for stage in stages for out in stage.get("outs", []) if isinstance(out, str)]
    return any(path.is_relative_to(out) for out in outs)


def bring_local_files(config: Config) -> None:
    """In the copy that `dvc exp run` with --temp or --queue makes, link what git ignores and a configuration names.

    These are the local files, the mirror, the folders of models that are named, as they are in the repository now. What
    the copy has already (option -C of DVC) stays.
    """
    repository = _repository()
    if repository.resolve() == Path.cwd().resolve():
        return
    if config.data.source == "local":
        for source in _sources(config):
            for there, name in zip(local_paths(source, LOCAL, repository / LOCAL), source.files):
                _link_file(there, LOCAL / name)
    named = config.start_from, config.teacher, config.mine.miner
    folders = [config.data.mirror, *(value.partition(":")[2] for value in named)]
    for name in filter(None, folders):
        if not Path(name).exists() and (repository / name).is_dir() and not _made_by_a_stage(name):
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).symlink_to((repository / name).resolve(), target_is_directory=True)


def _link_file(there: Path, path: Path) -> None:
    """A hard link, which DVC hashes as the file itself; a copy where that cannot be."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(there.resolve(), path)
    except OSError:  # another file system, or one without links
        shutil.copyfile(there, path)


def write_inputs(config: Config, codes: Path, out: Path) -> None:
    """Write the digests of configuration, code, sources and local files as JSON, and remove scores of other inputs.

    codes: the folder of `write_stage_code`. Paths of the repository are relative to the working folder.
    """
    sources = _sources(config)
    local = [path for source in sources for path in local_paths(source, LOCAL)] if config.data.source == "local" else []
    values = {key: value for key, value in asdict(config).items() if key != "machine"}
    inputs = {
        "config": _digest(values),
        "code": {path.stem: sha256(path) for path in sorted(codes.glob("*.py")) if path.stem <= EVALUATION},
        "sources": _digest([asdict(source) for source in sources]),
        "files": {str(path): sha256(path) for path in local},
    }
    text = json.dumps(inputs, indent=1) + "\n"
    if hashlib.md5(text.encode()).hexdigest() != _hash_in_lock(out):
        _remove_scores()
    with whole_file(out) as new:
        new.write_text(text, encoding="utf-8")


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _hash_in_lock(out: Path) -> str | None:
    """The MD5 that dvc.lock has for the digests: those of the run that results/ belongs to."""
    if not Path("dvc.lock").exists():
        return None
    stages = read_yaml(Path("dvc.lock")).get("stages", {})
    outs = stages.get("code", {}).get("outs", [])
    return next((entry.get("md5") for entry in outs if entry["path"] == out.as_posix()), None)


def _remove_scores() -> None:
    """Remove the metrics and plots that dvc.yaml keeps outside DVC's cache."""
    stages = read_yaml(Path("dvc.yaml"))["stages"].values()
    tables = [table for stage in stages for table in (*stage.get("metrics", []), *stage.get("plots", []))]
    removed = [path for table in tables for path in map(Path, table) if path.exists()]
    for path in removed:
        path.unlink()
    if removed:
        print(f"removed, for they are of other inputs: {', '.join(map(str, removed))}; stage evaluate makes new ones")
