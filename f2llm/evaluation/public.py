"""Any model to evaluate: a folder of the kit, a folder of sentence-transformers, or a hub id that a mirror holds.

Each keeps its own prompts: F2LLM's models, and those that the kit trained with instructions, those of the published
runs; a model that mteb's registry knows with instructions, the registry's; any other, what its folder declares.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from ..data.mirror import Mirror
from ..encoder import ForeignEncoder, encode_by, load_encoder
from ..model import Embedder
from ..store.files import whole_file
from ..store.model_folder import is_model, read_json
from ..text import QUERY_PROMPT
from .benchmarks import instructions
from .library import mteb
from .models import RememberedRows, revision_of
from .run import Results, run_tasks
from .variants import PRECISIONS, variants_of

TOKEN_BUDGET = {"cpu": 1024, "cuda": 16384}  # per forward pass; on a CPU 8192 take a third longer than 1024
PLAIN_LOADER = "SentenceTransformerEncoderWrapper"  # of mteb's registry
NO_PROMPTS = {"query": "", "document": ""}  # what sentence-transformers adds to a folder's own
SIMILARITIES = ("cosine", "dot")


@dataclass(frozen=True)
class PublicModel:
    """A loaded model. prompts: where its prompts come from, in words."""

    name: str
    revision: str
    encode: Callable  # (texts, (prompt, kind of text)) -> one row per text
    dim: int
    max_tokens: int | None
    prompts: str
    interface: Callable  # of one encode: an mteb model
    facts: dict  # what its scores depend on beside weights, dim, precision, the task and the version of mteb

    def key(self, dim: int, precision: str) -> dict:
        """What its scores depend on beside the task and the version of mteb."""
        return {"model": self.name, "revision": self.revision, "dim": dim, "precision": precision} | self.facts


def load_model(name: str, mirror: Path) -> PublicModel:
    """A model from a folder, or from a mirror by its hub id. ValueError if neither is there, or it is no model.

    The revision is the hub's commit, or, of a folder, the SHA-1 of its weights and settings: 40 digits either way.
    """
    folder, hub_id, revision = find_model(name, mirror)
    encoder = load_encoder(folder, TOKEN_BUDGET["cuda" if torch.cuda.is_available() else "cpu"])
    registered, settings = _registered(hub_id, folder), _settings(folder)
    if limit := registered.pop("limit", None):
        _shorten(encoder, limit)
    prompts, words = _prompts_of(folder, hub_id, registered, settings)
    similarity = registered.get("similarity") or settings.get("similarity_fn_name") or "cosine"
    if similarity not in SIMILARITIES:
        raise ValueError(f"{name} is scored by similarity {similarity!r}, but only {', '.join(SIMILARITIES)} are known")
    default = (settings.get("prompts") or {}).get(settings.get("default_prompt_name")) or ""
    encode = partial(_encode_as_read, default) if isinstance(encoder, Embedder) else _encode_as_declared
    rows = RememberedRows(lambda texts, prompt: encode(encoder, texts, prompt))
    interface = _interface(prompts, hub_id or f"f2llm/{folder.resolve().name}", revision, similarity)
    dtype = str(next(_module(encoder).parameters()).dtype).removeprefix("torch.")
    facts = {"prompts": words, "of": _digest([prompts, similarity, default]), "max_tokens": encoder.max_tokens}
    key = facts | {"computed_in": dtype}
    return PublicModel(hub_id or folder.name, revision, rows, encoder.dim, encoder.max_tokens, words, interface, key)


def _module(encoder: Embedder | ForeignEncoder) -> torch.nn.Module:
    return encoder.model


def _shorten(encoder: Embedder | ForeignEncoder, limit: int) -> None:
    """Read texts up to the registry's maximum length."""
    if isinstance(encoder, ForeignEncoder):
        encoder.model.max_seq_length = limit
    else:
        encoder.max_tokens = min(limit, encoder.max_tokens)


def _digest(values) -> str:
    """Of values in which functions count by their names."""
    text = json.dumps(values, sort_keys=True, default=lambda value: getattr(value, "__name__", str(value)))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _settings(folder: Path) -> dict:
    path = folder / "config_sentence_transformers.json"
    return read_json(path) if path.exists() else {}


def find_model(name: str, mirror: Path) -> tuple[Path, str | None, str]:
    """(folder, hub id or None, revision) of a folder's path or of a hub id in a mirror."""
    folder, held = Path(name), Mirror(mirror)
    if is_model(folder):
        return folder, None, revision_of(folder)
    if folder.exists():
        raise ValueError(f"{folder} is no model: it has no config.json and no modules.json; remedy: a model's folder")
    if name not in held:
        raise ValueError(
            f"there is no folder {name}, and mirror {mirror} holds no model of that id; remedy: f2llm fetch --model "
            f"{name} on a machine with network, or the path of a folder"
        )
    held.require(name, ["*.safetensors", *held.names(name)], command=f"f2llm fetch --model {name}", hashed=True)
    return held.path / name, name, held.revision(name)


