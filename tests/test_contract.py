"""The embedding contract of a model folder: what it says, that it is true, and what is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.closeness import assert_close
from transformers import AutoTokenizer, Qwen3Config, Qwen3Model

from f2llm.contract import FILE, IDS_KEPT, contract_of, read_contract, write_contract
from f2llm.model import Embedder


@pytest.fixture
def folder(embedder, tmp_path):
    embedder.save(tmp_path / "model")
    return tmp_path / "model"


def test_a_contract_says_what_decides_an_embedding(embedder, folder):
    contract = read_contract(folder)
    assert (contract.pooling, contract.normalised, contract.dim, contract.max_tokens) == ("lasttoken", True, 32, 24)
    assert (contract.eos_token, contract.eos_token_id) == ("<|im_end|>", embedder.tokenizer.eos_token_id)
    assert (contract.tokens_before, contract.padding_side, contract.matryoshka_dims) == ([], "right", None)
    assert contract.dtype == contract.computed_in == "float32"
    assert contract.prompts == {"query": "", "document": ""}


def test_its_probes_are_the_model_s_own_tokens_and_embeddings(embedder, folder):
    probes = read_contract(folder).probes
    assert {probe.name for probe in probes} == {"plain", "short", "multilingual", "prompt", "too long"}
    texts = [probe.whole_text for probe in probes]
    assert texts[3].startswith("Instruct: Given a question, ") and texts[3].endswith(" 12345 lines?\n\n")
    for probe, ids, row in zip(probes, embedder.tokenize(texts), embedder.encode(texts)):
        assert probe.has_ids(ids) and not probe.has_ids(ids[:-1]) and not probe.has_ids([*ids[:-1], 0])
        assert_close(probe.embedding, row[: len(probe.embedding)])
    assert [len(probe.embedding) for probe in probes] == [32, 16, 16, 16, 16]
    assert abs(np.linalg.norm(probes[0].embedding) - 1) < 1e-5
    saved = AutoTokenizer.from_pretrained(folder)
    assert len(saved(texts[-1])["input_ids"]) > probes[-1].num_tokens == 24, "vacuous: the last text was not cut"


def test_it_reads_back_as_it_was_written_and_the_same_model_writes_the_same_bytes(embedder, folder, tmp_path):
    contract = replace(read_contract(folder), matryoshka_dims=[8, 32])
    write_contract(tmp_path, contract)
    assert read_contract(tmp_path) == contract
    embedder.tokenize(["a text"])
    embedder.save(tmp_path / "again")
    for file in folder.rglob("*.json"):
        assert file.read_bytes() == (tmp_path / "again" / file.relative_to(folder)).read_bytes(), file.name


def test_the_precision_of_training_does_not_matter(embedder, folder):
    """Training multiplies in bfloat16, its weights are float32."""
    embedder.autocast_dtype = torch.bfloat16
    assert contract_of(folder, embedder) == read_contract(folder)
    assert embedder.autocast_dtype == torch.bfloat16


def test_without_embeddings_it_has_token_ids_alone(embedder, folder):
    contract = contract_of(folder, embedder, vectors=False)
    assert contract.computed_in is None and [probe.embedding for probe in contract.probes] == [None] * 5
    assert all(probe.token_ids for probe in contract.probes)


def test_half_precision_is_said(embedder, tmp_path):
    embedder.model.to(torch.bfloat16)
    embedder.save(tmp_path / "model")
    contract = read_contract(tmp_path / "model")
    assert contract.dtype == contract.computed_in == "bfloat16"


def test_the_widest_model_that_reads_the_longest_texts_has_a_small_file(tokenizer, tmp_path):
    shape = {"hidden_size": 5120, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    shape |= {"num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 40960}
    model = Embedder(Qwen3Model(Qwen3Config(vocab_size=len(tokenizer), **shape)).eval(), tokenizer, 40960)
    model.save(tmp_path / "model")
    assert (tmp_path / "model" / FILE).stat().st_size < 100_000
    *_, longest = read_contract(tmp_path / "model").probes
    assert (longest.num_tokens, len(longest.token_ids), longest.embedding) == (40960, IDS_KEPT, None)


def test_a_folder_without_one_has_none(tmp_path):
    assert read_contract(tmp_path) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is damaged: no JSON"),
        ('{"version": 2}', r"has version 2, but this f2llm reads 1; remedy: "),
        ("[]", "has version None"),
        ('{"version": 1}', "is damaged"),
        ('{"version": 1, "probes": []}', "is damaged"),
        ('{"version": 1, "probes": [{}]}', "is damaged"),
    ],
)
def test_what_is_damaged_or_of_a_later_version_is_an_error(tmp_path, text, message):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_contract(tmp_path)


def test_the_file_is_json_with_one_line_for_each_probe(folder):
    lines = (folder / FILE).read_text().splitlines()
    assert sum(line.startswith('  {"name": ') for line in lines) == 5
    assert json.loads("\n".join(lines))["probes"][1]["text"] == "fox"
