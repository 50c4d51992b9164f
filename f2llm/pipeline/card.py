"""The model card of an exported model: what it is, how it is used, what it was trained on, how it scored."""

import csv
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import yaml

from ..contract import INSTRUCTION, Contract

PAPERS = "arXiv [2510.02294](https://arxiv.org/abs/2510.02294) and [2603.19223](https://arxiv.org/abs/2603.19223)"
TAGS = ["sentence-transformers", "sentence-similarity", "feature-extraction", "f2llm"]
SCORED = (
    "Main scores times 100, scored by [mteb](https://github.com/embeddings-benchmark/mteb) in the stage `evaluate` of "
    "the kit, on tasks made from held-out texts. They cannot be compared with the leaderboard, whose tasks are others."
)


@dataclass(frozen=True)
class Facts:
    """What a card is made of.

    train: train.json of the model, {} without. sources: entries of the data's manifest. scores: (type, mean) of the
    model's tasks. commit: of the code that exported it, '' if unknown. parameters: (all, of the embedding table).
    """

    name: str
    licence: str
    base: str | None
    contract: Contract
    train: dict
    sources: dict[str, dict]
    scores: list[tuple[str, float]]
    commit: str
    parameters: tuple[int, int]
    onnx: bool

    @property
    def languages(self) -> list[str]:
        """ISO 639 codes of the languages of the training data, in order; regions and scripts are left out."""
        codes = {re.split("[-_]", code)[0] for entry in self.sources.values() for code in entry.get("languages") or {}}
        return sorted(code for code in codes if re.fullmatch("[a-z]{2,3}", code))


def card(facts: Facts) -> str:
    """The text of README.md: YAML for the hub, then Markdown."""
    parts = [_front_matter(facts), f"# {facts.name.partition('/')[2]}\n", _introduction(facts), _properties(facts)]
    parts += [_with_sentence_transformers(facts), _with_transformers(facts), _prompts(facts), _data(facts)]
    parts += [_scores(facts), _provenance(facts), _limits(facts)]
    return "\n".join(part for part in parts if part)


def _front_matter(facts: Facts) -> str:
    values = {"license": facts.licence, "language": facts.languages, "library_name": "sentence-transformers"}
    values |= {"pipeline_tag": "feature-extraction", "tags": TAGS, "base_model": facts.base}
    datasets = {entry.get("hub_id") or "" for entry in facts.sources.values()}
    values["datasets"] = sorted(name for name in datasets if re.fullmatch(r"[\w.-]+/[\w.-]+", name))
    kept = {key: value for key, value in values.items() if value}
    return f"---\n{yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)}---\n"


def _introduction(facts: Facts) -> str:
    origin = f", trained from [{facts.base}](https://huggingface.co/{facts.base})" if facts.base else ""
    return (
        f"A text-embedding model{origin}. Its embedding is the final hidden state of the last token, EOS, at unit "
        f"length; texts are compared by cosine. It was trained by f2llm, a kit that reproduces F2LLM and F2LLM-v2 "
        f"({PAPERS}); it is not a release of their authors.\n"
    )


def _properties(facts: Facts) -> str:
    contract, (total, embedding) = facts.contract, facts.parameters
    dims = ", ".join(map(str, sorted(contract.matryoshka_dims or [])))
    languages = f"{len(facts.languages)} in the training data" if facts.languages else "not recorded"
    rows = {
        "context length": f"{contract.max_tokens} tokens; longer texts are cut, EOS is kept",
        "dimensions": str(contract.dim),
        "matryoshka dimensions": dims or "none recorded",
        "parameters": f"{total:,}, of which {embedding:,} in the embedding table",
        "precision": contract.dtype,
        "pooling": f"last token, `{contract.eos_token}`, which the tokenizer appends",
        "padding": f"on the {contract.padding_side}",
        "languages": languages,
        "licence": facts.licence,
    }
    return _table(("", ""), rows.items())


