"""Model folders that declare something else than the kit computes, or are not whole."""

import json
import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import torch
from registry import reads, refused
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)

from f2llm.embedded.backbone import train_tokenizer
from f2llm.model import Embedder, append_eos
from f2llm.pipeline.models import check_model_folder

TEXTS = ["a", "the quick brown fox", "jumps over the lazy dog " * 3]
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "max_position_embeddings": 128}


@cache
def tokenizer():
    return train_tokenizer([*TEXTS, "every good model is loaded by what it declares"] * 9, 320)


@cache
def template() -> Path:
    """A tiny random Qwen3 as the kit writes it."""
    torch.manual_seed(0)
    folder = Path(mkdtemp(), "model")
    model = Qwen3Model(Qwen3Config(vocab_size=len(tokenizer()), head_dim=8, initializer_range=0.3, **SHAPE))
    Embedder(model, tokenizer(), max_tokens=64).save(folder)
    return folder


def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(template(), tmp_path / "model"))


def edit(path: Path, **values) -> None:
    """Set keys of a JSON file; None removes a key."""
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def loading(folder: Path):
    return lambda: Embedder.load(folder)


def difference_to_sentence_transformers(folder: Path) -> bool:
    """Whether the kit's embeddings of the texts are those of sentence-transformers, up to rounding."""
    from sentence_transformers import SentenceTransformer

    theirs = SentenceTransformer(str(folder), device="cpu").encode(TEXTS, normalize_embeddings=True)
    return bool(np.allclose(Embedder.load(folder).encode(TEXTS), theirs, atol=1e-5))


# Refused ----------------------------------------------------------------------------------------


@refused(r"is missing, so .* is no model", "config.json", "model.safetensors", "tokenizer.json")
def without_a_file(tmp_path, name):
    (copied(tmp_path) / name).unlink()
    return loading(tmp_path / "model")


@refused(r"is damaged: no JSON", "config.json", "modules.json", "1_Pooling/config.json")
def half_of_a_file(tmp_path, name):
    path = copied(tmp_path) / name
    path.write_text(path.read_text()[:20])
    return loading(tmp_path / "model")


@refused(r"pooling, not lasttoken", *("mean_tokens", "cls_token", "max_tokens", "weightedmean_tokens"))
def another_pooling_in_the_old_spelling(tmp_path, mode):
    path = copied(tmp_path) / "1_Pooling" / "config.json"
    edit(path, pooling_mode_lasttoken=False, **{f"pooling_mode_{mode}": True})
    return loading(tmp_path / "model")


