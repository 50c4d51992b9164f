"""Adapters: against peft by hand, what is trained and what stays, merged = unmerged, what is refused."""

import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import SENTENCES
from helpers.closeness import assert_all_close, assert_close
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from f2llm import lora
from f2llm.batches import HomogeneousBatches
from f2llm.config import Lora
from f2llm.encoder import load_encoder
from f2llm.evaluation.public import find_model
from f2llm.losses import matryoshka_dims
from f2llm.model import Embedder
from f2llm.pipeline.doctor import examine
from f2llm.store.model_folder import check_foreign_folder
from f2llm.store.run_log import Run
from f2llm.train import train

LORA = Lora(rank=4, alpha=8.0, dora=False, targets="all")
KINDS = {"lora": LORA, "dora": replace(LORA, dora=True), "some": replace(LORA, targets=["q_proj", "down_proj"])}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.fixture
def base(embedder, tmp_path):
    embedder.query_prompt = "Instruct: "
    embedder.save(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def trained(embedder, base, kind):
    """An embedder with an adapter that changes every embedding, as after training."""
    embedder.matryoshka_dims = matryoshka_dims(embedder.dim, 8)
    lora.add_adapter(embedder.model, kind, seed=1)
    shake(embedder.model)
    return embedder


def shake(model) -> None:
    with torch.no_grad():
        for parameter in of_adapter(model).values():
            parameter.add_(0.2 * torch.randn_like(parameter))


def of_adapter(model) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in of_adapter(model).items()}


@pytest.fixture
def saved(trained, base, tmp_path):
    """The folder of the adapter of `trained`."""
    lora.save_adapter(tmp_path / "adapter", trained, weights_of(trained.model), base)
    return tmp_path / "adapter"


def one_by_one(model, token_ids: list[list[int]]) -> torch.Tensor:
    """Oracle: the forward pass of transformers and peft, text by text; the last hidden state of each."""
    return torch.cat([model(torch.tensor([ids])).last_hidden_state[:, -1] for ids in token_ids])


