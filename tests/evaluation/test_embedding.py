"""The sentence encoder against `transformers` on torch (golden values), and its way with texts."""

from pathlib import Path

import numpy as np
import pytest

from safemoe_jax.evaluation import embedding
from safemoe_jax.evaluation.embedding import MiniLM, encode

GOLDEN = Path(__file__).parent.parent / "golden" / "bert.npz"


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as stored:
        values = dict(stored)
    tensors = {
        name.removeprefix("weight "): value
        for name, value in values.items()
        if name.startswith("weight ")
    }
    texts = [
        text[:length].tolist()
        for text, length in zip(values["texts"], values["lengths"], strict=True)
    ]
    return tensors, texts, values["vectors"]


def test_vectors_are_those_of_the_reference_whatever_shares_the_batch(golden):
    tensors, texts, vectors = golden
    np.testing.assert_allclose(encode(tensors, texts, heads=4), vectors, atol=1e-5)
    for text, vector in zip(texts, vectors, strict=True):
        np.testing.assert_allclose(encode(tensors, [text], heads=4)[0], vector, atol=1e-5)
    assert np.abs(vectors[0] - vectors[1]).max() > 0.1


class Ids:
    """A tokenizer of numbers, three to a piece."""

    def __init__(self, ids):
        parts = [ids[i : i + 3] for i in range(0, len(ids), 3)]
        self.ids, self.overflowing = parts[0], [Ids(part) for part in parts[1:]]

    @classmethod
    def encode_batch(cls, texts):
        return [cls([int(word) for word in text.split()]) for text in texts]


def test_a_text_is_a_row_for_each_piece_in_order(golden, monkeypatch):
    tensors, _, _ = golden
    monkeypatch.setattr(embedding, "_PIECES_AT_ONCE", 2)
    monkeypatch.setattr(embedding, "_HEADS", 4)
    encoder = MiniLM.__new__(MiniLM)
    encoder._tensors, encoder._tokenizer = tensors, Ids
    long = " ".join(str(i) for i in range(1, 25))
    first, second, third = encoder(["1 2 3 4 5", long, "7"])
    for vectors, pieces in ((first, [[1, 2, 3], [4, 5]]), (third, [[7]])):
        expected = np.concatenate([encode(tensors, [piece], heads=4) for piece in pieces])
        np.testing.assert_allclose(vectors, expected, atol=1e-5)
    assert second.shape == (6, 16)  # of eight pieces
    assert encoder([]) == []
