"""Encoders for hard-negative mining: TF-IDF, models of this kit, models of sentence-transformers.

An encoder has `encode_queries(texts, instruction)` and `encode_documents(texts)`, which give one row of unit length per
text, and `key`, a hash of everything that these rows depend on besides the texts.
"""

import hashlib
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np

from ..config import Mine
from ..encoder import ForeignEncoder, compare_with_sentence_transformers, encode_by
from ..model import Embedder
from ..store.code import code_digest
from ..store.files import sha256, whole_file
from ..store.model_folder import require_no_pickles
from ..text import prompted
from .search import unit_rows
from .tfidf import MAX_CHARACTERS, Tfidf

MODEL_FILES = {".safetensors", ".bin", ".json", ".txt", ".model"}  # weights, settings, vocabularies


class EmbedderMiner:
    """A model folder of this kit, such as models/stage1, loaded when the first text is embedded.

    max_tokens: of one text, prompt included, unless the model takes fewer.
    """

    block, cached = 4096, True

    def __init__(self, folder: Path, max_tokens: int):
        self.folder, self.max_tokens = folder, max_tokens
        self.key = _folder_key("embedder", folder, max_tokens, code_digest("f2llm.model"))

    @cached_property
    def model(self) -> Embedder:
        embedder = Embedder.load(self.folder)
        compare_with_sentence_transformers(embedder, self.folder)
        embedder.max_tokens = min(embedder.max_tokens, self.max_tokens)
        return embedder

    def encode_queries(self, texts: list[str], instruction: str | None) -> np.ndarray:
        """Float32 rows of the texts with the instruction before them."""
        return unit_rows(self.model.encode(texts, instruction), texts, str(self.folder))

    def encode_documents(self, texts: list[str]) -> np.ndarray:
        """Float32 rows of the raw texts."""
        return self.encode_queries(texts, None)


class SentenceTransformerMiner:
    """Any model that sentence-transformers loads from this disk, with our prompts instead of its own.

    It never downloads and never runs code that comes with a model.
    """

    block, cached = 4096, True

    def __init__(self, name: str, max_tokens: int):
        self.folder, self.max_tokens = _on_this_disk(name), max_tokens
        self.key = _folder_key("sentence-transformers", self.folder, max_tokens)

    @cached_property
    def model(self):
        return ForeignEncoder(self.folder, self.max_tokens).model

    def encode_queries(self, texts: list[str], instruction: str | None) -> np.ndarray:
        """Float32 rows of the texts with the instruction before them."""
        return self._rows(self.model.encode_query, texts, prompted("", instruction))

    def encode_documents(self, texts: list[str]) -> np.ndarray:
        """Float32 rows of the raw texts."""
        return self._rows(self.model.encode_document, texts, "")

    def _rows(self, encode, texts: list[str], prompt: str) -> np.ndarray:
        rows = encode_by(encode, texts, prompt=prompt, normalize_embeddings=True)
        return unit_rows(np.asarray(rows, dtype=np.float32), texts, str(self.folder))


def miner_of(rules: Mine, texts: Iterable[str], num_texts: int | None = None):
    """The miner that `rules.miner` names; texts: what TF-IDF counts its frequencies over, others do not read them.

    num_texts: about how many there are.
    """
    kind, _, name = rules.miner.partition(":")
    if rules.miner == "tfidf":
        return Tfidf((text[:MAX_CHARACTERS] for text in texts), num_texts=num_texts)
    if kind == "embedder" and name:
        return EmbedderMiner(Path(name), rules.max_tokens)
    if kind == "sentence-transformers" and name:
        return SentenceTransformerMiner(name, rules.max_tokens)
    raise ValueError(
        f"mine.miner is {rules.miner!r}, but must be tfidf, embedder:<folder> or sentence-transformers:<folder or "
        "name>; remedy: for example embedder:models/stage1"
    )


def _folder_key(kind: str, folder: Path, max_tokens: int, *more: str) -> str:
    """Hash of the content of a model folder's weights, settings and tokenizer, and of further settings."""
    files = sorted(file for file in folder.rglob("*") if file.suffix in MODEL_FILES and file.is_file())
    if not any(file.suffix in {".safetensors", ".bin"} for file in files):
        raise ValueError(
            f"mine.miner {kind}:{folder}: there are no model weights in {folder}; "
            "remedy: the folder of a trained model (dvc repro stage1 makes models/stage1), or miner: tfidf"
        )
    require_no_pickles(folder)
    parts = [f"{file.relative_to(folder).as_posix()} {sha256(file)}" for file in files]
    return hashlib.sha256("\n".join([kind, str(max_tokens), *more, *parts]).encode()).hexdigest()


def _on_this_disk(name: str) -> Path:
    """The folder of a model: itself, or where the hub's cache has it."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError) as error:  # not there, or no name at all
        raise ValueError(
            f"mine.miner sentence-transformers:{name}: neither a folder nor a model in the hub's cache "
            f"({type(error).__name__}); remedy: hf download {name}, which needs a network once"
        ) from None


# Embeddings on disk ------------------------------------------------------------------------------


def embedded_block(folder: Path, name: str, texts: list[str], encode) -> Path:
    """The file under `folder` with encode(texts), which is called only if it is not there whole.

    name: what the rows depend on besides the texts. The file is a .npy array followed by a hash of its key and the
    array; a file that is truncated, changed or renamed is computed again.
    """
    key = hashlib.sha256(name.encode())
    for text in texts:
        content = text.encode()
        key.update(len(content).to_bytes(8) + content)
    path = folder / f"{key.hexdigest()}.npy"
    if _is_whole(path):
        return path
    rows = encode(texts)
    with whole_file(path) as aside:
        np.save(aside, rows)
        with aside.open("ab") as file:
            file.write(_seal(path, aside.read_bytes()))
    return path


def _seal(path: Path, array: bytes) -> bytes:
    return hashlib.sha256(path.stem.encode() + array).digest()


def _is_whole(path: Path) -> bool:
    if not path.exists():
        return False
    content = path.read_bytes()
    return content[-32:] == _seal(path, content[:-32])