def gradients(model, embeddings: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of the adapter's weights, by their names in peft's files."""
    weights = torch.linspace(-1, 1, embeddings.numel()).view_as(embeddings)
    model.zero_grad()
    (torch.nn.functional.normalize(embeddings, dim=-1) * weights).sum().backward()
    found = {name.removeprefix(lora.PREFIX): parameter.grad for name, parameter in of_adapter(model).items()}
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)
    return found


def test_embeddings_and_gradients_are_those_of_peft_on_the_base(trained, saved, base):
    ids = trained.tokenize(SENTENCES)
    plain = AutoModel.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    by_hand = PeftModel.from_pretrained(plain, saved, is_trainable=True).eval()
    expected = one_by_one(by_hand, ids)
    expected_gradients = gradients(by_hand, expected)
    found = trained.embed(ids)
    assert_close(found, expected, eps=1e-5)
    assert (found - Embedder.load(base).embed(ids)).abs().max() > 0.1, "vacuous: the adapter changes nothing"
    found = gradients(trained.model, found)
    assert len(found) >= 2 * 2 * 2
    assert_all_close(found, expected_gradients, eps=1e-5)


def test_a_model_that_is_not_merged_is_not_written(trained, tmp_path):
    with pytest.raises(RuntimeError, match=r"has an adapter beside its weights, .* remedy: f2llm\.lora\.save_adapter"):
        trained.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_merged_model_has_the_embeddings_of_base_and_adapter(trained, saved, base):
    ids = trained.tokenize(SENTENCES)
    expected = trained.embed(ids)
    merged = lora.merge(saved, base)
    assert_close(merged.embed(ids), expected, eps=1e-5)
    names = AutoModel.from_pretrained(base).state_dict().keys()
    assert merged.model.state_dict().keys() == names and not lora.has_adapter(merged.model)
    settings = ("max_tokens", "query_prompt", "matryoshka_dims")
    assert [getattr(merged, key) for key in settings] == [getattr(trained, key) for key in settings]


def test_a_new_adapter_changes_nothing_and_is_drawn_by_its_seed(embedder, kind):
    ids = embedder.tokenize(SENTENCES)
    before, models = embedder.embed(ids), [copy.deepcopy(embedder.model) for _ in range(3)]
    state = torch.get_rng_state()
    for model, seed in zip(models, (3, 3, 4)):
        lora.add_adapter(model, kind, seed)
    one, same, other = (torch.cat([weight.flatten() for weight in of_adapter(model).values()]) for model in models)
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(state, torch.get_rng_state()), "drawing it must not change what is drawn later"
    assert_close(Embedder(models[0], embedder.tokenizer, embedder.max_tokens).embed(ids), before, eps=1e-6)


def test_training_moves_the_adapter_alone(embedder, kind, small_store, tiny_training, machine):
    before = copy.deepcopy(embedder.model.state_dict())
    lora.add_adapter(embedder.model, kind, seed=0)
    start, frozen = weights_of(embedder.model), copy.deepcopy(embedder.model.state_dict())
    plan = replace(tiny_training, epochs=5, learning_rate=1e-2, min_learning_rate=1e-3)
    batches = HomogeneousBatches(small_store, plan, seed=0, stage1=False)
    run = Run("test", len(batches), print_every=1e9)
    train(embedder, batches, plan, run, replace(machine, token_budget=2000))
    losses = [row["loss"] for row in run.rows if row["source"] == "pairs"]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    after = embedder.model.state_dict()
    assert sorted(key for key in after if not torch.equal(after[key], frozen[key])) == sorted(start)
    unchanged = {key.replace(".base_layer", ""): weight for key, weight in after.items() if key not in start}
    assert unchanged.keys() == before.keys()
    assert all(torch.equal(weight, before[key]) for key, weight in unchanged.items())
    assert lora.num_trained(embedder.model)[0] == sum(weight.numel() for weight in start.values())


def test_the_first_step_at_full_rank_goes_where_full_training_goes(embedder, base):
    """With A = identity and B = 0 the gradient of B is that of the weight itself: W + B."""
    full = Embedder.load(base, training=True)
    ids = full.tokenize(SENTENCES)
    weights = torch.linspace(-1, 1, len(ids) * full.dim).view(len(ids), -1)
    (full.embed(ids) * weights).sum().backward()
    lora.add_adapter(embedder.model, Lora(rank=32, alpha=32.0, dora=False, targets=["q_proj", "gate_proj"]), seed=0)
    with torch.no_grad():
        for key, parameter in of_adapter(embedder.model).items():
            if "lora_A" in key:
                parameter.copy_(torch.eye(32))
    (embedder.embed(ids) * weights).sum().backward()
    expected = {
        key: value.grad for key, value in full.model.named_parameters() if "q_proj" in key or "gate_proj" in key
    }
    found = {
        key.replace(".lora_B.default", ""): value.grad
        for key, value in of_adapter(embedder.model).items()
        if "lora_B" in key
    }
    assert len(found) == 4
    assert_all_close(found, expected, eps=1e-5)


# Adapters from elsewhere ------------------------------------------------------------------------


@pytest.fixture
def foreign(base, tmp_path):
    """What peft itself saves of an adapter on the same model with a language-model head."""
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_config(AutoModel.from_pretrained(base).config)
    model.model.load_state_dict(AutoModel.from_pretrained(base).state_dict())
    model.name_or_path = "someone/base"
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "up_proj"], lora_dropout=0.1, use_rslora=True)
    adapted = get_peft_model(model, config).eval()
    shake(adapted)
    adapted.save_pretrained(tmp_path / "foreign", save_embedding_layers=False)
    return tmp_path / "foreign", adapted


def test_an_adapter_that_peft_saved_is_merged_into_the_model_it_names(foreign, base, embedder):
    folder, adapted = foreign
    assert not (folder / "base.json").exists()
    merged = lora.merge(folder, base)
    ids = embedder.tokenize(SENTENCES)
    expected = one_by_one(adapted.base_model.model.model, ids)
    assert_close(merged.embed(ids), expected, eps=1e-5)
    assert (embedder.embed(ids) - expected).abs().max() > 0.05, "vacuous: the adapter changes nothing"


def test_an_adapter_of_another_base_is_refused(trained, saved, base, tmp_path):
    other = Embedder.load(base, training=True)
    with torch.no_grad():
        other.model.norm.weight[0] += 1
    other.save(tmp_path / "other")
    with pytest.raises(ValueError, match=r"was trained on .*/base, but the weights of .*/other are others; remedy"):
        lora.merge(saved, tmp_path / "other")


def test_without_hashes_the_name_must_be_the_bases(foreign, base, tmp_path):
    shutil.copytree(base, tmp_path / "another")
    with pytest.raises(ValueError, match=r"names the base 'someone/base', but .*another has another name; remedy"):
        lora.merge(foreign[0], tmp_path / "another")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3', but must be one of: LORA"),
        ({"r": 0}, "r is 0, but must be above 0"),
        ({"r": 5}, "does not fit its base: r is 5, but its weights are of rank 3"),
        ({"bias": "all"}, "has bias 'all', with which the kit merges no adapter; remedy"),
        ({"modules_to_save": ["norm"]}, r"has modules_to_save \['norm'\]"),
        ({"rank_pattern": {"(a+)+$": 3}}, "has rank_pattern"),
        ({"megatron_config": {"a": 1}}, "has megatron_config"),
        ({"of_tomorrow": True}, "has of_tomorrow True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"target_modules": "(a+)+$"}, "target_modules is .* but must be a list"),
        ({"target_modules": ["nowhere"]}, "does not fit its base: .*nowhere"),
        ({"target_modules": ["q_proj"]}, "does not fit its base: .*up_proj.* is left over"),
        ({"target_modules": ["q_proj", "up_proj", "k_proj"]}, "does not fit its base: .*k_proj.* is missing"),
    ],
    ids=str,
)
def test_settings_and_weights_that_do_not_fit_are_one_clear_error(foreign, base, change, expected):
    path = foreign[0] / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=expected) as error:
        lora.merge(foreign[0], base)
    assert "\n" not in str(error.value)


def test_damaged_and_unsafe_weights_are_refused(foreign, base):
    path = foreign[0] / "adapter_model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="does not fit its base"):
        lora.merge(foreign[0], base)
    path.write_bytes(content)
    weights = load_file(path)
    weights[min(weights)][0] = torch.nan
    save_file(weights, path)
    with pytest.raises(ValueError, match="NaN"):
        lora.merge(foreign[0], base)
    path.rename(foreign[0] / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model.safetensors is missing; remedy: .* saved as safetensors"):
        lora.merge(foreign[0], base)


def test_an_adapter_is_named_where_a_model_is_expected(foreign, base, tmp_path):
    folder, expected = foreign[0], r"has an adapter \(adapter_config.json\).* remedy: f2llm merge .* BASE OUT"
    for reader in (Embedder.load, load_encoder, examine, lambda path: find_model(str(path), tmp_path / "mirror")):
        with pytest.raises(ValueError, match=expected):
            reader(folder)
    shutil.copy(folder / "adapter_config.json", base)  # beside whole weights, where sentence-transformers adds it
    for reader in (load_encoder, examine, check_foreign_folder):
        with pytest.raises(ValueError, match=expected):
            reader(base)


def test_the_files_of_an_adapter_do_not_depend_on_the_order_of_sets(trained, saved, base, tmp_path):
    values = json.loads((saved / "adapter_config.json").read_text())
    assert values["target_modules"] == sorted(values["target_modules"])
    lora.save_adapter(tmp_path / "again", trained, dict(reversed(weights_of(trained.model).items())), base)
    for file in saved.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    ours = load_file(saved / "adapter_model.safetensors")
    assert ours.keys() == {lora.PREFIX + key for key in get_peft_model_state_dict(trained.model)}
