"""Adapters to mteb: evaluation tasks from plain files become mteb tasks, our encoders become mteb models.

Each model needs new task objects: a task that was run before keeps the state of its random numbers.
"""

import hashlib
import json
from collections.abc import Callable

import numpy as np
from datasets import Dataset, DatasetDict
from mteb.abstasks import (
    AbsTaskBitextMining,
    AbsTaskClassification,
    AbsTaskClustering,
    AbsTaskPairClassification,
    AbsTaskRetrieval,
    AbsTaskSTS,
)
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder, get_prompt_name
from mteb.models.model_meta import ScoringFunction
from mteb.types import PromptType

from ..store.progress import Progress


def _bitext(data: dict) -> dict:
    return {subset: DatasetDict(test=Dataset.from_dict(columns)) for subset, columns in data.items()}


def _pairs(data: dict) -> DatasetDict:
    return DatasetDict(test=Dataset.from_dict(data["default"]))


def _train_and_test(data: dict) -> DatasetDict:
    return DatasetDict({split: Dataset.from_dict(columns) for split, columns in data["default"].items()})


def _retrieval(data: dict) -> dict:
    parts = data["default"]
    texts = [*parts["corpus"], *parts.get("distractors", [])]
    queries = [{"id": f"q{number}", "text": text} for number, text in enumerate(parts["queries"])]
    corpus = [{"id": f"d{number}", "title": "", "text": text} for number, text in enumerate(texts)]
    relevant = {f"q{number}": {f"d{row}": 1 for row in rows} for number, rows in enumerate(parts["relevant"])}
    candidates = None
    if "candidates" in parts:
        candidates = {f"q{number}": [f"d{row}" for row in rows] for number, rows in enumerate(parts["candidates"])}
    split = RetrievalSplitData(
        queries=Dataset.from_list(queries),
        corpus=Dataset.from_list(corpus),
        relevant_docs=relevant,
        top_ranked=candidates,
    )
    return {"default": {"test": split}}


# type: base class, function that builds its data, main score, settings of the class
class _Classification(AbsTaskClassification):
    """mteb's, whose seven metrics would each read the labels from disk, one by one: most of a small task's time."""

    def _calculate_scores(self, y_test, y_pred):
        return super()._calculate_scores(np.asarray(y_test), y_pred)


KINDS = {
    "BitextMining": (AbsTaskBitextMining, _bitext, "f1", {}),
    "Retrieval": (AbsTaskRetrieval, _retrieval, "ndcg_at_10", {}),
    "Reranking": (AbsTaskRetrieval, _retrieval, "map_at_1000", {}),
    "STS": (AbsTaskSTS, _pairs, "cosine_spearman", {"min_score": 0, "max_score": 1}),
    "PairClassification": (AbsTaskPairClassification, _pairs, "max_ap", {}),
    "Classification": (
        _Classification,
        _train_and_test,
        "accuracy",
        {"samples_per_label": 16, "n_experiments": 5},
    ),
    "Clustering": (
        AbsTaskClustering,
        _pairs,
        "v_measure",
        {"max_fraction_of_documents_to_embed": None, "max_document_to_embed": None, "max_documents_per_cluster": 512},
    ),
}


def mteb_task(task: dict):
    """A new mteb task from one of our files; nothing is looked up on the hub."""
    base, build, main_score, settings = KINDS[task["type"]]
    languages = task["languages"]
    metadata = TaskMetadata(
        name=task["name"],
        description=f"Evaluation task of type {task['type']}: {task['instruction']}",
        reference=None,
        type=task["type"],
        category="t2c" if task["type"] in ("Classification", "Clustering") else "t2t",
        main_score=main_score,
        dataset={"path": f"local/{task['name']}", "revision": "local"},
        eval_splits=["test"],
        eval_langs=languages if task["type"] == "BitextMining" else languages["default"],
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

    def load_data(self, *arguments, **kwargs):
        self.dataset, self.data_loaded = build(task["data"]), True

    digest = hashlib.sha256(json.dumps(task, ensure_ascii=False).encode()).hexdigest()[:16]
    own = {"metadata": metadata, "load_data": load_data, "instruction": task["instruction"], "data_digest": digest}
    own["num_characters"] = num_characters(task["data"])
    return type(task["name"], (base,), own | settings)()


def num_characters(data) -> int:
    """Of all texts in the data of a task."""
    if isinstance(data, dict):
        return sum(num_characters(value) for value in data.values())
    if isinstance(data, list):
        return sum(map(num_characters, data))
    return len(data) if isinstance(data, str) else 0


class Encoder(AbsEncoder):
    """An `encode` function with the interface of an mteb model: encode(texts, instruction) returns one row per text.

    instructions: {task, or type of tasks, or "query": instruction}, of which mteb chooses. Documents get none.
    """

    def __init__(
        self,
        encode: Callable,
        name: str,
        instructions: dict[str, str],
        revision: str = "local",
        similarity: str = "cosine",
    ):
        self.function, self.prompts_dict = encode, instructions
        self.mteb_model_meta = ModelMeta.create_empty(
            overwrites={
                "name": name if "/" in name else f"f2llm/{name}",
                "revision": revision,
                "similarity_fn_name": ScoringFunction(similarity),
                "modalities": ["text"],
            }
        )

    def encode(self, inputs, *, task_metadata, hf_split, hf_subset, prompt_type=None, **kwargs) -> np.ndarray:
        texts = [text for batch in inputs for text in batch["text"]]
        with Progress("embed", "characters").work(sum(map(len, texts))):
            return self.function(texts, self.prompt_of(task_metadata, prompt_type))

    def prompt_of(self, task_metadata: TaskMetadata, prompt_type: PromptType | None):
        """What `encode` gets beside the texts: the instruction, None for documents."""
        if prompt_type == PromptType.document:
            return None
        if task_metadata.name in self.prompts_dict:  # mteb would give a task of ours without instruction its default
            return self.prompts_dict[task_metadata.name]
        return self.get_instruction(task_metadata, prompt_type)


class InstructedEncoder(Encoder):
    """With the whole text to put before each text, made by a template as mteb's registry has it.

    on_documents: whether documents get the prompt, too. `encode` gets (prompt, None).
    """

    def __init__(self, *arguments, template=None, on_documents: bool = False, **keywords):
        super().__init__(*arguments, **keywords)
        self.instruction_template, self.on_documents = template, on_documents

    def prompt_of(self, task_metadata: TaskMetadata, prompt_type: PromptType | None) -> tuple[str | None, None]:
        plain = prompt_type == PromptType.document and not self.on_documents
        return (None if plain else self.get_task_instruction(task_metadata, prompt_type)), None


class PromptedEncoder(Encoder):
    """With the prompts that a folder or mteb's registry declares by name, chosen as mteb chooses them.

    `encode` gets (prompt, kind of text): the prompt is None if none is declared, kind is query, document or None.
    """

    def prompt_of(self, task_metadata: TaskMetadata, prompt_type: PromptType | None) -> tuple[str | None, str | None]:
        declared = self.prompts_dict or {}
        name = get_prompt_name(declared, task_metadata, prompt_type) if declared else None
        return declared.get(name), prompt_type and prompt_type.value
