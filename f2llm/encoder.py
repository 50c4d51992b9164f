"""Models that the kit's own forward pass does not compute, run by sentence-transformers as they declare themselves.

Such a model can be a teacher, a miner or an evaluated model, but no backbone. It is loaded from a folder: nothing is
downloaded, no code that comes with a model runs, and no pickle is read. N texts, D dimensions.
"""

import math
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModel, MT5EncoderModel, T5EncoderModel

from .model import Embedder, device_and_dtype
from .store.model_folder import NotComputed, check_foreign_folder, check_weights, read_json
from .store.progress import Progress

COMPARED = (
    "fox",
    "Où est la bibliothèque? 图书馆在哪里？ पुस्तकालय कहाँ है?",
    "A text of some length, so that attention has something to look at: " + "one thing follows the other, " * 8,
)
LEAST_COSINE = {torch.float32: 0.9999, torch.bfloat16: 0.98, torch.float16: 0.98}


class ForeignEncoder:
    """A folder of sentence-transformers with its own pooling, modules, prompts and longest text.

    ValueError if tensors are missing or left over, if its weights are pickles, or if it needs code of its own.
    """

    def __init__(self, folder: Path, max_tokens: int | None = None):
        self.folder = Path(folder)
        check_foreign_folder(self.folder)
        for module in read_json(self.folder / "modules.json"):
            if module["type"].endswith(".Transformer"):
                _check_weights_of(self.folder / module["path"])
        self.model = _sentence_transformers().SentenceTransformer(str(self.folder), local_files_only=True)
        longest = self.model.max_seq_length or max_tokens or math.inf
        if max_tokens and longest != math.inf:  # static embeddings have no length to set
            self.model.max_seq_length = min(longest, max_tokens)

    @property
    def max_tokens(self) -> int | None:
        """The longest text in tokens; None if there is no limit."""
        return self.model.max_seq_length

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)

    @cached_property
    def dim(self) -> int:
        return self.embed_texts(["a"]).shape[1]

    def embed_texts(self, texts: list[str]) -> Tensor:
        """Embeddings (N, D), float32, of the texts as they are, without the model's prompts and its normalisation.

        A teacher reads the stage's prompts, which are part of the texts, and distillation compares raw embeddings.
        """
        return encode_by(self._unnormalised.encode, texts, prompt="", convert_to_tensor=True).float()

    @cached_property
    def _unnormalised(self):
        modules = [module for module in self.model if type(module).__name__ != "Normalize"]
        return _sentence_transformers().SentenceTransformer(modules=modules, device=str(self.device))

    def encode(self, texts: list[str], instruction: str | None = None, dim: int | None = None) -> np.ndarray:
        """Unit-length float32 embeddings (N, dim), with the prompts that the model itself declares.

        instruction: None for documents; any text for queries, of which only its presence counts.
        """
        encode = self.model.encode_document if instruction is None else self.model.encode_query
        rows = np.asarray(encode_by(encode, texts), dtype=np.float32)[:, :dim]
        return rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-12)

    def num_parameters(self) -> tuple[int, int]:
        """(all, without input embedding tables)."""
        tables = [module for module in self.model.modules() if isinstance(module, torch.nn.Embedding)]
        total = sum(parameter.numel() for parameter in self.model.parameters())
        return total, total - sum(table.weight.numel() for table in tables)


def encode_by(encode: Callable, texts: list[str], **options):
    """The result of a model's `encode`, `encode_query` or `encode_document`, with the kit's line instead of its bar."""
    progress = Progress("embed", "texts", len(texts))

    def count(module, given, made: dict) -> None:
        progress.add(len(made["sentence_embedding"]))

    hook = encode.__self__[-1].register_forward_hook(count)
    try:
        with progress.work(len(texts)):
            return encode(texts, show_progress_bar=False, **options)
    finally:
        hook.remove()


def load_encoder(path: Path, token_budget: int = 8192) -> Embedder | ForeignEncoder:
    """The model of a folder: by the kit's forward pass where that computes it, by sentence-transformers otherwise.

    ValueError if neither can. Static embeddings have no config.json at all.
    """
    declares_modules = (Path(path) / "modules.json").exists()
    if declares_modules and not (Path(path) / "config.json").exists():
        return ForeignEncoder(path)
    try:
        return Embedder.load(path, token_budget)
    except NotComputed:
        if not declares_modules:
            raise
        return ForeignEncoder(path)


def compare_with_sentence_transformers(model: Embedder, path: Path) -> None:
    """ValueError if a folder's embeddings of three texts by the kit are not those that sentence-transformers gives.

    Nothing is compared where the folder declares no modules, or where sentence-transformers is not installed.
    """
    if not (Path(path) / "modules.json").exists():
        return
    try:
        import sentence_transformers
    except ImportError:
        return
    theirs = sentence_transformers.SentenceTransformer(
        str(path), local_files_only=True, model_kwargs={"dtype": model.model.dtype}
    )
    texts = list(COMPARED)
    expected = theirs.encode(texts, prompt="", normalize_embeddings=True, show_progress_bar=False)
    cosines = (model.encode(texts) * np.asarray(expected, dtype=np.float32)).sum(1)
    worst = int(cosines.argmin())
    if not cosines[worst] >= LEAST_COSINE[device_and_dtype()[1]]:
        raise ValueError(
            f"{path}: the kit's embedding of {texts[worst][:40]!r} has a cosine of {cosines[worst]:.4f} with that of "
            "sentence-transformers, so the kit does not read this model as it is meant; remedy: another model, and a "
            "report of this one"
        )


def _check_weights_of(folder: Path) -> None:
    """sentence-transformers itself only warns when weights are missing, and draws them at random."""
    of_encoders = {"t5": T5EncoderModel, "mt5": MT5EncoderModel}  # of these it takes the encoder
    kind = of_encoders.get(read_json(folder / "config.json").get("model_type"), AutoModel)
    _, report = kind.from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True)
    check_weights(folder, report)


def _sentence_transformers():
    try:
        import sentence_transformers
    except ImportError:
        raise ValueError(
            "this model needs sentence-transformers, which is not installed; remedy: pip install sentence-transformers"
        ) from None
    return sentence_transformers
