"""Says whether a model folder still gives the embeddings that it was written with, and if not, names the fault.

A folder with an embedding contract is held against it, any other one against what its own files declare. Its texts go
through the kit's forward pass, sentence-transformers, and transformers alone, as a reader of the model card would use
it. No code of the folder is run, no pickle is read, nothing is downloaded.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..contract import IDS_KEPT, VERSION, Contract, Probe, probe_texts, read_contract
from ..encoder import ForeignEncoder
from ..model import Embedder, device_and_dtype, load_weights
from ..store.model_folder import (
    NotComputed,
    check_foreign_folder,
    check_model_folder,
    is_model,
    longest_text,
    pooling_modes,
    read_json,
    weight_dtypes,
)
from ..text import QUERY_PROMPT, prompted

DISTANCE = {True: 1e-3, False: 0.2}  # between unit vectors: all in float32, or not; the other is a cosine of 0.98
AGAIN = "copy the whole folder again"


@dataclass(frozen=True)
class Finding:
    """The result of one check. state: ok, WRONG, or note: nothing to check, or what follows from a fault above."""

    state: str
    check: str
    text: str

    def __str__(self) -> str:
        return f"{self.state}: {self.check}: {self.text}"


@dataclass(frozen=True)
class Examined:
    """A folder, what its files declare, and what it is held against; own: whether that is a contract of its own."""

    folder: Path
    modules: list[str]  # names of classes, such as Pooling; [] without modules.json
    pooling: dict
    config: dict
    tokenizer: PreTrainedTokenizerBase | None
    contract: Contract
    own: bool

    def compare(self, check: str, found, expected, remedy: str) -> Finding:
        """ok if what was found is what is expected."""
        if found == expected:
            return Finding("ok", check, shown(found))
        return Finding("WRONG", check, f"found {shown(found)}, expected {shown(expected)}; remedy: {remedy}")

    @property
    def pools_last_token(self) -> bool:
        return self.contract.pooling == "lasttoken"

    @property
    def exact(self) -> bool:
        """Whether everything is float32, so that embeddings must agree to a thousandth."""
        kinds = {self.contract.computed_in or "float32", *weight_dtypes(self.folder)} | set(_dtype(self.config))
        return kinds == {"float32"} and device_and_dtype()[1] == torch.float32


def shown(value) -> str:
    """A value in a line of the report."""
    if isinstance(value, list):
        return " + ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def examine(folder: Path) -> list[Finding]:
    """The findings of all checks of a folder, in order; ValueError if it is no whole model or not safe to load."""
    folder = Path(folder)
    if not is_model(folder):
        what = "has neither config.json nor modules.json" if folder.is_dir() else "is no folder"
        raise ValueError(f"{folder} {what}, so it is no model; remedy: the folder of a model, such as models/stage2")
    contract = read_contract(folder)
    _check_files(folder, contract)
    examined = _read(folder, contract)
    start = "its own embedding contract" if examined.own else "what its files declare: it has no embedding contract"
    found = [Finding("note", "held against", start)]
    found += [check(examined) for check in (_modules, _pooling, _pooling_dim, _normalisation, _prompts)]
    found += [check(examined) for check in (_max_tokens, _precision)]
    if examined.tokenizer and examined.pools_last_token:
        found += [_padding(examined), _eos(examined), _tokens(examined)]
    return found + _embeddings(examined, faulty=any(finding.state == "WRONG" for finding in found))


# Reading ----------------------------------------------------------------------------------------


def _check_files(folder: Path, contract: Contract | None) -> None:
    """ValueError if files are missing or damaged, or would run code of their own."""
    if (folder / "modules.json").exists():
        check_foreign_folder(folder)
    if contract or not (folder / "modules.json").exists():
        with suppress(NotComputed):  # whole, but with other pooling or of another family, which the checks below name
            check_model_folder(folder)


def _read(folder: Path, contract: Contract | None) -> Examined:
    modules = read_json(folder / "modules.json") if (folder / "modules.json").exists() else []
    paths = {module["type"].rpartition(".")[2]: folder / module["path"] for module in modules}
    body, pooling = paths.get("Transformer", folder), paths.get("Pooling", folder) / "config.json"
    has_pooling = "Pooling" in paths and pooling.exists()
    config = read_json(body / "config.json") if (body / "config.json").exists() else {}
    tokenizer = _tokenizer(body) if config else None
    read = partial(Examined, body, list(paths), read_json(pooling) if has_pooling else {}, config, tokenizer)
    if contract:
        return replace(read(contract, own=True), folder=folder)
    return replace(read(None, own=False), folder=folder, contract=declared(folder, read(None, own=False)))


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # of tokenizers, which has no type of its own, or of transformers
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{folder}: its tokenizer cannot be loaded ({reason}); remedy: {AGAIN}") from None


def declared(folder: Path, read: Examined) -> Contract:
    """A contract that says what a folder without one declares; its token ids are those of its own tokenizer."""
    longest = longest_text(folder) or read.config.get("max_position_embeddings") or 512
    longest = min(longest, read.config.get("max_position_embeddings") or longest)
    eos, probes = _ending(read.tokenizer), []
    for name, text, times, instruction in probe_texts(longest) if read.tokenizer else []:
        whole = prompted(text * times, instruction)
        ids = read.tokenizer(whole, truncation=True, max_length=longest)["input_ids"]
        probes.append(Probe(name, text, times, instruction, len(ids), ids[:IDS_KEPT], None))
    return Contract(
        version=VERSION,
        pooling=" + ".join(pooling_modes(read.pooling)) or "none",
        normalised="Normalize" in read.modules,
        dim=read.config.get("hidden_size") or 0,
        matryoshka_dims=None,
        max_tokens=longest,
        eos_token=read.tokenizer.convert_ids_to_tokens(eos) if eos is not None else "",
        eos_token_id=-1 if eos is None else eos,
        tokens_before=[],
        padding_side=read.tokenizer.padding_side if read.tokenizer else "right",
        dtype=" and ".join(weight_dtypes(folder) or _dtype(read.config)),
        computed_in=None,
        prompts=_declared_prompts(folder),
        query_prompt=QUERY_PROMPT,
        probes=probes,
    )


def _ending(tokenizer: PreTrainedTokenizerBase | None) -> int | None:
    """The token that a tokenizer puts after a text, whatever it calls EOS; EOS if it puts none there."""
    if tokenizer is None:
        return None
    plain, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    return whole[-1] if whole[-1:] != plain[-1:] else tokenizer.eos_token_id


def _dtype(config: dict) -> list[str]:
    """The precision that config.json declares, in the spelling of transformers 5 or 4; [] if none."""
    kind = config.get("dtype") or config.get("torch_dtype")
    return [str(kind).removeprefix("torch.")] if kind else []


def _declared_prompts(folder: Path) -> dict[str, str]:
    path = folder / "config_sentence_transformers.json"
    return (read_json(path).get("prompts") or {}) if path.exists() else {}


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
    found, expected = _declared_prompts(of.folder), of.contract.prompts
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
    files, config = shown(weight_dtypes(of.folder)), shown(_dtype(of.config))
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
    eos, name = of.contract.eos_token_id, of.contract.eos_token
    remedy = f"a post-processor in tokenizer.json that appends {name or 'EOS'} once (F2LLM: append_eos)"
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


# Embeddings -------------------------------------------------------------------------------------


def _embeddings(of: Examined, faulty: bool) -> list[Finding]:
    """Weights against the contract, then three ways to embed the same texts. faulty: a fault was found before."""
    decoder = of.pools_last_token or not of.modules
    if not decoder or of.config.get("model_type") is None:
        return [_foreign(of)]
    try:
        model = load_weights(of.folder, device_and_dtype()[1]).to(device_and_dtype()[0]).eval()
    except ValueError as error:
        return [Finding("WRONG", "weights", str(error))]
    probes = [probe for probe in of.contract.probes if probe.is_whole]
    reference = np.stack([_last_hidden_state(model, probe.token_ids) for probe in probes])
    found = [_weights(of, probes, reference)]
    if not of.modules and not of.own:
        return [*found, Finding("note", "embeddings", "not compared: which token is pooled is not declared")]
    compared = partial(_compared, of, probes, reference, faulty)
    found.append(compared("transformers", partial(_by_transformers, of, model)))
    del model
    found.append(compared("the kit", lambda texts: Embedder.load(of.folder).encode(texts)))
    found.append(compared("sentence-transformers", partial(_by_sentence_transformers, of)))
    return found


@torch.inference_mode()
def _last_hidden_state(model: PreTrainedModel, ids: list[int]) -> np.ndarray:
    """The embedding of token ids by transformers' own forward pass, at unit length."""
    hidden = model(input_ids=torch.tensor([ids], device=model.device)).last_hidden_state[0, -1]
    return torch.nn.functional.normalize(hidden.float(), dim=-1).cpu().numpy()


