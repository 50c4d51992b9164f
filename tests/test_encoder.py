"""Models of other families as encoders, against sentence-transformers; and what both can run, compared."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SENTENCES
from helpers.closeness import assert_close
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, Qwen3Config, Qwen3Model, XLMRobertaConfig, XLMRobertaModel

from f2llm.batches import HomogeneousBatches
from f2llm.encoder import ForeignEncoder, compare_with_sentence_transformers, load_encoder
from f2llm.model import Embedder
from f2llm.pipeline.models import copy_teacher
from f2llm.step import compute_losses, prepare
from f2llm.teacher import Cached, TextTeacher, check_teacher, live, teacher_of

sentence_transformers = pytest.importorskip("sentence_transformers")
models = pytest.importorskip("sentence_transformers.sentence_transformer.modules")

SHAPE = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXTS = [*SENTENCES, "fox", " ".join(SENTENCES)]
KINDS = ("bert, mean", "bert, cls and dense", "xlm-roberta, prompts", "qwen3, mean", "static")


def write(folder, kind, tokenizer):
    """A tiny random folder of sentence-transformers."""
    torch.manual_seed(0)
    if kind == "static":
        modules = [models.StaticEmbedding(tokenizer.backend_tokenizer, embedding_dim=48)]
    else:
        classes = {
            "bert": (BertModel, BertConfig, {}),
            "xlm-roberta": (XLMRobertaModel, XLMRobertaConfig, {"pad_token_id": 0}),
            "qwen3": (Qwen3Model, Qwen3Config, {"num_key_value_heads": 2, "head_dim": 12}),
        }
        model, config, more = classes[kind.split(",")[0]]
        model(config(vocab_size=len(tokenizer), initializer_range=0.3, **SHAPE, **more)).save_pretrained(folder / "of")
        tokenizer.save_pretrained(folder / "of")
        mode = "cls" if "cls" in kind else "mean"
        modules = [models.Transformer(str(folder / "of"), max_seq_length=24), models.Pooling(48, pooling_mode=mode)]
        if "dense" in kind:
            modules.append(models.Dense(48, 40))
        if "prompts" in kind:
            modules[1].include_prompt = False
        modules.append(models.Normalize())
    prompts = {"query": "query: ", "document": "passage: "} if "prompts" in kind else None
    whole = sentence_transformers.SentenceTransformer(modules=modules, device="cpu", prompts=prompts)
    whole.save_pretrained(str(folder / "model"))
    return folder / "model"


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def foreign(kind, tokenizer, tmp_path):
    return write(tmp_path, kind, tokenizer)


def theirs(folder):
    return sentence_transformers.SentenceTransformer(str(folder), device="cpu", local_files_only=True)


def test_what_the_kit_does_not_compute_is_run_as_it_declares_itself(foreign, kind):
    encoder = load_encoder(foreign)
    assert isinstance(encoder, ForeignEncoder)
    expected = theirs(foreign).encode_query(TEXTS, normalize_embeddings=True)
    assert_close(encoder.encode(TEXTS, instruction="Find it."), expected)
    documents = theirs(foreign).encode_document(TEXTS, normalize_embeddings=True)
    assert_close(encoder.encode(TEXTS), documents)
    assert ("prompts" in kind) == (np.abs(expected - documents).max() > 1e-3)
    prefix = encoder.encode(TEXTS, dim=8)
    assert_close(prefix, documents[:, :8] / np.linalg.norm(documents[:, :8], axis=1, keepdims=True))


def test_a_teacher_s_embeddings_are_raw_and_without_the_model_s_own_prompts(foreign, kind):
    raw = load_encoder(foreign).embed_texts(TEXTS).numpy()
    expected = theirs(foreign).encode(TEXTS, prompt="", normalize_embeddings=True)
    lengths = np.linalg.norm(raw, axis=1, keepdims=True)
    assert_close(raw / lengths, expected)
    assert np.abs(lengths - 1).max() > 0.01, "vacuous: they have unit length already"
    assert raw.shape[1] == load_encoder(foreign).dim == (40 if "dense" in kind else 48)


def test_a_student_learns_from_it(foreign, embedder, small_store, tiny_training, machine, tmp_path):
    plan = replace(tiny_training, distillation_weight=1.0)
    packed = prepare(embedder, HomogeneousBatches(small_store, plan, seed=0, stage1=False)[0], machine)
    teacher = teacher_of(embedder, load_encoder(foreign))
    check_teacher(embedder, teacher)
    assert isinstance(teacher, TextTeacher)
    expected = load_encoder(foreign).embed_texts(packed.batch.texts)
    (tmp_path / "cache").mkdir()
    cached = Cached(teacher, tmp_path / "cache", machine)
    for target in (live(teacher)(packed), cached(packed)):
        assert_close(target, expected)
    cached.flush()
    assert_close(Cached(None, tmp_path / "cache", machine)._row(next(iter(cached.where))), expected[0])
    embeddings = embedder.embed(embedder.tokenize(packed.batch.texts))
    losses = compute_losses(embeddings, packed.batch, plan, expected)
    assert losses["distill"] > 0


def test_an_embedder_with_another_tokenizer_reads_texts(embedder, tokenizer, tmp_path):
    other = copy_with_another_token(embedder, tmp_path)
    teacher = teacher_of(embedder, load_encoder(other))
    assert isinstance(teacher, TextTeacher)
    encoder = Embedder.load(other)
    assert_close(teacher(TEXTS), encoder.embed(encoder.tokenize(TEXTS)))
    embedder.save(tmp_path / "same")
    same = teacher_of(embedder, load_encoder(tmp_path / "same"))
    assert isinstance(same, Embedder) and same.max_tokens == embedder.max_tokens


def copy_with_another_token(embedder, tmp_path):
    embedder.save(tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    text = path.read_text()
    assert "<|im_start|>" in text
    path.write_text(text.replace("<|im_start|>", "<|other|>"))
    return tmp_path / "other"


def test_a_teacher_folder_is_copied_whole_and_tried(foreign, config, tmp_path):
    stage2 = replace(config.stage2, distillation_weight=1.0)
    copy_teacher(replace(config, teacher=f"folder:{foreign}", stage2=stage2), tmp_path / "teacher")
    assert_close(load_encoder(tmp_path / "teacher").encode(TEXTS), load_encoder(foreign).encode(TEXTS))


# Refused ----------------------------------------------------------------------------------------


def test_missing_left_over_and_misshapen_tensors_are_named(tokenizer, tmp_path):
    folder = write(tmp_path, "bert, mean", tokenizer)
    path = folder / "model.safetensors"
    weights, name = load_file(path), "encoder.layer.0.output.dense.weight"
    for changed, message in (
        ({key: tensor for key, tensor in weights.items() if key != name}, f"lacks the weights {name}"),
        (
            weights | {"encoder.layer.7.output.dense.weight": weights[name].clone()},
            "has left over the weights encoder.layer.7",
        ),
        (
            weights | {name: weights[name][:5].contiguous()},
            "another shape than its config.json: encoder.layer.0.output",
        ),
    ):
        save_file(changed, path, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message):
            load_encoder(folder)


def test_pickles_and_code_of_its_own_are_not_run(tokenizer, tmp_path):
    folder = write(tmp_path, "bert, cls and dense", tokenizer)
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps([*modules, {"idx": 9, "path": "", "type": "os.Mine"}]))
    with pytest.raises(ValueError, match=r"type 'os\.Mine', which is code of its own"):
        load_encoder(folder)
    (folder / "modules.json").write_text(json.dumps(modules))
    dense = next(folder / module["path"] for module in modules if module["type"].endswith("Dense"))
    torch.save({}, dense / "pytorch_model.bin")
    (dense / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"pytorch_model\.bin are a pickle"):
        load_encoder(folder)


def test_a_folder_that_declares_no_modules_is_no_encoder(tokenizer, tmp_path):
    folder = write(tmp_path, "bert, mean", tokenizer)
    (folder / "modules.json").unlink()
    with pytest.raises(ValueError, match="is a 'bert', but the kit's forward pass computes"):
        load_encoder(folder)
    with pytest.raises(ValueError, match=r"has no modules\.json, so which tokens are pooled is unknown; remedy: "):
        ForeignEncoder(folder)


def test_a_teacher_that_is_narrower_is_refused(tokenizer, tmp_path, embedder, monkeypatch):
    encoder = load_encoder(write(tmp_path, "bert, mean", tokenizer))
    monkeypatch.setattr(Embedder, "dim", 64)
    with pytest.raises(ValueError, match="48 dimensions, fewer than the student's 64"):
        check_teacher(embedder, teacher_of(embedder, encoder))


# Compared ---------------------------------------------------------------------------------------


def test_the_kit_s_own_folders_agree_with_sentence_transformers(embedder, tmp_path):
    embedder.save(tmp_path / "model")
    compare_with_sentence_transformers(load_encoder(tmp_path / "model"), tmp_path / "model")


def test_a_difference_is_an_error(embedder, tmp_path):
    """The folder has other weights than the model: whatever the reason, the embeddings differ."""
    embedder.save(tmp_path / "model")
    other = Embedder.untrained(tmp_path / "model", seed=5)
    with pytest.raises(ValueError, match=r"has a cosine of .* with that of sentence-transformers.*remedy: "):
        compare_with_sentence_transformers(other, tmp_path / "model")


def test_a_bare_backbone_has_nothing_to_compare_with(embedder, tmp_path):
    embedder.save(tmp_path / "model")
    (tmp_path / "model" / "modules.json").unlink()
    shutil.rmtree(tmp_path / "model" / "1_Pooling")
    compare_with_sentence_transformers(Embedder.untrained(tmp_path / "model", seed=5), tmp_path / "model")
