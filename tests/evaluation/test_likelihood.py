import numpy as np

from safemoe_jax.evaluation.likelihood import CachedScorer, fluency


class Counting:
    def __init__(self):
        self.seen = []

    def __call__(self, pairs):
        self.seen.extend(pairs)
        return [-np.arange(len(answer.split()) + 1, dtype=np.float32) for _, answer in pairs]


def test_a_text_is_scored_once_within_a_run_and_across_runs(tmp_path):
    raw = Counting()
    scorer = CachedScorer(raw, tmp_path / "scores.npz", "base")
    first = scorer([("p", "one two"), ("q", "one"), ("p", "one two")])
    # The token that ends the turn is dropped.
    np.testing.assert_array_equal(first[0], [0, -1])
    np.testing.assert_array_equal(first[1], [0])
    np.testing.assert_array_equal(first[2], first[0])
    assert len(raw.seen) == 2

    again = Counting()
    second = CachedScorer(again, tmp_path / "scores.npz", "base")([("q", "one"), ("p", "one two")])
    np.testing.assert_array_equal(second[1], first[0])
    np.testing.assert_array_equal(second[0], first[1])
    assert not again.seen


def test_other_weights_share_nothing(tmp_path):
    CachedScorer(Counting(), tmp_path / "scores.npz", "base")([("p", "one")])
    raw = Counting()
    CachedScorer(raw, tmp_path / "scores.npz", "other")([("p", "one")])
    assert len(raw.seen) == 1


def test_the_file_holds_no_text(tmp_path):
    CachedScorer(Counting(), tmp_path / "scores.npz", "base")([("a secret prompt", "a secret")])
    assert b"secret" not in (tmp_path / "scores.npz").read_bytes()


def test_only_the_first_400_characters_are_scored(tmp_path):
    raw = Counting()
    CachedScorer(raw, tmp_path / "scores.npz", "base")([("p", "word " * 200)])
    ((_, answer),) = raw.seen
    assert len(answer) <= 400 and answer.endswith("word")


def test_fluency():
    values = fluency(np.array([-1.0, -2.0, -3.0, -10.0]))
    np.testing.assert_allclose(values, [-4.0, -2.5, -7.9, 0.25], rtol=1e-6)