def _distance(found: np.ndarray, expected: np.ndarray) -> float:
    """The length of the difference, in lengths of what is expected; infinite if it is another number of numbers."""
    if found.shape != expected.shape:
        return float("inf")
    return float(np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-12))


def _weights(of: Examined, probes: list[Probe], reference: np.ndarray) -> Finding:
    golden = {row: np.array(probe.embedding) for row, probe in enumerate(probes) if probe.embedding}
    if not golden:
        why = "its contract has no embeddings, `f2llm export` adds them" if of.own else "there is no contract"
        return Finding("note", "weights", f"whole; whether they are the original ones is not known: {why}")
    distances = {row: _distance(reference[row][: len(values)], values) for row, values in golden.items()}
    worst = max(distances, key=distances.get)
    if distances[worst] <= DISTANCE[of.exact]:
        return Finding("ok", "weights", f"{len(golden)} embeddings within {distances[worst]:.0e} of the contract's")
    text = f"found an embedding of the contract's token ids of {probes[worst].name!r} at a distance of "
    text += f"{distances[worst]:.2g} from the contract's, expected at most {DISTANCE[of.exact]:g}"
    return Finding("WRONG", "weights", f"{text}; remedy: the weights and the config.json that belong to the contract")


def _compared(
    of: Examined, probes: list[Probe], reference: np.ndarray, faulty: bool, name: str, encode: Callable
) -> Finding:
    """One way to embed the probes' texts, against the embeddings of their token ids."""
    try:
        rows = np.asarray(encode([probe.whole_text for probe in probes]), dtype=np.float32)
    except NotComputed as error:
        if not of.own:
            return Finding("note", name, f"not computed by its forward pass: {error}")
        reason = str(error)
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
    else:
        if not of.contract.normalised:
            rows = rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-12)
        distances = [_distance(*pair) for pair in zip(rows, reference)]
        worst = int(np.argmax(distances))
        if distances[worst] <= DISTANCE[of.exact]:
            return Finding(
                "ok", name, f"{len(rows)} texts within {distances[worst]:.0e} of their token ids' embeddings"
            )
        reason = f"the embedding of {probes[worst].name!r} is {distances[worst]:.2g} from that of its token ids"
    if faulty:
        reason = reason.partition("; remedy: ")[0]
        return Finding("note", name, f"{reason}, as is to be expected with what is WRONG above")
    remedy = "other versions of transformers or sentence-transformers, and a report of this one"
    return Finding("WRONG", name, reason if "; remedy: " in reason else f"{reason}; remedy: {remedy}")