def _registered(hub_id: str | None, folder: Path) -> dict:
    """What mteb's registry says of a model: instructions, template and on_documents, or declared prompts.

    Also its similarity, and its limit, the maximum length in tokens. Empty if the registry does not know the model. A
    loader of the registry's own is run once to see what it makes of the folder.
    """
    try:
        meta = mteb().get_model_meta(hub_id) if hub_id else None
    except KeyError:
        return {}
    if meta is None or meta.loader is None:
        return {}
    from mteb.models.instruct_wrapper import InstructSentenceTransformerModel

    given = dict(meta.loader_kwargs or {})
    similarity = {"similarity": meta.similarity_fn_name and meta.similarity_fn_name.value}
    if meta.loader.__name__ == PLAIN_LOADER:
        return similarity | {"declared": given.get("model_prompts")}
    if meta.loader is not InstructSentenceTransformerModel:
        loaded = meta.loader(str(folder), revision=None, **given)
        if not isinstance(loaded, InstructSentenceTransformerModel):
            raise ValueError(
                f"mteb loads {hub_id} by code of its own ({meta.loader.__name__}), which this kit does not run; "
                "remedy: mteb.evaluate on mteb.get_model, where a network is"
            )
        given |= {"instruction_template": loaded.instruction_template, "prompts_dict": loaded.prompts_dict}
        given |= {"apply_instruction_to_passages": loaded.apply_instruction_to_passages}
    return similarity | {
        "instructions": given.get("prompts_dict") or {},
        "template": given.get("instruction_template"),
        "on_documents": given.get("apply_instruction_to_passages", True),
        "limit": given.get("max_seq_length"),
    }


def _prompts_of(folder: Path, hub_id: str | None, registered: dict, settings: dict) -> tuple[dict, str]:
    """(arguments of an `InstructedEncoder`, or {"declared": prompts}; where they come from)."""
    facts = read_json(folder / "train.json") if (folder / "train.json").exists() else {}
    recipe = None
    if hub_id and hub_id.startswith("codefuse-ai/F2LLM"):
        recipe = "v2" if "-v2-" in hub_id else "v1"
    elif facts.get("instructions"):
        recipe = facts.get("recipe", "v2")
    if recipe:
        return {"instructions": instructions(recipe), "template": QUERY_PROMPT}, f"F2LLM's instructions, {recipe}"
    if registered.get("template"):
        given = {key: registered[key] for key in ("instructions", "template", "on_documents")}
        return given, "instructions of mteb's registry"
    if registered.get("declared"):
        return {"declared": NO_PROMPTS | registered["declared"]}, "prompts of mteb's registry"
    given = {key: prompt for key, prompt in (settings.get("prompts") or {}).items() if prompt is not None}
    declared = NO_PROMPTS | given
    shown = ", ".join(sorted(key for key, prompt in declared.items() if prompt)) or "none"
    return {"declared": declared}, f"prompts of its folder: {shown}"


def _interface(prompts: dict, name: str, revision: str, similarity: str) -> Callable:
    mteb()
    from .tasks import InstructedEncoder, PromptedEncoder

    facts = {"revision": revision, "similarity": similarity}
    if "declared" in prompts:
        return lambda encode: PromptedEncoder(encode, name, prompts["declared"], **facts)
    return lambda encode: InstructedEncoder(encode, name, **prompts, **facts)


def _encode_as_read(
    default: str, encoder: Embedder, texts: list[str], prompt: tuple[str | None, str | None]
) -> np.ndarray:
    """By the kit's forward pass: the prompt is part of the text; default: the folder's prompt where none is given."""
    front = default if prompt[0] is None else prompt[0]
    return encoder.encode([front + text for text in texts])


def _encode_as_declared(encoder: ForeignEncoder, texts: list[str], prompt: tuple[str | None, str | None]) -> np.ndarray:
    """By sentence-transformers: queries and documents through its own functions for them."""
    text, kind = prompt
    encode = {"query": encoder.model.encode_query, "document": encoder.model.encode_document}.get(
        kind, encoder.model.encode
    )
    return np.asarray(encode_by(encode, texts, prompt=text), dtype=np.float32)


def variants(model: PublicModel, dims: Sequence[int], precisions: Sequence[str]) -> dict[tuple[int, str], object]:
    """{(dim, precision): mteb model}; ValueError for a dim or a precision that the model cannot have."""
    for dim in dims:
        if not 1 <= dim <= model.dim:
            raise ValueError(f"--dim is {dim}, but embeddings of {model.name} have {model.dim} dimensions")
    for precision in precisions:
        if precision not in PRECISIONS:
            raise ValueError(f"--precision is {precision!r}, but must be one of {', '.join(PRECISIONS)}")
    if "binary" in precisions and model.dim % 8:
        raise ValueError(f"--precision is binary, but {model.dim} dimensions are no multiple of 8")
    found = variants_of(model.encode, model.dim, dims, precisions)
    return {key: model.interface(encode) for key, encode in found.items()}


def score_model(
    model: PublicModel,
    tasks: Sequence,
    folder: Path,
    dims: Sequence[int] = (),
    precisions: Sequence[str] = (),
    part: tuple[int, int] = (0, 1),
) -> tuple[pd.DataFrame, Results]:
    """(model, dim, precision, task, type, split, subset, score; the results by ((dim, precision), task)).

    The result of each task is kept in `folder` as it ends, and read from there by the next call with the same weights,
    prompts, data and version of mteb. Texts are embedded once for all dims and precisions.
    """
    models = variants(model, dims, precisions)
    keep = {(dim, precision): folder_of(folder, model, dim, precision) for dim, precision in models}
    results = run_tasks(models, tasks, keep, part, after_task=model.encode.clear)
    return results.by_variant(model.name), results


def folder_of(folder: Path, model: PublicModel, dim: int, precision: str) -> Path:
    """Where results of a model at a dim and precision are kept; model.json there says what they are of."""
    facts = model.key(dim, precision)
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    path = Path(folder) / f"{model.name.replace('/', '__')}-{digest}"
    if not (path / "model.json").exists():
        with whole_file(path / "model.json") as new:
            new.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return path
