"""What the embeddings of a model folder must be, written into it: anyone can check a copy of it without this kit.

`embedding_contract.json` has probe texts with their token ids and embeddings, and everything that decides an embedding
beside the weights: pooling, EOS, normalisation, prompts, the longest text, precision. `f2llm doctor` replays it.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .store.model_folder import read_json, weight_dtypes
from .text import QUERY_PROMPT, prompted

if TYPE_CHECKING:
    from .model import Embedder

FILE = "embedding_contract.json"
VERSION = 1
IDS_KEPT = 256  # of a text's token ids; longer texts are not embedded here: 1024 tokens take a CPU a minute at 0.6B
NUMBERS_KEPT = 16  # of every embedding but the first, which is whole
DIGITS = 6  # of embeddings of unit length: 1e-4 of a number's size at 5120 dimensions
INSTRUCTION = "Given a question, retrieve passages that can help answer the question."


@dataclass(frozen=True)
class Probe:
    """A text, repeated `times` times, after an instruction if there is one.

    num_tokens counts all tokens, EOS included; token_ids are the first IDS_KEPT of them. embedding: its first numbers,
    at unit length; None if it was not computed.
    """

    name: str
    text: str
    times: int
    instruction: str | None
    num_tokens: int
    token_ids: list[int]
    embedding: list[float] | None

    @property
    def whole_text(self) -> str:
        """The text as the tokenizer gets it."""
        return prompted(self.text * self.times, self.instruction)

    @property
    def is_whole(self) -> bool:
        """Whether token_ids are all of them."""
        return self.num_tokens == len(self.token_ids)

    def has_ids(self, ids: list[int]) -> bool:
        """Whether these are the text's token ids, as far as they are kept."""
        return len(ids) == self.num_tokens and ids[: len(self.token_ids)] == self.token_ids


@dataclass(frozen=True)
class Contract:
    """What decides an embedding, as `embedding_contract.json` has it.

    dim: numbers of an embedding; matryoshka_dims: prefixes of it that training used, None if unknown. tokens_before:
    ids that the tokenizer puts before a text. dtype: of the weights; computed_in: of the embeddings, None without any.
    prompts: those that sentence-transformers applies by name; query_prompt: the form of a prompt with an instruction.
    """

    version: int
    pooling: str
    normalised: bool
    dim: int
    matryoshka_dims: list[int] | None
    max_tokens: int
    eos_token: str
    eos_token_id: int
    tokens_before: list[int]
    padding_side: str
    dtype: str
    computed_in: str | None
    prompts: dict[str, str]
    query_prompt: str
    probes: list[Probe]


def probe_texts(max_tokens: int) -> list[tuple[str, str, int, str | None]]:
    """(name, text, times, instruction) of every probe: one in several scripts, one with a prompt, one that is cut."""
    return [
        ("plain", "The quick brown fox jumps over the lazy dog.", 1, None),
        ("short", "fox", 1, None),
        ("multilingual", "Grüße aus 北京 и हिन्दी, مرحبا!", 1, None),
        ("prompt", "  two  spaces,\n\ta tab, isn't it, and 12345 lines?\n\n", 1, INSTRUCTION),
        ("too long", "one thing follows another, ", max_tokens, None),
    ]


def contract_of(folder: Path, model: "Embedder", vectors: bool = True) -> Contract:
    """The contract of a model whose files are in the folder.

    vectors: whether embeddings are computed, by the model as it is in memory; they cannot be where every process holds
    a part of the weights only.
    """
    return Contract(
        version=VERSION,
        pooling="lasttoken",
        normalised=True,
        dim=model.dim,
        matryoshka_dims=model.matryoshka_dims,
        max_tokens=model.max_tokens,
        eos_token=model.tokenizer.eos_token,
        eos_token_id=model.tokenizer.eos_token_id,
        tokens_before=model.before,
        padding_side=model.tokenizer.padding_side,
        dtype=" and ".join(weight_dtypes(folder)),
        computed_in=str(model.model.dtype).removeprefix("torch.") if vectors else None,
        prompts=read_json(folder / "config_sentence_transformers.json")["prompts"],
        query_prompt=QUERY_PROMPT,
        probes=_probes(model, vectors),
    )


def _probes(model: "Embedder", vectors: bool) -> list[Probe]:
    """Every probe with its token ids, and with embeddings of those that are short enough."""
    texts = probe_texts(model.max_tokens)
    token_ids = model.tokenize([prompted(text * times, instruction) for _, text, times, instruction in texts])
    embedded: list[list[float] | None] = [None] * len(texts)
    short = [row for row, ids in enumerate(token_ids) if vectors and len(ids) <= IDS_KEPT]
    for row, embedding in zip(short, _embeddings(model, [token_ids[row] for row in short])):
        kept = embedding if row == 0 else embedding[:NUMBERS_KEPT]
        embedded[row] = [round(number, DIGITS) for number in kept]
    return [
        Probe(*text, num_tokens=len(ids), token_ids=ids[:IDS_KEPT], embedding=embedding)
        for text, ids, embedding in zip(texts, token_ids, embedded)
    ]


@torch.inference_mode()
def _embeddings(model: "Embedder", token_ids: list[list[int]]) -> list[list[float]]:
    """Unit-length embeddings in the precision of the weights: without autocast, and without what was compiled."""
    if not token_ids:
        return []
    autocast, model.autocast_dtype = model.autocast_dtype, None
    try:
        with torch.compiler.set_stance("force_eager"):
            embeddings = torch.cat([model.embed([ids]) for ids in token_ids]).float()
    finally:
        model.autocast_dtype = autocast
    return torch.nn.functional.normalize(embeddings, dim=-1).tolist()


def write_contract(folder: Path, contract: Contract) -> None:
    """Write it into the folder: one line for each value, and one for each probe."""
    values = asdict(contract)
    probes = ",\n  ".join(json.dumps(probe, ensure_ascii=False) for probe in values.pop("probes"))
    lines = [f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]
    text = "{\n" + ",\n".join([*lines, f' "probes": [\n  {probes}\n ]']) + "\n}\n"
    (folder / FILE).write_text(text, encoding="utf-8")


def read_contract(folder: Path) -> Contract | None:
    """The contract of a folder, None if it has none; ValueError if it is damaged or of a later version."""
    path = Path(folder) / FILE
    if not path.exists():
        return None
    values = read_json(path)
    found = values.get("version") if isinstance(values, dict) else None
    if found != VERSION:
        raise ValueError(
            f"{path} has version {found!r}, but this f2llm reads {VERSION}; remedy: the f2llm that wrote it"
        )
    try:
        return Contract(**values | {"probes": [Probe(**probe) for probe in values["probes"]]})
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); remedy: copy or fetch it again") from None
