"""TF-IDF by blocks against scikit-learn's own."""

from dataclasses import replace

import numpy as np
from conftest import SENTENCES
from helpers.closeness import assert_close
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer

from f2llm.mining.encoders import miner_of
from f2llm.mining.tfidf import MAX_CHARACTERS, Tfidf


def test_tfidf_rows_have_unit_length_and_near_texts_are_near():
    texts = ["a red house", "the red houses", "quantum field theory", "Хлеб и соль"]
    vectors = Tfidf(texts).encode(texts)
    scores = (vectors @ vectors.T).toarray()
    assert_close(np.diag(scores), np.ones(4))
    assert scores[0, 1] > 0.4 > 0.1 > scores[0, 2]
    assert scores[0, 3] < 0.01, "nothing is shared between two scripts"


def test_frequencies_that_are_counted_by_blocks_are_those_of_scikit_learn():
    texts = [f"{sentence} {number}" for number in range(400) for sentence in SENTENCES]
    assert len(texts) > 2 * Tfidf.block
    counts = HashingVectorizer(analyzer="char_wb", ngram_range=(2, 4), n_features=2**14, norm=None).transform(texts)
    library = TfidfTransformer(sublinear_tf=False).fit(abs(counts))
    ours = Tfidf(iter(texts))
    assert_close(ours.weights.idf_, library.idf_, eps=1e-12)
    assert_close(ours.encode(texts[:50]).toarray(), library.transform(counts[:50]).toarray(), eps=1e-6)


def test_the_tfidf_miner_reads_the_beginning_of_a_text_and_no_instruction(config):
    long = [sentence * 20 for sentence in SENTENCES]
    miner = miner_of(replace(config.mine, miner="tfidf"), long)
    cut = [text[:MAX_CHARACTERS] for text in long]
    assert min(map(len, long)) > MAX_CHARACTERS
    expected = Tfidf(cut).encode(cut).toarray()
    assert_close(miner.encode_documents(long).toarray(), expected, eps=1e-6)
    assert_close(miner.encode_queries(long, "Find the same sentence.").toarray(), expected, eps=1e-6)


def test_the_tfidf_key_is_that_of_its_frequencies():
    assert Tfidf(SENTENCES).key == Tfidf(reversed(SENTENCES)).key != Tfidf(SENTENCES[1:]).key
