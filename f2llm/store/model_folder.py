"""What a model folder declares of itself, checked against what the kit's forward pass computes.

That pass is a decoder's with the hidden state of the last token as embedding. A folder that declares something else
would give other embeddings than the model's own, so it is refused by name.
"""

import json
from pathlib import Path

# model_type of config.json: decoders whose layers call transformers' attention interface; tests/test_architectures.py
OF_LLAMA = ("qwen3", "qwen2", "llama", "mistral")  # weights named as Llama's, two norms a layer: these can be pruned
ARCHITECTURES = (*OF_LLAMA, "gemma", "gemma2", "gemma3_text", "smollm3", "olmo", "olmo2", "olmo3")
# The linear layers of every one of them, in attention and MLP.
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
HEADS = ("lm_head", "cls.", "pooler.", "classifier.", "qa_outputs.", "embeddings.position_ids")
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors: torch
WEIGHTS = ["model.safetensors", "model.safetensors.index.json"]
REMEDY = (
    "remedy: as a miner, sentence-transformers:<folder> runs it as it is; elsewhere, a decoder with last-token pooling"
)


class NotComputed(ValueError):
    """A whole model that the kit's forward pass does not compute; sentence-transformers may run it as an encoder."""


def read_json(path: Path) -> dict | list:
    """The content of a JSON file; ValueError if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: no JSON ({error}); remedy: copy or fetch it again") from None


def is_model(folder: Path) -> bool:
    """Whether a folder is a model of transformers or of sentence-transformers; ValueError if it holds an adapter."""
    refuse_adapter(folder)
    return (folder / "config.json").is_file() or (folder / "modules.json").is_file()


def refuse_adapter(folder: Path) -> None:
    """ValueError if a folder holds an adapter of peft, which libraries would add to weights or look for a base of."""
    if adapters := sorted(file.name for file in folder.glob("adapter_*")):
        raise ValueError(
            f"{folder} has an adapter ({adapters[0]}), which is no model by itself; remedy: f2llm merge {folder} BASE "
            "OUT, which adds it to the weights of the model that it was trained on"
        )


def check_model_folder(folder: Path) -> None:
    """ValueError unless the folder is a whole model whose embeddings the kit's forward pass computes."""
    refuse_adapter(folder)
    for names in (["config.json"], WEIGHTS, ["tokenizer.json"]):
        if not any((folder / name).exists() for name in names):
            raise ValueError(
                f"{folder / names[0]} is missing, so {folder} is no model; remedy: dvc repro, or another path"
            )
    _check_config(folder, read_json(folder / "config.json"))
    _check_shards(folder)
    if (folder / "modules.json").exists():
        _check_modules(folder, read_json(folder / "modules.json"))


def longest_text(folder: Path) -> int | None:
    """The longest text in tokens that a sentence-transformers folder declares; None if it does not.

    Its version 6 keeps it in the tokenizer's model_max_length, where other tools write 1e30 for no limit.
    """
    for name, key in (("sentence_bert_config.json", "max_seq_length"), ("tokenizer_config.json", "model_max_length")):
        if (folder / name).exists() and (folder / "modules.json").exists():
            length = read_json(folder / name).get(key)
            if isinstance(length, int) and 0 < length < 10**9:
                return length
    return None


def weight_dtypes(folder: Path) -> list[str]:
    """Names of the floating-point types in a folder's safetensors, as torch spells them: float32, bfloat16."""
    found = set()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as opened:  # a header of JSON, whose length comes first
            try:
                header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
                found |= {entry["dtype"] for name, entry in header.items() if name != "__metadata__"}
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError):
                raise ValueError(f"{file} is damaged: it has no header; remedy: copy or fetch it again") from None
    return sorted(DTYPES.get(name, name) for name in found if "F" in name)


def _check_config(folder: Path, config: dict) -> None:
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        computed = ", ".join(ARCHITECTURES)
        raise NotComputed(f"{folder} is a {kind!r}, but the kit's forward pass computes {computed}; {REMEDY}")
    for key, what in (("auto_map", "code of its own"), ("quantization_config", "quantised weights")):
        if config.get(key):
            raise ValueError(f"{folder}/config.json declares {what} ({key}), which the kit never runs; {REMEDY}")
    if config.get("use_bidirectional_attention") or config.get("is_causal") is False:
        raise NotComputed(
            f"{folder}/config.json declares bidirectional attention, which the kit does not compute; {REMEDY}"
        )
    if "longrope" in _rope_types(config):
        raise NotComputed(
            f"{folder}/config.json declares rope_type longrope, whose frequencies follow the longest text of a batch: "
            f"embeddings would depend on their neighbours, which the kit does not compute; {REMEDY}"
        )


