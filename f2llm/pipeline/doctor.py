"""Says whether a model folder still gives the embeddings that it was written with, and if not, names the fault.

A folder with an embedding contract is held against it, any other one against what its own files declare. Then its texts
are embedded in three ways, see `f2llm.pipeline.replay`. No code of the folder is run, no pickle is read, nothing is
downloaded.
"""

from contextlib import suppress
from pathlib import Path

from ..contract import Contract, Probe, read_contract
from ..store.model_folder import (
    NotComputed,
    check_foreign_folder,
    check_model_folder,
    is_model,
    longest_text,
    pooling_modes,
    weight_dtypes,
)
from .examined import Examined, Finding, declared_dtype, declared_prompts, read, shown
from .replay import replay

AGAIN = "copy the whole folder again"


def examine(folder: Path) -> list[Finding]:
    """The findings of all checks of a folder, in order; ValueError if it is no whole model or not safe to load."""
    folder = Path(folder)
    if not is_model(folder):
        what = "has neither config.json nor modules.json" if folder.is_dir() else "is no folder"
        raise ValueError(f"{folder} {what}, so it is no model; remedy: the folder of a model, such as models/stage2")
    contract = read_contract(folder)
    _check_files(folder, contract)
    examined = read(folder, contract)
    start = "its own embedding contract" if examined.own else "what its files declare: it has no embedding contract"
    found = [Finding("note", "held against", start)]
    found += [check(examined) for check in (_modules, _pooling, _pooling_dim, _normalisation, _prompts)]
    found += [check(examined) for check in (_max_tokens, _precision)]
    if examined.tokenizer and examined.pools_last_token:
        found += [_padding(examined), _eos(examined), _tokens(examined)]
    return found + replay(examined, faulty=any(finding.state == "WRONG" for finding in found))


def _check_files(folder: Path, contract: Contract | None) -> None:
    """ValueError if files are missing or damaged, or would run code of their own."""
    if (folder / "modules.json").exists():
        check_foreign_folder(folder)
    if contract or not (folder / "modules.json").exists():
        with suppress(NotComputed):  # whole, but with other pooling or of another family, which the checks below name
            check_model_folder(folder)


# What is declared -------------------------------------------------------------------------------


def _modules(of: Examined) -> Finding:
    if not of.modules:
        text = "no modules.json: sentence-transformers would make up a model that pools the mean of all tokens"
        return Finding("WRONG", "modules", f"{text}; remedy: {AGAIN}") if of.own else Finding("note", "modules", text)
    more = [name for name in of.modules if name not in ("Transformer", "Pooling", "Normalize")]
    if of.own and (more or "Transformer" not in of.modules):
        return of.compare("modules", of.modules, ["Transformer", "Pooling", "Normalize"], AGAIN)
    return Finding("ok", "modules", shown(of.modules))


def _pooling(of: Examined) -> Finding:
    if not of.modules:
        return Finding("note", "pooling", "none is declared")
    found = shown(pooling_modes(of.pooling))
    if of.pooling.get("include_prompt") is False and of.pools_last_token:
        found += " without the prompt"
    remedy = '1_Pooling/config.json with "pooling_mode_lasttoken": true and "include_prompt": true alone'
    return of.compare("pooling", found, of.contract.pooling, remedy)


def _pooling_dim(of: Examined) -> Finding:
    found = of.pooling.get("word_embedding_dimension", of.pooling.get("embedding_dimension"))
    hidden = of.config.get("hidden_size")
    if found is None or hidden is None:
        return Finding("note", "pooling dimension", "none is declared")
    remedy = f"word_embedding_dimension {hidden} in the config.json of Pooling"
    return of.compare("pooling dimension", found, hidden, remedy)


def _normalisation(of: Examined) -> Finding:
    has = "Normalize" in of.modules
    if not of.modules or (not of.own and not has):
        return Finding("note", "normalisation", "none is declared; embeddings are not of unit length")
    remedy = "a module sentence_transformers.models.Normalize at the end of modules.json"
    return of.compare("normalisation", "unit length" if has else None, "unit length", remedy)


def _prompts(of: Examined) -> Finding:
    found, expected = declared_prompts(of.folder), of.contract.prompts
    names = f"of {' and '.join(sorted(found))}" if found else None
    if not of.own:
        return Finding("ok" if found else "note", "prompts", names or "none are declared")
    if found == expected:
        return Finding("ok", "prompts", names or "none")
    remedy = f'"prompts": {expected} in config_sentence_transformers.json'
    return of.compare("prompts", str(found) if found else None, str(expected), remedy)


