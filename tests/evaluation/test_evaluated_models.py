"""Which models are compared, what each one is given to read, and how texts become rows."""

import numpy as np
import pytest
from conftest import SENTENCES

from f2llm.config import resolve
from f2llm.evaluation.models import (
    NUM_FEATURES,
    RememberedRows,
    encoder_of,
    models_of,
    parameters_of,
    reading_of,
    tfidf_encoder,
)
from f2llm.evaluation.variants import at_dim
from f2llm.mining.tfidf import Tfidf
from f2llm.model import Embedder

LONG = "one two three four five six seven eight nine ten " * 4  # more tokens than any model of these tests takes


@pytest.fixture
def configured(params):
    """The configuration of the default size with two short lengths and one student."""
    params["seed"] = 7  # not that of the fixture `embedder`
    own = {"stage2": {"max_tokens": 20}, "distill": {"max_tokens": 12}, "prune": {"leave_out": ["femto", "atto"]}}
    return lambda *only: resolve(params, "nano", own | {"evaluate": {"only": list(only)}})


@pytest.fixture
def folder(embedder, tmp_path):
    for name in ("backbone", "stage1", "stage2", "pruned/pico", "distilled/pico"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        embedder.save(tmp_path / name)
    return tmp_path


def test_all_models_of_the_pipeline_are_compared_in_its_order(configured, folder, small_store):
    models = models_of(configured(), folder, small_store.path)
    assert list(models) == ["tfidf", "untrained", "backbone", "stage1", "stage2", "pico-pruned", "pico-distilled"]
    assert [name for name, model in models.items() if model.trained] == ["stage1", "stage2", "pico-distilled"]
    reading = reading_of(models)
    assert reading["max_tokens"].tolist() == ["all", 20, 20, 20, 20, 12, 12]
    assert reading.index[reading["instruction"] != "none"].tolist() == ["stage2", "pico-distilled"]


def test_every_model_reads_texts_as_it_was_trained_to(configured, folder, embedder, small_store):
    models = models_of(configured(), folder, small_store.path)
    for name, model in models.items():
        if name in ("tfidf", "untrained"):
            continue
        embedder.max_tokens = 12 if name.startswith("pico") else 20
        instruction = "Find it." if name in ("stage2", "pico-distilled") else None
        expected = embedder.encode([*SENTENCES, LONG], instruction)
        np.testing.assert_allclose(model.encode([*SENTENCES, LONG], "Find it."), expected, atol=1e-6)
    raw, instructed = models["stage1"].encode([LONG], "Find it."), models["stage2"].encode([LONG], "Find it.")
    assert np.abs(raw - instructed).max() > 0.01, "vacuous: the instruction has no effect"
    assert np.abs(raw - models["pico-pruned"].encode([LONG], None)).max() > 0.01, "vacuous: the length has no effect"


def test_the_untrained_model_is_drawn_by_the_seed(configured, folder):
    config = configured("untrained", "backbone")
    models = models_of(config, folder)
    untrained = Embedder.untrained(folder / "backbone", config.seed)
    untrained.max_tokens = 20
    rows = models["untrained"].encode(SENTENCES, None)
    np.testing.assert_array_equal(rows, untrained.encode(SENTENCES))
    assert np.abs(rows - models["backbone"].encode(SENTENCES, None)).max() > 0.01, "vacuous: the weights are alike"


def test_only_the_chosen_models_are_loaded(configured, folder, small_store):
    assert list(models_of(configured("stage1", "backbone"), folder, folder / "no tuples")) == ["backbone", "stage1"]
    assert list(models_of(configured("tfidf"), folder / "no models", small_store.path)) == ["tfidf"]


def test_an_unknown_model_is_refused_before_anything_is_loaded(configured, tmp_path):
    with pytest.raises(ValueError, match=r"evaluate.only has 'stage3', but the models are: tfidf, untrained.*remedy"):
        models_of(configured("stage1", "stage3"), tmp_path / "no models", tmp_path / "no tuples")


def test_tfidf_is_fitted_on_the_training_texts(configured, small_store):
    encode = models_of(configured("tfidf"), tuples=small_store.path)["tfidf"].encode
    texts = ["pairs document 3", "a text of something else"]
    fitted = tfidf_encoder(Tfidf(small_store.texts(), NUM_FEATURES))
    np.testing.assert_array_equal(encode(texts, None), fitted(texts, None))
    assert np.abs(encode(texts, None) - tfidf_encoder(Tfidf(texts, NUM_FEATURES))(texts, None)).max() > 0.01


def test_parameters_are_counted_with_and_without_embeddings(configured, folder, small_store, embedder):
    parameters = parameters_of(models_of(configured("tfidf", "backbone", "stage1"), folder, small_store.path))
    total = sum(parameter.numel() for parameter in embedder.model.parameters())
    without = total - 320 * 32
    assert parameters.to_dict("list") == {
        "model": ["backbone", "stage1"],
        "parameters": [total, total],
        "without_embeddings": [without, without],
    }


# Encoders ---------------------------------------------------------------------------------------


def test_a_prefix_of_whole_embeddings_is_what_encoding_at_that_dim_gives(embedder):
    shortened = at_dim(encoder_of(embedder, instructions=True), 8)
    direct = encoder_of(embedder, instructions=True, dim=8)
    for instruction in (None, "Find it."):
        np.testing.assert_allclose(shortened(SENTENCES, instruction), direct(SENTENCES, instruction), atol=1e-5)
    assert np.abs(direct(SENTENCES, None) - direct(SENTENCES, "Find it.")).max() > 0.01, "vacuous: no effect"


def test_a_model_that_never_saw_an_instruction_gets_none(embedder):
    raw = encoder_of(embedder, instructions=False)
    np.testing.assert_array_equal(raw(SENTENCES, "Find it."), embedder.encode(SENTENCES))


def test_a_cached_encoder_computes_every_text_once_per_instruction():
    asked = []

    def rows_of(texts, instruction):
        return np.array([[ord(text), len(instruction or "")] for text in texts])

    def encode(texts, instruction):
        asked.extend((text, instruction) for text in texts)
        return rows_of(texts, instruction)

    lookup = RememberedRows(encode)
    for texts, instruction in ((["a", "b", "a"], None), (["b", "c"], None), (["b"], "x"), (["c", "a"], None)):
        np.testing.assert_array_equal(lookup(texts, instruction), rows_of(texts, instruction))
    assert asked == [("a", None), ("b", None), ("c", None), ("b", "x")]


def test_tfidf_takes_no_notice_of_instructions():
    encode = tfidf_encoder(Tfidf(SENTENCES))
    np.testing.assert_array_equal(encode(SENTENCES, None), encode(SENTENCES, "Find it."))
    np.testing.assert_allclose(np.linalg.norm(encode(SENTENCES, None), axis=1), 1, atol=1e-5)
