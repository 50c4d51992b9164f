"""What a run on this machine has to do, counted in data that its stages have made: steps, texts, tokens."""

from collections.abc import Sequence
from dataclasses import replace
from math import inf
from pathlib import Path

from tokenizers import Tokenizer

from ...batches import Batch, HomogeneousBatches
from ...config import Config
from ...data.registry import Source, choose_sources
from ...embedded.tasks import names_of_tasks
from ...evaluation.benchmarks import EMBEDDED
from ...store.tuples import OWN, TupleStore, load_tasks
from ...teacher import most_rows
from .costs import Work

BACKBONE = Path("models/backbone")
SAMPLE = 64  # steps of a training whose texts are counted


def open_store(config: Config, registry: list[Source]) -> TupleStore | None:
    """The tuples and mined negatives of this configuration's sources; None if they, or a tokenizer, are not there."""
    if not (Path("data/assembled/manifest.json").exists() and (BACKBONE / "tokenizer.json").exists()):
        return None
    try:
        store = TupleStore()
    except ValueError:  # not mined yet
        return None
    sources, _ = choose_sources(registry, config.data, config.recipe)
    names = {entry.get("source", name) for name, entry in store.sources.items()}
    return store if names == {source.name for source in sources} else None


def batches_of(work: Work, config: Config, store: TupleStore) -> HomogeneousBatches:
    """The batches of a training, as its stage draws them."""
    return HomogeneousBatches(store, work.training, config.seed, stage1=work.stage == "stage1")


def sampled(num_steps: int) -> list[int]:
    """Steps, evenly spaced, whose texts stand for all."""
    return sorted({num_steps * number // SAMPLE for number in range(SAMPLE)}) if num_steps else []


def count(work: Work, config: Config, store: TupleStore) -> Work:
    """A training with its number of steps, and the tokens of every text of `sampled` ones."""
    batches = batches_of(work, config, store)
    if not len(batches):
        return replace(work, steps=0, counted=True)
    lengths = [_lengths(batches[step], work.training.max_tokens) for step in sampled(len(batches))]
    return replace(work, steps=len(batches), lengths=lengths, num_different=most_rows(batches), counted=True)


def _lengths(batch: Batch, most: int) -> tuple[list[int], list[int]]:
    """Tokens of a batch's queries, and of all its other texts."""
    lengths, queries = num_tokens(batch.texts, most), set(batch.query.tolist())
    return [lengths[row] for row in queries], [length for row, length in enumerate(lengths) if row not in queries]


def num_tokens(texts: Sequence[str], most: float = inf) -> list[int]:
    """Tokens of each text by the backbone's tokenizer, EOS included."""
    tokenizer = Tokenizer.from_file(str(BACKBONE / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    found = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [min(len(encoding.ids) + 1, int(min(most, 2**31))) for encoding in found]


def evaluated_lengths(config: Config) -> list[int] | None:
    """Tokens of every text that one model encodes for evaluate.benchmark; None where it is not of this kit's tasks."""
    benchmark = config.evaluate.benchmark
    names = [benchmark] if isinstance(benchmark, str) else benchmark
    if any(name not in (EMBEDDED, *names_of_tasks()) and not name.endswith(OWN) for name in names):
        return None
    tasks = [task for task in load_tasks() if EMBEDDED in names or task["name"] in names]
    return num_tokens([text for task in tasks for text in texts_in(task["data"])], config.stage2.max_tokens)


def texts_in(data) -> list[str]:
    """All texts of a task's data, whatever its form."""
    if isinstance(data, dict):
        return [text for value in data.values() for text in texts_in(value)]
    if isinstance(data, list):
        return [text for value in data for text in texts_in(value)]
    return [data] if isinstance(data, str) else []
