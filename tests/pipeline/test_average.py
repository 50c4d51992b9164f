"""Several models' weights as one model."""

import copy
import json
import shutil

import pytest
import torch
from helpers.closeness import assert_close

from f2llm.contract import read_contract
from f2llm.embedded.backbone import train_tokenizer
from f2llm.model import Embedder
from f2llm.pipeline.average import average
from f2llm.store.model_folder import read_json


@pytest.fixture
def three(embedder, tmp_path):
    """Folders of three models of one shape; the first was trained with a prompt."""
    folders = []
    for seed in range(3):
        model = Embedder(copy.deepcopy(embedder.model), embedder.tokenizer, embedder.max_tokens)
        torch.manual_seed(seed)
        with torch.no_grad():
            for weight in model.model.parameters():
                weight.add_(0.1 * torch.randn_like(weight))
        model.matryoshka_dims, model.query_prompt = [8, 16], "Instruct: find.\nQuery: " if seed == 0 else ""
        model.save(tmp_path / f"model{seed}")
        folders.append(tmp_path / f"model{seed}")
    return folders


def weights(folder):
    return {name: weight.double() for name, weight in Embedder.load(folder).model.state_dict().items()}


def test_the_mean_of_three_models_loads_as_one_with_the_first_ones_settings(three, tmp_path):
    average(three, tmp_path / "mean")
    found, parts = weights(tmp_path / "mean"), [weights(folder) for folder in three]
    for name, weight in found.items():
        assert_close(weight, sum(part[name] for part in parts) / 3, eps=1e-6)
        assert not torch.equal(weight, parts[0][name])
    prompts = "config_sentence_transformers.json"
    assert read_json(tmp_path / "mean" / prompts)["prompts"] == read_json(three[0] / prompts)["prompts"]
    assert read_contract(tmp_path / "mean").matryoshka_dims == [8, 16]
    assert Embedder.load(tmp_path / "mean").max_tokens == Embedder.load(three[0]).max_tokens


def test_a_model_averaged_with_itself_is_itself(three, tmp_path):
    average([three[0]] * 4, tmp_path / "mean")
    for name, weight in weights(tmp_path / "mean").items():
        assert torch.equal(weight, weights(three[0])[name])


@pytest.mark.parametrize("difference", ["shape", "tokenizer", "alone", "no model"])
def test_what_cannot_be_averaged_is_one_error_and_nothing_is_written(three, tmp_path, difference):
    other = three[1]
    if difference == "shape":
        config = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0, "num_hidden_layers": 7}))
        reason = r"model1 has num_hidden_layers 7 in config.json, .*model0 has \d+; remedy: models of the same shape"
    elif difference == "tokenizer":
        train_tokenizer(["other texts"], vocab=300).save_pretrained(other)
        reason = "model1 has another tokenizer.json than .*model0; remedy"
    elif difference == "alone":
        three, reason = three[:1], "1 model to average; remedy: name two or more"
    else:
        shutil.rmtree(other)
        reason = "model1"
    with pytest.raises(ValueError, match=reason):
        average(three, tmp_path / "mean")
    assert not (tmp_path / "mean").exists()