def _rope_types(config: dict) -> set[str | None]:
    """The kinds of rotary embeddings, in the spelling of transformers 5 or 4; Gemma 3 has one for each layer type."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    parts = [part for part in (rope, *rope.values()) if isinstance(part, dict)]
    return {part.get("rope_type", part.get("type")) for part in parts}


def _check_shards(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists() or not index.exists():
        return
    shards = sorted(set(read_json(index).get("weight_map", {}).values()))
    if missing := [name for name in shards if not (folder / name).exists()]:
        raise ValueError(f"{index} names {missing[0]}, which is missing; remedy: copy or fetch the whole folder")


def _check_modules(folder: Path, modules: list) -> None:
    """What sentence-transformers would compute: Transformer, last-token Pooling, perhaps Normalize, nothing else."""
    for module in modules:
        kind = module["type"].rpartition(".")[2]
        if kind not in ("Transformer", "Pooling", "Normalize"):
            raise NotComputed(f"{folder}/modules.json has a module {kind}, which the kit does not compute; {REMEDY}")
        if kind == "Pooling":
            path = folder / module["path"] / "config.json"
            if not path.exists():
                raise ValueError(
                    f"{path} is missing, so the pooling is unknown; remedy: copy or fetch the whole folder"
                )
            if (pooling := pooling_modes(read_json(path))) != ["lasttoken"]:
                raise NotComputed(f"{path} declares {' + '.join(pooling) or 'no'} pooling, not lasttoken; {REMEDY}")
    if (settings := folder / "sentence_bert_config.json").exists() and read_json(settings).get("do_lower_case"):
        raise NotComputed(f"{settings} declares do_lower_case, which the kit does not compute; {REMEDY}")


def pooling_modes(config: dict) -> list[str]:
    """The pooling modes of both spellings: booleans up to version 5 of sentence-transformers, then names."""
    if "pooling_mode" in config:
        modes = config["pooling_mode"]
        return [modes] if isinstance(modes, str) else list(modes)
    short = {"mean_tokens": "mean", "cls_token": "cls", "max_tokens": "max"}
    names = [key.removeprefix("pooling_mode_") for key, on in config.items() if key.startswith("pooling_mode_") and on]
    return [short.get(name, name) for name in names]


def check_foreign_folder(folder: Path) -> None:
    """ValueError unless a folder of sentence-transformers can be run without code of its own and without pickles."""
    if not (folder / "modules.json").exists():
        raise ValueError(
            f"{folder} has no modules.json, so which tokens are pooled is unknown; remedy: a folder that "
            "sentence-transformers saved, or embedder:<folder> for a decoder with last-token pooling"
        )
    for module in read_json(folder / "modules.json"):
        refuse_adapter(folder / str(module.get("path", "")))
        if not str(module.get("type", "")).startswith("sentence_transformers."):
            raise ValueError(
                f"{folder}/modules.json has a module of type {module.get('type')!r}, which is code of its own; "
                "remedy: a model of sentence-transformers' own modules"
            )
    for path in (folder / "config.json", folder / "tokenizer_config.json"):
        if path.exists() and read_json(path).get("auto_map"):
            raise ValueError(f"{path} declares code of its own (auto_map), which the kit never runs; {REMEDY}")
    require_no_pickles(folder)


def require_no_pickles(folder: Path) -> None:
    """ValueError if weights of a folder, or of a module in it, are there as pickles alone."""
    for file in sorted(folder.rglob("pytorch_model*.bin")):  # also of a module such as 2_Dense
        if not list(file.parent.glob("*.safetensors")):
            raise ValueError(
                f"{folder}: the weights of {file.name} are a pickle, which can hold code and is not "
                "read; remedy: save them as safetensors (in an environment that you can spare)"
            )


def check_weights(folder: Path, report: dict) -> None:
    """ValueError if tensors that the model needs are missing or of another shape, or if files hold others.

    report: the loading info of transformers. Heads may be left over, and a pooler, which nothing here reads, missing.
    """
    left_over = {name for name in report["unexpected_keys"] if not name.startswith(HEADS)}
    missing = {name for name in report["missing_keys"] if not name.startswith("pooler.")}
    shapes = {f"{name} {tuple(saved)}, not {tuple(needed)}" for name, saved, needed in report["mismatched_keys"]}
    for names, what in (
        (missing, "lacks the weights"),
        (left_over, "has left over the weights"),
        (shapes, "has weights of another shape than its config.json:"),
    ):
        if names:
            shown = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise ValueError(f"{folder} {what} {shown}; remedy: the whole model, saved for its config.json")
