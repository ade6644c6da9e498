import numpy as np
import pytest

from safemoe_jax.evaluation import cues


def present(text):
    names = [f"{part} {name}" for part in ("first", "opening", "rest") for name in cues.CUES]
    return {
        name for name, value in zip(names, cues.refusal_cues(text)[:-2], strict=True) if value > 0
    }


@pytest.mark.parametrize(
    "text",
    [
        "I\u2019m sorry, but I can\u2019t help with that.",
        "We would rather not: we are not able to provide such a plan.",
        "As an AI language model, I cannot fulfil this.",
    ],
)
def test_declining_is_seen_whatever_the_wording_and_the_apostrophe(text):
    assert "first declines" in present(text)


@pytest.mark.parametrize(
    "text",
    [
        "You cannot open the jar without a lid.",
        "Sure, here is how: you can't miss the house.",
    ],
)
def test_a_negated_verb_of_someone_else_is_no_refusal(text):
    assert not {"first declines", "first unable"} & present(text)


def test_what_follows_the_opening_is_told_apart():
    late = "word " * 80 + "I cannot help with that."
    assert {"opening declines", "rest declines"} & present(late) == {"rest declines"}
    assert "first declines" not in present("Bread is baked. I cannot help with more.")
    assert "opening declines" in present("Bread is baked. I cannot help with more.")


@pytest.mark.parametrize(
    ("text", "act"),
    [
        ("I'm not going to sharpen your saw.", "will_not"),
        ("Absolutely not.", "says_no"),
        ("Felling another's tree is theft, and you could face a fine.", "names_a_crime"),
        ("Wet ladders should be avoided at all costs.", "would_avoid"),
    ],
)
def test_acts_that_need_no_verb_of_giving(text, act):
    assert f"first {act}" in present(text)
    assert f"first {act}" not in present("Sharpen the saw, and mind the ladder.")


def test_manner_is_a_rate_and_length_stops_to_count():
    once, twice = (cues.manner("Take your oar and please row! " * n) for n in (20, 40))
    assert once == pytest.approx(twice, abs=0.1)
    assert once[-1] == twice[-1] > cues.manner("Take your oar and please row!")[-1]
    stars = list(cues._MANNER).index("stars")
    starred, plain = (cues.manner(text)[stars] for text in ("* " * 30, "row on " * 30 + "*"))
    assert starred > 5 * plain > 0


def test_repetition_is_the_share_of_repeated_four_grams():
    assert cues.repetition("a b c d e f g h i") == 0.0
    # 12 words, 9 four-grams, of which a b c d, b c d a, c d a b, d a b c are distinct.
    assert cues.repetition("a b c d " * 3) == pytest.approx(5 / 9)
    assert cues.repetition("a a a a a") == 0.0  # too short to tell


def test_shared_words_weigh_rare_ones():
    rarity = {"the": 0.0, "bread": 2.0, "oven": 1.0, "cold": 1.0}
    share, cosine, rarest = cues.shared_words("the bread oven", "the bread cold", rarity)
    assert share == pytest.approx(2 / 3) and cosine == pytest.approx(2 / 3) and rarest == 1.0
    assert np.all(cues.shared_words("the oven", "the cold", rarity) == 0)
    # Compared by the first five letters.
    assert cues.shared_words("baking breads", "bread", {"bakin": 1.0, "bread": 1.0})[0] == 0.5
