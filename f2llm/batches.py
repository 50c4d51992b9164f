"""Homogeneous batches: one source per global batch, a pure function of (seed, step)."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .config import Training
from .store.tuples import TupleStore, take
from .text import prompted


@dataclass(frozen=True)
class Batch:
    """B tuples of one source, every text once. query (B), passage (B), hard_negatives (B, K): rows of `texts`."""

    source: str
    task: str
    rows: np.ndarray  # (B): rows of the source
    texts: list[str]
    query: np.ndarray
    passage: np.ndarray
    hard_negatives: np.ndarray
    document: np.ndarray  # (B): the passages' rows in the store
    group: np.ndarray  # (B): tuples of one group answer each other's queries
    stored: list[int | None]  # documents that are `texts` as they are: their rows; None for what has a prompt

    @property
    def num_texts(self) -> int:
        """Queries, passages and hard negatives, counted as often as they occur."""
        return len(self.query) * (2 + self.hard_negatives.shape[1])


class HomogeneousBatches:
    """Batches of a training stage in order; `batches[step]` needs no batch before it.

    Each epoch visits every kept row exactly once. A source's rows are shuffled by (seed, source, epoch), the order
    of sources by (seed, epoch), so that a source is met in proportion to its size. The last batch of a source holds
    what is left, without filling it up (the authors repeat rows, which then are each other's negatives).
    """

    def __init__(self, store: TupleStore, training: Training, seed: int, stage1: bool):
        self.store, self.training, self.seed = store, training, seed
        sources = {name: entry for name, entry in store.sources.items() if entry["stage1"] or not stage1}
        self.draws: dict[str, int] = {}  # hard negatives per query where a source has no row with as many as asked for
        self.too_few: dict[str, int] = {}  # rows with fewer hard negatives than a step draws, which are left out
        usable = {name: self._usable_rows(name) for name in sources}
        if empty := [name for name, rows in usable.items() if not len(rows)]:
            raise ValueError(
                f"sources {empty} have no row with as many hard negatives as a step draws "
                f"({training.hard_negatives}); remedy: draw fewer, mine more, or name them in data.leave_out"
            )
        self.withheld = {name: self._withheld_rows(name, rows) for name, rows in usable.items()}
        self.rows = {name: self._without_withheld(name, rows) for name, rows in usable.items()}
        size = training.global_batch_size
        self.num_batches = {name: -(-len(rows) // size) for name, rows in self.rows.items()}
        self.per_epoch = sum(self.num_batches.values())
        self._plans: dict[int, list[tuple[str, int]]] = {}
        self._shuffles: dict[str, tuple[int, np.ndarray]] = {}

    def __len__(self) -> int:
        """Number of optimizer steps of the stage."""
        steps = self.per_epoch * self.training.epochs
        return min(steps, self.training.max_steps or steps)

    def __getitem__(self, step: int) -> Batch:
        """The batch of a step, counted from 0."""
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} of {len(self)}")
        epoch, position = divmod(step, self.per_epoch)
        source, index = self._plan(epoch)[position]
        size = self.training.global_batch_size
        rows = self._shuffle(source, epoch)[index * size : (index + 1) * size]
        return self._batch(source, rows, epoch)

    def validation(self) -> Iterator[Batch]:
        """One batch of each source's withheld rows, always the same."""
        for name, rows in sorted(self.withheld.items()):
            if len(rows):
                yield self._batch(name, rows, epoch=0)

    def _usable_rows(self, name: str) -> np.ndarray:
        """Rows with as many negatives as a step draws, capped by a draw keyed by (seed, source)."""
        chunks = self.store.tables[name]["negatives"].chunks
        given = np.concatenate([np.diff(chunk.offsets.to_numpy()) for chunk in chunks])
        if given.max() < self.num_negatives(name) and self._learns_without(name):
            self.draws[name] = int(np.median(given))
        rows = np.flatnonzero(given >= self.num_negatives(name)).astype(np.int32)
        if len(rows) < len(self.store.tables[name]):
            self.too_few[name] = len(self.store.tables[name]) - len(rows)
        cap = self.training.cap_per_source
        if cap and len(rows) > cap:
            rows = np.sort(self._random("cap", name).permutation(rows)[:cap])
        return rows

    def _withheld_rows(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Rows for validation, at most a tenth of the source: a draw keyed by (seed, source)."""
        count = min(self.training.validation_rows, len(rows) // 10) if self.training.validate_every else 0
        return np.sort(self._random("validation", name).permutation(rows)[:count])

    def _without_withheld(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Rows for training: no withheld row and, in retrieval, none with a withheld row's passage."""
        withheld = self.withheld[name]
        if not len(withheld):
            return rows
        key = np.arange(len(self.store.tables[name]))
        if self.store.sources[name]["task"] == "retrieval":
            key = self.store.tables[name]["passage"].to_numpy()
        return rows[~np.isin(key[rows], key[withheld])]

    def num_negatives(self, name: str) -> int:
        """Hard negatives per query of a source.

        Where no row has as many as `hard_negatives` asks for, as in a source of a few texts, it is the median of what
        rows have, if the source has another loss too. Deviation: the authors' data have 24 in every row.
        """
        return self.draws.get(name, getattr(self.training.hard_negatives, self.store.sources[name]["task"]))

    def _learns_without(self, name: str) -> bool:
        """Whether a source has a loss without hard negatives."""
        return self.store.sources[name]["task"] in self.training.in_batch_tasks

    def _plan(self, epoch: int) -> list[tuple[str, int]]:
        """(source, batch of that source) of every step of an epoch."""
        if epoch not in self._plans:
            plan = [(name, index) for name, count in sorted(self.num_batches.items()) for index in range(count)]
            order = self._random("plan", epoch).permutation(len(plan))
            self._plans[epoch] = [plan[position] for position in order]
        return self._plans[epoch]

    def _shuffle(self, source: str, epoch: int) -> np.ndarray:
        if self._shuffles.get(source, (None,))[0] != epoch:  # only the last epoch's is kept: four bytes a row
            self._shuffles[source] = epoch, self._random("rows", source, epoch).permutation(self.rows[source])
        return self._shuffles[source][1]

    def _random(self, *key) -> np.random.Generator:
        return np.random.default_rng(list(repr((self.seed, *key)).encode()))

    def _batch(self, source: str, rows: np.ndarray, epoch: int) -> Batch:
        entry, training = self.store.sources[source], self.training
        tuples, documents = take(self.store.tables[source], rows), self.store.documents[source]
        wanted = self.num_negatives(source)
        instruction = entry["instruction"] if training.instructions else None
        share = training.document_instruction_share if entry["symmetric"] else 0.0
        texts: dict[str, int] = {}
        stored: list[int | None] = []

        def place(text: str, row: int | None) -> int:
            if text not in texts:
                texts[text] = len(texts)
                stored.append(row)
            return texts[text]

        def document(row: int, draw: np.random.Generator) -> int:
            if draw.random() < share and instruction:
                return place(prompted(documents[row], instruction), None)
            return place(documents[row], row)

        query, passage, hard_negatives = [], [], []
        for row, found in zip(rows, tuples):
            draw = self._random("sample", source, int(row), epoch)
            query.append(place(prompted(found["query"], instruction), None))
            passage.append(document(found["passage"], draw))
            chosen = draw.choice(found["negatives"], size=wanted, replace=False) if wanted else []
            hard_negatives.append([document(int(negative), draw) for negative in chosen])
        return Batch(
            source=source,
            task=entry["task"],
            rows=rows,
            texts=list(texts),
            query=np.array(query),
            passage=np.array(passage),
            hard_negatives=np.array(hard_negatives, dtype=np.int64).reshape(len(rows), wanted),
            document=np.array([found["passage"] for found in tuples]),
            group=np.array([found["group"] for found in tuples]),
            stored=stored,
        )