def _max_tokens(of: Examined) -> Finding:
    found = longest_text(of.folder)
    if not of.modules:
        return Finding("note", "maximum length", "none is declared")
    if of.own:
        remedy = f'"max_seq_length": {of.contract.max_tokens} in sentence_bert_config.json'
        return of.compare("maximum length", found, of.contract.max_tokens, remedy)
    most = of.config.get("max_position_embeddings")
    if found and most and found > most:
        remedy = f'"max_seq_length": {most} in sentence_bert_config.json'
        return Finding("WRONG", "maximum length", f"found {found}, expected at most {most} positions; remedy: {remedy}")
    return Finding("ok" if found else "note", "maximum length", f"{found} tokens" if found else "none is declared")


def _precision(of: Examined) -> Finding:
    """Both the file and what config.json says: libraries convert the one to the other when they load it."""
    files, config = shown(weight_dtypes(of.body)), shown(declared_dtype(of.config))
    expected = of.contract.dtype
    if files == expected and config in (expected, "none"):
        return Finding("ok", "precision", expected)
    if files == "none" and not of.own:
        return Finding("note", "precision", f"weights of another module than the first; config.json: {config}")
    text = f"found {files} in safetensors and {config} in config.json, expected {expected}"
    remedy = f"the original weights, or dtype={expected} when it is loaded if only config.json differs"
    return Finding("WRONG", "precision", f"{text}; remedy: {remedy}")


# Tokens -----------------------------------------------------------------------------------------


def _padding(of: Examined) -> Finding:
    found, expected = of.tokenizer.padding_side, of.contract.padding_side
    if found != expected:
        where = {"right": "attention_mask.sum(1) - 1", "left": "-1"}[expected]
        remedy = f'"padding_side": "{expected}" in tokenizer_config.json'
        text = f"found on the {found}, expected on the {expected}: in a batch, position {where} is then another token"
        return Finding("WRONG", "padding", f"{text}; remedy: {remedy}")
    if of.tokenizer.pad_token is None:
        return Finding(
            "WRONG", "padding", "found no pad token, expected one; remedy: pad_token in tokenizer_config.json"
        )
    return Finding("ok", "padding", f"on the {found}, with {of.tokenizer.pad_token}")


def _ids(of: Examined, probe: Probe) -> list[int]:
    return of.tokenizer(probe.whole_text, truncation=True, max_length=of.contract.max_tokens)["input_ids"]


def _number_of_eos(ids: list[int], eos: int) -> int:
    """How many EOS a text ends with."""
    return next((count for count, number in enumerate(reversed(ids)) if number != eos), len(ids))


def _without_end(of: Examined, ids: list[int]) -> list[int]:
    """Token ids without the special tokens at their end."""
    special = {number for number, token in of.tokenizer.added_tokens_decoder.items() if token.special}
    special |= {of.contract.eos_token_id}
    return ids[: next((end for end in range(len(ids), 0, -1) if ids[end - 1] not in special), 0)]


def _eos(of: Examined) -> Finding:
    """Exactly one EOS after every text, also after one that was cut."""
    eos, name = of.contract.eos_token_id, of.contract.eos_token or "EOS"
    remedy = f"a post-processor in tokenizer.json that appends {name} once"
    if of.own and of.tokenizer.eos_token_id != eos:
        found = f"{of.tokenizer.eos_token} ({of.tokenizer.eos_token_id})"
        return of.compare("EOS", found, f"{name} ({eos})", "eos_token in tokenizer_config.json")
    for probe in of.contract.probes:
        ids = _ids(of, probe)
        count = _number_of_eos(ids, eos)
        if count != 1:
            found = count or f"{of.tokenizer.convert_ids_to_tokens(ids[-1])!r} and no EOS"
            text = f"found {found} after the probe {probe.name!r}, expected one {name}"
            return Finding("WRONG", "EOS", f"{text}; remedy: {remedy}")
    return Finding("ok", "EOS", f"{name} once after every text, cut or not")


def _tokens(of: Examined) -> Finding:
    """The tokens of each probe but for special ones at its end, which the check before has looked at."""
    for probe in of.contract.probes:
        found = _without_end(of, _ids(of, probe)[: len(probe.token_ids)])
        expected = _without_end(of, probe.token_ids)
        cut = probe.num_tokens == of.contract.max_tokens
        both = min(len(found), len(expected)) if cut else max(len(found), len(expected))
        if found[:both] != expected[:both]:
            where = next((at for at, pair in enumerate(zip(found, expected)) if len(set(pair)) > 1), both - 1)
            tokens = [of.tokenizer.convert_ids_to_tokens(ids[where : where + 1]) for ids in (found, expected)]
            text = f"found {shown(tokens[0])} at token {where} of the probe {probe.name!r}, expected {shown(tokens[1])}"
            return Finding("WRONG", "tokens", f"{text}; remedy: the tokenizer.json of this model")
    return Finding("ok", "tokens", f"of {len(of.contract.probes)} probes")
