"""A model folder as `f2llm doctor` sees it: what its files declare, and what that is held against."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..contract import IDS_KEPT, VERSION, Contract, Probe, probe_texts
from ..model import device_and_dtype
from ..store.model_folder import longest_text, pooling_modes, read_json, weight_dtypes
from ..text import QUERY_PROMPT, prompted


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
    """A folder, what its files declare, and what it is held against; own: whether that is a contract of its own.

    body: where the files of transformers are, mostly the folder itself. modules: names of classes, such as Pooling; []
    without modules.json.
    """

    folder: Path
    body: Path
    modules: list[str]
    pooling: dict
    config: dict
    tokenizer: PreTrainedTokenizerBase | None
    contract: Contract | None
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
        kinds = {self.contract.computed_in or "float32", *weight_dtypes(self.body)} | set(declared_dtype(self.config))
        return kinds == {"float32"} and device_and_dtype()[1] == torch.float32


def shown(value) -> str:
    """A value in a line of the report."""
    if isinstance(value, list):
        return " + ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def read(folder: Path, contract: Contract | None) -> Examined:
    """What the files of a folder declare; contract: its own, None to hold it against what they declare themselves."""
    modules = read_json(folder / "modules.json") if (folder / "modules.json").exists() else []
    paths = {module["type"].rpartition(".")[2]: folder / module["path"] for module in modules}
    body, pooling = paths.get("Transformer", folder), paths.get("Pooling", folder) / "config.json"
    config = read_json(body / "config.json") if (body / "config.json").exists() else {}
    tokenizer = _tokenizer(body) if config else None
    settings = read_json(pooling) if "Pooling" in paths and pooling.exists() else {}
    examined = Examined(folder, body, list(paths), settings, config, tokenizer, contract, own=contract is not None)
    return examined if contract else replace(examined, contract=declared(examined))


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # of tokenizers, which has no type of its own, or of transformers
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{folder}: its tokenizer cannot be loaded ({reason}); remedy: copy the whole folder again"
        ) from None


def declared(read: Examined) -> Contract:
    """A contract that says what a folder without one declares; its token ids are those of its own tokenizer."""
    longest = longest_text(read.folder) or read.config.get("max_position_embeddings") or 512
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
        dtype=" and ".join(weight_dtypes(read.body) or declared_dtype(read.config)),
        computed_in=None,
        prompts=declared_prompts(read.folder),
        query_prompt=QUERY_PROMPT,
        probes=probes,
    )


def _ending(tokenizer: PreTrainedTokenizerBase | None) -> int | None:
    """The token that a tokenizer puts after a text, whatever it calls EOS; EOS if it puts none there."""
    if tokenizer is None:
        return None
    plain, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    return whole[-1] if whole[-1:] != plain[-1:] else tokenizer.eos_token_id


def declared_dtype(config: dict) -> list[str]:
    """The precision that config.json declares, in the spelling of transformers 5 or 4; [] if none."""
    kind = config.get("dtype") or config.get("torch_dtype")
    return [str(kind).removeprefix("torch.")] if kind else []


def declared_prompts(folder: Path) -> dict[str, str]:
    path = folder / "config_sentence_transformers.json"
    return (read_json(path).get("prompts") or {}) if path.exists() else {}
