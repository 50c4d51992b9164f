"""Data sets in the hub's layout in a mirror, and mteb tasks that read them."""

import json
from pathlib import Path

import pandas as pd
from mteb.abstasks.task_metadata import TaskMetadata

from f2llm.data.mirror import write_manifest
from f2llm.store.files import sha256

ONE, TWO = "1" * 40, "2" * 40


def task_of(base, kind, score, repo, languages=("eng-Latn",), revision=ONE, split="test", extra=None, **own):
    """A new task, as mteb defines them, of a data set of the hub."""
    metadata = TaskMetadata(
        name=own.pop("name", f"Task{repo.rpartition('/')[2]}"),
        description="",
        reference=None,
        type=kind,
        category="t2t",
        main_score=score,
        dataset={"path": repo, "revision": revision, **(extra or {})},
        eval_splits=[split],
        eval_langs=dict(languages) if isinstance(languages, dict) else list(languages),
        modalities=["text"],
        date=("2025-01-01", "2025-12-31"),
        domains=["Written"],
        task_subtypes=[],
        license="not specified",
        annotations_creators="derived",
        dialect=[],
        sample_creation="created",
        bibtex_citation="",
    )
    return type(metadata.name, (base,), {"metadata": metadata, **own})()


def add(mirror: Path, repo: str, tables: dict, configs: list[dict] | None = None, revision=ONE, folder=None) -> None:
    """Put a data set into a mirror: {file: rows}, with a README that names its configs, and into the manifest."""
    where = mirror / (folder or repo)
    for name, rows in tables.items():
        (where / name).parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(rows).to_parquet(where / name)
    if configs:
        lines = ["---", "configs:"]
        for config in configs:
            lines += [f"- config_name: {config['name']}", "  data_files:"]
            lines += [
                line for split, file in config["files"].items() for line in (f"  - split: {split}", f"    path: {file}")
            ]
        (where / "README.md").write_text("\n".join([*lines, "---", ""]))
    record(mirror, folder or repo, revision)


def record(mirror: Path, key: str, revision=ONE) -> None:
    """Write what is there now into the manifest, as a fetch does."""
    manifest = json.loads((mirror / "manifest.json").read_text()) if (mirror / "manifest.json").exists() else {}
    files = [path for path in sorted((mirror / key).rglob("*")) if path.is_file()]
    facts = {
        path.relative_to(mirror / key).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in files
    }
    write_manifest(mirror, manifest | {key: {"revision": revision, "files": facts}})


PAIRS = {"sentence1": ["a one", "b two", "c three"], "sentence2": ["a", "b", "x"], "score": [1.0, 0.8, 0.1]}
