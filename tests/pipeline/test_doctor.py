"""`f2llm doctor`: all is well with what the kit writes, and every fault of a copy is named, and no other."""

import json
import shutil

import pytest
import torch
from conftest import ROOT, SENTENCES
from pipeline.test_cli import f2llm
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from test_architectures import CONFIGS, SHAPE
from test_encoder import write
from tokenizers import Tokenizer, processors
from transformers import AutoModel, Qwen2Config

from f2llm.contract import FILE, contract_of, read_contract, write_contract
from f2llm.embedded.backbone import train_tokenizer
from f2llm.model import Embedder, append_eos
from f2llm.pipeline.doctor import examine
from f2llm.store.model_folder import read_json


@pytest.fixture
def folder(embedder, tmp_path):
    embedder.save(tmp_path / "model")
    return tmp_path / "model"


def edit(path, **values):
    """Set keys of a JSON file; None removes a key."""
    content = read_json(path) | values
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def states(findings):
    """{check: state}; every check once."""
    found = {finding.check: finding.state for finding in findings}
    assert len(found) == len(findings)
    return found


def faults(findings):
    return [finding for finding in findings if finding.state == "WRONG"]


POOLING, ROPE = "1_Pooling/config.json", {"rope_theta": 50.0, "rope_type": "default"}

# What the kit writes ----------------------------------------------------------------------------

CHECKS = ["modules", "pooling", "pooling dimension", "normalisation", "prompts", "maximum length", "precision"]
CHECKS += ["padding", "EOS", "tokens", "weights", "transformers", "the kit", "sentence-transformers"]


def test_all_is_well_with_a_folder_as_the_kit_writes_it(folder):
    found = states(examine(folder))
    assert found == {"held against": "note"} | dict.fromkeys(CHECKS, "ok")


def test_all_is_well_without_a_contract_too(folder):
    (folder / FILE).unlink()
    found = states(examine(folder))
    assert found == {"held against": "note", "weights": "note"} | dict.fromkeys(set(CHECKS) - {"weights"}, "ok")


def test_a_contract_without_embeddings_is_said_to_have_none(folder, embedder):
    write_contract(folder, contract_of(folder, embedder, vectors=False))
    found = {finding.check: finding for finding in examine(folder)}
    assert found["weights"].state == "note" and "`f2llm export` adds them" in found["weights"].text
    assert not faults(found.values())


def test_all_is_well_with_what_version_6_of_sentence_transformers_makes_of_it(folder, tmp_path):
    SentenceTransformer(str(folder), device="cpu").save_pretrained(str(tmp_path / "again"))
    assert "pooling_mode" in read_json(tmp_path / "again" / POOLING), "vacuous: it writes what we write"
    shutil.copy(folder / FILE, tmp_path / "again")
    assert states(examine(tmp_path / "again")) == {"held against": "note"} | dict.fromkeys(CHECKS, "ok")


def test_a_model_that_pads_on_the_left_and_ends_with_another_token_is_well_by_its_own_words(folder):
    """As Qwen3-Embedding: the kit's forward pass would read another last token, so only the others are compared."""
    (folder / FILE).unlink()
    edit(folder / "tokenizer_config.json", padding_side="left")
    post_processor(another_end)(folder)
    found = {finding.check: finding for finding in examine(folder)}
    assert not faults(found.values())
    assert found["EOS"].text.startswith("<|im_start|> once") and found["padding"].text.startswith("on the left")
    assert found["the kit"].state == "note" and found["transformers"].state == "ok"


def test_a_model_in_half_precision_is_well_too(embedder, tmp_path):
    embedder.model.to(torch.bfloat16)
    embedder.save(tmp_path / "model")
    assert not faults(examine(tmp_path / "model"))


@pytest.mark.parametrize("family", [name for name in CONFIGS if "qwen2" not in name])
def test_all_is_well_with_decoders_of_every_family_with_bos(family, tmp_path):
    tokenizer = train_tokenizer(SENTENCES, vocab=320)
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<|im_start|>", "<|im_end|>")]
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.backend_tokenizer.post_processor = append_eos(*ids[1], before=ids[:1])
    kind, own = CONFIGS[family]
    special = {"pad_token_id": None, "bos_token_id": ids[0][1], "eos_token_id": ids[1][1]}
    model = AutoModel.from_config(kind(**SHAPE | own | special, vocab_size=320)).eval()
    Embedder(model, tokenizer, max_tokens=100).save(tmp_path)
    assert read_contract(tmp_path).tokens_before == [ids[0][1]]
    assert states(examine(tmp_path)) == {"held against": "note"} | dict.fromkeys(CHECKS, "ok")