@refused(r"pooling, not lasttoken", "mean", "cls", ["lasttoken", "mean"])
def another_pooling_in_the_new_spelling(tmp_path, mode):
    (copied(tmp_path) / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": mode}))
    return loading(tmp_path / "model")


@refused(r"lasttoken \+ mean|mean \+ lasttoken")
def two_poolings(tmp_path):
    edit(copied(tmp_path) / "1_Pooling" / "config.json", pooling_mode_mean_tokens=True)
    return loading(tmp_path / "model")


@refused(r"1_Pooling/config\.json is missing")
def a_pooling_that_is_not_there(tmp_path):
    (copied(tmp_path) / "1_Pooling" / "config.json").unlink()
    return loading(tmp_path / "model")


@refused(r"has a module Dense")
def a_dense_module(tmp_path):
    path = copied(tmp_path) / "modules.json"
    dense = {"idx": 3, "name": "3", "path": "3_Dense", "type": "sentence_transformers.models.Dense"}
    path.write_text(json.dumps([*json.loads(path.read_text()), dense]))
    return loading(tmp_path / "model")


@refused(r"do_lower_case")
def lower_case(tmp_path):
    edit(copied(tmp_path) / "sentence_bert_config.json", do_lower_case=True)
    return loading(tmp_path / "model")


@refused(r"is a '(bert|gpt2)', but the kit's forward pass computes qwen3, ", "bert", "gpt2")
def another_architecture(tmp_path, kind):
    folder = tmp_path / "model"
    config, model = {"bert": (BertConfig, BertModel), "gpt2": (GPT2Config, GPT2Model)}[kind]
    model(config(vocab_size=len(tokenizer()), **SHAPE)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return loading(folder)


@refused(r"is a 'mpt'")
def another_architecture_as_backbone(tmp_path):
    edit(copied(tmp_path) / "config.json", model_type="mpt")
    return lambda: check_model_folder(tmp_path / "model")


@refused(r"declares bidirectional attention")
def attention_in_both_directions(tmp_path):
    edit(copied(tmp_path) / "config.json", model_type="gemma3_text", use_bidirectional_attention=True)
    return loading(tmp_path / "model")


@refused(r"declares bidirectional attention", "qwen3", "llama")
def attention_that_is_not_causal(tmp_path, kind):
    edit(copied(tmp_path) / "config.json", model_type=kind, is_causal=False)
    return loading(tmp_path / "model")


LONG = {"factor": 4.0, "short_factor": [1.0] * 4, "long_factor": [8.0] * 4, "original_max_position_embeddings": 12}


@refused(
    r"declares rope_type longrope, .* would depend on their neighbours",
    {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, **LONG}},
    {"rope_parameters": None, "rope_scaling": {"type": "longrope", **LONG}},
    {"rope_parameters": {"full_attention": {"rope_type": "longrope", **LONG}}},
)
def frequencies_by_the_longest_text_of_a_batch(tmp_path, rope):
    edit(copied(tmp_path) / "config.json", **rope)
    return loading(tmp_path / "model")


@refused(r"has an adapter \(adapter_.*\), .* remedy: f2llm merge", "adapter_config.json", "adapter_model.safetensors")
def an_adapter_beside_the_weights(tmp_path, name):
    (copied(tmp_path) / name).write_text("{}")
    return loading(tmp_path / "model")


@refused(r"reads the tokenizer of a 'qwen2' as Qwen2Tokenizer, which makes other tokens")
def a_tokenizer_that_transformers_replaces(tmp_path):
    folder = copied(tmp_path)
    numbers = train_tokenizer(["in 2024 and 2025, 20242025 times"] * 9, 320)
    Embedder(AutoModel.from_pretrained(folder), numbers, max_tokens=64).save(folder)
    Qwen2Model(Qwen2Config(vocab_size=len(tokenizer()), **SHAPE)).save_pretrained(folder)
    return loading(folder)


@refused(r"declares code of its own")
def remote_code(tmp_path):
    edit(copied(tmp_path) / "config.json", auto_map={"AutoModel": "modeling.Mine"})
    return loading(tmp_path / "model")


@refused(r"declares quantised weights")
def quantised(tmp_path):
    edit(copied(tmp_path) / "config.json", quantization_config={"quant_method": "fp8"})
    return loading(tmp_path / "model")


@refused(r"lacks the weights", "layers.1.mlp.up_proj.weight", "norm.weight", "embed_tokens.weight")
def a_missing_tensor(tmp_path, name):
    path = copied(tmp_path) / "model.safetensors"
    save_file({key: value for key, value in load_file(path).items() if key != name}, path, {"format": "pt"})
    return loading(tmp_path / "model")


@refused(r"has left over the weights", "layers.2.mlp.up_proj.weight", "layers.0.self_attn.q_proj.bias", "score.weight")
def a_tensor_left_over(tmp_path, name):
    path = copied(tmp_path) / "model.safetensors"
    save_file(load_file(path) | {name: torch.zeros(32)}, path, {"format": "pt"})
    return loading(tmp_path / "model")


@refused(r"weights of another shape than its config.json: norm.weight \(31,\), not \(32,\)")
def a_tensor_of_another_shape(tmp_path):
    path = copied(tmp_path) / "model.safetensors"
    save_file(load_file(path) | {"norm.weight": torch.zeros(31)}, path, {"format": "pt"})
    return loading(tmp_path / "model")


@refused(r"its weights cannot be loaded")
def half_of_the_weights(tmp_path):
    path = copied(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return loading(tmp_path / "model")


@refused(r"names model-0000., which is missing|names model-00001-of-.*, which is missing")
def a_shard_that_is_not_there(tmp_path):
    folder = copied(tmp_path)
    model = AutoModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    sorted(folder.glob("model-*.safetensors"))[0].unlink()
    return loading(folder)


@refused(r"the tokenizer makes .* of 'a'", "before", "twice", "none")
def other_special_tokens(tmp_path, kind):
    folder = copied(tmp_path)
    changed = AutoTokenizer.from_pretrained(folder)
    eos, number = changed.eos_token, changed.eos_token_id
    single = {"before": f"{eos} $A {eos}", "twice": f"$A {eos} {eos}", "none": "$A"}[kind]
    specials = [(eos, number)] if kind != "none" else []
    changed.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=specials)
    changed.save_pretrained(folder)
    return loading(folder)


@refused(r"the tokenizer has \d+ tokens, but the model only")
def a_tokenizer_of_another_model(tmp_path):
    folder = copied(tmp_path)
    changed = AutoTokenizer.from_pretrained(folder)
    changed.add_tokens([f"<more{number}>" for number in range(300)])
    changed.save_pretrained(folder)
    return loading(folder)


# Read right -------------------------------------------------------------------------------------


@reads(True)
def as_the_kit_writes_it(tmp_path):
    return lambda: difference_to_sentence_transformers(copied(tmp_path))


@reads((True, 64))
def as_sentence_transformers_saves_it_again(tmp_path):
    from sentence_transformers import SentenceTransformer

    SentenceTransformer(str(template()), device="cpu").save_pretrained(str(tmp_path / "again"))
    folder = tmp_path / "again"
    return lambda: (difference_to_sentence_transformers(folder), Embedder.load(folder).max_tokens)


@reads(128, 10**30, None)
def a_length_that_nobody_means(tmp_path, length):
    folder = copied(tmp_path)
    edit(folder / "sentence_bert_config.json", max_seq_length=None)
    edit(folder / "tokenizer_config.json", model_max_length=length)
    return lambda: Embedder.load(folder).max_tokens


@reads(True, 0, 1)
def a_sliding_window(tmp_path, first):
    path = copied(tmp_path) / "config.json"
    edit(path, use_sliding_window=True, sliding_window=4, max_window_layers=first, layer_types=None)
    return lambda: difference_to_sentence_transformers(tmp_path / "model")


@reads(True)
def another_decoder(tmp_path):
    folder = copied(tmp_path)
    torch.manual_seed(4)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer()), initializer_range=0.3, **SHAPE)).save_pretrained(folder)
    return lambda: difference_to_sentence_transformers(folder)