def _by_sentence_transformers(of: Examined, texts: list[str]) -> np.ndarray:
    try:
        import sentence_transformers
    except ImportError:
        raise ValueError("it is not installed; remedy: pip install sentence-transformers") from None
    model = sentence_transformers.SentenceTransformer(str(of.folder), local_files_only=True)
    return model.encode(texts, prompt="", show_progress_bar=False)


@torch.inference_mode()
def _by_transformers(of: Examined, model: PreTrainedModel, texts: list[str]) -> np.ndarray:
    """As the model card says: one padded batch, cut by the tokenizer, pooled where its side of padding puts the end."""
    options = {"truncation": True, "max_length": of.contract.max_tokens, "return_tensors": "pt"}
    batch = of.tokenizer(texts, padding=True, **options).to(model.device)
    last = batch["attention_mask"].sum(1) - 1
    if of.contract.padding_side == "left":
        last = torch.full_like(last, -1)
    rows = model(**batch).last_hidden_state[torch.arange(len(texts), device=model.device), last]
    return torch.nn.functional.normalize(rows.float(), dim=-1).cpu().numpy()


def _foreign(of: Examined) -> Finding:
    """A model that only sentence-transformers runs: whole, and with embeddings that do not depend on neighbours."""
    try:
        encoder = ForeignEncoder(of.folder)
    except ValueError as error:
        return Finding("WRONG", "weights", str(error))
    texts = [prompted(text * min(times, 20), instruction) for _, text, times, instruction in probe_texts(512)]
    together = encoder.embed_texts(texts).cpu().numpy()
    alone = np.concatenate([encoder.embed_texts([text]).cpu().numpy() for text in texts])
    worst = max(_distance(*pair) for pair in zip(together, alone))
    if worst <= DISTANCE[of.exact]:
        return Finding("ok", "sentence-transformers", f"{len(texts)} texts give the same alone and in a batch")
    text = f"found embeddings that differ by {worst:.2g} alone and in a batch, expected {DISTANCE[of.exact]:g} at most"
    return Finding("WRONG", "sentence-transformers", f"{text}; remedy: the tokenizer and its padding")
