"""The models that are evaluated: their folders, their maximum lengths and instructions, and their encoders."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ..config import Config, Training, names_of_models
from ..mining.tfidf import MAX_CHARACTERS, Tfidf
from ..model import Embedder
from ..store.tuples import TupleStore

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


def models_of(config: Config, models: Path = Path("models"), tuples: Path = Path("data/assembled")) -> dict:
    """{name: EvaluatedModel} of TF-IDF and all models of the pipeline, or of evaluate.only alone."""
    known, only = _known_models(config), config.evaluate.only
    chosen = [name for name in names_of_models(config) if not only or name in only]
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
    known = {
        "untrained": ("backbone", stage2, False, False),
        "backbone": ("backbone", stage2, False, False),
        "stage1": ("stage1", stage2, False, True),
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
    return EvaluatedModel(cached(encoder_of(embedder, instructions)), embedder, instructions, trained)


def _load_tfidf(tuples: Path) -> EvaluatedModel:
    """The TF-IDF baseline, fitted on the training texts."""
    texts = (text[:MAX_CHARACTERS] for text in TupleStore(tuples, mined=None).texts())
    return EvaluatedModel(cached(tfidf_encoder(Tfidf(texts, NUM_FEATURES))))


# Encoders ---------------------------------------------------------------------------------------


def encoder_of(model: Embedder, instructions: bool, dim: int | None = None) -> Callable:
    """A model's `encode` as `evaluate` needs it; a model that was trained without instructions gets none."""
    return lambda texts, instruction: model.encode(texts, instruction if instructions else None, dim)


def tfidf_encoder(tfidf: Tfidf) -> Callable:
    """`encode` of the character n-gram baseline, with dense rows; it ignores the instruction."""
    return lambda texts, instruction: tfidf.encode(texts).toarray()


def cached(encode: Callable) -> Callable:
    """`encode` with a cache: each (text, instruction) is computed once, also if languages or dims share it."""
    rows_of: dict[tuple[str, str | None], np.ndarray] = {}

    def lookup(texts: list[str], instruction: str | None) -> np.ndarray:
        missing = list(dict.fromkeys(text for text in texts if (text, instruction) not in rows_of))
        rows = encode(missing, instruction) if missing else []
        rows_of.update({(text, instruction): row for text, row in zip(missing, rows, strict=True)})
        return np.stack([rows_of[text, instruction] for text in texts])

    return lookup


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