@reads(True)
def with_a_token_before_every_text(tmp_path):
    folder = copied(tmp_path)
    changed = AutoTokenizer.from_pretrained(folder)
    changed.bos_token, eos = "<|endoftext|>", (changed.eos_token, changed.eos_token_id)
    bos = (changed.bos_token, changed.bos_token_id)
    changed.backend_tokenizer.post_processor = append_eos(*eos, [bos])
    changed.save_pretrained(folder)
    assert Embedder.load(folder).tokenize(["a"])[0][0] == bos[1], "vacuous: nothing stands before the text"
    return lambda: difference_to_sentence_transformers(folder)


@reads(True)
def in_shards(tmp_path):
    folder = copied(tmp_path)
    model = AutoModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1, "vacuous: one shard"
    return lambda: difference_to_sentence_transformers(folder)


@reads(True)
def with_the_head_of_a_language_model(tmp_path):
    folder = copied(tmp_path)
    torch.manual_seed(1)
    config = Qwen3Config(vocab_size=len(tokenizer()), head_dim=8, tie_word_embeddings=False, **SHAPE)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return lambda: difference_to_sentence_transformers(folder)


@reads(True)
def padded_on_the_left(tmp_path):
    folder = copied(tmp_path)
    edit(folder / "tokenizer_config.json", padding_side="left")
    return lambda: difference_to_sentence_transformers(folder)


@reads(True)
def with_biases_in_attention(tmp_path):
    folder = copied(tmp_path)
    torch.manual_seed(2)
    config = Qwen3Config(vocab_size=len(tokenizer()), head_dim=8, attention_bias=True, **SHAPE)
    Qwen3Model(config).save_pretrained(folder)
    return lambda: difference_to_sentence_transformers(folder)


@reads(True)
def with_more_rows_than_tokens(tmp_path):
    folder = copied(tmp_path)
    torch.manual_seed(3)
    Qwen3Model(Qwen3Config(vocab_size=len(tokenizer()) + 40, head_dim=8, **SHAPE)).save_pretrained(folder)
    return lambda: difference_to_sentence_transformers(folder)