def _with_sentence_transformers(facts: Facts) -> str:
    shorter = [dim for dim in sorted(facts.contract.matryoshka_dims or []) if dim < facts.contract.dim]
    text = f'''## sentence-transformers

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{facts.name}")
prompt = "{_prompt(facts)}"
queries = model.encode(["how do plants make sugar?"], prompt=prompt)
documents = model.encode(["Photosynthesis turns light into chemical energy."])
print(model.similarity(queries, documents))
```
'''
    if shorter:
        dim = shorter[len(shorter) // 2]
        text += (
            f'\nShorter embeddings are prefixes: `SentenceTransformer("{facts.name}", truncate_dim={dim})`. Cosine '
            "needs no more; before a dot product, bring them to unit length again (`normalize_embeddings=True`).\n"
        )
    return text


def _with_transformers(facts: Facts) -> str:
    contract = facts.contract
    last = {"right": 'batch["attention_mask"].sum(1) - 1', "left": "-1"}[contract.padding_side]
    return f'''## transformers

The tokenizer appends EOS by itself, once, also to a text that it cuts. Do not append another.

```python
import torch
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{facts.name}")
model = AutoModel.from_pretrained("{facts.name}").eval()
texts = ["{_prompt(facts)}how do plants make sugar?", "Photosynthesis turns light into chemical energy."]
batch = tokenizer(texts, padding=True, truncation=True, max_length={contract.max_tokens}, return_tensors="pt")
with torch.inference_mode():
    hidden = model(**batch).last_hidden_state
last = {last}
embeddings = torch.nn.functional.normalize(hidden[torch.arange(len(texts)), last].float(), dim=-1)
print(embeddings[0] @ embeddings[1])
```
'''


def _prompt(facts: Facts) -> str:
    """A query's prompt as a Python string has it."""
    return facts.contract.query_prompt.format(instruction=INSTRUCTION).replace("\n", "\\n")


def _prompts(facts: Facts) -> str:
    form = facts.contract.query_prompt.replace("\n", "\\n")
    named = [f"`{name}`: {text!r}" for name, text in facts.contract.prompts.items() if text]
    applied = f"Named prompts: {'; '.join(named)}" if named else "No prompt is applied by default"
    return (
        f"## Prompts\n\nQueries are embedded as `{form}` and the query, with an instruction that says what is "
        "looked for; documents as they are. For symmetric tasks (similarity, clustering, classification) every text "
        f"may have the instruction. {applied}.\n"
    )


def _data(facts: Facts) -> str:
    if not facts.sources:
        return "## Training data\n\nNot recorded in this export.\n"
    by_source: dict[str, dict] = {}
    for name, entry in facts.sources.items():
        row = by_source.setdefault(entry.get("source", name), {**entry, "kept": 0})
        row["kept"] += entry.get("kept") or 0
    rows = [
        (
            entry.get("title", name),
            entry.get("task", ""),
            f"{entry['kept']:,}",
            entry.get("licence", "unknown"),
            {True: "yes", False: "no"}.get(entry.get("commercial"), "unknown"),
            entry.get("hub_id") or "",
        )
        for name, entry in by_source.items()
    ]
    total = sum(entry["kept"] for entry in by_source.values())
    licences = "The licence of the weights does not change the licences of the data."
    return f"## Training data\n\n{total:,} rows of {len(rows)} sources. {licences}\n\n" + _table(
        ("source", "task", "rows", "licence", "commercial use", "origin"), rows
    )


def _scores(facts: Facts) -> str:
    if not facts.scores:
        return ""
    return f"## Scores\n\n{SCORED}\n\n" + _table(
        ("type of task", "mean"), [(kind, f"{100 * mean:.1f}") for kind, mean in facts.scores]
    )


def _provenance(facts: Facts) -> str:
    train, rows = facts.train, {}
    if train:
        rows = {key: train[key] for key in ("stage", "recipe", "size_name", "seed", "steps", "tokens") if key in train}
        rows["inputs"] = ", ".join(train.get("inputs", []))
        versions = {"python": train.get("python"), **train.get("versions", {})}
        rows["versions"] = ", ".join(f"{name} {number}" for name, number in versions.items() if number)
        rows |= {key: train[key] for key in ("device", "processes") if key in train}
    rows["exported by the code at"] = facts.commit or "an unknown commit"
    shown = [(key.replace("_", " "), f"{value:,}" if key == "tokens" else str(value)) for key, value in rows.items()]
    return "## Provenance\n\n" + _table(("", ""), shown)


def _limits(facts: Facts) -> str:
    onnx = (
        "onnx/model.onnx is a copy for ONNX Runtime."
        if facts.onnx
        else ("There is no ONNX file: the package `optimum`, which writes it, was not installed at the export.")
    )
    return (
        f"## Check a copy\n\n`embedding_contract.json` has token ids and embeddings of five texts. `f2llm doctor "
        f"<folder>` replays them and names what is wrong: EOS, padding, pooling, prompts, precision, weights. {onnx}\n"
    )


def _table(head: tuple[str, ...], rows: Iterable[tuple]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def read_scores(path: Path, model: str) -> list[tuple[str, float]]:
    """(type, mean over its tasks) of a model in scores.csv, the mean over all tasks first.

    ValueError if the file has no scores of the model.
    """
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = sorted({row["model"] for row in rows})
    if model not in names:
        raise ValueError(f"{path} has no scores of {model!r}; remedy: one of {', '.join(names)}, or no scores")
    by_type = defaultdict(list)
    for row in rows:
        if row["model"] == model:
            by_type[row["type"]].append(float(row["score"]))
    every = [score for scores in by_type.values() for score in scores]
    means = {kind: sum(scores) / len(scores) for kind, scores in sorted(by_type.items())}
    return [(f"all {len(every)} tasks", sum(every) / len(every)), *means.items()]
