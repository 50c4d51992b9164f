"""A causal Qwen3, or another decoder, as an embedding model: the final hidden state of EOS, each text's last token.

N texts, T tokens of all of them, D dimensions. Texts are packed: no padding is computed anywhere.
"""

import json
import math
import threading
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer, processors
from torch import Tensor
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from . import attention
from .contract import contract_of, write_contract
from .distributed import is_sharded
from .packing import Pack, pack
from .store.files import whole_folder
from .store.model_folder import NotComputed, check_model_folder, check_weights, longest_text
from .store.progress import Progress
from .text import prompted

transformers_logging.disable_progress_bar()  # one bar per loaded model says nothing that loading does not
MODEL_FILES = ["config.json", "*.safetensors", "tokenizer.json", "tokenizer_config.json"]  # without code and pickles
PROBES = ("It's 2024, isn't it?", "Grüße aus 北京 и हिन्दी", "  two  spaces,\n\ttabs and 12345 lines\n\n")
WORTH_SHARING = 4  # tokens at the start of all texts from which on computing them once pays


class Embedder:
    """A decoder without language-model head, with its tokenizer and the longest text it takes, in tokens.

    token_budget: tokens per forward pass. autocast_dtype: of matrix products, where weights are float32 for training.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_tokens: int, token_budget: int = 8192
    ):
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "the tokenizer has no EOS token, whose hidden state is the embedding; remedy: set eos_token"
            )
        self.before = tokens_before(tokenizer)
        if max_tokens < 2 + len(self.before):
            least = 2 + len(self.before)
            raise ValueError(f"max_tokens is {max_tokens}, but one token, BOS where there is one, and EOS need {least}")
        model.set_attn_implementation(attention.NAME)
        attention.only_last_tokens(model)
        self.model, self.tokenizer = model, tokenizer
        self.max_tokens, self.token_budget = max_tokens, token_budget
        self.autocast_dtype: torch.dtype | None = None
        self.matryoshka_dims: list[int] | None = None  # what training used, for the contract of its folder
        self.query_prompt = ""  # what sentence-transformers puts before queries, in the folder that is written
        self._tokenizing = threading.Lock()  # a fast tokenizer serves one thread at a time

    @classmethod
    def load(
        cls,
        path: Path | str,
        token_budget: int = 8192,
        training: bool = False,
        precision: str = "auto",
        device: torch.device | None = None,
    ) -> "Embedder":
        """From a folder with config.json, safetensors and tokenizer, onto the device; None: the GPU if there is one.

        Weights are bfloat16 on Ampere or newer; float32 on CPU, on older GPUs and for training. There `precision` says
        what matrix products are computed in (`machine.precision`); weights and their gradients stay float32.
        """
        path = Path(path)
        check_model_folder(path)
        usual, dtype = device_and_dtype()
        model = load_weights(path, torch.float32 if training else dtype).to(device or usual).eval()
        tokenizer = AutoTokenizer.from_pretrained(path)
        check_tokenizer(path, tokenizer)
        if len(tokenizer) > model.config.vocab_size:
            raise ValueError(
                f"{path}: the tokenizer has {len(tokenizer)} tokens, but the model only {model.config.vocab_size}; "
                "remedy: the tokenizer that belongs to the model"
            )
        longest = min(longest_text(path) or math.inf, model.config.max_position_embeddings)
        embedder = cls(model, tokenizer, longest, token_budget)
        products = dtype if precision == "auto" else getattr(torch, precision)
        embedder.autocast_dtype = products if training and products != torch.float32 else None
        return embedder

    @classmethod
    def untrained(cls, path: Path | str, seed: int) -> "Embedder":
        """The model of a folder with random weights: what training starts from."""
        trained = cls.load(path)
        torch.manual_seed(seed)
        model = AutoModel.from_config(AutoConfig.from_pretrained(path))
        return cls(model.to(trained.model.device).eval(), trained.tokenizer, trained.max_tokens)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dim(self) -> int:
        return self.model.config.hidden_size

    @cached_property
    def _longest_token(self) -> int:
        """Characters of the longest token of the vocabulary."""
        return max(map(len, self.tokenizer.get_vocab()))

    def num_parameters(self) -> tuple[int, int]:
        """(all, without the embedding table)."""
        total = sum(parameter.numel() for parameter in self.model.parameters())
        return total, total - self.model.embed_tokens.weight.numel()

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text: BOS if the tokenizer puts it there, the text, cut, and exactly one EOS.

        Time and memory do not grow with the part of a text that is cut off: only characters that can reach the kept
        tokens are read, four times as many as the longest tokens hold, since normalisation may join characters.
        """
        backend, ids = self.tokenizer.backend_tokenizer, []
        most = 4 * self.max_tokens * self._longest_token
        for start in range(0, len(texts), 1024):  # what a tokenizer finds beside ids takes a hundred bytes a token
            with self._tokenizing:
                backend.no_padding()
                backend.enable_truncation(self.max_tokens - 1 - len(self.before))
                cut = [text[:most] for text in texts[start : start + 1024]]
                found = backend.encode_batch_fast(cut, add_special_tokens=False)
            ids += [[*self.before, *encoding.ids, self.tokenizer.eos_token_id] for encoding in found]
        return ids

    def embed(self, token_ids: list[list[int]]) -> Tensor:
        """Un-normalised embeddings (N, D) in the order given, with gradient where it is enabled."""
        packs = list(pack(token_ids, self.token_budget))
        embeddings = torch.cat([self.embed_pack(part) for part in packs])
        order = torch.tensor([row for part in packs for row in part.rows], device=embeddings.device)
        return embeddings[order.argsort()]

    def embed_pack(self, part: Pack, every_token: bool = False, **of_attention) -> Tensor:
        """Un-normalised embeddings (N, D) of one pack, in its order.

        every_token: compute also what no embedding needs, for hooks that look at activations. of_attention: more
        keyword arguments for `attention.attend`; training has none.
        """
        part = part.to(self.device)
        lengths = {"cu_seq_lens_q": part.cu_seqlens, "max_length_q": part.longest}
        with torch.autocast(self.device.type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None):
            output = self.model(
                part.input_ids,
                position_ids=part.position_ids,
                attention_mask=attention.NO_MASK,
                only_last=not every_token,
                use_cache=False,
                **lengths,
                **of_attention,
            )
        hidden = output.last_hidden_state[0]
        return hidden[part.cu_seqlens[1:].long() - 1] if every_token else hidden

    @torch.inference_mode()
    def encode(self, texts: list[str], instruction: str | None = None, dim: int | None = None) -> np.ndarray:
        """Unit-length float32 embeddings (N, dim) in the order given.

        `instruction` is for queries, `dim` a matryoshka prefix. What all texts begin with, such as the
        instruction, is computed once (on CPU).
        """
        if dim is not None and not 1 <= dim <= self.dim:
            raise ValueError(f"dim is {dim}, but this model's embeddings have {self.dim} dimensions")
        if isinstance(texts, str):
            raise ValueError(f"texts is the single text {texts[:40]!r}; remedy: a list of texts")
        embeddings = np.zeros((len(texts), dim or self.dim), dtype=np.float32)
        if not len(texts):
            return embeddings
        token_ids = self.tokenize([prompted(text, instruction) for text in texts])
        shares = self.device.type == "cpu" and attention.is_plain(self.model)
        shared, prefix = common_prefix(token_ids) if shares else 0, {}
        if shared >= WORTH_SHARING:
            prefix = {"prefix": self._keys_and_values(token_ids[0][:shared])}
            token_ids = [ids[shared:] for ids in token_ids]
        progress = Progress("embed", "tokens", sum(map(len, token_ids)))
        for part in pack(token_ids, self.token_budget):
            with progress.work(part.num_tokens):
                after = replace(part, position_ids=part.position_ids + shared) if prefix else part
                full = self.embed_pack(after, **prefix).float()
                embeddings[part.rows] = torch.nn.functional.normalize(full[:, :dim], dim=-1).cpu().numpy()
        return embeddings

    def _keys_and_values(self, token_ids: list[int]) -> dict[int, tuple[Tensor, Tensor]]:
        """{layer: (keys, values)} of tokens that several texts begin with, for `attention.attend_to_prefix`."""
        (start,) = pack([token_ids], self.token_budget)
        recorded = {}
        self.embed_pack(start, record=recorded)
        return recorded

    def compile(self) -> None:
        """Fuse the element-wise work of every layer by torch.compile; a minute at the first steps, then faster.

        On a CPU torch calls a C++ compiler and does not quote the folder that it is installed in.
        """
        if self.device.type == "cpu" and " " in torch.__file__:
            raise ValueError(
                "machine.compile is true, but torch cannot compile for a CPU from a folder with spaces, "
                f"{torch.__file__!r}; remedy: compile: false, or an environment elsewhere"
            )
        for layer in self.model.layers:
            layer.compile(dynamic=True)

    def recompute(self, selectively: bool) -> None:
        """Compute activations again in the backward pass: memory for time.

        selectively: keep the results of matrix products and attention, which cost most to make again.
        """
        options = {"use_reentrant": False}
        if selectively:
            options["context_fn"] = partial(create_selective_checkpoint_contexts, attention.COSTLY)
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)

    def save(self, path: Path | str) -> None:
        """A folder that sentence-transformers loads as it is: prompts, EOS pooling and normalisation included."""
        with whole_folder(Path(path)) as folder:
            self.write(folder)

    def write(self, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
        """The files of `save`, into a folder that is there; weights: instead of the model's own, if sharded.

        The embedding contract is computed by the model in memory, which has the same weights. If it is sharded, its
        contract has no embeddings, since no process has all weights; `f2llm export` adds them.
        """
        if hasattr(self.model, "peft_config"):
            raise RuntimeError(
                f"{folder}: a model in training has an adapter beside its weights, which no model folder holds; "
                "remedy: f2llm.lora.save_adapter, then f2llm.lora.merge; or lora.rank 0"
            )
        self.model.save_pretrained(folder, state_dict=weights)
        if self.tokenizer.pad_token is None:  # as Llama, Mistral, SmolLM; sentence-transformers pads, and masks pads
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.tokenizer.backend_tokenizer.no_truncation()  # or its file would tell whether texts were tokenised
        self.tokenizer.save_pretrained(folder)
        _write_sentence_transformers_files(folder, self.dim, self.max_tokens, self.query_prompt)
        write_contract(folder, contract_of(folder, self, vectors=not is_sharded(self.model)))


def load_weights(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a folder; ValueError if weights are damaged, of another shape, missing, or left over."""
    try:
        model, report = AutoModel.from_pretrained(
            path, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (SafetensorError, RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path}: its weights cannot be loaded ({reason}); remedy: copy or fetch it again") from None
    check_weights(path, report)
    return model


def check_tokenizer(path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """ValueError if texts become other tokens than tokenizer.json says, or stand between other tokens than the kit's.

    transformers replaces the tokenizer.json of some model types by a class of its own, which may split texts in another
    way. Before a text the kit takes BOS or nothing, after it EOS. A bare backbone may add no EOS: the kit then appends
    it. A folder that declares its pooling is what its own tokenizer makes of a text, so there EOS must come from the
    tokenizer.
    """
    written = Tokenizer.from_file(str(path / "tokenizer.json"))
    written.no_truncation()
    longest = sorted(tokenizer.get_vocab(), key=lambda token: (-len(token), token))[:300]
    for text in (*PROBES, tokenizer.convert_tokens_to_string(longest)):
        if tokenizer(text, add_special_tokens=False)["input_ids"] != written.encode(text, add_special_tokens=False).ids:
            kind, of = type(tokenizer).__name__, json.loads((path / "config.json").read_text()).get("model_type")
            shown = repr(text[:60])
            raise NotComputed(
                f"{path}: transformers reads the tokenizer of a {of!r} as {kind}, which makes other tokens of {shown} "
                "than its tokenizer.json; remedy: the tokenizer that belongs to such models"
            )
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    ids = tokenizer("a")["input_ids"]
    before = tokens_before(tokenizer)
    whole = [*before, *plain]
    allowed = [[*whole, tokenizer.eos_token_id]] + ([] if (path / "modules.json").exists() else [whole])
    if ids not in allowed and tokenizer.eos_token_id is not None:
        raise NotComputed(
            f"{path}: the tokenizer makes {tokenizer.convert_ids_to_tokens(ids)} of 'a', but the kit's forward pass "
            f"reads {tokenizer.convert_ids_to_tokens(whole)} and one {tokenizer.eos_token} after it; remedy: a "
            "tokenizer.json whose post-processor appends EOS and nothing else"
        )


def tokens_before(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that a tokenizer puts before a text: BOS or nothing."""
    first = tokenizer("a")["input_ids"][:1]
    return first if first and first[0] == tokenizer.bos_token_id else []


def append_eos(eos: str, number: int, before: list[tuple[str, int]] | None = None) -> processors.PostProcessor:
    """A tokenizer's post-processor that appends one EOS to every text; before: tokens that it puts before a text."""
    front = "".join(f"{token} " for token, _ in before or [])
    tokens = [*(before or []), (eos, number)]
    return processors.TemplateProcessing(
        single=f"{front}$A {eos}", pair=f"{front}$A {eos} $B {eos}", special_tokens=list(dict(tokens).items())
    )


def common_prefix(token_ids: list[list[int]]) -> int:
    """Number of tokens that all texts begin with, but for the last token of the shortest; 0 for a single text."""
    if len(token_ids) < 2:
        return 0
    first, last = min(token_ids), max(token_ids)  # in lexicographic order: all others begin alike where these two do
    most = min(map(len, token_ids)) - 1
    return next((position for position in range(most) if first[position] != last[position]), most)


def device_and_dtype() -> tuple[torch.device, torch.dtype]:
    """bfloat16 from compute capability 8 (Ampere); float32 on older GPUs, which only emulate it, and on CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu"), torch.float32
    ampere = torch.cuda.get_device_capability() >= (8, 0)
    return torch.device("cuda"), torch.bfloat16 if ampere else torch.float32


def _write_sentence_transformers_files(folder: Path, dim: int, max_tokens: int, query_prompt: str) -> None:
    """Module list and settings. The class names are those that every version since 2 understands."""
    kinds = {"0": ("Transformer", ""), "1": ("Pooling", "1_Pooling"), "2": ("Normalize", "2_Normalize")}
    modules = [
        {"idx": int(index), "name": index, "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (kind, path) in kinds.items()
    ]
    files = {
        "modules.json": modules,
        "sentence_bert_config.json": {"max_seq_length": max_tokens, "do_lower_case": False},
        "config_sentence_transformers.json": {
            "similarity_fn_name": "cosine",
            "prompts": {"query": query_prompt, "document": ""},
        },
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
