"""A causal Qwen3 as an embedding model: the final hidden state of EOS, the last token of every text.

N texts, L tokens, D dimensions.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerBase, Qwen3Model
from transformers.utils import logging as transformers_logging

from .checkpoint import whole_folder
from .text import prompted

transformers_logging.disable_progress_bar()  # one bar per loaded model says nothing that loading does not


class Embedder:
    """A Qwen3 without language-model head, with its tokenizer and the longest text it takes, in tokens."""

    def __init__(
        self, model: Qwen3Model, tokenizer: PreTrainedTokenizerBase, max_tokens: int, token_budget: int = 8192
    ):
        self.model, self.tokenizer = model, tokenizer
        self.max_tokens, self.token_budget = max_tokens, token_budget

    @classmethod
    def load(cls, path: Path | str, token_budget: int = 8192) -> "Embedder":
        """From a folder with config.json, safetensors and tokenizer; float32 on CPU, bfloat16 on Ampere or newer."""
        path = Path(path)
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            if not (path / name).exists():
                raise ValueError(f"{path / name} is missing, so {path} is no model; remedy: dvc repro, or another path")
        device, dtype = device_and_dtype()
        model = AutoModel.from_pretrained(path, dtype=dtype, attn_implementation="sdpa").to(device).eval()
        settings = path / "sentence_bert_config.json"
        longest = json.loads(settings.read_text())["max_seq_length"] if settings.exists() else None
        tokenizer = AutoTokenizer.from_pretrained(path)
        return cls(model, tokenizer, longest or model.config.max_position_embeddings, token_budget)

    @classmethod
    def untrained(cls, path: Path | str, seed: int) -> "Embedder":
        """The model of a folder with random weights: what training starts from."""
        trained = cls.load(path)
        torch.manual_seed(seed)
        model = AutoModel.from_config(AutoConfig.from_pretrained(path), attn_implementation="sdpa")
        return cls(model.to(trained.model.device).eval(), trained.tokenizer, trained.max_tokens)

    @property
    def dim(self) -> int:
        return self.model.config.hidden_size

    def num_parameters(self) -> tuple[int, int]:
        """(all, without the embedding table)."""
        total = sum(parameter.numel() for parameter in self.model.parameters())
        return total, total - self.model.embed_tokens.weight.numel()

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text: cut to max_tokens - 1, then exactly one EOS."""
        ids = self.tokenizer(texts, add_special_tokens=False, truncation=True, max_length=self.max_tokens - 1)[
            "input_ids"
        ]
        return [[*tokens, self.tokenizer.eos_token_id] for tokens in ids]

    def embed(self, token_ids: list[list[int]]) -> Tensor:
        """Un-normalised embeddings (N, D) in the order given, with gradient where it is enabled.

        Texts of similar length share a forward pass of at most `token_budget` tokens. Padding stands right
        of EOS, where a causal model cannot see it, so the result does not depend on it.
        """
        parts, order = [], []
        for rows in micro_batches([len(ids) for ids in token_ids], self.token_budget):
            lengths = torch.tensor([len(token_ids[row]) for row in rows])
            padded = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)  # (n, L)
            for position, row in enumerate(rows):
                padded[position, : len(token_ids[row])] = torch.tensor(token_ids[row])
            hidden = self.model(input_ids=padded.to(self.model.device), use_cache=False).last_hidden_state  # (n, L, D)
            parts.append(hidden[torch.arange(len(rows)), lengths - 1])
            order += rows
        position = torch.empty(len(order), dtype=torch.long)
        position[torch.tensor(order)] = torch.arange(len(order))
        return torch.cat(parts)[position]

    @torch.inference_mode()
    def encode(self, texts: list[str], instruction: str | None = None, dim: int | None = None) -> np.ndarray:
        """Unit-length float32 embeddings (N, dim); `instruction` is for queries, `dim` a matryoshka prefix."""
        if dim is not None and not 1 <= dim <= self.dim:
            raise ValueError(f"dim is {dim}, but this model's embeddings have {self.dim} dimensions")
        if not texts:
            return np.zeros((0, dim or self.dim), dtype=np.float32)
        embeddings = self.embed(self.tokenize([prompted(text, instruction) for text in texts])).float()
        return torch.nn.functional.normalize(embeddings[:, :dim], dim=-1).cpu().numpy()

    def save(self, path: Path | str) -> None:
        """A folder that sentence-transformers loads as it is: prompts, EOS pooling and normalisation included."""
        with whole_folder(Path(path)) as folder:
            self.write(folder)

    def write(self, folder: Path) -> None:
        """The files of `save`, into a folder that is there."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        _write_sentence_transformers_files(folder, self.dim, self.max_tokens)


def micro_batches(lengths: list[int], token_budget: int) -> Iterator[list[int]]:
    """Rows grouped by length, so that rows x longest stays within the budget; one long text may exceed it alone."""
    rows: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: (lengths[row], row)):
        if rows and (len(rows) + 1) * lengths[row] > token_budget:
            yield rows
            rows = []
        rows.append(row)
    if rows:
        yield rows


def device_and_dtype() -> tuple[torch.device, torch.dtype]:
    """bfloat16 from compute capability 8 (Ampere); float32 on older GPUs, which only emulate it, and on CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu"), torch.float32
    ampere = torch.cuda.get_device_capability() >= (8, 0)
    return torch.device("cuda"), torch.bfloat16 if ampere else torch.float32


def _write_sentence_transformers_files(folder: Path, dim: int, max_tokens: int) -> None:
    """Module list and settings. The class names are those that every version since 2 understands."""
    kinds = {"0": ("Transformer", ""), "1": ("Pooling", "1_Pooling"), "2": ("Normalize", "2_Normalize")}
    modules = [
        {"idx": int(index), "name": index, "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (kind, path) in kinds.items()
    ]
    files = {
        "modules.json": modules,
        "sentence_bert_config.json": {"max_seq_length": max_tokens, "do_lower_case": False},
        "config_sentence_transformers.json": {"similarity_fn_name": "cosine", "prompts": {"query": "", "document": ""}},
        "1_Pooling/config.json": {
            "word_embedding_dimension": dim,
            "pooling_mode_cls_token": False,
            "pooling_mode_mean_tokens": False,
            "pooling_mode_lasttoken": True,
            "include_prompt": True,
        },
    }
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "2_Normalize").mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    (folder / "2_Normalize" / "README.md").write_text("Normalisation to unit length has no settings.\n")