def test_a_tokenizer_that_transformers_replaces_by_a_class_of_its_own_is_a_fault(folder, tokenizer):
    """Of model type qwen2 it takes the post-processor and the vocabulary of tokenizer.json, but splits otherwise."""
    config = Qwen2Config(vocab_size=len(tokenizer), **SHAPE)
    Embedder(AutoModel.from_config(config).eval(), tokenizer, max_tokens=100).write(folder)
    found = examine(folder)
    assert [finding.check for finding in faults(found)] == ["tokens"]
    assert "Qwen2Tokenizer" in str(found[-2]) and found[-2].state == "note"


# Faults -----------------------------------------------------------------------------------------


def post_processor(processor):
    def change(folder):
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.post_processor = processor(tokenizer)
        tokenizer.save(str(folder / "tokenizer.json"))

    return change


def twice(tokenizer):
    eos = ("<|im_end|>", tokenizer.token_to_id("<|im_end|>"))
    return processors.TemplateProcessing(single="$A <|im_end|> <|im_end|>", special_tokens=[eos])


def without_eos(tokenizer):
    return processors.TemplateProcessing(single="$A", special_tokens=[])


def another_end(tokenizer):
    return append_eos("<|im_start|>", tokenizer.token_to_id("<|im_start|>"))


def a_token_before(tokenizer):
    ids = [(token, tokenizer.token_to_id(token)) for token in ("<|im_start|>", "<|im_end|>")]
    return append_eos(*ids[1], before=ids[:1])


def in_json(name, **values):
    return lambda folder: edit(folder / name, **values)


def pooling(mode):
    return in_json(POOLING, **{"pooling_mode_lasttoken": False, f"pooling_mode_{mode}": True})


def without_module(name):
    def change(folder):
        modules = [module for module in read_json(folder / "modules.json") if not module["type"].endswith(name)]
        (folder / "modules.json").write_text(json.dumps(modules))

    return change


def weights(change):
    def changed(folder):
        path = folder / "model.safetensors"
        save_file({name: change(name, tensor) for name, tensor in load_file(path).items()}, path, {"format": "pt"})

    return changed


def half(name, tensor):
    return tensor.to(torch.bfloat16)


def one_layer_scaled(name, tensor):
    return tensor * 1.2 if name == "layers.1.mlp.down_proj.weight" else tensor


def other_words(folder):
    path = folder / "tokenizer.json"
    content = read_json(path)
    vocab = content["model"]["vocab"]
    vocab["f"], vocab["o"] = vocab["o"], vocab["f"]
    path.write_text(json.dumps(content))


