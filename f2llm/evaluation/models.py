"""The models that are evaluated: their folders, their maximum lengths and instructions, and their encoders."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ..config import Config, Training, names_of_models
from ..mining.tfidf import MAX_CHARACTERS, Tfidf
from ..model import Embedder
from ..store.files import sha256
from ..store.tuples import TupleStore
from .benchmarks import EMBEDDED

CACHE_BYTES = 4 * 2**30
NUM_FEATURES = 2**13  # of TF-IDF; 2**15: half a point better, 4 times slower


@dataclass(frozen=True)
class EvaluatedModel:
    """encode(texts, instruction): one row per text, see `evaluate`. embedder: None for TF-IDF.

    instructions: whether it is given the task's instruction. trained: whether it is also scored at matryoshka dims.
    """

    encode: Callable[[list[str], str | None], np.ndarray]
    embedder: Embedder | None = None
    instructions: bool = False
    trained: bool = False
    folder: Path | None = None

    @property
    def dim(self) -> int:
        return self.embedder.dim if self.embedder else NUM_FEATURES

    def digest(self, instructions: Mapping[str, str] | None = None) -> str | None:
        """Of all that its embeddings depend on, with the texts of the tasks' instructions if it is given them.

        None for TF-IDF and the untrained model, which are made anew.
        """
        if self.folder is None:
            return None
        words = sorted((instructions or {}).items()) if self.instructions else None
        number = next(self.embedder.model.parameters()).dtype, self.embedder.autocast_dtype
        facts = [revision_of(self.folder), self.embedder.max_tokens, words, *map(str, number)]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]


def models_of(config: Config, models: Path = Path("models"), tuples: Path = Path("data/assembled")) -> dict:
    """{name: EvaluatedModel} of TF-IDF and all models of the pipeline, or of evaluate.only alone.

    TF-IDF's rows are dense and have 8,192 dimensions: on a public benchmark, whose corpora have millions of documents,
    it is scored only if evaluate.only names it.
    """
    known, only = _known_models(config), config.evaluate.only
    public = config.evaluate.benchmark != EMBEDDED
    chosen = [name for name in names_of_models(config) if (name in only if only else name in known or not public)]
    return {
        name: _load_model(name, models, config.seed, *known[name]) if name in known else _load_tfidf(tuples)
        for name in chosen
    }


def _known_models(config: Config) -> dict[str, tuple[str, Training, bool, bool]]:
    """{name: (folder, training section, instructions, trained)} of every model but TF-IDF, in the tables' order.

    A model reads texts up to the max_tokens of its training section; an untrained one, up to that of the training that
    starts from it. It is given instructions only if it was trained with them.
    """
    stage2 = config.stage2
    adapts = config.start_from != "none"  # an embedder that is finished has learned with instructions
    known = {
        "untrained": ("backbone", stage2, False, False),
        "backbone": ("backbone", stage2, adapts and stage2.instructions, adapts),
        "stage1": ("stage1", stage2, adapts and stage2.instructions, True),
        "stage2": ("stage2", stage2, stage2.instructions, True),
    }
    for student in config.prune.students:
        training = config.distill[student]
        known[f"{student}-pruned"] = (f"pruned/{student}", training, False, False)
        known[f"{student}-distilled"] = (f"distilled/{student}", training, training.instructions, True)
    return known


def _load_model(
    name: str, models: Path, seed: int, folder: str, training: Training, instructions: bool, trained: bool
) -> EvaluatedModel:
    path = Path(models) / folder
    embedder = Embedder.untrained(path, seed) if name == "untrained" else Embedder.load(path)
    embedder.max_tokens = training.max_tokens
    encode = RememberedRows(encoder_of(embedder, instructions))
    return EvaluatedModel(encode, embedder, instructions, trained, None if name == "untrained" else path)


def _load_tfidf(tuples: Path) -> EvaluatedModel:
    """The TF-IDF baseline, fitted on the training texts."""
    store = TupleStore(tuples, mined=None)
    texts = (text[:MAX_CHARACTERS] for text in store.texts())
    num_texts = sum(map(len, store.documents.values()))
    return EvaluatedModel(RememberedRows(tfidf_encoder(Tfidf(texts, NUM_FEATURES, num_texts))))


# Encoders ---------------------------------------------------------------------------------------


def encoder_of(model: Embedder, instructions: bool, dim: int | None = None) -> Callable:
    """A model's `encode` as `evaluate` needs it; a model that was trained without instructions gets none."""
    return lambda texts, instruction: model.encode(texts, instruction if instructions else None, dim)


def tfidf_encoder(tfidf: Tfidf) -> Callable:
    """`encode` of the character n-gram baseline, with dense rows; it ignores the instruction."""
    return lambda texts, instruction: tfidf.encode(texts).toarray()


class RememberedRows:
    """`encode` with a memory: each (text, instruction) is computed once, for all languages, dims and precisions.

    Rows are kept up to `CACHE_BYTES`; what comes after is computed each time.
    """

    def __init__(self, encode: Callable):
        self.encode, self.rows, self.bytes = encode, {}, 0

    def __call__(self, texts: list[str], instruction) -> np.ndarray:
        missing = list(dict.fromkeys(text for text in texts if (text, instruction) not in self.rows))
        computed = self.encode(missing, instruction) if missing else []
        new = dict(zip(missing, computed, strict=True))
        result = np.stack([new[text] if text in new else self.rows[text, instruction] for text in texts])
        if missing and self.bytes + computed.nbytes <= CACHE_BYTES:
            self.bytes += computed.nbytes
            self.rows.update({(text, instruction): row for text, row in new.items()})
        return result

    def clear(self) -> None:
        self.rows.clear()
        self.bytes = 0


def revision_of(folder: Path) -> str:
    """SHA-1 of the names and hashes of a model's weights, tokenizer and settings, not of logs of its training."""
    files = sorted(file for file in folder.rglob("*") if file.suffix in (".safetensors", ".json", ".txt", ".model"))
    kept = [file for file in files if file.name not in ("train.json", "embedding_contract.json", "model_meta.json")]
    facts = "".join(f"{file.relative_to(folder).as_posix()} {sha256(file)}\n" for file in kept)
    return hashlib.sha1(facts.encode()).hexdigest()


# Tables -----------------------------------------------------------------------------------------


def reading_of(models: dict[str, EvaluatedModel]) -> pd.DataFrame:
    """The input of each model: its maximum length in tokens, and whether instructions come before queries."""
    rows = {
        name: {
            "max_tokens": model.embedder.max_tokens if model.embedder else "all",
            "instruction": "the task's" if model.instructions else "none",
        }
        for name, model in models.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index")


def parameters_of(models: dict[str, EvaluatedModel]) -> pd.DataFrame:
    """model, parameters, without_embeddings (non-embedding parameters): the size of each model except TF-IDF."""
    rows = [(name, *model.embedder.num_parameters()) for name, model in models.items() if model.embedder]
    return pd.DataFrame(rows, columns=["model", "parameters", "without_embeddings"])
