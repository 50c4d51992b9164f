"""Shared by all tests: a tiny random Qwen3 and its tokenizer, a small store of tuples, the embedded corpus once."""

import copy
import json
import os
import pickle
from dataclasses import replace
from functools import partial
from pathlib import Path

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # the same float32 numbers on every machine
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pyarrow as pa
import pytest
import torch
from filelock import FileLock

from f2llm.config import HardNegatives, read_yaml, resolve
from f2llm.data.assemble import assemble
from f2llm.data.registry import choose_sources, load_registry
from f2llm.data.sources import evaluation_tasks, load_source, parts_of
from f2llm.embedded.backbone import new_model, train_tokenizer
from f2llm.embedded.texts import texts as embedded_texts
from f2llm.model import Embedder
from f2llm.store.files import sha256
from f2llm.store.tuples import DOCUMENTS, SCHEMA, TupleStore, read_arrow, write_arrow

ROOT = Path(__file__).parents[1]
STAGE_NOTEBOOKS = sorted(path for path in (ROOT / "notebooks").glob("*.ipynb") if path.stem != "00_walkthrough")
SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "Der schnelle braune Fuchs springt über den faulen Hund.",
    "Быстрая коричневая лиса прыгает через ленивую собаку.",
    "敏捷的棕色狐狸跳过了懒狗。",
    "الثعلب البني السريع يقفز فوق الكلب الكسول",
    "तेज भूरी लोमड़ी आलसी कुत्ते के ऊपर कूदती है।",
    "def f(x: int) -> int:\n    return 2 * x + 1",
]


SLOW_FILES = ["test_documented_experiments", "test_ablations", "test_killed_trainings", "test_pipeline"]


def pytest_collection_modifyitems(items):
    """The slowest files first, so that of two processes none waits for the other's at the end."""
    items.sort(key=lambda item: item.path.stem not in SLOW_FILES)


def made_once(tmp_path_factory, name: str, make) -> Path:
    """The file or folder that `make` writes, also if several processes of `pytest -n` ask for it."""
    base = tmp_path_factory.getbasetemp()
    path = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{path}.lock"):
        if not path.exists():
            make(path)
    return path


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same numbers, on one thread, whatever ran before."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def params():
    """params.yaml as it is read, for every test to change as it likes."""
    return read_yaml(ROOT / "params.yaml")


@pytest.fixture(scope="session")
def config():
    return resolve(read_yaml(ROOT / "params.yaml"), "nano")


# A tiny model -----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(SENTENCES, vocab=320)


@pytest.fixture(scope="session")
def tiny_backbone(config):
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    return replace(config.backbone, vocab_size=320, initializer_range=0.1, **shape)


@pytest.fixture(scope="session")
def _session_model(tiny_backbone, tokenizer):
    return new_model(tiny_backbone, tokenizer, seed=0).model.eval()


@pytest.fixture
def embedder(_session_model, tokenizer):
    """A tiny embedder of its own for every test; texts are cut at 24 tokens."""
    return Embedder(copy.deepcopy(_session_model), tokenizer, max_tokens=24, token_budget=2048)


# A small store of tuples ------------------------------------------------------------------------

SMALL_SOURCES = {  # rows, negatives per row, and what the registry says of it
    "pairs": (60, 5, {"task": "retrieval", "stage1": True, "symmetric": True, "instruction": "Find the pair."}),
    "code": (26, 5, {"task": "retrieval", "stage1": True, "symmetric": False, "instruction": "Find the code."}),
    "kinds": (20, 3, {"task": "clustering", "stage1": False, "symmetric": True, "instruction": "Which kind?"}),
    "tense": (14, 1, {"task": "classification", "stage1": False, "symmetric": False, "instruction": "Which tense?"}),
}


def write_small_store(folder: Path) -> None:
    """Four sources whose texts name themselves; row 3 of 'pairs' has too few negatives, rows 0 and 1 one group."""
    sources = {}
    for kind in ("tuples", "documents"):
        (folder / kind).mkdir(parents=True)
    for name, (count, num_negatives, entry) in SMALL_SOURCES.items():
        documents = [f"{name} document {number}" for number in range(count + 10)]
        rows = [
            {
                "query": f"{name} query {number}",
                "passage": number,
                "group": 0 if number < 2 else number,
                "negatives": [(number + 2 + step) % (count + 10) for step in range(num_negatives)],
                "language": "en",
            }
            for number in range(count)
        ]
        if name == "pairs":
            rows[3]["negatives"] = rows[3]["negatives"][:1]
        write_arrow(pa.Table.from_pylist(rows, schema=SCHEMA), folder / "tuples" / f"{name}.arrow")
        write_arrow(pa.table({"text": documents}, schema=DOCUMENTS), folder / "documents" / f"{name}.arrow")
        sources[name] = entry | {"negatives": "mine" if entry["task"] == "retrieval" else "labels"}
    hashes = {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*.arrow"))}
    (folder / "manifest.json").write_text(json.dumps({"sources": sources, "sha256": hashes}))


def write_small_data(folder: Path) -> None:
    """The small store and mined negatives of its retrieval sources, as a working folder's `data` has them."""
    write_small_store(folder / "assembled")
    (folder / "mined").mkdir()
    for name in ("pairs", "code"):
        table = read_arrow(folder / "assembled" / "tuples" / f"{name}.arrow")
        write_arrow(table.select(["negatives"]), folder / "mined" / f"{name}.arrow")


@pytest.fixture(scope="session")
def small_store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small") / "assembled"
    write_small_store(folder)
    return TupleStore(folder, mined=None)


@pytest.fixture(scope="session")
def tiny_training(config):
    """Stage 2 of the default size, with batches of four and without a limit of steps."""
    small = {"global_batch_size": 4, "epochs": 2, "max_steps": 0, "cap_per_source": 0, "max_tokens": 24}
    small |= {"validate_every": 0, "validation_rows": 0}
    negatives = HardNegatives(retrieval=2, clustering=2, classification=1)
    return replace(config.stage2, hard_negatives=negatives, warmup_steps=2, instructions=True, **small)


@pytest.fixture(scope="session")
def machine(config):
    """One thread, packs so small that a batch of four tuples takes several."""
    return replace(config.machine, threads=1, token_budget=60, activation_tokens=1000)


# The embedded corpus, read once -----------------------------------------------------------------


@pytest.fixture(scope="session")
def registry():
    return load_registry(ROOT / "data" / "sources.yaml")


@pytest.fixture(scope="session")
def texts(config, tmp_path_factory):
    """(training, evaluation) texts: the slow part of the suite, at most half a minute."""

    def make(path: Path) -> None:
        path.write_bytes(pickle.dumps(embedded_texts(config.data.held_out_percent, config.data.split)))

    return pickle.loads(made_once(tmp_path_factory, "texts.pickle", make).read_bytes())


@pytest.fixture(scope="session")
def assembled(texts, registry, config, tmp_path_factory):
    """The folder of all sources of the registry, as the pipeline's stage writes it."""
    return made_once(tmp_path_factory, "assembled", lambda folder: assemble_some(registry, config, folder))


def assemble_some(registry, config, out: Path) -> dict:
    """What the stage `data` does; returns the manifest's sources."""
    data, seed = config.data, config.seed
    chosen, _ = choose_sources(registry, data, config.recipe)
    records = partial(load_source, data=data, seed=seed)
    return assemble(parts_of(chosen, data), records, evaluation_tasks(data, seed), data, seed, out)