FAULTS = {
    "EOS missing": (post_processor(without_eos), "EOS", "and no EOS after the probe 'plain', expected one <|im_end|>"),
    "EOS twice": (post_processor(twice), "EOS", "found 2 after the probe 'plain', expected one <|im_end|>"),
    "another EOS": (in_json("tokenizer_config.json", eos_token="<|im_start|>"), "EOS", "found <|im_start|> (1), exp"),
    "another last token": (post_processor(another_end), "EOS", "found '<|im_start|>' and no EOS after the probe"),
    "a token before": (post_processor(a_token_before), "tokens", "found <|im_start|> at token 0 of the probe"),
    "other tokens": (other_words, "tokens", "of the probe 'plain', expected "),
    "padding on the left": (in_json("tokenizer_config.json", padding_side="left"), "padding", "found on the left, exp"),
    "no pad token": (in_json("tokenizer_config.json", pad_token=None), "padding", "found no pad token"),
    "mean": (
        in_json(POOLING, pooling_mode_lasttoken=False, pooling_mode_mean_tokens=True),
        "pooling",
        "found mean, exp",
    ),
    "cls": (in_json(POOLING, pooling_mode_lasttoken=False, pooling_mode_cls_token=True), "pooling", "found cls, exp"),
    "two poolings": (in_json(POOLING, pooling_mode_mean_tokens=True), "pooling", "found mean + lasttoken, expected"),
    "prompt not pooled": (in_json(POOLING, include_prompt=False), "pooling", "found lasttoken without the prompt, exp"),
    "dimension": (in_json(POOLING, word_embedding_dimension=48), "pooling dimension", "found 48, expected 32"),
    "no prompts": (in_json("config_sentence_transformers.json", prompts=None), "prompts", "found none, expected {"),
    "other prompts": (in_json("config_sentence_transformers.json", prompts={"query": "q: "}), "prompts", "found {'que"),
    "declared half": (in_json("config.json", dtype="bfloat16"), "precision", "float32 in safetensors and bfloat16 in"),
    "stored half": (weights(half), "precision", "found bfloat16 in safetensors and float32 in config.json, expected f"),
    "not normalised": (without_module("Normalize"), "normalisation", "found none, expected unit length"),
    "no modules": (lambda folder: (folder / "modules.json").unlink(), "modules", "pools the mean of all tokens"),
    "shorter": (in_json("sentence_bert_config.json", max_seq_length=12), "maximum length", "found 12, expected 24"),
    "no maximum": (in_json("sentence_bert_config.json", max_seq_length=None), "maximum length", "found none, expected"),
    "weights": (weights(one_layer_scaled), "weights", "from the contract's, expected at most 0.001"),
    "another base": (
        in_json("config.json", rope_parameters={"rope_theta": 50.0, "rope_type": "default"}),
        "weights",
        "",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_and_no_other(folder, fault):
    change, check, message = FAULTS[fault]
    change(folder)
    (wrong,) = faults(examine(folder))
    assert wrong.check == check
    assert message in wrong.text and "; remedy: " in wrong.text
    assert str(wrong).startswith(f"WRONG: {check}: ")


def test_two_faults_are_two_lines(folder):
    weights(one_layer_scaled)(folder)
    pooling("mean_tokens")(folder)
    found = examine(folder)
    assert [finding.check for finding in faults(found)] == ["pooling", "weights"]
    assert "as is to be expected with what is WRONG above" in str(found[-1])


def test_missing_and_left_over_weights_are_a_fault(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor for name, tensor in tensors.items() if name != "norm.weight"}, path, {"format": "pt"})
    (wrong,) = faults(examine(folder))
    assert wrong.check == "weights" and "lacks the weights norm.weight; remedy" in wrong.text


# Without a contract -----------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["EOS missing", "EOS twice", "dimension", "stored half", "no pad token"])
def test_without_a_contract_faults_are_named_that_files_show_by_themselves(folder, fault):
    change, check, _ = FAULTS[fault]
    (folder / FILE).unlink()
    change(folder)
    assert [finding.check for finding in faults(examine(folder))] == [check]


@pytest.mark.parametrize("kind", ["bert, mean", "bert, cls and dense", "xlm-roberta, prompts", "qwen3, mean", "static"])
def test_a_foreign_folder_is_held_against_what_it_declares(kind, tokenizer, tmp_path):
    found = {finding.check: finding for finding in examine(write(tmp_path, kind, tokenizer))}
    assert not faults(found.values())
    assert "no embedding contract" in found["held against"].text
    assert found["sentence-transformers"].state == "ok"
    pooling = "none" if kind == "static" else "cls" if "cls" in kind else "mean"
    assert found["pooling"].text == pooling
    assert found["prompts"].text == "of document and query"


def test_a_foreign_folder_with_wrong_parts_is_a_fault(tokenizer, tmp_path):
    folder = write(tmp_path, "bert, mean", tokenizer)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor for name, tensor in tensors.items() if "layer.1" not in name}, path, {"format": "pt"})
    assert [finding.check for finding in faults(examine(folder))] == ["weights"]


def test_a_backbone_is_no_embedding_model_and_no_fault(folder):
    for name in (FILE, "modules.json"):
        (folder / name).unlink()
    shutil.rmtree(folder / "1_Pooling")
    found = {finding.check: finding for finding in examine(folder)}
    assert not faults(found.values())
    assert found["modules"].state == "note" and "pools the mean" in found["modules"].text


# The command ------------------------------------------------------------------------------------


def test_the_command_prints_a_line_for_each_check_and_fails_for_a_fault(folder):
    done = f2llm("doctor", folder)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1 + len(CHECKS)
    edit(folder / POOLING, word_embedding_dimension=48)
    done = f2llm("doctor", folder)
    assert done.returncode == 1 and "WRONG: pooling dimension: found 48, expected 32; remedy: " in done.stdout


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (shutil.rmtree, "is no folder, so it is no model; remedy: "),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is damaged: no JSON"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "its tokenizer cannot be loaded"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 99), "model.safetensors is damaged"),
        (lambda folder: (folder / FILE).write_text("{"), "embedding_contract.json is damaged"),
        (lambda folder: edit(folder / "config.json", auto_map={"AutoModel": "x.Y"}), "code of its own"),
    ],
)
def test_what_is_no_model_is_one_line(folder, prepare, message):
    prepare(folder)
    with pytest.raises(ValueError, match="remedy") as error:
        examine(folder)
    assert len(str(error.value).splitlines()) == 1 and "; remedy: " in str(error.value)
    assert message in str(error.value)


def test_a_folder_of_other_files_is_one_line():
    done = f2llm("doctor", ROOT / "data")
    assert done.returncode == 1 and done.stdout == "" and len(done.stderr.strip().splitlines()) == 1
    assert "has neither config.json nor modules.json, so it is no model" in done.stderr
