"""Teacher embeddings for distillation: computed at every step, or once per text and stored on disk.

D dimensions of the teacher.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import distributed
from .batches import HomogeneousBatches
from .config import Machine
from .encoder import ForeignEncoder
from .model import MODEL_FILES, Embedder
from .step import PackedBatch, embed_without_gradient, prepare
from .store.files import sha256, whole_file


def check_teacher(model: Embedder, teacher: "Embedder | TextTeacher") -> None:
    """Raise a ValueError unless the teacher is at least as wide as the student."""
    if teacher.dim < model.dim:
        raise ValueError(
            f"the teacher's embeddings have {teacher.dim} dimensions, fewer than the student's {model.dim}; "
            "remedy: a larger teacher, or swap the two"
        )


class TextTeacher:
    """A teacher with a tokenizer of its own: it reads the texts of a batch, prompts of the stage included.

    encoder: an `Embedder`, or a model that sentence-transformers runs, whose own prompts are not used.
    """

    def __init__(self, encoder: Embedder | ForeignEncoder):
        self.encoder, self.dim, self.device = encoder, encoder.dim, encoder.device

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> Tensor:
        """Un-normalised embeddings (texts, D), float32."""
        if isinstance(self.encoder, ForeignEncoder):
            return self.encoder.embed_texts(texts)
        return self.encoder.embed(self.encoder.tokenize(texts)).float()


def teacher_of(model: Embedder, encoder: Embedder | ForeignEncoder) -> Embedder | TextTeacher:
    """The encoder itself, which shares the student's packs, if it has the same tokenizer and takes texts as long."""
    if isinstance(encoder, Embedder) and encoder.tokenizer.get_vocab() == model.tokenizer.get_vocab():
        encoder.max_tokens = model.max_tokens
        return encoder
    return TextTeacher(encoder)


def live(teacher: Embedder | TextTeacher) -> Callable[[PackedBatch], Tensor]:
    """A function that computes the teacher's embeddings (texts, D) of a batch, from the student's packs if it can."""
    if isinstance(teacher, TextTeacher):  # every process embeds all texts
        return lambda packed: teacher(packed.batch.texts)
    return lambda packed: embed_without_gradient(teacher, packed)


class Cached:
    """Teacher embeddings, computed once per text and stored on disk, keyed by a hash of the text with its prompt.

    The folder's name is a hash of teacher, longest text, data and order of batches: every later student, and the same
    training after a kill, reads the bytes that a first, uninterrupted training computes. Call `flush` before a
    checkpoint is written; otherwise rows of a killed training are computed again in packs with other texts, which
    changes their last bits.
    """

    def __init__(self, teacher: Embedder | TextTeacher, folder: Path, machine: Machine):
        self.teacher, self.folder, self.machine = teacher, Path(folder), machine
        self.parts: list[np.ndarray] = []
        self.where: dict[bytes, tuple[int, int]] = {}  # digest of a text -> part, row
        self.new: dict[bytes, np.ndarray] = {}
        for path in sorted(self.folder.glob("[0-9]*.keys.npy")):  # not what a killed process was writing
            self._read(path)

    def __call__(self, packed: PackedBatch) -> Tensor:
        """Embeddings (texts, D), float32; texts that are not stored yet are embedded now."""
        texts, stored = packed.batch.texts, packed.batch.stored
        keys = [hashlib.sha256(text.encode()).digest()[:16] for text in texts]
        absent = [row for row, key in enumerate(keys) if key not in self.where and key not in self.new]
        if absent:
            if isinstance(self.teacher, TextTeacher):
                made = self.teacher([texts[row] for row in absent])
            else:
                some = {"texts": [texts[row] for row in absent], "stored": [stored[row] for row in absent]}
                batch = prepare(self.teacher, replace(packed.batch, **some), self.machine)
                made = embed_without_gradient(self.teacher, batch)
            self.new.update(zip((keys[row] for row in absent), made.cpu().numpy(), strict=True))
        rows = [self.new[key] if key in self.new else self._row(key) for key in keys]
        return torch.from_numpy(np.stack(rows)).to(self.teacher.device)

    def flush(self) -> None:
        """Write the new rows as one more part of the folder; keys come last, so a part is complete or ignored."""
        if not self.new:
            return
        keys = self.folder / f"{len(self.parts):06d}.keys.npy"
        if distributed.rank() == 0:
            digests = np.frombuffer(b"".join(self.new), dtype=np.uint8).reshape(-1, 16)
            for path, content in ((_rows_of(keys), np.stack(list(self.new.values()))), (keys, digests)):
                with whole_file(path) as new:
                    np.save(new, content)
        distributed.barrier()
        self.new = {}
        self._read(keys)

    def _read(self, keys: Path) -> None:
        part = len(self.parts)
        self.parts.append(np.load(_rows_of(keys), mmap_mode="r"))
        self.where |= {key.tobytes(): (part, row) for row, key in enumerate(np.load(keys))}

    def _row(self, key: bytes) -> np.ndarray:
        part, row = self.where[key]
        return self.parts[part][row]


def _rows_of(keys: Path) -> Path:
    return keys.with_name(keys.name.replace(".keys.", ".rows."))


def teacher_embeddings(
    path: Path, teacher: Embedder | TextTeacher, batches: HomogeneousBatches, machine: Machine
) -> Callable[[PackedBatch], Tensor]:
    """`Cached`, if all rows of this training fit into machine.teacher_cache_gib, else `live`."""
    needed = most_rows(batches) * teacher.dim * 4 / 2**30
    if needed > machine.teacher_cache_gib:
        return live(teacher)
    names = ("cap_per_source", "instructions", "document_instruction_share", "global_batch_size", "hard_negatives")
    names += ("validate_every", "validation_rows", "max_tokens")
    facts = {"batches": {"seed": batches.seed} | {name: asdict(batches.training)[name] for name in names}}
    facts["data"] = batches.store.hashes()
    facts["mined"] = {file.name: sha256(file) for file in sorted(Path("data/mined").glob("*.arrow"))}
    files = sorted(file for pattern in MODEL_FILES for file in path.rglob(pattern))  # of modules such as 2_Dense, too
    facts["teacher"] = {file.relative_to(path).as_posix(): sha256(file) for file in files}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    return Cached(teacher, Path("scratch/teacher") / digest, machine)


def most_rows(batches: HomogeneousBatches) -> int:
    """Upper bound of the number of different texts of a training: those of its steps, and those of its sources."""
    store, of_sources, most = batches.store, 0, 0
    for name, rows in batches.rows.items():
        prompted = 2 if store.sources[name]["symmetric"] and batches.training.document_instruction_share else 1
        of_sources += len(rows) + prompted * len(store.documents[name])
        most = max(most, 2 + batches.num_negatives(name))
    return min(of_sources, len(batches) * batches.training.global_batch_size * most)
